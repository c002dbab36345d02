"""Repairing readers: between the plain rotation and least squares, as strongly as text that was left out allows."""

from pathlib import Path

import pytest
import torch
from tiny import write_tiny_checkpoint, write_tiny_tokens
from torch import Tensor

from slimqwen.calibration.calibrate import calibrate
from slimqwen.calibration.statistics import Part, Statistics
from slimqwen.core.errors import UserError
from slimqwen.planning.norm_readers import STRENGTHS, Reading, best_strength, strengths_in_words
from slimqwen.planning.plan import plan
from slimqwen.planning.rotation import Basis
from slimqwen.recipe import CalibrationRecipe, PruningRecipe, Target, TextSettings

HIDDEN, KEPT = 7, 4


def text(seed: int, mixing: Tensor | None = None) -> Tensor:
    """z of 300 tokens, [300, HIDDEN] float64; channels depend on one another as `mixing` [HIDDEN, HIDDEN] says."""
    generator = torch.Generator().manual_seed(seed)
    mixing = mixing_of(0) if mixing is None else mixing
    return torch.randn(300, HIDDEN, generator=generator, dtype=torch.float64) @ mixing


def mixing_of(seed: int) -> Tensor:
    return torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(z: Tensor) -> Tensor:
    return z.T @ z / len(z)


def reading(z: Tensor, stretch: float = 1.0) -> Reading:
    """What remains is KEPT orthonormal directions of the stretched z."""
    directions = torch.linalg.qr(mixing_of(1))[0][:, :KEPT]
    t = torch.linspace(1.0, stretch, HIDDEN, dtype=torch.float64)[:, None]
    return Reading(moment(z), t * directions, directions / t)


@pytest.mark.parametrize("stretch", [1.0, 1.4])
def test_a_strong_ridge_is_the_plain_rotation_and_a_weak_one_least_squares(stretch: float) -> None:
    z = text(0)
    one = reading(z, stretch)
    torch.testing.assert_close(one.reader(1e15), one.plain, rtol=0, atol=1e-12)
    least_squares = torch.linalg.lstsq(z @ one.coordinates, z).solution.T
    torch.testing.assert_close(one.reader(1e-13), least_squares, rtol=1e-6, atol=1e-6)


def test_a_reader_minimises_what_its_docstring_says() -> None:
    """No small change makes E|z - R y|^2 + ridge |R - P|^2 smaller."""
    z = text(0)
    one = reading(z, 1.4)
    y = z @ one.coordinates
    ridge = 0.3 * float((y.T @ y / len(y)).diagonal().mean())
    found = one.reader(0.3).requires_grad_()
    loss = (z - y @ found.T).square().sum() / len(z) + ridge * (found - one.plain).square().sum()
    (gradient,) = torch.autograd.grad(loss, found)
    assert float(gradient.abs().max()) < 1e-10 * float(loss.detach())


def test_of_two_coordinates_the_third_is_known() -> None:
    """z = (a, b, 2a - b): least squares tell it from the first two."""
    a, b = torch.randn(2, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = torch.stack([a, b, 2 * a - b], dim=1)
    kept = torch.eye(3, dtype=torch.float64)[:, :2]
    found = Reading(moment(z), kept, kept).reader(1e-6)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0], [0, 1], [2, -1]], dtype=torch.float64), rtol=0, atol=1e-4)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_what_a_reader_saves_on_other_text_is_what_it_saves_there(strength: float) -> None:
    one, elsewhere = reading(text(0), 1.4), text(1, mixing_of(2))
    y = elsewhere @ one.coordinates
    plain, repaired = (
        float((elsewhere - y @ matrix.T).square().sum() / len(y)) for matrix in (one.plain, one.reader(strength))
    )
    assert one.saved(strength, moment(elsewhere)) == pytest.approx(plain - repaired)


