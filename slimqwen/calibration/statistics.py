"""What calibration measures: sums and counts in float64, apart per source and half, so that they add up exactly."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slimqwen.artifacts import atomic_file
from slimqwen.core.errors import UserError, did_you_mean
from slimqwen.layerwise.memory import ADDED_AT_ONCE

FORMAT = "slimqwen.statistics/2"
METADATA_KEY = "slimqwen"  # one key, with all of it as JSON: safetensors writes several in a random order

Half = Literal[0, 1]

HALVES: tuple[Half, Half] = (0, 1)


class Part(NamedTuple):
    """Half 0, the even rows, or half 1, the odd rows, of one source of calibration text."""

    source: str
    half: Half

    @property
    def prefix(self) -> str:
        """The prefix of the names of this part's sums; a source's name holds no '/'."""
        return f"{self.source}/{self.half}/"


class LazyTensors(Mapping[str, Tensor]):
    """Lazy tensors by name: each is computed when it is read, and not kept."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Sums:
    """One value for each sum, over all the parts of a `Statistics`: what planning reads.

    `sums` has the names of `Statistics`, without source and half. `tokens["main"]` and `tokens["mtp"]` are what to
    divide by; weighted, they need not be whole.
    """

    tokens: Mapping[str, float]
    sums: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        """Return one sum, float64. Raises UserError where it was not measured."""
        if name not in self.sums:
            raise UserError(
                f"the statistics hold no '{name}', made by another version of slimqwen perhaps: "
                "run `slimqwen calibrate` again."
            )
        return self.sums[name]


class Fold(NamedTuple):
    """Calibration text without a part of it, and that part."""

    fitted: Sums
    left_out: Sums


