"""The search of `slimqwen plan search`: shapes ranked by the KL to the teacher after the cut."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from slimqwen.artifacts import alone_in, check_file_replaceable
from slimqwen.builtin import checkpoint_folder
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.core.progress import quiet, say
from slimqwen.data.store import check_vocabulary, load_manifest
from slimqwen.families.count import Counts
from slimqwen.model.device import resolve_device
from slimqwen.parallel.job import join_job
from slimqwen.recipe import Execution, Target
from slimqwen.runs.places import check_apart
from slimqwen.search.gauge import Gauge
from slimqwen.search.result import SearchResult, Sensitivity, Shape
from slimqwen.search.sensitivity import Axes, Curve, agreeing_pairs, predicted
from slimqwen.search.settings import SearchSettings
from slimqwen.shapes.fit import Feasible, feasible

RESULT = "search.json"
LISTED = 10


def search(
    teacher: str,
    budgets: str,
    work: Path,
    *,
    tokens: Path,
    statistics: Path | None = None,
    settings: SearchSettings = SearchSettings(),  # noqa: B008 - immutable
    execution: Execution = Execution(),  # noqa: B008 - immutable
    command: str = "slimqwen plan search",
) -> SearchResult:
    """Rank the shapes that meet `budgets` by KL to the teacher, and write search.json to the folder `work`.

    Where shapes of whole blocks of layers meet the budgets, only these are searched; `fit` lists them first, too.

    1. Each axis is cut alone, at up to `sizes_per_axis` of the sizes that it has among the shapes.
    2. For each shape the KL of its axes is added up: the prediction.
    3. The `shapes` with the lowest prediction, and the best by arithmetic (`fit`), are cut and measured.

    Measurements are kept in `work` by content: after an interruption the same call continues, and another search
    reuses those that it has in common with this one.

    All processes that torchrun started may call it together: they measure as in `evaluate`, and the first decides what is next.

    Args:
        teacher: a checkpoint folder, or 'builtin'.
        budgets: in the form of `fit`.
        tokens: folder written by `tokenize`; calibration reads its training text, measurement its held-out text.
        statistics: of the teacher, from `calibrate`; None makes them here.

    Raises UserError, before anything is measured, for arguments that conflict and where no shape meets the budgets.
    """
    with join_job(resolve_device(execution.device)) as job, quiet(not job.is_first), alone_in(work):
        check_file_replaceable(work / RESULT)
        source = Checkpoint(checkpoint_folder(teacher))
        check_apart("--work", work, {"the teacher": [source.folder], "the tokens": [tokens]})
        found = feasible(source.family, source.config, budgets, align=settings.align).of_whole_blocks()
        check_tokens(tokens, source, settings.sequence_length)
        axes = Axes(found)
        cuts = axes.cuts(settings.sizes_per_axis)
        say(
            f"search: {len(found.shapes):,} shapes meet {budgets}; {len(cuts)} cuts of one axis and about "
            f"{settings.shapes + 1} shapes to measure"
        )
        gauge = Gauge(settings.recipe(teacher, work, execution), tokens, statistics, command, job)
        result = measure_shapes(found, axes, cuts, gauge, settings, checkpoint=source.fingerprint(), budgets=budgets)
        if job.is_first:
            result.save(work / RESULT)
        job.wait()
        return result


def measure_shapes(
    found: Feasible,
    axes: Axes,
    cuts: Sequence[tuple[str, int, Counts]],
    gauge: Gauge,
    settings: SearchSettings,
    *,
    checkpoint: str,
    budgets: str,
) -> SearchResult:
    """Measure the cuts of one axis, predict, and measure the shapes that look best; checkpoint: the teacher's fingerprint."""
    gauge.expect((axes.base != Target()) + len(cuts) + settings.shapes)
    base_kl = gauge.kl(axes.base)
    sensitivities = [_sensitivity(axes, gauge, base_kl, *cut) for cut in cuts]
    prediction = predicted(found.shapes, _curves(found, sensitivities), base_kl)
    order_by_prediction = gauge.agree(np.argsort(prediction, kind="stable").tolist())
    ranked = found.candidates(order_by_prediction, max(settings.shapes, LISTED))
    by_arithmetic = found.candidates(range(len(found.shapes)), 1)
    to_measure = dict(list(ranked.items())[: settings.shapes]) | by_arithmetic
    gauge.expect(len(to_measure))
    measured = {index: gauge.kl(candidate.target) for index, candidate in to_measure.items()}

    order = sorted(measured, key=measured.__getitem__) + [index for index in ranked if index not in measured]
    agreeing, pairs = agreeing_pairs([prediction[index] for index in measured], list(measured.values()))
    return SearchResult(
        checkpoint=checkpoint,
        budgets=budgets,
        pruning=settings.pruning,
        measured_tokens=settings.measured_tokens,
        base=axes.base,
        base_kl=base_kl,
        sensitivities=sensitivities,
        feasible=len(found.shapes),
        shapes=[
            Shape(
                candidate=(ranked | by_arithmetic)[index],
                predicted_kl=float(prediction[index]),
                measured_kl=measured.get(index),
                arithmetic_place=index + 1,
            )
            for index in order
        ],
        agreeing_pairs=agreeing,
        pairs=pairs,
    )


def check_tokens(tokens: Path, source: Checkpoint, sequence_length: int) -> None:
    """Raise UserError for tokens of another vocabulary, and for too little held-out text to measure on."""
    manifest = load_manifest(tokens)
    check_vocabulary(manifest, tokens, source.folder, source.config["vocab_size"])
    if manifest.heldout.tokens <= sequence_length:
        raise UserError(
            f"{tokens} has {manifest.heldout.tokens:,} held-out tokens, and KL is measured on rows of "
            f"{sequence_length} and one more: give a folder with held-out text, or a lower --sequence-length."
        )


def _sensitivity(axes: Axes, gauge: Gauge, base_kl: float, field: str, size: int, counts: Counts) -> Sensitivity:
    """Measure one cut of one axis; counts: what it leaves."""
    return Sensitivity(
        field=field,
        size=size,
        kl=gauge.kl(axes.alone(field, size)) - base_kl,
        total_saved=axes.base_counts.total_parameters - counts.total_parameters,
        active_saved=axes.base_counts.active_parameters - counts.active_parameters,
    )


def _curves(found: Feasible, sensitivities: Sequence[Sensitivity]) -> dict[str, Curve]:
    """Return the curve of each axis that was cut alone."""
    measured: dict[str, dict[int, float]] = {}
    for cut in sensitivities:
        measured.setdefault(cut.field, {})[cut.size] = cut.kl
    return {field: Curve.through(found.config[field], points) for field, points in measured.items()}
