"""The stage `measure-depth`: what dropping layers does to a checkpoint's predictions, measured by dropping them.

A score of a layer says how much it does, and not what its absence does to the layers after it: of a pretrained 30-layer model
the run that `last` drops costs ten times the KL of the best one. So layers with little influence are really left out, one
more in each round, and the KL to the whole model decides; runs compete with what is found so. Streams are shared up to the
first layer in which two of them differ, and every layer's weights are read once per round. Of a stack that alternates
regularly (three DeltaNet layers and one of attention) whole periods go where the target is some of them fewer.

What is missed least is not what the refit makes up for best. So the best sets of the last round are refitted too, on half of the text,
each as `slimqwen repair` would, and the KL on the other half decides.
"""

import math
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from slimqwen.artifacts import fingerprint_value, makes_file, scratch_folder, write_json, write_text
from slimqwen.calibration.statistics import Part, Statistics
from slimqwen.calibration.text import TRAINING_TEXT, CalibrationText
from slimqwen.checkpoint.config import read_json
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.core.progress import Progress, say
from slimqwen.core.warning import warn
from slimqwen.families import Config
from slimqwen.families.canonical import full_attention_interval
from slimqwen.families.family import Block
from slimqwen.layerwise.memory import allot
from slimqwen.layerwise.side_by_side import STUDENT, TEACHER, SideBySide
from slimqwen.layerwise.stream import Stream
from slimqwen.model.device import reproducible, resolve_device, resolve_dtype
from slimqwen.planning import importance
from slimqwen.planning.depth import least_influential
from slimqwen.planning.measured_depth import Dropped, MeasuredDepth, MeasuredDrop
from slimqwen.recipe import Execution
from slimqwen.refit.layers import Refit

CHUNK_TOKENS = 512  # whose logits, of two models, exist at one time
SAMPLES = 32
SHORTLIST = 8
REFITTED = 3  # of the last round's sets, beside what has the least block influence


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
        refit: whether the cut will be refitted (`pruning.experts.refit`).

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
    measurable = measured_after_refit(rows, parts)
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
        walk = Walk(Stream(source, rows, allotment, torch_dtype, torch_device), parts, folder, title)
        count = layers - num_hidden_layers
        attention = source.family.attention_layers(source.config)
        search = Search(influence, count, shortlist, attention, layers_at_once(source.config, count))
        found = search.run(walk)
        if refit and measurable.any():
            found = [*found, *walk.refitted(search.finalists(found), measurable)]
        result = MeasuredDepth(
            checkpoint=source.fingerprint(), data=text.fingerprint, tokens=rows[:, 1:].numel(), measured=found
        )
        write_text(out, result.model_dump_json(indent=1) + "\n")
    return result


def layers_at_once(config: Config, count: int) -> int:
    """How many neighbours go together: a whole period of a stack that alternates regularly, where `count` is some of them.

    Engines that count layers by full_attention_interval load what is left; of other counts `plan` says which do not.
    """
    period = full_attention_interval(config) if config.get("layer_types") else None
    return period if period is not None and count % period == 0 else 1


