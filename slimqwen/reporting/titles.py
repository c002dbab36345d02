"""What each model of a run is called wherever a person reads about it."""

MAIN_RUN = "slimqwen"  # the name of the recipe's own run beside its baselines

TITLES = {
    "teacher": "teacher",
    "paper_pruned": "the paper's cut, no training",
    "pruned": "pruned, no training",
    "random_init": "random init + KD",
    "lm_only": "pruned + LM only",
    "paper": "the paper's cut + KD",
    MAIN_RUN: "slimqwen",
}


def title_of(name: str) -> str:
    """The title of a model of a run; a checkpoint evaluated by itself goes by its own name."""
    return TITLES.get(name, name)
