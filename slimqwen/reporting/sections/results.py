"""The sections on results: the table of models, their loss by group of tokens, and samples."""

from dataclasses import dataclass

from slimqwen.evaluation.result import ModelEvaluation, Sample
from slimqwen.reporting.charts.models import loss_by
from slimqwen.reporting.run_folder import Run
from slimqwen.reporting.sections.amounts import NOTHING, Cell, amount, number, percent, share
from slimqwen.reporting.sections.chart import Chart
from slimqwen.reporting.titles import MAIN_RUN, title_of


@dataclass(frozen=True)
class ResultTable:
    """The table of all models."""

    tokens: int
    sequence_length: int
    columns: list[str]
    rows: list[tuple[str, str, list[Cell]]]  # name, title, cells


def tabulate_models(run: Run) -> ResultTable | None:
    """Make the final table: a row per model, the teacher first."""
    if run.evaluation is None:
        return None
    models = run.evaluation.models
    depth = max((len(model.mtp_acceptance) for model in models.values()), default=0)
    is_speculated = any(model.tokens_per_verification is not None for model in models.values())
    is_calibrated = any(model.calibration_error is not None for model in models.values())
    teacher = run.teacher

    def size(value: int, of: int | None) -> Cell:
        return Cell(amount(value) if of is None else f"{amount(value)} ({percent(value / of)})", value)

    rows = []
    for name, model in models.items():
        cells = [
            size(model.total_parameters, teacher.total_parameters if teacher else None),
            size(model.active_parameters, teacher.active_parameters if teacher else None),
            number(model.loss, 3),
            number(model.perplexity, 2 if model.perplexity < 1000 else 0),
            number(model.bits_per_byte, 3),
            number(model.kl_to_teacher, 3),
            share(model.top1_agreement),
            *([number(model.calibration_error, 3)] if is_calibrated else []),
            *map(share, model.mtp_acceptance),
            *[NOTHING] * (depth - len(model.mtp_acceptance)),
            *([number(model.tokens_per_verification, 2)] if is_speculated else []),
        ]
        rows.append((name, title_of(name), cells))
    columns = ["total parameters", "active", "loss", "perplexity", "bits/byte", "KL", "top-1"]
    columns += ["calibration error"] if is_calibrated else []
    columns += [f"acc_{k}" for k in range(depth)]
    columns += ["tokens/pass"] if is_speculated else []
    return ResultTable(run.evaluation.tokens, run.evaluation.sequence_length, columns, rows)


def draw_losses(run: Run) -> list[Chart]:
    """Make charts of the loss of each model by position in the text, and by frequency of the predicted token."""
    models = run.evaluation.models if run.evaluation else {}
    found = []
    for title, quantity, buckets, caption in (
        (
            "Loss by position",
            "tokens read before the predicted one",
            {name: model.loss_by_position for name, model in models.items()},
            "A line that falls to the right means that the model uses its context; one that flattens early does not use distant "
            "tokens.",
        ),
        (
            "Loss by token frequency",
            "rank of the predicted token in the text, 1 the most frequent",
            {name: model.loss_by_frequency for name, model in models.items()},
            "Pruning tends to cost rare tokens first: look for a gap to the teacher that opens to the right.",
        ),
    ):
        measured = {name: means for name, means in buckets.items() if means}
        if measured:
            found.append(Chart.of(title, loss_by(measured, quantity), caption))
    return found


def list_samples(run: Run) -> list[tuple[str, Sample]]:
    """List each model's continuation of the same prompt: teacher and result first, then the others."""
    models: dict[str, ModelEvaluation] = run.evaluation.models if run.evaluation else {}
    first = [name for name in ("teacher", MAIN_RUN) if name in models]
    others = [name for name in models if name not in first]
    return [(title_of(name), models[name].sample) for name in [*first, *others]]
