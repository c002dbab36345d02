"""Closed-form repair: exact where the answer is known, never worse on its text, the same however the text is cut."""

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_tiny_checkpoint, write_tiny_tokens
from tiny_families import FAMILIES_NATIVE
from torch import Tensor, nn
from torch.nn.functional import kl_div
from typer.testing import CliRunner

from slimqwen.calibration.calibrate import calibrate
from slimqwen.calibration.experts import Pairs
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.cli import app
from slimqwen.data.store import training_stream
from slimqwen.errors import UserError
from slimqwen.families.count import count
from slimqwen.families.family import Layout
from slimqwen.modeling.model import load
from slimqwen.planning.choose import Scores
from slimqwen.planning.experts import ExpertGroup
from slimqwen.planning.plan import Plan
from slimqwen.planning.plan import plan as make_plan
from slimqwen.planning.shapes import completed
from slimqwen.pruning.prune import prune
from slimqwen.recipe import CalibrationRecipe, PruningRecipe, Target
from slimqwen.repair import layers, refit
from slimqwen.repair.layers import courses
from slimqwen.repair.refit import ExpertInputs, squared_norm, subtract_outputs
from slimqwen.repair.repair import repair
from slimqwen.repair.ridge import RidgeSums

SEQUENCE_LENGTH = 16
SAMPLES = 24
KEPT_EXPERTS = 4
OUTPUT_MATRICES = r"\.experts\..*(down_proj|w2)"  # of routed experts, in every family and layout


class Texts(NamedTuple):
    tokenizer: Path
    tokens: Path


class Cut(NamedTuple):
    teacher: Path
    student: Path
    plan: Plan


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    return Texts(*write_tiny_tokens(tmp_path_factory.mktemp("texts")))


@pytest.fixture(scope="module")
def cut(texts: Texts, tmp_path_factory: pytest.TempPathFactory) -> Cut:
    folder = tmp_path_factory.mktemp("cut")
    return without_some_experts(write_tiny_checkpoint(folder / "teacher", tokenizer=texts.tokenizer), folder)


def a_plan(teacher: Path, target: Target, kept_layers: list[int] | None = None, **kept: Any) -> Plan:
    """The first experts stay, and in each layer the last one absorbs the expert that follows it."""
    checkpoint = Checkpoint(teacher)
    family, config = checkpoint.family, checkpoint.config
    target = completed(family, target, config)
    kept_layers = kept_layers or list(range(config["num_hidden_layers"]))
    groups = [ExpertGroup(base=e, members=[e], weights=[1.0]) for e in range(target.num_experts or 0)]
    if len(groups) < config["num_experts"]:
        last = len(groups) - 1
        groups[last] = ExpertGroup(base=last, members=[last, last + 1], weights=[0.5, 0.5])
    blocks = [block.name for block in family.moe_blocks(config) if block.layer is None or block.layer in kept_layers]
    return Plan(
        checkpoint=checkpoint.fingerprint(),
        statistics_data="none",
        target=target,
        pruning=PruningRecipe(),
        kept_layers=kept_layers,
        kept=kept,
        expert_groups=dict.fromkeys(blocks, groups),
        before=count(family, config),
        after=count(family, config),
        scores=Scores(layer_similarity=[], layer_block_influence=[], hidden=[], experts={}),
    )


def without_some_experts(teacher: Path, folder: Path, **kept: Any) -> Cut:
    plan = a_plan(teacher, Target(num_experts=KEPT_EXPERTS), **kept)
    return Cut(teacher, prune(teacher, folder / "student", plan=plan), plan)


def repaired(cut: Cut, texts: Texts, out: Path, **changed: Any) -> Path:
    settings = {"samples": SAMPLES, "sequence_length": SEQUENCE_LENGTH, "batch_size": 8} | changed
    return repair(cut.student, out, teacher=cut.teacher, plan=cut.plan, tokens=texts.tokens, **settings)


