"""What each model of a run is called wherever a person reads about it."""

MAIN_RUN = "slimqwen"  # the name of the recipe's own run beside its baselines

TITLES = {
    "teacher": "teacher",
    "pruned": "pruned, no training",
    "random_init": "random init + KD",
    "lm_only": "pruned + LM only",
    MAIN_RUN: "SlimQwen",
}


def title_of(name: str) -> str:
    """The title of a model of a run; a checkpoint evaluated by itself goes by its own name."""
    return TITLES.get(name, name)
