"""The stage `heal`: every layer is trained towards its teacher's stream, and nothing else changes."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rounding
import torch
from safetensors.torch import load_file, save_file
from tiny import write_tiny_checkpoint, write_tiny_tokens
from tiny_cuts import (
    KEPT_EXPERTS,
    SAMPLES,
    SEQUENCE_LENGTH,
    Cut,
    Texts,
    a_plan,
    distance,
    predictions,
    with_half_the_neurons,
    with_noise,
    without_some_experts,
)
from tiny_families import FAMILIES_NATIVE
from torch.nn.functional import kl_div
from typer.testing import CliRunner

from slimqwen.calibration.calibrate import calibrate
from slimqwen.calibration.statistics import Part
from slimqwen.cli import app
from slimqwen.core.errors import UserError
from slimqwen.data.store import training_stream
from slimqwen.families import Config
from slimqwen.families.family import Layout
from slimqwen.healing.heal import heal, left_out_of, training_of
from slimqwen.healing.layers import FIRST_RATE, LONGER, Healing, share_of_peak
from slimqwen.healing.objective import PredictionError, StreamError
from slimqwen.planning.plan import plan as make_plan
from slimqwen.pruning.prune import prune
from slimqwen.recipe import CalibrationRecipe, Execution, HealingRecipe, PruningRecipe, Target, TextSettings

pytestmark = pytest.mark.rounding

RECIPE = HealingRecipe(samples=SAMPLES, epochs=3, learning_rate=3e-3, batch_size=4)
OUTSIDE_THE_LAYERS = r"embed_tokens|lm_head|shared_head|^model\.norm|^mtp\.norm"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    return Texts(*write_tiny_tokens(tmp_path_factory.mktemp("texts")))


@pytest.fixture(scope="module")
def cut(texts: Texts, tmp_path_factory: pytest.TempPathFactory) -> Cut:
    folder = tmp_path_factory.mktemp("cut")
    return without_some_experts(write_tiny_checkpoint(folder / "teacher", tokenizer=texts.tokenizer), folder)


def healed(cut: Cut, texts: Texts, out: Path, recipe: HealingRecipe = RECIPE, **changed: Any) -> Path:
    settings = {"text": TextSettings(sequence_length=SEQUENCE_LENGTH)} | changed
    return heal(cut.student, out, teacher=cut.teacher, plan=cut.plan, tokens=texts.tokens, recipe=recipe, **settings)


def changed_tensors(before: Path, after: Path) -> set[str]:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert ours.keys() == theirs.keys()
    assert {name: tensor.dtype for name, tensor in ours.items()} == {name: t.dtype for name, t in theirs.items()}
    return {name for name in ours if not torch.equal(ours[name], theirs[name])}


def layer_of(name: str) -> str | None:
    found = re.match(r".*layers\.\d+\.", name)
    return found[0] if found else None


@pytest.mark.parametrize("cut_by", [without_some_experts, with_half_the_neurons])
@pytest.mark.parametrize("number", range(len(FAMILIES_NATIVE)), ids=FAMILIES_NATIVE)
def test_every_family_comes_nearer_to_its_teacher(
    tmp_path: Path, texts: Texts, number: int, cut_by: Callable[[Path, Path], Cut]
) -> None:
    native = list(FAMILIES_NATIVE.values())[number]
    layout: Layout = "fused" if number % 2 else "per_expert"
    teacher = write_tiny_checkpoint(tmp_path / "teacher", native=native, layout=layout, tokenizer=texts.tokenizer)
    cut = cut_by(teacher, tmp_path)
    out = healed(cut, texts, tmp_path / "out")
    assert distance(out, teacher, texts) < 0.8 * distance(cut.student, teacher, texts)
    changed = changed_tensors(cut.student, out)
    assert changed and not any(re.search(OUTSIDE_THE_LAYERS, name) for name in changed)
    # In a layer that changed all weights did, but for experts that no token went to, and a buffer.
    layers = {layer_of(name) for name in changed} - {None}
    stayed = {name for name in load_file(out / "model.safetensors").keys() - changed if layer_of(name) in layers}
    assert all(re.search(rf"experts\.\d+\.|e_score_correction_bias|{OUTSIDE_THE_LAYERS}", name) for name in stayed)


@pytest.mark.parametrize("native", FAMILIES_NATIVE.values(), ids=FAMILIES_NATIVE)
def test_an_exact_student_stays(tmp_path: Path, texts: Texts, native: Config) -> None:
    """A layer that is where the teacher's is has nothing to gain, and what does not become better stays."""
    teacher = write_tiny_checkpoint(tmp_path / "teacher", native=native, tokenizer=texts.tokenizer)
    student = shutil.copytree(teacher, tmp_path / "student")
    out = healed(Cut(teacher, student, a_plan(teacher, Target())), texts, tmp_path / "out")
    assert changed_tensors(student, out) == set()


