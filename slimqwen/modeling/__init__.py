"""Torch modules from a checkpoint: the backbone is Transformers', the MTP module is ours."""
