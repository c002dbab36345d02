"""The stage `measure-depth`: what leaving layers out does to a checkpoint's predictions, measured by leaving them out.

A layer's score measures how much the layer does, not what its absence does to the layers after it: of a pretrained 30-layer model
the run that `last` drops costs ten times the KL of the best one. So layers with little influence are really left out, one
more in each round, and the KL to the whole model decides; runs compete with what is found so. Streams are shared up to the
first layer in which two of them differ, and every layer's weights are read once per round. Of a stack that alternates
regularly (three DeltaNet layers and one of attention) whole periods go where the target is some of them fewer.

What is missed least is not what the refit makes up for best. So the best sets of the last round are refitted too, on half of the text,
each as `slimqwen repair` would, and the KL on the other half decides.
"""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch

from slimqwen.artifacts import fingerprint_value, makes_file, scratch_folder, write_text
from slimqwen.calibration.statistics import Statistics
from slimqwen.calibration.text import TRAINING_TEXT, CalibrationText
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.core.warning import warn
from slimqwen.depth.drops import LayerDrops, unseen_rows
from slimqwen.depth.search import Search
from slimqwen.families import Config
from slimqwen.families.canonical import full_attention_interval
from slimqwen.layerwise.memory import allot
from slimqwen.layerwise.stream import Stream
from slimqwen.model.device import reproducible, resolve_device, resolve_dtype
from slimqwen.planning import importance
from slimqwen.planning.measured_depth import MeasuredDepth
from slimqwen.recipe import Execution

SAMPLES = 32
SHORTLIST = 8


@makes_file("checkpoint", "statistics", "tokens", kind="depth")
def measure_depth(
    checkpoint: Path,
    out: Path,
    *,
    statistics: Path | Statistics,
    tokens: Path | Mapping[str, Path],
    num_hidden_layers: int,
    samples: int = SAMPLES,
    shortlist: int = SHORTLIST,
    refit: bool = True,
    sequence_length: int = 256,
    seed: int = 0,
    execution: Execution = Execution(),  # noqa: B008 - immutable
    dtype: str = "auto",
    title: str = "measure-depth",
) -> MeasuredDepth:
    """Find what to leave out for `num_hidden_layers` layers to stay; write all that was measured to `out` and return it.

    Every round adds to the layers left out so far the one, of `shortlist` with the least block influence, without which the
    KL is smallest; with the last round come the contiguous runs with the least influence, half as many. The best of that round
    and the layers with the least influence are then refitted on half of the text and measured on the other. Layer by layer:
    one layer's weights in memory at a time, the hidden states in files. Interrupted, it continues with the round under way.

    Args:
        statistics: of the same checkpoint, for the block influence.
        tokens: folder written by `tokenize`, or several by the names of their sources; `samples` sequences are used.
        refit: whether the cut will be refitted (`pruning.refit_outputs`).

    Raises UserError for statistics of another checkpoint, and for a number of layers that is none to reach.
    """
    source = Checkpoint(checkpoint)
    measured = statistics if isinstance(statistics, Statistics) else Statistics.load(statistics)
    layers = source.config["num_hidden_layers"]
    if measured.checkpoint != source.fingerprint():
        raise UserError(
            f"the statistics were not measured on {checkpoint}, or by an earlier version of slimqwen: run `slimqwen calibrate` on it first."
        )
    if not 1 <= num_hidden_layers < layers:
        raise UserError(f"{checkpoint} has {layers} layers, so 1 to {layers - 1} can stay, not {num_hidden_layers}.")
    sums = measured.weighted()
    influence = importance.block_influence(sums["layers/cosine_sums"], sums.tokens["main"]).tolist()
    sources = {TRAINING_TEXT: tokens} if isinstance(tokens, Path) else tokens
    text = CalibrationText(sources, source, samples=samples, sequence_length=sequence_length, seed=seed)
    text.say_what_is_short()
    batches = list(text.batches(execution.batch_size))
    rows = torch.cat([batch for _, batch in batches])
    parts = [part for part, batch in batches for _ in batch]
    torch_device = resolve_device(execution.device)
    torch_dtype = resolve_dtype(dtype, torch_device)
    allotment = allot(
        source,
        parts=0,
        rows=len(rows),
        sequence_length=sequence_length,
        batch_size=execution.batch_size,
        budget_bytes=execution.memory_budget,
        dtype=torch_dtype,
        device=torch_device,
    )
    measurable = unseen_rows(rows, parts)
    if refit and not measurable.any():
        warn(
            "note: no sequence is left that a refit would not have seen, so the sets are chosen by the KL before it: raise --samples, "
            "or give more text."
        )
    made_from = [
        version("slimqwen"),
        source.fingerprint(),
        text.fingerprint,
        influence,
        num_hidden_layers,
        shortlist,
        refit,
    ]
    settings = [allotment.rows_per_pass, allotment.rows_per_chunk, str(torch_dtype), torch_device.type]
    rounds = out.with_name(f"{out.name}.rounds")
    with (
        scratch_folder(rounds, fingerprint_value([made_from, settings])) as folder,
        reproducible(torch_device),
        torch.inference_mode(),
    ):
        drops = LayerDrops(Stream(source, rows, allotment, torch_dtype, torch_device), parts, folder, title)
        count = layers - num_hidden_layers
        attention = source.family.attention_layers(source.config)
        search = Search(influence, count, shortlist, attention, layers_at_once(source.config, count))
        found = search.run(drops)
        if refit and measurable.any():
            found = [*found, *drops.measure_refitted(search.finalists(found), measurable)]
        result = MeasuredDepth(
            checkpoint=source.fingerprint(), data=text.fingerprint, tokens=rows[:, 1:].numel(), measured=found
        )
        write_text(out, result.model_dump_json(indent=1) + "\n")
    return result


def layers_at_once(config: Config, count: int) -> int:
    """Return how many neighbours go together: a whole period of a stack that alternates regularly, where `count` is some of them.

    Engines that count layers by full_attention_interval load what is left; of other counts `plan` says which do not.
    """
    period = full_attention_interval(config) if config.get("layer_types") else None
    return period if period is not None and count % period == 0 else 1