def test_a_layer_that_becomes_worse_stays(tmp_path: Path, texts: Texts, cut: Cut) -> None:
    out = healed(cut, texts, tmp_path / "out", RECIPE.model_copy(update={"learning_rate": 100.0}))
    assert changed_tensors(cut.student, out) == set()


def test_bfloat16_stays_bfloat16(tmp_path: Path, texts: Texts) -> None:
    teacher = write_tiny_checkpoint(tmp_path / "teacher", dtype=torch.bfloat16, tokenizer=texts.tokenizer)
    cut = without_some_experts(teacher, tmp_path)
    out = healed(cut, texts, tmp_path / "out")
    assert changed_tensors(cut.student, out)
    assert distance(out, teacher, texts) < 0.8 * distance(cut.student, teacher, texts)


def test_a_student_with_fewer_layers(tmp_path: Path, texts: Texts) -> None:
    """The layer before a gap learns what the layers in it did; the one before that is where the teacher is, and stays."""
    teacher = write_tiny_checkpoint(tmp_path / "teacher", tokenizer=texts.tokenizer)
    plan = a_plan(teacher, Target(num_hidden_layers=3), kept_layers=[0, 1, 3])
    cut = Cut(teacher, prune(teacher, tmp_path / "student", plan=plan), plan)
    out = healed(cut, texts, tmp_path / "out")
    assert distance(out, teacher, texts) < 0.9 * distance(cut.student, teacher, texts)
    assert not any(name.startswith("model.layers.0.") for name in changed_tensors(cut.student, out))


def test_a_student_with_rotated_channels(tmp_path: Path, texts: Texts) -> None:
    """Refitted before or not: the target is the teacher's stream in the coordinates that are left."""
    teacher = write_tiny_checkpoint(tmp_path / "teacher", tokenizer=texts.tokenizer)
    statistics = calibrate(
        teacher,
        tmp_path / "statistics.safetensors",
        tokens=texts.tokens,
        recipe=CalibrationRecipe(samples=SAMPLES),
        text=TextSettings(sequence_length=SEQUENCE_LENGTH),
        second_moments=True,
    )
    plan = tmp_path / "plan.json"
    target = Target(hidden_size=24, num_experts=KEPT_EXPERTS)
    make_plan(teacher, plan, statistics=statistics, target=target, pruning=PruningRecipe(width="rotation"))
    student = prune(teacher, tmp_path / "student", plan=plan)
    out = heal(
        student,
        tmp_path / "out",
        teacher=teacher,
        plan=plan,
        tokens=texts.tokens,
        recipe=RECIPE,
        text=TextSettings(sequence_length=SEQUENCE_LENGTH),
    )
    rows = training_stream(texts.tokens, SEQUENCE_LENGTH, 0).batch(0, SAMPLES).tokens
    pruned, better, wanted = (predictions(folder, rows) for folder in (student, out, teacher))
    before, after = (kl_div(ours, wanted, log_target=True, reduction="sum") for ours in (pruned, better))
    assert after < 0.9 * before