def with_noise(checkpoint: Path, out: Path, only: str, size: float) -> Path:
    """A copy in which the tensors whose names match `only` are damaged."""
    shutil.copytree(checkpoint, out)
    generator = torch.Generator().manual_seed(5)
    tensors = load_file(out / "model.safetensors")
    for name in tensors:
        if re.search(only, name):
            tensors[name] = tensors[name] + size * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, out / "model.safetensors")
    return out


@torch.no_grad()
def distance(student: Path, teacher: Path, texts: Texts, channels: list[int] | None = None) -> float:
    """|student's - teacher's stream|^2 / |teacher's|^2 after the last layer, on the text that the repair used."""
    rows = training_stream(texts.tokens, SEQUENCE_LENGTH, 0).batch(0, SAMPLES).tokens
    ours, theirs = (before_the_norm(folder, rows) for folder in (student, teacher))
    theirs = theirs if channels is None else theirs[..., channels]
    return float((ours - theirs).square().sum() / theirs.square().sum())


def before_the_norm(folder: Path, rows: Tensor) -> Tensor:
    model = load(folder)
    model.backbone.get_decoder().norm = nn.Identity()
    return model(rows, with_mtp=False).main


@torch.no_grad()
def predictions(folder: Path, rows: Tensor) -> Tensor:
    """Log probabilities [rows, seq, vocab]."""
    model = load(folder)
    return (model(rows, with_mtp=False).main @ model.head.T).log_softmax(dim=-1)


# Refitting one layer


