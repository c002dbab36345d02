"""Rotating the residual stream: exact without a cut, exact where what is cut carries nothing, and refused where it must be."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import FORWARD, error
from safetensors.torch import load_file, save_file
from tiny import put_json, tiny_tokens, write_tiny_checkpoint, write_tiny_tokens
from tiny_families import FAMILIES_NATIVE
from torch import Tensor

from slimqwen.calibration.calibrate import calibrate
from slimqwen.calibration.statistics import Statistics
from slimqwen.checkpoint.config import read_json
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.families import FAMILIES
from slimqwen.families.axes import Cat
from slimqwen.model.model import load
from slimqwen.planning.mtp_rotation import stretches
from slimqwen.planning.plan import Plan, plan
from slimqwen.planning.rotation import Basis, cut_gain, principal_directions
from slimqwen.pruning.cut import Cut
from slimqwen.pruning.planned import planned_cut
from slimqwen.pruning.prune import prune
from slimqwen.pruning.residual import Residual
from slimqwen.recipe import CalibrationRecipe, DepthCriterion, Execution, PruningRecipe, Target, TextSettings

pytestmark = pytest.mark.rounding

TOKENS = tiny_tokens(rows=2, columns=13)
HIDDEN, KEPT = 32, 24
COMPENSATED = PruningRecipe(width="rotation", compensate=True, refit_readers=False)
REPAIRED = PruningRecipe(width="rotation", compensate=True, refit_readers=True)
# OLMoE's heads span its hidden size: it does not get narrower without losing heads.
CUTTABLE = [name for name in FAMILIES if name != "olmoe"]

Logits = tuple[Tensor, Tensor | None]


@torch.no_grad()
def logits(folder: Path) -> Logits:
    """Of the backbone and, where there is one, of the MTP module; [batch, seq, vocab]."""
    model = load(folder)
    hidden = model(TOKENS)
    return hidden.main @ model.head.T, None if hidden.mtp is None else hidden.mtp @ model.head.T


def difference(one: Logits, other: Logits) -> float:
    """The largest of both heads, over the largest logit."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    assert len(pairs) == sum(head is not None for head in one)
    return max(error(a, b) for a, b in pairs)


def edited(folder: Path, change: dict[str, Any]) -> Path:
    """A checkpoint with some tensors replaced: name -> a function of the tensor."""
    tensors = load_file(folder / "model.safetensors")
    for name, function in change.items():
        tensors[name] = function(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def head_norms(source: Checkpoint) -> list[str]:
    """The two norms that feed lm_head."""
    names = [name for _, name in source.family.residual_norms(source.config)]
    return [name for name in names if name.endswith((".norm.weight",)) and "layernorm" not in name]


def with_head_norms_of_one_size(folder: Path, signed: bool) -> Path:
    """Gains of 1.3 (the final norm) and 0.7 (the MTP module's last), with random signs: then the MTP module is exact too."""
    source = Checkpoint(folder)
    offset = source.family.norm_offset
    generator = torch.Generator().manual_seed(7)
    signs = torch.randint(2, (2, HIDDEN), generator=generator) * 2.0 - 1.0 if signed else torch.ones(2, HIDDEN)
    gains = zip(head_norms(source), (1.3 * signs[0], 0.7 * signs[1]), strict=False)
    return edited(folder, {name: lambda _, gain=gain: gain - offset for name, gain in gains})


def orthogonal(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator, dtype=torch.float64))[0]


def rotated(source: Path, out: Path) -> Path:
    """The whole checkpoint in other coordinates."""
    checkpoint = Checkpoint(source)
    eye = torch.eye(HIDDEN, dtype=torch.float64)
    scales = {name: cut_gain(eye, t, HIDDEN) for name, t in stretches(checkpoint).norms.items()}
    residual = Residual(checkpoint, HIDDEN, compensate=False, basis=Basis(orthogonal(), scales, {}))
    out.mkdir()
    layers = list(range(checkpoint.config["num_hidden_layers"]))
    Cut(checkpoint, layers, {}, {}, residual=residual).write(out, "test")
    return out


