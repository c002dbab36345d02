"""Titles of the models of a run, for tables and charts."""

MAIN_RUN = "slimqwen"  # the name of the recipe's main run beside its baselines

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
    """Return the title of a model of a run; a checkpoint evaluated by itself keeps its own name."""
    return TITLES.get(name, name)
