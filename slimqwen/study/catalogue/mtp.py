"""Table 4: how to train the MTP module."""

from collections.abc import Callable

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.recipe import Recipe
from slimqwen.study.catalogue.definition import Definition, terms
from slimqwen.study.variation import Changes, Variation
from slimqwen.study.verdict import Finding, higher

_ACCEPTANCE = ("acc_0", "acc_1", "acc_2", "acc_3", "acc_4")


def _trained_on(*names: str, **changes: str) -> Callable[[Recipe, Checkpoint], Changes]:
    """Terms of the loss, and four times the recipe's prompts: acceptance is what this study is about, and it is noisy."""

    def made(recipe: Recipe, teacher: Checkpoint) -> Changes:
        prompts = 4 * recipe.evaluation.acceptance_prompts
        return {**terms("lm", "kd", *names), "evaluation.acceptance_prompts": prompts, **changes}

    return made


MTP = Definition(
    "mtp",
    "Does the MTP module draft better if it is distilled, and from which of the teacher's heads?",
    "Table 4",
    "mtp_kd",
    [
        Variation(
            "mtp_lm",
            "MTP-LM",
            _trained_on("mtp_lm"),
            paper=dict(zip(_ACCEPTANCE, (95.90, 57.62, 23.64, 8.02, 2.37), strict=True)),
        ),
        Variation(
            "mtp_kd",
            "MTP-KD, target: the teacher's main head",
            _trained_on("mtp_kd"),
            paper=dict(zip(_ACCEPTANCE, (95.50, 75.18, 45.67, 22.43, 10.37), strict=True)),
        ),
        Variation(
            "mtp_kd_from_mtp",
            "MTP-KD, target: the teacher's MTP head",
            _trained_on("mtp_kd", **{"distil.mtp_target": "mtp"}),
        ),
    ],
    [
        *(
            Finding(
                f"kd_drafts_better_{depth}",
                f"Distilled, the module's first {depth + 1} drafts are accepted more often than trained on text",
                "share of positions gained",
                higher(f"acc_{depth}", "mtp_kd", "mtp_lm"),
            )
            for depth in (1, 2, 3)
        ),
        Finding(
            "kd_saves_passes",
            "Distilled, the module makes real speculative decoding need fewer passes of the backbone",
            "tokens gained per pass",
            higher("tokens_per_verification", "mtp_kd", "mtp_lm"),
        ),
        Finding(
            "main_head_is_the_better_target",
            "The teacher's main head is a better target than its MTP head",
            "share of positions gained at three drafts",
            higher("acc_2", "mtp_kd", "mtp_kd_from_mtp"),
        ),
    ],
    drafts=True,
)