# --- without a cut ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_rotation_changes_no_logit(tmp_path: Path, model_type: str) -> None:
    layout = FAMILIES[model_type].default_layout
    source = write_tiny_checkpoint(tmp_path / "source", native=FAMILIES_NATIVE[model_type], layout=layout)
    with_head_norms_of_one_size(source, signed=True)
    out = rotated(source, tmp_path / "rotated")
    assert difference(logits(out), logits(source)) < FORWARD
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    family, config = FAMILIES[model_type], Checkpoint(source).config
    touched = {spec.name for spec in Checkpoint(source).specs.values() if _mentions_hidden(spec.dims, family.hidden)}
    assert touched == {name for name in before if not torch.equal(before[name], after[name])}
    for _, norm in family.residual_norms(config):
        assert after[norm].unique().numel() == 1, norm


def _mentions_hidden(dims: tuple[Any, ...], hidden: Any) -> bool:
    def mentions(term: Any) -> bool:
        if isinstance(term, Cat):
            return any(mentions(part) for _, part in term.parts)
        return term == hidden or getattr(term, "axis", None) == hidden

    return any(mentions(term) for term in dims)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_random_gains_are_exact_in_the_backbone(tmp_path: Path, model_type: str) -> None:
    """Of the MTP module one factor per token and norm is not: its logits stay near."""
    source = write_tiny_checkpoint(tmp_path / "source", native=FAMILIES_NATIVE[model_type])
    found, expected = logits(rotated(source, tmp_path / "rotated")), logits(source)
    assert difference((found[0], None), (expected[0], None)) < FORWARD
    if expected[1] is not None and found[1] is not None:
        both = torch.stack([found[1].flatten(), expected[1].flatten()])
        assert torch.corrcoef(both)[0, 1] > 0.8


def test_16_bit_weights_are_rounded_once(tmp_path: Path) -> None:
    source = Checkpoint(write_tiny_checkpoint(tmp_path / "source", dtype=torch.bfloat16))
    out = load_file(rotated(source.folder, tmp_path / "rotated") / "model.safetensors")
    embedding = source.read("model.embed_tokens.weight").double() @ orthogonal()
    assert (out["model.embed_tokens.weight"] == embedding.bfloat16()).float().mean() > 0.999
    norms = [norm for _, norm in source.family.residual_norms(source.config)]
    assert all(out[name].dtype == source.dtype(name) for name in out) and all(name in out for name in norms)


# --- with a cut -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_tiny_tokens(tmp_path_factory.mktemp("texts"))


def measured(checkpoint: Path, out: Path, tokens: Path, second_moments: bool = True) -> Path:
    recipe = CalibrationRecipe(samples=12)
    calibrate(
        checkpoint,
        out,
        tokens=tokens,
        recipe=recipe,
        text=TextSettings(sequence_length=32),
        execution=Execution(device="cpu"),
        second_moments=second_moments,
    )
    return out


def in_a_subspace(folder: Path, basis: Tensor) -> Path:
    """A checkpoint whose residual stream stays in the span of `basis` [hidden, kept]: every writer is projected."""
    source = Checkpoint(folder)
    projection = (basis @ basis.T).float()
    change: dict[str, Any] = {}
    for spec in source.specs.values():
        if spec.part == "norm":
            continue
        if spec.dims[0] == source.family.hidden:
            change[spec.name] = lambda tensor: projection @ tensor
        elif len(spec.dims) > 1 and spec.dims[1] == source.family.hidden:
            change[spec.name] = lambda tensor: tensor @ projection
    return edited(folder, change)


