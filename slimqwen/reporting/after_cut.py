"""What was done to the weights between a cut and the training, in sentences for the report and the model card."""

from slimqwen.recipe import Recipe


def describe_after_cut(recipe: Recipe) -> list[str]:
    """Describe the refit and the healing of a run's cut models, a sentence each."""
    if recipe.init == "random":
        return []
    sentences = []
    if recipe.pruning.refit_outputs:
        sentences.append(
            "After each cut of more than channels, the output matrices of experts and dense MLPs were solved for in closed form, "
            f"layer by layer, on {recipe.calibration.samples:,} sequences, without training."
        )
    if recipe.healing is not None:
        samples, epochs = recipe.healing.samples, recipe.healing.epochs
        sentences.append(
            "Each cut model was healed before distillation: every layer was trained alone towards the teacher’s residual stream, "
            f"for {epochs} epoch{'s' if epochs > 1 else ''} of {samples:,} sequences."
        )
    return sentences
