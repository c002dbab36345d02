"""Cutting the residual stream in coordinates of its own: one rotation of the whole model before channels are dropped.

RMSNorm without a gain commutes with any orthogonal Q, so with every norm's gain folded into what reads it, a model whose
writers and readers are all rotated by Q computes the same function. This module chooses Q from calibration, so that the dropped
coordinates carry least; it lies beside plan.json. `pruning/residual.py` has what becomes of each tensor; `mtp_rotation` what an MTP
module, which shares lm_head with the backbone, needs beside it. SliceGPT (2401.15024) rotates layer by layer and pays with a matrix
on every skip connection; one rotation for the whole model needs none, and the result is an ordinary checkpoint.

What a norm's readers see is its normalised input z, of mean square 1, so the directions kept are the principal ones of z's
second moments C_n = E[z z'], summed over the backbone's norms: of all orthonormal B [hidden, kept] they lose least of
sum_n E|z - B B'z|^2. Weighting that by what the readers do with z wins 7 % of the little that is left, and takes the products
W'W of all weights: not worth it (docs/beyond-the-paper.md).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slimqwen.artifacts import atomic_file, fingerprint
from slimqwen.calibration.statistics import Fold, Sums
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.planning.mtp_rotation import stretches
from slimqwen.planning.norm_readers import Reading, best_strength

DIRECTIONS = "directions"
FORMAT = "slimqwen.basis/1"


@dataclass(frozen=True)
class Basis:
    """What a rotated cut needs beside a plan.

    directions: B, [hidden, kept] float64, orthonormal: the residual stream becomes B'(t * x), t as in `mtp.Stretches`.
    scales: norm -> the gain of the cut norm, the same for all channels.
    readers: norm -> R [hidden, kept] float32, which predicts z from its kept coordinates, z ~ R B'(t * z). Empty where readers
    are not refitted: then R = diag(1 / t) B.
    strengths: norm -> the ridge that R was found with (`readers.STRENGTHS`); None: R is diag(1 / t) B here. Not saved.

    Of Qwen3-Next-80B, 2048 -> 1536: 25 MB, with refitted readers 1.3 GB.
    """

    directions: Tensor
    scales: Mapping[str, float]
    readers: Mapping[str, Tensor]
    strengths: Mapping[str, float | None] = field(default_factory=dict)

    def save(self, path: Path) -> str:
        """Write one safetensors file; returns its fingerprint."""
        scales = {f"scales/{norm}": torch.tensor(scale, dtype=torch.float64) for norm, scale in self.scales.items()}
        readers = {f"readers/{norm}": reader for norm, reader in self.readers.items()}
        with atomic_file(path) as partial:
            save_file(
                {DIRECTIONS: self.directions.contiguous(), **scales, **readers}, partial, metadata={"slimqwen": FORMAT}
            )
        return fingerprint(path)

    @classmethod
    def load(cls, plan: Path, name: str, expected: str) -> "Basis":
        """Map the file `name` beside a plan. Raises UserError where it is not the one that was written with the plan."""
        path = plan.parent / name
        if Path(name).name != name:
            raise UserError(f"{plan} names {name!r} as its basis, which is not a file beside it: make the plan again.")
        if not path.is_file() or fingerprint(path) != expected:
            raise UserError(
                f"{path} is not there, or not what was written with {plan.name}: keep the two together, or make the plan again "
                "with `slimqwen plan`."
            )
        try:
            file: Any = safe_open(path, framework="pt")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not readable: {error}. Make the plan again with `slimqwen plan`.") from error
        if DIRECTIONS not in tensors:
            raise UserError(f"{path} holds no '{DIRECTIONS}': make the plan again with `slimqwen plan`.")
        return cls(
            tensors[DIRECTIONS],
            {key.removeprefix("scales/"): float(value) for key, value in tensors.items() if key.startswith("scales/")},
            {key.removeprefix("readers/"): value for key, value in tensors.items() if key.startswith("readers/")},
        )


def choose_basis(
    source: Checkpoint,
    sums: Sums,
    kept_layers: Collection[int],
    keep: int,
    *,
    compensate: bool,
    refit_readers: bool,
    folds: Sequence[Fold] = (),
) -> tuple[Basis, Tensor]:
    """Choose the `keep` best coordinates for a model of these layers, and the share of sum_n E|z|^2 in each of all, [hidden].

    The MTP module's norms follow the backbone's choice. How strongly each norm's readers are refitted is chosen by `folds`.
    Raises UserError where the statistics have no second moments.
    """
    stretched = stretches(source)
    norms = [
        (block, name)
        for block, name in source.family.residual_norms(source.config)
        if block.layer is None or block.layer in kept_layers
    ]
    variances, directions = principal_directions(
        second_moment(sums, name, block.is_mtp) for block, name in norms if not block.is_mtp
    )
    directions = directions[:, :keep].contiguous()
    scales, readers = {}, {}
    strengths: dict[str, float | None] = {}
    for block, name in norms:
        moment = second_moment(sums, name, block.is_mtp)
        t = stretched.norms[name][:, None]
        scales[name] = cut_gain(moment, t[:, 0], keep if compensate else len(t))
        if refit_readers:
            coordinates, plain = t * directions, directions / t
            strengths[name] = best_strength(
                [
                    (
                        Reading(second_moment(fitted, name, block.is_mtp), coordinates, plain),
                        second_moment(left_out, name, block.is_mtp),
                    )
                    for fitted, left_out in folds
                ]
            )
            strength = strengths[name]
            readers[name] = (
                plain if strength is None else Reading(moment, coordinates, plain).reader(strength)
            ).float()
    return Basis(directions, scales, readers, strengths), variances / variances.sum()


def second_moment(sums: Sums, norm: str, is_mtp: bool) -> Tensor:
    """Return E[z z'] over the calibration tokens, [hidden, hidden] float64."""
    name = f"norm/{norm}/second_moments"
    if name not in sums.sums:
        raise UserError(
            "the statistics hold no second moments, which pruning.width rotation needs: run `slimqwen calibrate` again "
            "without --no-second-moments, or set pruning.width: norm_activation."
        )
    return sums[name] / sums.tokens["mtp" if is_mtp else "main"]


def principal_directions(moments: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the variance along each principal direction of the sum of `moments`, [hidden], and the directions as columns; largest first.

    A direction and its opposite are the same choice: its largest entry is made positive.
    """
    variances, directions = torch.linalg.eigh(reduce(torch.add, moments))
    variances, directions = variances.flip(0), directions.flip(1)
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    return variances.clamp(min=0.0), directions * largest.sign()


def cut_gain(moment: Tensor, t: Tensor, channels: int) -> float:
    """Return the gain of a cut norm, sqrt(E|t * z|^2 / channels): with t = 1 and the channels that are kept it is sqrt(hidden / kept).

    A cut norm divides by the root mean square over the channels that are left, |B'x| / sqrt(kept), where the whole one
    divides by |x| / sqrt(hidden). If the dropped coordinates carry nothing, |B'x| = |x|, this gain is exact; without it all that the
    readers see grows by sqrt(kept / hidden), less than 1.
    If they carry something, least squares over tokens gives less, E|B'z| / sqrt(kept): the gain that makes up for what
    is left alone. Measured that is worse in every row (docs/beyond-the-paper.md): the readers miss the dropped part in any
    case, and with the smaller gain logits and routers are too timid on top.
    """
    return float(((t.square() * moment.diagonal()).sum() / channels).sqrt())