@pytest.mark.parametrize("model_type", CUTTABLE)
def test_what_carries_nothing_goes_without_a_trace(tmp_path: Path, model_type: str, texts: tuple[Path, Path]) -> None:
    """From calibration to a narrower checkpoint: exact with compensation, not without it, and near with a repair's ridge."""
    source = write_tiny_checkpoint(tmp_path / "source", native=FAMILIES_NATIVE[model_type], tokenizer=texts[0])
    in_a_subspace(with_head_norms_of_one_size(source, signed=False), orthogonal(1)[:, :KEPT])
    statistics = measured(source, tmp_path / "s", texts[1])
    expected = logits(source)
    errors = {}
    for name, pruning in (
        ("bare", PruningRecipe(width="rotation", compensate=False, refit_readers=False)),
        ("full", COMPENSATED),
        ("repaired", REPAIRED),
    ):
        file = tmp_path / f"{name}.json"
        made = plan(source, file, statistics=statistics, target=Target(hidden_size=KEPT), pruning=pruning)
        assert made.kept["hidden"] == list(range(KEPT)) and sum(made.scores.hidden[KEPT:]) < 1e-6
        out = prune(source, tmp_path / name, plan=file)
        assert Checkpoint(out).config["hidden_size"] == KEPT
        errors[name] = difference(logits(out), expected)
    assert errors["full"] < 1e-3
    assert 1e-2 < errors["bare"] > errors["repaired"]


