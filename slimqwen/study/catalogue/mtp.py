"""Table 4: how to train the MTP module."""

from slimqwen.recipe import Recipe
from slimqwen.study.catalogue.definition import Definition, terms
from slimqwen.study.variation import Changes, Variation
from slimqwen.study.verdict import Finding, higher

_ACCEPTANCE = ("acc_0", "acc_1", "acc_2", "acc_3", "acc_4")


def _more_prompts(recipe: Recipe) -> Changes:
    """Return four times the recipe's number: this study compares acceptance, which is noisy."""
    return {"evaluation.acceptance.prompts": 4 * recipe.evaluation.acceptance.prompts}


MTP = Definition(
    "mtp",
    "Does the MTP module draft better if it is distilled, and from which of the teacher's heads?",
    "Table 4",
    "mtp_kd",
    [
        Variation(
            "mtp_lm",
            "MTP-LM",
            terms("lm", "kd", "mtp_lm"),
            paper=dict(zip(_ACCEPTANCE, (0.9590, 0.5762, 0.2364, 0.0802, 0.0237), strict=True)),
        ),
        Variation(
            "mtp_kd",
            "MTP-KD, target: the teacher's main head",
            terms("lm", "kd", "mtp_kd"),
            paper=dict(zip(_ACCEPTANCE, (0.9550, 0.7518, 0.4567, 0.2243, 0.1037), strict=True)),
        ),
        Variation(
            "mtp_kd_from_mtp",
            "MTP-KD, target: the teacher's MTP head",
            {**terms("lm", "kd", "mtp_kd"), "distil.mtp_target": "mtp"},
        ),
    ],
    [
        *(
            Finding(
                f"kd_drafts_better_{depth}",
                f"The first {depth + 1} drafts of a distilled module are accepted more often than those of one trained on text",
                "share of positions gained",
                higher(f"acc_{depth}", "mtp_kd", "mtp_lm"),
            )
            for depth in (1, 2, 3)
        ),
        Finding(
            "kd_saves_passes",
            "With a distilled module, speculative decoding needs fewer forward passes of the backbone",
            "tokens gained per forward pass",
            higher("tokens_per_verification", "mtp_kd", "mtp_lm"),
        ),
        Finding(
            "main_head_is_the_better_target",
            "The teacher's main head is a better target than its MTP head",
            "share of positions gained at three drafts",
            higher("acc_2", "mtp_kd", "mtp_kd_from_mtp"),
        ),
    ],
    given={"distil.mtp_target": "main"},
    evaluation=_more_prompts,
    drafts=True,
)