def test_every_sixteenth_sequence_of_each_source_is_left_out_and_one_at_least() -> None:
    parts = [Part("a", 0)] * 20 + [Part("a", 1)] * 20 + [Part("b", 0)] * 3
    assert left_out_of(parts).nonzero()[:, 0].tolist() == [15, 31, 42]


def test_the_last_layer_learns_what_the_teacher_predicts(tmp_path: Path, texts: Texts, cut: Cut) -> None:
    """Its own objective, on the text that it was trained on: the KL falls by more than the other layers alone would."""
    rows = training_stream(texts.tokens, SEQUENCE_LENGTH, 0).batch(0, SAMPLES).tokens
    out = healed(cut, texts, tmp_path / "out")
    without = load_file(out / "model.safetensors")
    last = re.compile(r"^model\.layers\.3\.")
    start = load_file(cut.student / "model.safetensors")
    shutil.copytree(out, tmp_path / "without")
    save_file({n: start[n] if last.match(n) else t for n, t in without.items()}, tmp_path / "without/model.safetensors")
    wanted = predictions(cut.teacher, rows)
    kl = [
        float(kl_div(predictions(folder, rows), wanted, log_target=True, reduction="sum"))
        for folder in (cut.student, tmp_path / "without", out)
    ]
    assert kl[2] < 0.9 * kl[1] and kl[2] < 0.8 * kl[0]


def test_rows_per_pass_make_no_difference(tmp_path: Path, texts: Texts, cut: Cut) -> None:
    """The gradient of a step is the mean over its tokens, in however many passes they go through the layer."""
    recipe = RECIPE.model_copy(update={"epochs": 1})
    one = healed(cut, texts, tmp_path / "one", recipe)
    other = healed(cut, texts, tmp_path / "other", recipe, execution=Execution(memory_budget=60_000))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    start = load_file(cut.student / "model.safetensors")
    moved = sum(float((ours[name] - start[name]).square().sum()) for name in ours)
    apart = sum(float((ours[name] - theirs[name]).square().sum()) for name in ours)
    assert 0 < apart < 1e-3 * moved  # other passes, or nothing is shown