class ThreeExperts(nn.Module):
    """What `refit` needs of Transformers' experts module; the activation is ReLU."""

    def __init__(self, neurons: int, hidden: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.num_experts = 3
        self.gate_up_proj = torch.randn(3, neurons, hidden, generator=generator)

    def _apply_gate(self, neurons: Tensor) -> Tensor:
        return neurons.relu()


def a_layer(tokens: int = 200, hidden: int = 6, neurons: int = 5) -> tuple[ExpertInputs, Tensor, Tensor]:
    """Tokens that each choose two of three experts, output matrices that are wrong, and those that are right."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, hidden, generator=generator)
    chosen = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(tokens)])
    gates = torch.rand(tokens, 2, generator=generator) + 0.1
    inputs = ExpertInputs(ThreeExperts(neurons, hidden), x, Pairs.of(chosen, gates, 3))
    wrong, right = torch.randn(2, 3, hidden, neurons, generator=generator)
    return inputs, wrong, right


def residual_of(inputs: ExpertInputs, wrong: Tensor, right: Tensor) -> Tensor:
    residual = torch.zeros_like(inputs.hidden_states)
    subtract_outputs(inputs, right, residual)
    residual.neg_()
    subtract_outputs(inputs, wrong, residual)
    return residual


def test_the_right_matrices_are_found() -> None:
    inputs, matrices, right = a_layer()
    residual = residual_of(inputs, matrices, right)
    list(refit.refit(inputs, matrices, residual, ridge=1e-9, sweeps=60))
    torch.testing.assert_close(matrices, right, rtol=1e-3, atol=1e-3)
    assert residual.abs().max() < 1e-3


def test_no_sweep_makes_it_worse() -> None:
    inputs, matrices, _ = a_layer()
    start, ridge = matrices.clone(), 0.1
    target = torch.randn(200, 6, generator=torch.Generator().manual_seed(2))  # nothing explains it
    residual = target.clone()
    subtract_outputs(inputs, matrices, residual)
    squares = [f.square().sum() for e, pairs in inputs.pairs.by_expert() for _, f in inputs.of_expert(e, pairs)]
    penalty = ridge * float(sum(squares)) / (3 * 5)
    sums = [squared_norm(residual)]
    for _ in range(5):
        # One sweep at a time from the same start: the penalty is on the distance from there.
        matrices, residual = start.clone(), target.clone()
        subtract_outputs(inputs, matrices, residual)
        errors = list(refit.refit(inputs, matrices, residual, ridge=ridge, sweeps=len(sums)))
        assert errors[-1] == squared_norm(residual)
        sums.append(errors[-1] + penalty * float((matrices - start).square().sum()))
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(sums))
    assert sums[1] < 0.99 * sums[0]


def test_many_sweeps_are_the_joint_solution() -> None:
    """The referee solves for all experts at once, from a matrix with a column for each neuron of each expert."""
    inputs, matrices, _ = a_layer()
    start, ridge = matrices.clone(), 0.05
    target = torch.randn(200, 6, generator=torch.Generator().manual_seed(2))
    everything = torch.zeros(200, 3, 5, dtype=torch.float64)
    for expert, pairs in inputs.pairs.by_expert():
        for tokens, features in inputs.of_expert(expert, pairs):
            everything[tokens, expert] = features.double()
    columns = everything.flatten(1)
    residual = target.clone()
    subtract_outputs(inputs, matrices, residual)
    penalty = ridge * columns.square().sum() / 15
    gram = columns.T @ columns + penalty * torch.eye(15)
    change = torch.linalg.solve(gram, columns.T @ residual.double()).view(3, 5, 6).transpose(1, 2)
    list(refit.refit(inputs, matrices, residual, ridge=ridge, sweeps=60))
    torch.testing.assert_close(matrices, (start + change).float(), rtol=1e-4, atol=1e-4)


def test_the_residual_is_that_of_the_rounded_matrices() -> None:
    inputs, matrices, right = a_layer()
    matrices = matrices.bfloat16()
    target = residual_of(inputs, torch.zeros_like(right), right)
    residual = target.clone()
    subtract_outputs(inputs, matrices, residual)
    list(refit.refit(inputs, matrices, residual, ridge=1e-3, sweeps=2))
    left = target.clone()
    subtract_outputs(inputs, matrices, left)
    torch.testing.assert_close(residual, left, rtol=0, atol=1e-4)


def test_parts_of_the_text_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for pairs_at_once in (8192, 7):
        monkeypatch.setattr(refit, "PAIRS_AT_ONCE", pairs_at_once)
        inputs, matrices, right = a_layer()
        residual = residual_of(inputs, matrices, right)
        list(refit.refit(inputs, matrices, residual, ridge=1e-3, sweeps=2))
        results.append(matrices)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_an_expert_without_tokens_stays() -> None:
    inputs, matrices, right = a_layer()
    chosen = torch.stack([torch.zeros(200, dtype=torch.int64), torch.full((200,), 2)], dim=1)
    inputs = ExpertInputs(inputs.experts, inputs.hidden_states, Pairs.of(chosen, torch.ones(200, 2), 3))
    start, residual = matrices.clone(), residual_of(inputs, matrices, right)
    list(refit.refit(inputs, matrices, residual, ridge=1e-3, sweeps=1))
    assert torch.equal(matrices[1], start[1])
    assert not torch.equal(matrices[0], start[0])


def test_ridge_by_hand() -> None:
    """Feature 2, residual 6: from 0, D = 12 / (4 + 4) = 1.5; R was measured with a change of 1, so that 8 is to be explained."""
    sums = RidgeSums()
    sums.add(torch.tensor([[2.0]]), torch.tensor([[6.0]]))
    assert sums.solve(torch.zeros(1, 1), 4.0).item() == pytest.approx(1.5)
    assert sums.solve(torch.ones(1, 1), 4.0).item() == pytest.approx(2.0)


def test_courses_by_hand() -> None:
    """Layers 0, 1, 3 of 4: the third layer of the student ends where layer 3 of the teacher does."""
    student: list[Any] = ["s0", "s1", "s2", "s mtp"]
    teacher: list[Any] = ["t0", "t1", "t2", "t3", "t mtp"]
    paired = [(course.student, list(course.teacher)) for course in courses(student, teacher, [0, 1, 3])]
    assert paired == [("s0", ["t0"]), ("s1", ["t1"]), ("s2", ["t2", "t3"]), ("s mtp", ["t mtp"])]


# The stage


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_damaged_experts_are_restored(
    tmp_path: Path, texts: Texts, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "RIDGE", 1e-8)
    monkeypatch.setattr(layers, "SWEEPS", 12)
    teacher = write_tiny_checkpoint(tmp_path / "teacher", layout=layout, tokenizer=texts.tokenizer)
    student = with_noise(teacher, tmp_path / "student", only=OUTPUT_MATRICES, size=0.1)
    assert distance(student, teacher, texts) > 1e-2
    out = repaired(Cut(teacher, student, a_plan(teacher, Target())), texts, tmp_path / "out", samples=80)
    assert distance(out, teacher, texts) < 1e-6
    right, found = (load_file(folder / "model.safetensors") for folder in (teacher, out))
    for name in right:
        torch.testing.assert_close(found[name], right[name], rtol=0.02, atol=0.02)


def test_an_exact_student_stays(tmp_path: Path, texts: Texts) -> None:
    """Nothing was dropped, so nothing is to be made up for."""
    teacher = write_tiny_checkpoint(tmp_path / "teacher", tokenizer=texts.tokenizer)
    student = shutil.copytree(teacher, tmp_path / "student")
    out = repaired(Cut(teacher, student, a_plan(teacher, Target())), texts, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (student, out))
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("number", range(len(FAMILIES_NATIVE)), ids=FAMILIES_NATIVE)
def test_every_family_comes_nearer_to_its_teacher(tmp_path: Path, texts: Texts, number: int) -> None:
    native = list(FAMILIES_NATIVE.values())[number]
    layout: Layout = "fused" if number % 2 else "per_expert"  # that both are read and written, damaged experts show
    teacher = write_tiny_checkpoint(tmp_path / "teacher", native=native, layout=layout, tokenizer=texts.tokenizer)
    cut = without_some_experts(teacher, tmp_path)
    out = repaired(cut, texts, tmp_path / "out")
    assert distance(out, teacher, texts) < 0.8 * distance(cut.student, teacher, texts)
    before, after = (load_file(folder / "model.safetensors") for folder in (cut.student, out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if re.search(OUTPUT_MATRICES, name)}
    assert json.loads((out / "config.json").read_text()) == json.loads((cut.student / "config.json").read_text())
    assert (out / "tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()


def test_bfloat16_stays_bfloat16(tmp_path: Path, texts: Texts) -> None:
    teacher = write_tiny_checkpoint(tmp_path / "teacher", dtype=torch.bfloat16, tokenizer=texts.tokenizer)
    cut = without_some_experts(teacher, tmp_path)
    out = repaired(cut, texts, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (cut.student, out))
    assert {name: tensor.dtype for name, tensor in after.items()} == {
        name: tensor.dtype for name, tensor in before.items()
    }
    assert distance(out, teacher, texts) < 0.8 * distance(cut.student, teacher, texts)


def test_a_student_with_fewer_channels(tmp_path: Path, texts: Texts) -> None:
    """The target is the teacher's stream in the channels that are left."""
    teacher = write_tiny_checkpoint(tmp_path / "teacher", tokenizer=texts.tokenizer)
    channels = [c for c in range(32) if c % 4]
    plan = a_plan(teacher, Target(hidden_size=24), hidden=channels)
    cut = Cut(teacher, prune(teacher, tmp_path / "student", plan=plan), plan)
    out = repaired(cut, texts, tmp_path / "out")
    assert distance(out, teacher, texts, channels) < 0.9 * distance(cut.student, teacher, texts, channels)


def test_a_student_with_rotated_channels(tmp_path: Path, texts: Texts) -> None:
    """The target is the teacher's stream in the coordinates that are left; its predictions are in the same ones as before."""
    teacher = write_tiny_checkpoint(tmp_path / "teacher", tokenizer=texts.tokenizer)
    statistics = calibrate(
        teacher,
        tmp_path / "statistics.safetensors",
        tokens=texts.tokens,
        recipe=CalibrationRecipe(samples=SAMPLES, batch_size=8),
        sequence_length=SEQUENCE_LENGTH,
        second_moments=True,
    )
    plan = tmp_path / "plan.json"
    target = Target(hidden_size=24, num_experts=KEPT_EXPERTS)
    make_plan(teacher, plan, statistics=statistics, target=target, pruning=PruningRecipe(width="rotation"))
    student = prune(teacher, tmp_path / "student", plan=plan)
    settings = {"samples": SAMPLES, "sequence_length": SEQUENCE_LENGTH}
    out = repair(student, tmp_path / "out", teacher=teacher, plan=plan, tokens=texts.tokens, **settings)
    rows = training_stream(texts.tokens, SEQUENCE_LENGTH, 0).batch(0, SAMPLES).tokens
    pruned, better, wanted = (predictions(folder, rows) for folder in (student, out, teacher))
    assert kl_div(better, wanted, log_target=True, reduction="sum") < 0.9 * kl_div(
        pruned, wanted, log_target=True, reduction="sum"
    )


def test_a_student_with_fewer_layers(tmp_path: Path, texts: Texts) -> None:
    teacher = write_tiny_checkpoint(tmp_path / "teacher", tokenizer=texts.tokenizer)
    kept = [0, 2, 3]
    plan = a_plan(teacher, Target(num_hidden_layers=3), kept_layers=kept)
    cut = Cut(teacher, prune(teacher, tmp_path / "student", plan=plan), plan)
    out = repaired(cut, texts, tmp_path / "out")
    assert distance(out, teacher, texts) < 0.9 * distance(cut.student, teacher, texts)


def test_passes_make_no_difference(tmp_path: Path, texts: Texts, cut: Cut) -> None:
    one = repaired(cut, texts, tmp_path / "one")
    other = repaired(cut, texts, tmp_path / "other", batch_size=3, memory_budget_bytes=1_000_000)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-3)


