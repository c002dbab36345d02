"""Table 8: which layers to remove."""

from slimqwen.study.catalogue.definition import KL, Definition, cut_along
from slimqwen.study.variation import Variation
from slimqwen.study.verdict import Finding, lower


def _depth(criterion: str, title: str, mmlu_one_shot: float | None = None, mmlu: float | None = None) -> Variation:
    paper = {"MMLU, one-shot": mmlu_one_shot, "MMLU": mmlu}
    return Variation(
        criterion,
        title,
        cut_along("num_hidden_layers", **{"pruning.depth": criterion}),
        paper={column: value for column, value in paper.items() if value is not None},
    )


DEPTH = Definition(
    "depth",
    "Which layers should be removed?",
    "Table 8",
    "last",
    [
        _depth("last", "last layers", mmlu_one_shot=73.86, mmlu=73.02),
        _depth("similarity", "similarity", mmlu_one_shot=41.95, mmlu=69.57),
        _depth("block_influence", "block influence"),
    ],
    [
        Finding(
            f"last_beats_{other}_{when}",
            f"Removing the last layers beats {other.replace('_', ' ')}, {words}",
            "KL to the teacher saved, nats per token",
            lower(KL, "last", other, one_shot=when == "one_shot"),
        )
        for other in ("similarity", "block_influence")
        for when, words in (("one_shot", "before training"), ("trained", "after training"))
    ],
)