def test_compensation_alone_is_exact_where_dropped_channels_are_empty(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", tokenizer=texts[0])
    in_a_subspace(source, torch.eye(HIDDEN, dtype=torch.float64)[:, 8:])
    statistics = measured(source, tmp_path / "s", texts[1], second_moments=False)
    errors = {}
    for compensate in (False, True):
        file = tmp_path / f"{compensate}.json"
        pruning = PruningRecipe(width="norm_activation", compensate=compensate)
        made = plan(source, file, statistics=statistics, target=Target(hidden_size=KEPT), pruning=pruning)
        assert made.kept["hidden"] == list(range(8, HIDDEN)) and made.basis is None
        errors[compensate] = difference(logits(prune(source, tmp_path / str(compensate), plan=file)), logits(source))
    assert errors[True] < 1e-3 < errors[False]


def test_one_plan_cuts_every_axis(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    """Layers, merged experts, neurons and rotated channels; the same from either layout of the source."""
    target = Target(
        num_hidden_layers=3,
        hidden_size=KEPT,
        num_experts=4,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=10,
    )
    pruning = REPAIRED.model_copy(update={"depth": DepthCriterion.BLOCK_INFLUENCE})
    results = []
    for layout in ("per_expert", "fused"):
        source = write_tiny_checkpoint(tmp_path / f"source-{layout}", layout=layout, tokenizer=texts[0])  # type: ignore[arg-type]
        statistics = measured(source, tmp_path / f"s-{layout}", texts[1])
        file = tmp_path / f"{layout}.json"
        plan(source, file, statistics=statistics, target=target, pruning=pruning)
        out = prune(source, tmp_path / f"out-{layout}", plan=file)
        assert Checkpoint(out).config["num_hidden_layers"] == 3
        results.append(logits(out))
    assert difference(*results) < FORWARD


def test_keeping_every_channel_is_no_rotation(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", tokenizer=texts[0])
    statistics = measured(source, tmp_path / "s", texts[1], second_moments=False)
    made = plan(source, tmp_path / "plan.json", statistics=statistics, target=Target(), pruning=REPAIRED)
    out = prune(source, tmp_path / "out", plan=tmp_path / "plan.json")
    assert made.basis is None and not list(tmp_path.glob("*.basis.*"))
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- the formulas -----------------------------------------------------------------------------------------------------


def test_principal_directions_are_those_of_the_largest_variance() -> None:
    rotation = orthogonal()
    moment = rotation @ torch.diag(torch.arange(HIDDEN, 0, -1, dtype=torch.float64)) @ rotation.T
    variances, directions = principal_directions([moment / 4, 3 * moment / 4])
    torch.testing.assert_close(variances, torch.arange(HIDDEN, 0, -1, dtype=torch.float64))
    torch.testing.assert_close((rotation.T @ directions).abs(), torch.eye(HIDDEN, dtype=torch.float64))
    assert (directions.gather(0, directions.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_a_cut_norm_has_the_mean_square_of_the_whole() -> None:
    z = torch.randn(4000, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z /= z.square().mean(dim=1, keepdim=True).sqrt()
    ones = torch.ones(8, dtype=torch.float64)
    assert cut_gain(z.T @ z / len(z), ones, 6) == pytest.approx(math.sqrt(8 / 6))
    assert cut_gain(z.T @ z / len(z), 2 * ones, 8) == pytest.approx(2.0)


# --- calibration ------------------------------------------------------------------------------------------------------


def test_second_moments_are_measured_where_they_are_asked_for(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", tokenizer=texts[0])
    plain = Statistics.load(measured(source, tmp_path / "plain", texts[1], second_moments=False))
    full = Statistics.load(measured(source, tmp_path / "full", texts[1]))
    moments = {name for name in full.sums if name.endswith("/second_moments")}
    assert plain.sums.keys() == full.sums.keys() - moments
    checkpoint = Checkpoint(source)
    assert len(moments) == 2 * len(checkpoint.family.residual_norms(checkpoint.config))  # two halves
    sums = full.weighted()
    for block, norm in checkpoint.family.residual_norms(checkpoint.config):
        moment = sums[f"norm/{norm}/second_moments"] / sums.tokens["mtp" if block.is_mtp else "main"]
        torch.testing.assert_close(moment, moment.T)
        assert float(moment.trace()) == pytest.approx(HIDDEN, rel=1e-3), norm  # z has mean square 1


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory, texts: tuple[Path, Path]) -> tuple[Path, Path, Path]:
    """(checkpoint, statistics, plan with a basis)."""
    folder = tmp_path_factory.mktemp("planned")
    source = write_tiny_checkpoint(folder / "source", tokenizer=texts[0])
    statistics = measured(source, folder / "s", texts[1])
    plan(source, folder / "plan.json", statistics=statistics, target=Target(hidden_size=KEPT), pruning=COMPENSATED)
    return source, statistics, folder / "plan.json"


def test_a_basis_that_is_not_the_plans_is_refused(tmp_path: Path, planned: tuple[Path, Path, Path]) -> None:
    source, _, file = planned
    made = read_json(file)
    assert made["basis"]["file"] == "plan.basis.safetensors"
    moved = tmp_path / "plan.json"
    put_json(moved, made)
    with pytest.raises(UserError, match=r"is not there, or not what was written with plan\.json"):
        prune(source, tmp_path / "out", plan=moved)
    save_file({"directions": torch.zeros(2, 2)}, tmp_path / "plan.basis.safetensors")
    with pytest.raises(UserError, match=r"is not there, or not what was written with plan\.json"):
        prune(source, tmp_path / "out", plan=moved)
    for name in ("../plan.basis.safetensors", str(file.with_name("plan.basis.safetensors"))):
        put_json(moved, made | {"basis": made["basis"] | {"file": name}})
        with pytest.raises(UserError, match="not a file beside it"):
            prune(source, tmp_path / "out", plan=moved)
    assert not (tmp_path / "out").exists()


def test_moments_of_an_optimiser_cannot_follow(planned: tuple[Path, Path, Path]) -> None:
    source, _, file = planned
    with pytest.raises(UserError, match="at_cut: reset"):
        planned_cut(Checkpoint(source), Plan.load(file))


def test_what_a_rotation_needs(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    target = Target(hidden_size=KEPT)
    source = write_tiny_checkpoint(tmp_path / "source", tokenizer=texts[0])
    bare = measured(source, tmp_path / "s", texts[1], second_moments=False)
    with pytest.raises(UserError, match="hold no second moments"):
        plan(source, tmp_path / "plan.json", statistics=bare, target=target, pruning=COMPENSATED)
    tied = write_tiny_checkpoint(tmp_path / "tied", tokenizer=texts[0], tie_word_embeddings=True)
    full = measured(tied, tmp_path / "full", texts[1])
    with pytest.raises(UserError, match="tied to the embedding"):
        plan(tied, tmp_path / "plan.json", statistics=full, target=target, pruning=COMPENSATED)
    with pytest.raises(ValueError, match="set width: rotation too"):
        PruningRecipe(width="norm_activation", refit_readers=True)
    assert not (tmp_path / "plan.json").exists()