def test_interrupted_and_continued_is_uninterrupted(
    tmp_path: Path, texts: Texts, cut: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = repaired(cut, texts, tmp_path / "whole")
    refitted: list[str] = []
    usual = layers.LayerByLayer._refit

    def two_layers(self: Any, course: Any, block: Any, *rest: Any) -> None:
        if len(refitted) == 2:
            raise KeyboardInterrupt
        refitted.append(block.name)
        usual(self, course, block, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(layers.LayerByLayer, "_refit", two_layers)
        repaired(cut, texts, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    continued = []
    monkeypatch.setattr(
        layers.LayerByLayer,
        "_refit",
        lambda self, course, block, *rest: continued.append(block.name) or usual(self, course, block, *rest),
    )
    out = repaired(cut, texts, tmp_path / "out")
    assert refitted == ["model.layers.0", "model.layers.1"]
    assert continued == ["model.layers.2", "model.layers.3", "mtp.layers.0"]
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if "layers" in path.name] == []


def test_what_does_not_belong_together_is_one_sentence(tmp_path: Path, texts: Texts, cut: Cut) -> None:
    trained = with_noise(cut.student, tmp_path / "trained", only="embed_tokens", size=0.5)
    with pytest.raises(
        UserError, match=r"the embeddings of .*trained are not what the plan makes of those of .*teacher"
    ):
        repaired(cut._replace(student=trained), texts, tmp_path / "out")
    with pytest.raises(UserError, match=r"has num_experts 8 and the plan leaves 4"):
        repaired(cut._replace(student=cut.teacher), texts, tmp_path / "out")
    with pytest.raises(UserError, match="the plan was not made for"):
        repaired(cut._replace(teacher=cut.student), texts, tmp_path / "out")
    backwards = cut.plan.model_copy(update={"kept_layers": [1, 0, 2, 3]})
    with pytest.raises(UserError, match="changes the order of the layers"):
        repaired(cut._replace(plan=backwards), texts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, texts: Texts, cut: Cut) -> None:
    cut.plan.save(tmp_path / "plan.json")
    options = ["--teacher", cut.teacher, "--tokens", texts.tokens, "--plan", tmp_path / "plan.json"]
    options += ["--out", tmp_path / "out", "--samples", SAMPLES, "--sequence-length", SEQUENCE_LENGTH]
    result = CliRunner().invoke(app, ["repair", str(cut.student), *map(str, options)])
    assert result.exit_code == 0, result.output
    expected = repaired(cut, texts, tmp_path / "expected")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
