"""Table 3: the terms of the loss."""

from slimqwen.study.catalogue.definition import ALL_TERMS, LOSS, MEAN, Definition, terms
from slimqwen.study.variation import Changes, Variation
from slimqwen.study.verdict import Finding, lower


def _lambda(start: float, end: float) -> Changes:
    return {"distil.kd_weight": {"start": start, "end": end}}


LOSSES = Definition(
    "losses",
    "Which terms should the loss have, and should lambda change during training?",
    "Table 3",
    "all",
    [
        Variation("kd", "KD", terms("kd"), paper={MEAN: 73.05}),
        Variation("kd_lm", "KD + LM", terms("lm", "kd"), paper={MEAN: 72.92}),
        Variation("kd_mtp_kd", "KD + MTP-KD", terms("kd", "mtp_kd"), paper={MEAN: 73.31}),
        Variation("kd_lm_mtp_lm", "KD + LM + MTP-LM", terms("lm", "kd", "mtp_lm"), paper={MEAN: 73.19}),
        Variation("all", "all four, lambda 1 to 0.75", {}, paper={MEAN: 73.45}),
        Variation("all_lambda_875", "all four, lambda 0.875", _lambda(0.875, 0.875)),
        Variation("all_lambda_500", "all four, lambda 0.5", _lambda(0.5, 0.5)),
    ],
    [
        Finding(
            "all_beats_kd",
            "All four terms beat KD alone",
            "held-out loss saved, nats per token",
            lower(LOSS, "all", "kd"),
        ),
        Finding(
            "mtp_kd_helps_the_main_head",
            "Distilling the MTP head too makes the main head better than KD alone",
            "held-out loss saved, nats per token",
            lower(LOSS, "kd_mtp_kd", "kd"),
        ),
        Finding(
            "lm_helps_on_text",
            "Adding LM to KD lowers the held-out loss (the paper: MMLU rises, the mean of eight does not)",
            "held-out loss saved, nats per token",
            lower(LOSS, "kd_lm", "kd"),
        ),
        Finding(
            "schedule_beats_fixed",
            "A lambda that falls from 1 to 0.75 beats one fixed at its mean",
            "held-out loss saved, nats per token",
            lower(LOSS, "all", "all_lambda_875"),
        ),
    ],
    given={**ALL_TERMS, **_lambda(1.0, 0.75)},
)
