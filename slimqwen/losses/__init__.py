"""The arithmetic of the losses over the vocabulary: training takes its gradients, evaluation its values."""