@dataclass
class Statistics:
    """Sums over calibration tokens, separate for each part.

    Each is called `{source}/{half}/` and one of

        norm/{tensor}/abs_sums             [hidden]       sum over tokens of |norm's output|, per residual channel
        norm/{tensor}/second_moments       [hidden, hidden]  sum over tokens of z z', z the norm's input divided by its root mean
                                                          square, before the gain; only with `second_moments`
        layers/hidden_sums                 [layers+1, H]  sum over tokens of the hidden state before layer 0, after layer 0, ..
        layers/cosine_sums                 [layers]       sum over tokens of cos(hidden before, hidden after the layer)
        experts/{block}/assignments        [experts]      tokens routed to each expert
        experts/{block}/gate_sums          [experts]      sum over them of the gate weight, renormalised over the chosen
        experts/{block}/gated_norm_sums    [experts]      sum over them of gate weight x ||E(x)||_2
        experts/{block}/output_sums        [experts, H]   sum over them of E(x)
        experts/{block}/neuron_abs_sums    [experts, neurons]  sum over them of |act(gate) x up|, what down_proj reads
        experts/{block}/logit_gram         [experts, experts]  sum over all tokens of logit_i x logit_j
        input/{tensor}/abs_sums            [neurons]      sum over tokens of |x|, x what this (not routed) down_proj reads
        input/{tensor}/norm_sums           [heads, heads within]  sum over tokens of ||x||_2, x what o_proj reads of a head

    `tokens` counts, per part, the tokens that its sums run over: "main" for the backbone, "mtp" for the MTP module.
    `checkpoint` and `data` are the fingerprints of what was measured on what.

    While it is measured it lies in memory; loaded from a file, only the names do, and each sum is read when it is
    used. A part of Qwen3-Next-80B (49 MoE blocks, 512 experts) takes 0.6 GB, nearly all of it output_sums, logit_gram
    and neuron_abs_sums, so a file with one source, two parts, takes 1.2 GB; second moments, of 102 norms, add 3.4 GB to
    each part. Nothing narrower than float64 would add up exactly.
    """

    checkpoint: str
    data: str
    tokens: dict[Part, dict[str, int]]
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    _open: Part | None = field(default=None, init=False, repr=False, compare=False)

    # While measuring

    @contextmanager
    def part(self, part: Part) -> Iterator[None]:
        """Let `add` add to this part while it is open."""
        assert part in self.tokens, f"{part} was not announced in `tokens`"
        self._open = part
        try:
            yield
        finally:
            self._open = None

    def add(self, name: str, value: Tensor) -> None:
        """Add one batch's sum, of any float dtype and on any device, to the open part, in float64 on the CPU."""
        assert self._open is not None, "open a part first"
        assert isinstance(self.sums, dict), "statistics read from a file are complete"
        name = self._open.prefix + name
        if name not in self.sums:
            with torch.inference_mode(False):  # a tensor born in inference mode could not be added to outside of it
                self.sums[name] = torch.zeros(value.shape, dtype=torch.float64)
        value = value.detach().cpu()
        rows = max(1, ADDED_AT_ONCE * len(value) // value.numel())
        for total, some in zip(self.sums[name].split(rows), value.split(rows), strict=True):
            total += some

    # What was measured

    @property
    def sources(self) -> dict[str, int]:
        """The backbone's tokens of each source."""
        tokens: Counter[str] = Counter()
        for part, counts in self.tokens.items():
            tokens[part.source] += counts["main"]
        return dict(tokens)

    def weighted(self, weights: Mapping[str, float] | None = None, half: Half | None = None) -> Sums:
        """Return all parts, or those of one half, as one: sum over sources s of scale_s x sums_s.

        Without weights every scale is 1: a source weighs by its tokens. With them scale_s = w_s / (sum of w) x
        (tokens of all sources) / (tokens of s), for every sum and for the token counts alike: the statistics of as many
        tokens, mixed by the weights. A sum is computed when it is read.

        Raises UserError for weights that are not one for each source, or have no sum to share out.
        """
        parts = [part for part in self.tokens if half in (None, part.half)]
        scales = dict.fromkeys(self.sources, 1.0) if weights is None else self._scales(parts, weights)
        used = [part for part in parts if scales[part.source] > 0]
        assert used, f"nothing was measured in half {half}"

        def total(name: str) -> Tensor:
            first, *others = used
            result = scales[first.source] * self.sums[first.prefix + name]
            for part in others:
                result.add_(self.sums[part.prefix + name], alpha=scales[part.source])
            return result

        tokens = {
            module: sum(scales[part.source] * self.tokens[part][module] for part in parts) for module in ("main", "mtp")
        }
        return Sums(tokens, LazyTensors(_names(self.sums, used[0]), total))

    def folds(self, weights: Mapping[str, float] | None = None) -> "list[Fold]":
        """Return ways to leave text out, each as what is left and what was left out: every source in turn, or each half of one.

        Sources that the weights ignore are in none. Empty where there is nothing to leave out: one source of one row.
        """
        counts: Mapping[str, float] = self.sources if weights is None else weights
        check_source_weights(counts, self.sources)
        used = [source for source, weight in counts.items() if weight > 0]
        if len(used) > 1:
            return [
                Fold(
                    self.weighted({**counts, source: 0.0}),
                    self.weighted({other: float(other == source) for other in counts}),
                )
                for source in used
            ]
        if any(Part(used[0], half) not in self.tokens for half in HALVES):
            return []
        even, odd = (self.weighted(weights, half) for half in HALVES)
        return [Fold(even, odd), Fold(odd, even)]

    def _scales(self, parts: list[Part], weights: Mapping[str, float]) -> dict[str, float]:
        check_source_weights(weights, self.sources)
        tokens: Counter[str] = Counter()
        for part in parts:
            tokens[part.source] += self.tokens[part]["main"]
        share = tokens.total() / sum(weights.values())
        return {source: weights[source] * share / count for source, count in tokens.items()}

    def __add__(self, other: "Statistics") -> "Statistics":
        """Return statistics of both runs' text together. Raises UserError where they were measured on different checkpoints."""
        both = (self, other)
        names = [_names(statistics.sums, part) for statistics in both for part in statistics.tokens]
        if self.checkpoint != other.checkpoint or any(some != names[0] for some in names):
            raise UserError("statistics of two different checkpoints cannot be added: calibrate both on the same one.")
        tokens: dict[Part, dict[str, int]] = {}
        for statistics in both:
            for part, counts in statistics.tokens.items():
                before = tokens.get(part, dict.fromkeys(counts, 0))
                tokens[part] = {module: before[module] + count for module, count in counts.items()}

        def total(name: str) -> Tensor:
            one, *rest = [statistics.sums[name] for statistics in both if name in statistics.sums]
            return one + rest[0] if rest else one

        sums = LazyTensors([*self.sums, *other.sums], total)
        return Statistics(self.checkpoint, f"{self.data}+{other.data}", tokens, sums)

    @classmethod
    def joined(cls, pieces: Sequence["Statistics"]) -> "Statistics":
        """Return one from several with different sums of the same text, a layer each for instance. Reads none of them."""
        first = pieces[0]
        owners = {name: piece.sums for piece in pieces for name in piece.sums}
        assert all((p.checkpoint, p.data, p.tokens) == (first.checkpoint, first.data, first.tokens) for p in pieces)
        assert len(owners) == sum(len(piece.sums) for piece in pieces), "two pieces hold the same sum"
        return cls(first.checkpoint, first.data, first.tokens, LazyTensors(owners, lambda name: owners[name][name]))

    # On disk

    def save(self, path: Path) -> None:
        """Write one safetensors file. Raises UserError for values that are not finite.

        What was loaded from files is copied from mapping to file and takes no memory (`save_file` is given pointers).
        """
        for name, value in self.sums.items():
            check_finite(name, value, path)
        parts = [_PartHeader(source=p.source, half=p.half, tokens=counts) for p, counts in self.tokens.items()]
        header = _Header(checkpoint=self.checkpoint, data=self.data, parts=parts)
        metadata = {METADATA_KEY: header.model_dump_json()}
        with atomic_file(path) as partial:
            save_file(dict(sorted(self.sums.items())), partial, metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Map a file; its values are read when they are used, and raise UserError then if they are not finite.

        Raises UserError for a file that is missing, corrupt, not statistics, or of an older version.
        """
        if path.is_dir():
            raise UserError(f"{path} is a folder: give the file that `slimqwen calibrate` wrote.")
        try:
            file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is not a readable statistics file: {error}. Run `slimqwen calibrate` again."
            ) from error
        metadata, names = file.metadata() or {}, list(file.keys())
        try:
            header = _Header.model_validate_json(metadata.get(METADATA_KEY, ""))
        except ValidationError as error:
            raise UserError(
                f"{path} is not a statistics file of {FORMAT}, damaged or made by an older version perhaps: "
                "run `slimqwen calibrate` again."
            ) from error
        tokens = {Part(part.source, part.half): part.tokens for part in header.parts}
        per_part = [_names(names, part) for part in tokens]
        if any(some != per_part[0] for some in per_part) or sum(map(len, per_part)) != len(names):
            raise UserError(f"{path} lacks some of its sums: run `slimqwen calibrate` again.")

        def read(name: str) -> Tensor:
            value = file.get_tensor(name)
            check_finite(name, value, path)
            return value

        return cls(header.checkpoint, header.data, tokens, LazyTensors(names, read))


class _PartHeader(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    source: str
    half: Half
    tokens: dict[str, int]


class _Header(BaseModel):
    """Header of a statistics file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["slimqwen.statistics/2"] = "slimqwen.statistics/2"
    checkpoint: str
    data: str
    parts: list[_PartHeader] = Field(min_length=1)


def _names(names: Iterable[str], part: Part) -> set[str]:
    """Return the names of one part's sums, without the part."""
    return {name.removeprefix(part.prefix) for name in names if name.startswith(part.prefix)}


def check_finite(name: str, value: Tensor, path: Path) -> None:
    """Raise UserError where a sum that `path` holds, or would hold, is not finite."""
    lowest, highest = value.aminmax()  # which copies nothing, unlike isfinite, and is nan where a value is
    if not (torch.isfinite(lowest) and torch.isfinite(highest)):
        raise UserError(f"{path}: statistics are not finite, in {name}: the model overflowed on the calibration text.")


def check_source_weights(weights: Mapping[str, float], sources: Collection[str]) -> None:
    """Raise UserError unless each source has a weight, none is negative and one is not 0."""
    for name in weights:
        if name not in sources:
            raise UserError(
                f"pruning.source_weights names '{name}'{did_you_mean(name, sources)}; the calibration text is {', '.join(sources)}."
            )
    missing = [source for source in sources if source not in weights]
    if missing:
        raise UserError(
            f"pruning.source_weights leaves out {', '.join(missing)}: give every source a weight, 0 to ignore it."
        )
    if min(weights.values()) < 0 or not 0 < sum(weights.values()) < math.inf:
        raise UserError("pruning.source_weights must be 0 or more, and at least one of them more than 0.")
