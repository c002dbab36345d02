"""The KL of a model without some of its layers, as it is or refitted: all sets of them in one walk over the layers."""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from slimqwen.artifacts import write_json
from slimqwen.calibration.statistics import Part
from slimqwen.checkpoint.config import read_json
from slimqwen.core.progress import Progress, say
from slimqwen.families.family import Block
from slimqwen.layerwise.side_by_side import STUDENT, TEACHER, SideBySide
from slimqwen.layerwise.stream import Stream
from slimqwen.parallel.job import Job
from slimqwen.planning.measured_depth import Dropped, MeasuredDrop
from slimqwen.refit.layers import Refit

CHUNK_TOKENS = 512  # whose logits, of two models, exist at one time


class LayerDrops:
    """The model on a text without some of its layers: the sets of a round share one walk, and every layer's weights are read once.

    stream: with the rows of this rank of the job; the KL is that of all rows, on every rank. parts: of each row of the whole text,
    its source and half. folder: keeps the result of each round and of each refit, for resuming.
    """

    def __init__(self, stream: Stream, parts: Sequence[Part], folder: Path, title: str, job: Job) -> None:
        self._stream, self._parts, self._folder, self._title, self._job = stream, parts, folder, title, job
        self._steps = [step for step in stream.steps if step.number is not None]
        self._walked = 0

    def measure(self, sets: Sequence[Dropped], name: str) -> list[MeasuredDrop]:
        """Return KL(whole || without) of each set, in the order of `sets`; what an interrupted process measured is read."""
        file = self._folder / f"round-{self._walked:03d}.json"
        self._walked += 1
        values = self._kept(file) or self._keep(file, self._measure_round(sets, name))
        return [MeasuredDrop(dropped=drop, kl=kl) for drop, kl in zip(sets, values, strict=True)]

    def measure_refitted(self, drops: Sequence[MeasuredDrop], measurable: Tensor) -> list[MeasuredDrop]:
        """Return the sets with their KL after a refit on the even rows of each source.

        measurable: the odd rows on which that KL is measured, bool [rows].
        """
        return [
            drop.model_copy(update={"refitted_kl": self._measure_one_refitted(drop.dropped, measurable)})
            for drop in drops
        ]

    def _measure_one_refitted(self, dropped: Dropped, measurable: Tensor) -> float:
        """Refit the model without these layers, layer by layer, and return its KL; or read what was measured before."""
        file = self._folder / f"refitted-{'-'.join(map(str, dropped))}.json"
        if (found := self._kept(file)) is not None:
            return found[0]
        own = self._stream.place
        whole, left = self._stream.without(()), self._stream.without(dropped)
        kept = [step.number for step in left.steps if step.number is not None]
        unseen = torch.tensor([part.half == 1 for part in self._parts])[own]
        refit = Refit(left, self._job, [fold[own] for fold in seen_folds(self._parts)], unseen)
        layers = file.with_suffix(".layers")
        layers.mkdir(exist_ok=True)
        name = f"{self._title}, without layers {', '.join(map(str, dropped))}, refitted"
        *_, last = SideBySide(left, whole, kept, keep_coordinates, self._job).run(refit, layers, name)
        ends = [
            states[measurable[own]]
            for states in (whole.open(last.with_name(TEACHER)), left.open(last.with_name(STUDENT)))
        ]
        found = self._keep(file, self._compute_divergences(ends[0], ends[1:]))
        if self._job.is_first:
            shutil.rmtree(layers)  # only now: what is half removed would look finished
        say(f"{name}: KL {found[0]:.4f}")
        return found[0]

    def _kept(self, file: Path) -> list[float] | None:
        """Return the KLs that an interrupted process kept in a file, the same on every rank; None where it kept none."""
        kept = self._job.lead(lambda: json.dumps(read_json(file)["kl"] if file.exists() else None))
        found: list[float] | None = json.loads(kept)
        return found

    def _keep(self, file: Path, kl: list[float]) -> list[float]:
        """Keep KLs in a file, by the first rank, and return them."""
        if self._job.is_first:
            write_json(file, {"kl": kl})
        return kl

    def _measure_round(self, sets: Sequence[Dropped], name: str) -> list[float]:
        """Take the text through every layer once for all sets, and compare what goes into lm_head with the whole model's."""
        everything = [(), *sets]
        tokens = math.prod(self._stream.shape[:2])
        total = tokens * (count_passes(everything, len(self._steps)) + 1)
        with Progress(f"{self._title}, {name}", total=total, unit="tokens") as progress:
            streams: dict[Dropped, Tensor] = {(): self._stream.embed(self._stream.create(self._file(())))}
            for layer, step in enumerate(self._steps):
                streams = self._fork(streams, layer, everything)
                with self._stream.weights_of(step):
                    for dropped, hidden in streams.items():
                        if layer not in dropped:
                            self._stream.advance(step, hidden, progress.advance)
            for hidden in streams.values():
                self._stream.apply_norm(self._steps[-1], hidden)
            kl = self._compute_divergences(streams.pop(()), [streams[drop] for drop in sets], progress)
        for name_of_set in {path.stem for path in self._folder.glob(".stream*")}:
            self._stream.remove(self._folder / name_of_set)
        best = min(range(len(sets)), key=kl.__getitem__)
        say(f"{self._title}, {name}: without layers {', '.join(map(str, sets[best]))} KL {kl[best]:.4f}")
        return kl

    def _fork(self, streams: dict[Dropped, Tensor], layer: int, sets: Iterable[Dropped]) -> dict[Dropped, Tensor]:
        """Return the streams after the choice at a layer, by what they lack of the layers up to it; one that lacks it begins as a copy."""
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

    def _compute_divergences(
        self, whole: Tensor, others: Sequence[Tensor], progress: Progress | None = None
    ) -> list[float]:
        """Compute the mean over all positions of KL(whole || other), from what goes into lm_head, [rows, seq, hidden] of each rank.

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
        everywhere = torch.tensor([*totals, whole.shape[0] * whole.shape[1]], dtype=torch.float64)
        *totals, count = self._job.total(everywhere).tolist()
        return [max(total / count, 0.0) for total in totals]


def unseen_rows(rows: Tensor, parts: Sequence[Part]) -> Tensor:
    """Return the rows on which a refit is measured, bool [rows]: the odd ones, but for those that an even one repeats.

    A source with fewer sequences than samples has some of them twice. rows: int64 [rows, sequence_length + 1].
    """
    texts = [tuple(row) for row in rows.tolist()]
    seen = {text for text, part in zip(texts, parts, strict=True) if part.half == 0}
    return torch.tensor([part.half == 1 and text not in seen for text, part in zip(texts, parts, strict=True)])


def seen_folds(parts: Sequence[Part]) -> list[Tensor]:
    """Return what the refit leaves out in turn, bool [rows], to measure how far to take it (`refit.trusted_share`).

    Of the even rows every source, or of one source each half.
    """
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


def keep_coordinates(_block: Block) -> Callable[[Tensor], Tensor]:
    """Return the teacher's stream as it is: in the student's coordinates, where no channel goes."""
    return lambda stream: stream


def count_passes(sets: Iterable[Dropped], layers: int) -> int:
    """Count how often a layer is gone through, by all streams together.

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