def test_interrupted_and_continued_is_uninterrupted(
    tmp_path: Path, texts: Texts, cut: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = healed(cut, texts, tmp_path / "whole")
    begun: list[str] = []
    usual = Healing.__call__

    def two_layers(self: Healing, course: Any, *rest: Any) -> None:
        if len(begun) == 2:
            raise KeyboardInterrupt
        begun.append(course.block.name)
        usual(self, course, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Healing, "__call__", two_layers)
        healed(cut, texts, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    continued: list[str] = []

    def noted(self: Healing, course: Any, *rest: Any) -> None:
        continued.append(course.block.name)
        usual(self, course, *rest)

    monkeypatch.setattr(Healing, "__call__", noted)
    out = healed(cut, texts, tmp_path / "out")
    assert begun == ["model.layers.0", "model.layers.1"]
    assert continued == ["model.layers.2", "model.layers.3", "mtp.layers.0"]
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if "layers" in path.name] == []


def test_what_does_not_belong_together_is_one_sentence(tmp_path: Path, texts: Texts, cut: Cut) -> None:
    trained = with_noise(cut.student, tmp_path / "trained", only="embed_tokens", size=0.5)
    with pytest.raises(UserError, match=r"the embeddings of .*trained are not what the plan makes of those of") as told:
        healed(cut._replace(student=trained), texts, tmp_path / "out")
    assert "refit" not in str(told.value)  # which is another command
    with pytest.raises(UserError, match="the plan was not made for"):
        healed(cut._replace(teacher=cut.student), texts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_layer_finds_its_learning_rate(
    tmp_path: Path, texts: Texts, cut: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From wherever the search begins it comes to the same rates, and to what these leave; each layer begins at the best of the last that became better."""
    auto = RECIPE.model_copy(update={"learning_rate": "auto", "epochs": 8})
    begun: list[list[float]] = []
    found: list[tuple[float, float]] = []
    usual_rate, usual_train = Healing._rate, Healing._train

    def rate(self: Healing, *rest: Any) -> tuple[float, float]:
        begun.append([])
        found.append(usual_rate(self, *rest))
        return found[-1]

    def train(self: Healing, training: Any, batches: Any, rate: float, progress: Any) -> None:
        if progress is None:
            begun[-1].append(rate)
        usual_train(self, training, batches, rate, progress)

    monkeypatch.setattr(Healing, "_rate", rate)
    monkeypatch.setattr(Healing, "_train", train)
    out = healed(cut, texts, tmp_path / "out", auto)
    assert distance(out, cut.teacher, texts) < 0.8 * distance(cut.student, cut.teacher, texts)
    starts = [trials[0] for trials in begun]
    assert starts[0] == FIRST_RATE
    for start, following, (chosen, _) in zip(starts[:-1], starts[1:], found[:-1], strict=True):
        assert following == pytest.approx(chosen / LONGER) or following == start  # of a layer that was left as it is
    assert len(set(starts)) > 1
    assert all(3 <= len(trials) <= 6 for trials in begun)
    for trials, (chosen, _) in zip(begun, found, strict=True):
        assert min(trials) / 2 <= chosen / LONGER <= max(trials) * 2


def test_layers_that_are_where_the_teacher_is_do_not_move_the_search(
    tmp_path: Path, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a gap there is nothing to learn and the lowest rate seems best: layer after layer it would fall by 32."""
    begun: list[tuple[int | None, float]] = []
    usual = Healing._rate

    def rate(self: Healing, course: Any, training: Any, first: float, progress: Any) -> tuple[float, float]:
        begun.append((course.student.number, first))
        return usual(self, course, training, first, progress)

    monkeypatch.setattr(Healing, "_rate", rate)
    teacher = write_tiny_checkpoint(tmp_path / "teacher", tokenizer=texts.tokenizer)
    plan = a_plan(teacher, Target(num_hidden_layers=3), kept_layers=[0, 1, 3])
    student = prune(teacher, tmp_path / "student", plan=plan)
    healed(Cut(teacher, student, plan), texts, tmp_path / "out", RECIPE.model_copy(update={"learning_rate": "auto"}))
    assert begun[0] == (1, FIRST_RATE)  # layer 0 is the teacher's: no rate is tried


def test_the_search_begins_where_the_last_layer_that_became_better_ended(
    tmp_path: Path, texts: Texts, cut: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[float] = []

    def rate(_self: Healing, _course: Any, _training: Any, first: float, _progress: Any) -> tuple[float, float]:
        begun.append(first)
        return (3e-3, first) if len(begun) == 1 else (1e3, first)  # at which nothing becomes better

    monkeypatch.setattr(Healing, "_rate", rate)
    healed(cut, texts, tmp_path / "out", RECIPE.model_copy(update={"learning_rate": "auto"}))
    assert begun == pytest.approx([FIRST_RATE, *[3e-3 / LONGER] * 4])


def test_no_sequence_is_both_trained_on_and_left_out() -> None:
    """Of a text with fewer sequences than samples some come twice."""
    rows = torch.tensor([[1, 2], [3, 4], [5, 6], [3, 4], [1, 2]])
    left_out = torch.tensor([False, True, False, False, False])
    assert training_of(rows, left_out).tolist() == [True, False, True, False, True]


def test_a_text_of_one_sequence_is_one_sentence(tmp_path: Path, texts: Texts, cut: Cut) -> None:
    with pytest.raises(UserError, match="leaves one sequence of each source out of its training, and this text has no"):
        healed(cut, texts, tmp_path / "out", text=TextSettings(sequence_length=4_000))
    assert not (tmp_path / "out").exists()


def test_any_seed_that_is_taken_can_be_trained_with(tmp_path: Path, texts: Texts, cut: Cut) -> None:
    recipe = RECIPE.model_copy(update={"samples": 2, "epochs": 1})
    assert healed(
        cut, texts, tmp_path / "out", recipe, text=TextSettings(sequence_length=SEQUENCE_LENGTH, seed=2**63 - 1)
    ).is_dir()


def test_a_search_that_breaks_everywhere_leaves_the_layer(
    tmp_path: Path, texts: Texts, cut: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimqwen.healing.layers.FIRST_RATE", 1e12)
    out = healed(cut, texts, tmp_path / "out", RECIPE.model_copy(update={"learning_rate": "auto"}))
    assert changed_tensors(cut.student, out) == set()


def test_the_rate_over_its_peak_rises_and_falls() -> None:
    shares = [share_of_peak(step, 40) for step in range(40)]
    assert shares[:2] == [0.5, 1.0]
    assert shares[1:] == sorted(shares[1:], reverse=True)
    assert 0 < shares[-1] < 0.01
    assert share_of_peak(0, 1) == 1.0


def test_one_sequence_cannot_be_trained_on_and_left_out(tmp_path: Path, texts: Texts, cut: Cut) -> None:
    with pytest.raises(UserError, match=r"healing leaves one sequence of each source out.*raise samples to at least 2"):
        healed(cut, texts, tmp_path / "out", RECIPE.model_copy(update={"samples": 1}))


def test_the_command(tmp_path: Path, texts: Texts, cut: Cut) -> None:
    cut.plan.save(tmp_path / "plan.json")
    options = ["--teacher", cut.teacher, "--tokens", texts.tokens, "--plan", tmp_path / "plan.json"]
    options += ["--out", tmp_path / "out", "--samples", SAMPLES, "--sequence-length", SEQUENCE_LENGTH]
    options += ["--epochs", 3, "--learning-rate", 3e-3, "--batch-size", 4]
    result = CliRunner().invoke(app, ["heal", str(cut.student), *map(str, options)])
    assert result.exit_code == 0, result.output
    expected = healed(cut, texts, tmp_path / "expected")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


# What a layer is trained to do


def test_the_error_of_the_stream_is_relative_to_each_token() -> None:
    """By hand: of two tokens one is missed by half of its length, one by all of it."""
    wanted = torch.tensor([[[3.0, 4.0], [100.0, 0.0]]])
    output = torch.tensor([[[3.0, 1.5], [0.0, 0.0]]])
    error = StreamError(wanted, torch.device("cpu"))  # type: ignore[arg-type] # a target is what rows are taken from
    rows = torch.tensor([0])
    assert float(error.total(output, rows)) == pytest.approx(0.25 + 1.0)
    assert error.in_words(0.25) == "0.500"


def test_the_error_of_predictions_is_the_kl_to_the_teacher() -> None:
    """Against the formula, and its gradient by autograd, over several chunks of logits."""
    generator = torch.Generator().manual_seed(0)
    head, teacher_head = (torch.randn(50, size, generator=generator) for size in (12, 16))
    hidden = torch.randn(3, 120, 16, generator=generator)
    output = torch.randn(2, 120, 12, generator=generator, requires_grad=True)
    norm = torch.nn.RMSNorm(12)
    rows = torch.tensor([2, 0])
    error = PredictionError(norm, head, hidden.__getitem__, teacher_head)
    found = error.total(output, rows)
    (gradient,) = torch.autograd.grad(found, output)
    wanted = kl_div(
        (norm(output) @ head.T).log_softmax(dim=-1),
        (hidden[rows] @ teacher_head.T).log_softmax(dim=-1),
        log_target=True,
        reduction="sum",
    )
    (expected,) = torch.autograd.grad(wanted, output)
    assert rounding.error(found[None], wanted[None]) < rounding.FORWARD
    assert rounding.error(gradient, expected) < rounding.GRADIENT