def test_text_left_out_chooses() -> None:
    """Text alike: the weakest ridge. Text on which the dropped part is the opposite: no repair. Between: between."""
    one = reading(text(0))
    mirrored = one.plain @ one.plain.T
    opposite = text(1) @ (
        2 * mirrored - torch.eye(HIDDEN, dtype=torch.float64)
    )  # what is kept as it is, the rest turned
    assert best_strength([(one, moment(text(1)))]) == STRENGTHS[0]
    assert best_strength([(one, moment(opposite))]) is None
    assert best_strength([]) == STRENGTHS[0]
    half = (moment(text(1)) + 0.4 * moment(opposite)) / 1.4
    chosen = best_strength([(one, half)])
    assert chosen is not None and chosen > STRENGTHS[0] and one.saved(chosen, half) > 0


def test_strengths_are_said() -> None:
    assert strengths_in_words({"a": 0.03, "b": 0.03}) == "ridge 0.03"
    assert strengths_in_words({"a": 0.03, "b": 0.3, "c": None}) == "ridge 0.03 to 0.3 (1 of 3 norms left as rotated)"
    assert strengths_in_words({"a": None}).startswith("left as rotated")


# From statistics


def statistics_of(**sums: float) -> Statistics:
    """One sum, `x`, of each part: `wiki_0` is source wiki, half 0. Each part has 10 tokens."""
    parts = {name: Part(name[:-2], 0 if name[-1] == "0" else 1) for name in sums}
    return Statistics(
        "checkpoint",
        "data",
        {part: {"main": 10, "mtp": 0} for part in parts.values()},
        {f"{parts[name].prefix}x": torch.tensor([value], dtype=torch.float64) for name, value in sums.items()},
    )


def test_folds_leave_out_a_source_or_of_one_source_a_half() -> None:
    halves = statistics_of(wiki_0=1.0, wiki_1=2.0).folds()
    assert [(float(fold.fitted["x"]), float(fold.left_out["x"])) for fold in halves] == [(1, 2), (2, 1)]
    three = statistics_of(a_0=1, a_1=2, b_0=4, b_1=8, c_0=16, c_1=32)
    means = [
        (float(f.fitted["x"] / f.fitted.tokens["main"]), float(f.left_out["x"] / f.left_out.tokens["main"]))
        for f in three.folds()
    ]
    assert means == [(60 / 40, 3 / 20), (51 / 40, 12 / 20), (15 / 40, 48 / 20)]
    ignoring = three.folds({"a": 1.0, "b": 0.0, "c": 3.0})
    assert [float(f.left_out["x"] / f.left_out.tokens["main"]) for f in ignoring] == [3 / 20, 48 / 20]
    assert statistics_of(wiki_0=1.0).folds() == []
    with pytest.raises(UserError, match=r"pruning\.source_weights leaves out"):
        three.folds({"a": 1.0})


def test_a_plan_says_how_strongly_each_norm_is_repaired(tmp_path: Path) -> None:
    tokenizer, tokens = write_tiny_tokens(tmp_path / "texts")
    source = write_tiny_checkpoint(tmp_path / "source", tokenizer=tokenizer)
    statistics = calibrate(
        source,
        tmp_path / "statistics.safetensors",
        tokens=tokens,
        recipe=CalibrationRecipe(samples=12),
        text=TextSettings(sequence_length=32),
        second_moments=True,
    )
    made = plan(
        source, tmp_path / "plan.json", statistics=statistics, target=Target(hidden_size=24), pruning=PruningRecipe()
    )
    assert made.basis is not None
    basis = Basis.load(tmp_path / "plan.json", made.basis.file, made.basis.fingerprint)
    assert made.readers.keys() == basis.readers.keys()
    assert set(made.readers.values()) <= {None, *STRENGTHS}
    without = plan(
        source,
        tmp_path / "bare.json",
        statistics=statistics,
        target=Target(hidden_size=24),
        pruning=PruningRecipe(refit_readers=False),
    )
    assert without.readers == {}