class Search:
    """Which layers to try to leave out: `count` of them at last, one of `attention` always staying.

    at_once: layers that go in each round, neighbours among those that are left; divides `count`. What alternates in a
    period of so many layers still does afterwards.
    """

    def __init__(
        self, influence: Sequence[float], count: int, shortlist: int, attention: Collection[int], at_once: int = 1
    ) -> None:
        self._influence, self._count, self._shortlist, self._at_once = influence, count, shortlist, at_once
        self._attention = set(attention)
        if not self.one_more(()):  # every run of neighbours has the last layer of full attention
            self._at_once = 1

    def run(self, walk: "Walk") -> list[MeasuredDrop]:
        """All that was measured, round after round."""
        found: list[MeasuredDrop] = []
        best: Dropped = ()
        rounds = self._count // self._at_once
        for number in range(1, rounds + 1):
            sets = self.one_more(best)
            if not sets:
                raise UserError(
                    f"no {self._count} of {len(self._influence)} layers can be left out: one of full attention has to stay; keep more layers."
                )
            if number == rounds:
                sets = list(dict.fromkeys([*sets, *self.runs(), *self._least()]))
            measured = walk.kl(sets, f"round {number} of {rounds}")
            found += measured
            grown = [drop for drop in measured if set(drop.dropped) > set(best)] or measured
            best = min(grown, key=lambda drop: (drop.kl, drop.dropped)).dropped
        return found

    def finalists(self, found: Sequence[MeasuredDrop]) -> list[MeasuredDrop]:
        """Of what was measured in the last round the best, and the layers with the least influence where they are among it."""
        last = sorted(
            (drop for drop in found if len(drop.dropped) == self._count), key=lambda drop: (drop.kl, drop.dropped)
        )
        return last[:REFITTED] + [drop for drop in last[REFITTED:] if drop.dropped in self._least()]

    def one_more(self, dropped: Dropped) -> list[Dropped]:
        """What is left out so far, and one more layer, or as many as go at once, with the least influence."""
        left = [layer for layer in range(len(self._influence)) if layer not in dropped]
        groups = [left[start : start + self._at_once] for start in range(len(left) - self._at_once + 1)]
        groups.sort(key=lambda group: sum(self._influence[layer] for layer in group))
        sets = [tuple(sorted((*dropped, *group))) for group in groups]
        return [drop for drop in sets if self._runs_without(drop)][: self._shortlist]

    def _least(self) -> list[Dropped]:
        """The layers with the least influence, wherever they lie; none where whole periods go."""
        if self._at_once > 1:
            return []
        return [least_influential(self._influence, self._count, self._attention)]

    def runs(self) -> list[Dropped]:
        """The contiguous runs with the least influence, summed."""
        starts = range(len(self._influence) - self._count + 1)
        runs = [tuple(range(start, start + self._count)) for start in starts]
        runs.sort(key=lambda run: sum(self._influence[layer] for layer in run))
        return [run for run in runs if self._runs_without(run)][: max(1, self._shortlist // 2)]

    def _runs_without(self, dropped: Dropped) -> bool:
        """A stack without any full attention does not run (formats.md section 2)."""
        return not self._attention or bool(self._attention - set(dropped))


class Walk:
    """The model on the text without some of its layers: all sets of them in one go through the layers."""

    def __init__(self, stream: Stream, parts: Sequence[Part], folder: Path, title: str) -> None:
        self._stream, self._parts, self._folder, self._title = stream, parts, folder, title
        self._steps = [step for step in stream.steps if step.number is not None]
        self._walked = 0

    def kl(self, sets: Sequence[Dropped], name: str) -> list[MeasuredDrop]:
        """KL(whole || without) of each set, in the order of `sets`; what an interrupted process measured is read."""
        file = self._folder / f"round-{self._walked:03d}.json"
        self._walked += 1
        if not file.exists():
            write_json(file, self._measured(sets, name))
        values = read_json(file)["kl"]
        return [MeasuredDrop(dropped=drop, kl=kl) for drop, kl in zip(sets, values, strict=True)]

    def refitted(self, drops: Sequence[MeasuredDrop], measurable: Tensor) -> list[MeasuredDrop]:
        """The same sets, refitted on the even rows of each source, with the KL on these of the odd ones, bool [rows]."""
        return [drop.model_copy(update={"refitted_kl": self._refitted_kl(drop.dropped, measurable)}) for drop in drops]

    def _refitted_kl(self, dropped: Dropped, measurable: Tensor) -> float:
        file = self._folder / f"refitted-{'-'.join(map(str, dropped))}.json"
        if not file.exists():
            whole, left = self._stream.without(()), self._stream.without(dropped)
            kept = [step.number for step in left.steps if step.number is not None]
            unseen = torch.tensor([part.half == 1 for part in self._parts])
            refit = Refit(left, folds_of_seen(self._parts), unseen)
            layers = file.with_suffix(".layers")
            layers.mkdir(exist_ok=True)
            name = f"{self._title}, without layers {', '.join(map(str, dropped))}, refitted"
            *_, last = SideBySide(left, whole, kept, _as_it_is).run(refit, layers, name)
            ends = [whole.open(last.with_name(TEACHER))[measurable], left.open(last.with_name(STUDENT))[measurable]]
            (kl,) = self._divergences(ends[0], ends[1:])
            write_json(file, {"kl": kl})
            shutil.rmtree(layers)  # only now: what is half removed would look finished
            say(f"{name}: KL {kl:.4f}")
        return float(read_json(file)["kl"])

    def _measured(self, sets: Sequence[Dropped], name: str) -> dict[str, list[float]]:
        everything = [(), *sets]
        tokens = math.prod(self._stream.shape[:2])
        total = tokens * (passes_of(everything, len(self._steps)) + 1)
        with Progress(f"{self._title}, {name}", total=total, unit="tokens") as progress:
            streams: dict[Dropped, Tensor] = {(): self._stream.embed(self._stream.create(self._file(())))}
            for layer, step in enumerate(self._steps):
                streams = self._forked(streams, layer, everything)
                with self._stream.weights_of(step):
                    for dropped, hidden in streams.items():
                        if layer not in dropped:
                            self._stream.advance(step, hidden, progress.advance)
            for hidden in streams.values():
                self._stream.apply_norm(self._steps[-1], hidden)
            kl = self._divergences(streams.pop(()), [streams[drop] for drop in sets], progress)
        for path in self._folder.glob(".stream*"):
            path.unlink()
        best = min(range(len(sets)), key=kl.__getitem__)
        say(f"{self._title}, {name}: without layers {', '.join(map(str, sets[best]))} KL {kl[best]:.4f}")
        return {"kl": kl}

    def _forked(self, streams: dict[Dropped, Tensor], layer: int, sets: Iterable[Dropped]) -> dict[Dropped, Tensor]:
        """The streams that a layer leaves, by what they lack of the layers up to it; those that lack it begin as copies."""
        lacking = dict.fromkeys(tuple(number for number in drop if number <= layer) for drop in sets)
        result = {}
        for dropped in lacking:
            if layer in dropped:
                result[dropped] = self._stream.create(self._file(dropped)).copy_(streams[dropped[:-1]])
            else:
                result[dropped] = streams[dropped]
        return result

    def _file(self, dropped: Dropped) -> Path:
        return self._folder / f".stream-{'-'.join(map(str, dropped))}"

    def _divergences(self, whole: Tensor, others: Sequence[Tensor], progress: Progress | None = None) -> list[float]:
        """Mean over all positions of KL(whole || other), from what goes into lm_head, [rows, seq, hidden].

        Two models' log-probabilities of CHUNK_TOKENS positions exist at one time, however many are compared.
        """
        head = self._stream.read_head()
        totals = [0.0] * len(others)

        def log_probabilities(hidden: Tensor, start: int) -> Tensor:
            rows = hidden.flatten(0, 1)[start : start + CHUNK_TOKENS].to(head)
            return (rows @ head.T).log_softmax(dim=-1)

        for start in range(0, whole.shape[0] * whole.shape[1], CHUNK_TOKENS):
            wanted = log_probabilities(whole, start)
            probabilities = wanted.exp()
            for number, other in enumerate(others):
                divergence = (probabilities * (wanted - log_probabilities(other, start))).sum(dim=-1)
                totals[number] += float(divergence.double().sum())
            if progress is not None:
                progress.advance(len(wanted))
        count = whole.shape[0] * whole.shape[1]
        return [max(total / count, 0.0) for total in totals]


def measured_after_refit(rows: Tensor, parts: Sequence[Part]) -> Tensor:
    """Return the rows on which a refit is measured, bool [rows]: the odd ones, but for those that an even one repeats.

    A source with fewer sequences than samples has some of them twice. rows: int64 [rows, sequence_length + 1].
    """
    texts = [tuple(row) for row in rows.tolist()]
    seen = {text for text, part in zip(texts, parts, strict=True) if part.half == 0}
    return torch.tensor([part.half == 1 and text not in seen for text, part in zip(texts, parts, strict=True)])


def folds_of_seen(parts: Sequence[Part]) -> list[Tensor]:
    """What the refit leaves out in turn to see how far it is to be trusted, bool [rows]: of the even rows every source, or halves of one."""
    seen = [row for row, part in enumerate(parts) if part.half == 0]
    sources = dict.fromkeys(part.source for part in parts)
    groups = (
        [[row for row in seen if parts[row].source == source] for source in sources]
        if len(sources) > 1
        else [seen[0::2], seen[1::2]]
    )
    if not all(groups):
        return []
    folds = []
    for group in groups:
        folds.append(torch.zeros(len(parts), dtype=torch.bool))
        folds[-1][group] = True
    return folds


def _as_it_is(_block: Block) -> Callable[[Tensor], Tensor]:
    """The teacher's stream in the student's coordinates, where no channel goes."""
    return lambda stream: stream


def passes_of(sets: Iterable[Dropped], layers: int) -> int:
    """How often a layer is gone through, by all streams together.

    Example: of 4 layers the whole model and the sets {1} and {1, 3}: 4 + 2 (layers 2 and 3 without 1) + 0: what lacks 1 and
    3 is what lacks 1, up to layer 3.
    """
    streams = {
        (tuple(number for number in drop if number <= layer), layer)
        for layer in range(layers)
        for drop in sets
        if layer not in drop
    }
    return len(streams)
