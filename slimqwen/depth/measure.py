"""The stage `measure-depth`: what leaving layers out does to a checkpoint's predictions, measured by leaving them out.

A layer's score measures how much the layer does, not what its absence does to the layers after it: of a pretrained 30-layer model
the run that `last` drops costs ten times the KL of the best one. So layers with little influence are really left out, one
more in each round, and the KL to the whole model decides; runs compete with what is found so. Streams are shared up to the
first layer in which two of them differ, and every layer's weights are read once per round. Of a stack that alternates
regularly (three DeltaNet layers and one of attention) whole periods go where the target is some of them fewer.

What is missed least is not what the refit makes up for best. So the best sets of the last round are refitted too, on half of the text,
each as `slimqwen refit` would, and the KL on the other half decides.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from slimqwen.artifacts import fingerprint_value, makes_file, write_text
from slimqwen.calibration.statistics import Part, Statistics
from slimqwen.calibration.text import CalibrationText
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.core.progress import quiet
from slimqwen.core.warning import warn
from slimqwen.depth.drops import LayerDrops, unseen_rows
from slimqwen.depth.search import Search
from slimqwen.families import Config
from slimqwen.families.canonical import full_attention_interval
from slimqwen.layerwise.memory import allot, settings_of
from slimqwen.layerwise.ranks import share_of, shared_scratch_folder
from slimqwen.layerwise.stream import Stream
from slimqwen.model.device import reproducible, resolve_device, resolve_dtype
from slimqwen.parallel.job import join_job
from slimqwen.planning import importance
from slimqwen.planning.measured_depth import MeasuredDepth
from slimqwen.recipe import Execution, Section, TextSettings


class DepthEffort(Section):
    """How much is measured."""

    samples: int = Field(32, description="Sequences to measure on.")
    shortlist: int = Field(8, description="Layers of the least influence that each round leaves out in turn.")
    refit: bool = Field(True, description="Whether the cut will be refitted (`pruning.refit_outputs`).")


@makes_file("checkpoint", "statistics", "tokens", kind="depth")
def measure_depth(
    checkpoint: Path,
    out: Path,
    *,
    statistics: Path | Statistics,
    tokens: Path | Mapping[str, Path],
    num_hidden_layers: int,
    text: TextSettings,
    effort: DepthEffort = DepthEffort(),  # noqa: B008 - immutable
    execution: Execution = Execution(),  # noqa: B008 - immutable
    title: str = "measure-depth",
) -> MeasuredDepth:
    """Find what to leave out for `num_hidden_layers` layers to stay; write all that was measured to `out` and return it.

    Every round adds to the layers left out so far the one, of `effort.shortlist` with the least block influence, without which the
    KL is smallest; with the last round come the contiguous runs with the least influence, half as many. The best of that round
    and the layers with the least influence are then refitted on half of the text and measured on the other. Layer by layer:
    one layer's weights in memory at a time, the hidden states in files. Interrupted, it continues with the round under way. All
    processes that torchrun started may call it together: each takes a share of the sequences through the layers.

    Args:
        statistics: of the same checkpoint, for the block influence.
        tokens: folder written by `tokenize`, or several by the names of their sources; `effort.samples` sequences are used.

    Raises UserError for statistics of another checkpoint, and for a number of layers that is none to reach.
    """
    source = Checkpoint(checkpoint)
    influence = _read_influence(source, statistics, num_hidden_layers)
    sequences = CalibrationText(
        tokens, source, samples=effort.samples, sequence_length=text.sequence_length, seed=text.seed
    )
    sequences.warn_where_short()
    rows, parts = sequences.read()
    measurable = _rows_to_measure_a_refit(rows, parts) if effort.refit else None
    device = resolve_device(execution.device)
    dtype = resolve_dtype(text.dtype, device)
    measured = [source.fingerprint(), sequences.fingerprint, influence]
    made_from = [version("slimqwen"), *measured, num_hidden_layers, effort.shortlist, effort.refit]
    key = fingerprint_value([made_from, [*settings_of(execution), str(dtype), device.type]])
    rounds = out.with_name(f"{out.name}.rounds")
    with join_job(device) as job, quiet(not job.is_first), shared_scratch_folder(rounds, key, job) as folder:
        own = share_of(len(rows), *job.share)
        own_rows = max(own.stop - own.start, 1)
        allotment = allot(source, execution, rows=own_rows, sequence_length=text.sequence_length, dtype=dtype)
        stream = Stream(source, rows[own], allotment, dtype, device, first_row=own.start)
        search = _search_of(source, influence, num_hidden_layers, effort.shortlist)
        with reproducible(device), torch.inference_mode():
            drops = LayerDrops(stream, parts, folder, title, job)
            found = search.run(drops)
            if measurable is not None:
                found = [*found, *drops.measure_refitted(search.finalists(found), measurable)]
        result = MeasuredDepth(
            checkpoint=source.fingerprint(), data=sequences.fingerprint, tokens=rows[:, 1:].numel(), measured=found
        )
        if job.is_first:
            write_text(out, result.model_dump_json(indent=1) + "\n")
    return result


def _read_influence(source: Checkpoint, statistics: Path | Statistics, num_hidden_layers: int) -> list[float]:
    """Return every layer's block influence. Raises UserError for other statistics, and a number of layers that cannot stay."""
    measured = statistics if isinstance(statistics, Statistics) else Statistics.load(statistics)
    layers = source.config["num_hidden_layers"]
    if measured.checkpoint != source.fingerprint():
        raise UserError(
            f"the statistics were not measured on {source.folder}, or by an earlier version of slimqwen: run `slimqwen calibrate` on it first."
        )
    if not 1 <= num_hidden_layers < layers:
        raise UserError(f"{source.folder} has {layers} layers, so 1 to {layers - 1} can stay, not {num_hidden_layers}.")
    sums = measured.weighted()
    influence: list[float] = importance.block_influence(sums["layers/cosine_sums"], sums.tokens["main"]).tolist()
    return influence


def _rows_to_measure_a_refit(rows: Tensor, parts: Sequence[Part]) -> Tensor | None:
    """Return the rows on which refits are measured, bool [rows]; warn, and return None, where there is none."""
    measurable = unseen_rows(rows, parts)
    if measurable.any():
        return measurable
    warn(
        "note: no sequence is left that a refit would not have seen, so the sets are chosen by the KL before it: raise --samples, "
        "or give more text."
    )
    return None


def _search_of(source: Checkpoint, influence: Sequence[float], num_hidden_layers: int, shortlist: int) -> Search:
    """Return the search for what to leave out for so many layers to stay."""
    count = len(influence) - num_hidden_layers
    attention = source.family.attention_layers(source.config)
    return Search(influence, count, shortlist, attention, layers_at_once(source.config, count))


def layers_at_once(config: Config, count: int) -> int:
    """Return how many neighbours go together: a whole period of a stack that alternates regularly, where `count` is some of them.

    Engines that count layers by full_attention_interval load what is left; of other counts `plan` says which do not.
    """
    period = full_attention_interval(config) if config.get("layer_types") else None
    return period if period is not None and count % period == 0 else 1
