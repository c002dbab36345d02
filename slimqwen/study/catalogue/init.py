"""Table 1 and Figure 2: a pruned or a random start, distillation or language modelling."""

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.recipe import Recipe
from slimqwen.study.catalogue.definition import ALL_TERMS, LOSS, MEAN, Definition, terms
from slimqwen.study.result import Run
from slimqwen.study.variation import Changes, Variation
from slimqwen.study.verdict import Finding, lower

LONGER = 4


def _longer(recipe: Recipe, teacher: Checkpoint) -> Changes:
    return {"init": "random", "distil.tokens": LONGER * recipe.distil.tokens}


INIT = Definition(
    "init",
    "Is a pruned model a better start than a random one, and is distillation better than language modelling?",
    "Table 1 and Figure 2",
    "pruned_kd",
    [
        Variation("random_lm", "random + LM", {"init": "random", **terms("lm", "mtp_lm")}),
        Variation("random_kd", "random + KD", {"init": "random"}, paper={MEAN: 61.66}),
        Variation("random_kd_longer", f"random + KD, {LONGER} times the tokens", _longer),
        Variation("pruned_lm", "pruned + LM", terms("lm", "mtp_lm"), paper={MEAN: 69.96}),
        Variation("pruned_kd", "pruned + KD", {}, paper={MEAN: 73.45}),
    ],
    [
        Finding(
            "pruned_beats_random",
            "A pruned start beats a random one, both with distillation",
            "held-out loss saved, nats per token",
            lower(LOSS, "pruned_kd", "random_kd"),
        ),
        Finding(
            "kd_beats_lm",
            "From a pruned start, distillation beats language modelling alone",
            "held-out loss saved, nats per token",
            lower(LOSS, "pruned_kd", "pruned_lm"),
        ),
        Finding(
            "pruned_lm_beats_random_kd",
            "A pruned start without a teacher beats a random one with a teacher",
            "held-out loss saved, nats per token",
            lower(LOSS, "pruned_lm", "random_kd"),
        ),
        Finding(
            "fewer_tokens",
            "The pruned start needs less than half of the tokens to reach the loss at which the random one ends",
            "share of the tokens below one half",
            lambda runs: 0.5 - tokens_to_reach(runs["pruned_kd"], final_training_loss(runs["random_kd"])),
        ),
        Finding(
            "longer_random_is_behind",
            f"A random start with {LONGER} times the tokens is still worse than the pruned one, both with distillation",
            "held-out loss saved, nats per token",
            lower(LOSS, "pruned_kd", "random_kd_longer"),
        ),
    ],
    given=ALL_TERMS,
)


def tokens_to_reach(run: Run, loss: float) -> float:
    """Return the share of its tokens after which a run's training loss (means over a few steps) is at most `loss`; 1 if never."""
    return next((point.tokens / run.curve[-1].tokens for point in run.curve if point.lm <= loss), 1.0)


def final_training_loss(run: Run) -> float:
    """Return the mean loss of a run's last steps."""
    return run.curve[-1].lm
