"""The stage `refit`: what was cut is made up for in every family, and the result is the same however the work is cut."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import write_tiny_checkpoint, write_tiny_tokens
from tiny_cuts import (
    KEPT_EXPERTS,
    OUTPUT_MATRICES,
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
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.cli import app
from slimqwen.core.errors import UserError
from slimqwen.data.store import training_stream
from slimqwen.families import Config
from slimqwen.families.family import Layout
from slimqwen.layerwise.courses import pair_courses
from slimqwen.planning.plan import cuts_only_channels
from slimqwen.planning.plan import plan as make_plan
from slimqwen.pruning.prune import prune
from slimqwen.recipe import CalibrationRecipe, Execution, PruningRecipe, Target, TextSettings
from slimqwen.refit import layers
from slimqwen.refit.refit import folds_of, refit

pytestmark = pytest.mark.rounding


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    return Texts(*write_tiny_tokens(tmp_path_factory.mktemp("texts")))


@pytest.fixture(scope="module")
def cut(texts: Texts, tmp_path_factory: pytest.TempPathFactory) -> Cut:
    folder = tmp_path_factory.mktemp("cut")
    return without_some_experts(write_tiny_checkpoint(folder / "teacher", tokenizer=texts.tokenizer), folder)


def refitted(cut: Cut, texts: Texts, out: Path, **changed: Any) -> Path:
    settings = {"samples": SAMPLES, "execution": Execution(batch_size=8)} | changed
    text = TextSettings(sequence_length=SEQUENCE_LENGTH)
    return refit(cut.student, out, teacher=cut.teacher, plan=cut.plan, tokens=texts.tokens, text=text, **settings)


# Layer after layer


def test_courses_by_hand() -> None:
    """Layers 0, 1, 3 of 5: a layer before dropped ones ends where they do in the teacher, the last one at the teacher's end."""
    student: list[Any] = ["s0", "s1", "s3", "s mtp"]
    teacher: list[Any] = ["t0", "t1", "t2", "t3", "t4", "t mtp"]
    paired = [(course.student, list(course.teacher)) for course in pair_courses(student, teacher, [0, 1, 3])]
    assert paired == [("s0", ["t0"]), ("s1", ["t1", "t2"]), ("s3", ["t3", "t4"]), ("s mtp", ["t mtp"])]


def test_courses_without_the_first_layer() -> None:
    paired = [(one.student, list(one.teacher)) for one in pair_courses(["s1", "s2"], ["t0", "t1", "t2"], [1, 2])]  # type: ignore[list-item]
    assert paired == [("s1", ["t0", "t1"]), ("s2", ["t2"])]


# The stage


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_damaged_networks_are_restored(
    tmp_path: Path, texts: Texts, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "RIDGE", 1e-8)
    monkeypatch.setattr(layers, "SWEEPS", 60)
    teacher = write_tiny_checkpoint(tmp_path / "teacher", layout=layout, tokenizer=texts.tokenizer)
    student = with_noise(teacher, tmp_path / "student", only=OUTPUT_MATRICES, size=0.1)
    assert distance(student, teacher, texts) > 1e-2
    out = refitted(Cut(teacher, student, a_plan(teacher, Target())), texts, tmp_path / "out", samples=80)
    assert distance(out, teacher, texts) < 1e-6
    right, found = (load_file(folder / "model.safetensors") for folder in (teacher, out))
    for name in right:
        torch.testing.assert_close(found[name], right[name], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("native", FAMILIES_NATIVE.values(), ids=FAMILIES_NATIVE)
def test_an_exact_student_stays(tmp_path: Path, texts: Texts, native: Config) -> None:
    """Nothing was dropped, so nothing is to be made up for: what is found of the networks and their weights is all there is."""
    teacher = write_tiny_checkpoint(tmp_path / "teacher", native=native, tokenizer=texts.tokenizer)
    student = shutil.copytree(teacher, tmp_path / "student")
    out = refitted(Cut(teacher, student, a_plan(teacher, Target())), texts, tmp_path / "out", samples=8)
    before, after = (load_file(folder / "model.safetensors") for folder in (student, out))
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("cut_by", [without_some_experts, with_half_the_neurons])
@pytest.mark.parametrize("number", range(len(FAMILIES_NATIVE)), ids=FAMILIES_NATIVE)
def test_every_family_comes_nearer_to_its_teacher(
    tmp_path: Path, texts: Texts, number: int, cut_by: Callable[[Path, Path], Cut]
) -> None:
    native = list(FAMILIES_NATIVE.values())[number]
    layout: Layout = "fused" if number % 2 else "per_expert"  # that both are read and written, damaged experts show
    teacher = write_tiny_checkpoint(tmp_path / "teacher", native=native, layout=layout, tokenizer=texts.tokenizer)
    cut = cut_by(teacher, tmp_path)
    out = refitted(cut, texts, tmp_path / "out")
    assert distance(out, teacher, texts) < 0.8 * distance(cut.student, teacher, texts)
    before, after = (load_file(folder / "model.safetensors") for folder in (cut.student, out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    wanted = {name for name in before if re.search(OUTPUT_MATRICES, name)}
    if cut_by is without_some_experts:  # a dense first layer is where the teacher's is
        wanted.discard("model.layers.0.mlp.down_proj.weight")
    assert changed == wanted
    assert json.loads((out / "config.json").read_text()) == json.loads((cut.student / "config.json").read_text())
    assert (out / "tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()


def test_bfloat16_stays_bfloat16(tmp_path: Path, texts: Texts) -> None:
    teacher = write_tiny_checkpoint(tmp_path / "teacher", dtype=torch.bfloat16, tokenizer=texts.tokenizer)
    cut = without_some_experts(teacher, tmp_path)
    out = refitted(cut, texts, tmp_path / "out")
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
    out = refitted(cut, texts, tmp_path / "out")
    assert distance(out, teacher, texts, channels) < 0.9 * distance(cut.student, teacher, texts, channels)


def test_a_student_with_rotated_channels(tmp_path: Path, texts: Texts) -> None:
    """The target is the teacher's stream in the coordinates that are left; its predictions are in the same ones as before."""
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
    out = refit(
        student,
        tmp_path / "out",
        teacher=teacher,
        plan=plan,
        tokens=texts.tokens,
        text=TextSettings(sequence_length=SEQUENCE_LENGTH),
        samples=SAMPLES,
    )
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
    out = refitted(cut, texts, tmp_path / "out")
    assert distance(out, teacher, texts) < 0.9 * distance(cut.student, teacher, texts)


def test_layers_where_the_teacher_is_stay_to_the_bit(tmp_path: Path, texts: Texts) -> None:
    """Of layers 0, 1 and 3 of 4 layer 1 makes up for the gap, and what comes before it is the teacher's."""
    teacher = write_tiny_checkpoint(tmp_path / "teacher", tokenizer=texts.tokenizer)
    plan = a_plan(teacher, Target(num_hidden_layers=3), kept_layers=[0, 1, 3])
    cut = Cut(teacher, prune(teacher, tmp_path / "student", plan=plan), plan)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (cut.student, refitted(cut, texts, tmp_path / "out"))
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if re.search(OUTPUT_MATRICES, name) and ".layers.0." not in name} | {
        name for name in before if re.search(r"mtp.*" + OUTPUT_MATRICES, name)
    }


def test_a_student_without_the_last_layer(tmp_path: Path, texts: Texts) -> None:
    """The last layer that is left aims at the teacher's final stream."""
    teacher = write_tiny_checkpoint(tmp_path / "teacher", tokenizer=texts.tokenizer, native=FAMILIES_NATIVE["mixtral"])
    layers_left = list(range(FAMILIES_NATIVE["mixtral"]["num_hidden_layers"] - 1))
    plan = a_plan(teacher, Target(num_hidden_layers=len(layers_left)), kept_layers=layers_left)
    cut = Cut(teacher, prune(teacher, tmp_path / "student", plan=plan), plan)
    out = refitted(cut, texts, tmp_path / "out")
    assert distance(out, teacher, texts) < 0.9 * distance(cut.student, teacher, texts)


def test_several_sources_are_left_out_in_turn_and_one_by_halves(tmp_path: Path, texts: Texts, cut: Cut) -> None:
    parts = [Part("a", 0), Part("a", 1), Part("b", 0)]
    assert [fold.tolist() for fold in folds_of(parts)] == [[True, True, False], [False, False, True]]
    assert [fold.tolist() for fold in folds_of(parts[:2])] == [[True, False], [False, True]]
    assert folds_of(parts[:1]) == []
    both = refit(
        cut.student,
        tmp_path / "both",
        teacher=cut.teacher,
        plan=cut.plan,
        tokens={"a": texts.tokens, "b": texts.tokens},
        samples=SAMPLES,
        text=TextSettings(sequence_length=SEQUENCE_LENGTH),
    )
    assert distance(both, cut.teacher, texts) < distance(cut.student, cut.teacher, texts)


def test_which_plans_take_only_channels(tmp_path: Path) -> None:
    teacher = write_tiny_checkpoint(tmp_path / "teacher")
    channels = list(range(24))
    source = Checkpoint(teacher)
    assert cuts_only_channels(source, a_plan(teacher, Target(hidden_size=24), hidden=channels))
    assert cuts_only_channels(source, a_plan(teacher, Target()))
    for target, kept_layers in (
        (Target(hidden_size=24, num_experts=4), None),
        (Target(hidden_size=24, num_experts_per_tok=1), None),
        (Target(hidden_size=24, num_hidden_layers=3), [0, 1, 3]),
    ):
        assert not cuts_only_channels(source, a_plan(teacher, target, kept_layers, hidden=channels))
    neurons = {"moe_neuron": {"model.layers.0": [[0]] * 8}}
    assert not cuts_only_channels(source, a_plan(teacher, Target(hidden_size=24), hidden=channels, **neurons))


def test_passes_make_no_difference(tmp_path: Path, texts: Texts, cut: Cut) -> None:
    one = refitted(cut, texts, tmp_path / "one")
    other = refitted(cut, texts, tmp_path / "other", execution=Execution(batch_size=3, memory_budget=1_000_000))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-3)


def test_interrupted_and_continued_is_uninterrupted(
    tmp_path: Path, texts: Texts, cut: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = refitted(cut, texts, tmp_path / "whole")
    layers_refitted: list[str] = []
    usual = layers.Refit._refit

    def two_layers(self: Any, course: Any, *rest: Any) -> None:
        if len(layers_refitted) == 2:
            raise KeyboardInterrupt
        layers_refitted.append(course.block.name)
        usual(self, course, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(layers.Refit, "_refit", two_layers)
        refitted(cut, texts, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    continued = []
    monkeypatch.setattr(
        layers.Refit,
        "_refit",
        lambda self, course, *rest: continued.append(course.block.name) or usual(self, course, *rest),
    )
    out = refitted(cut, texts, tmp_path / "out")
    assert layers_refitted == ["model.layers.0", "model.layers.1"]
    assert continued == ["model.layers.2", "model.layers.3", "mtp.layers.0"]
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if "layers" in path.name] == []


def test_what_does_not_belong_together_is_one_sentence(tmp_path: Path, texts: Texts, cut: Cut) -> None:
    trained = with_noise(cut.student, tmp_path / "trained", only="embed_tokens", size=0.5)
    with pytest.raises(
        UserError, match=r"the embeddings of .*trained are not what the plan makes of those of .*teacher"
    ):
        refitted(cut._replace(student=trained), texts, tmp_path / "out")
    with pytest.raises(UserError, match=r"has num_experts 8 and the plan leaves 4"):
        refitted(cut._replace(student=cut.teacher), texts, tmp_path / "out")
    with pytest.raises(UserError, match="the plan was not made for"):
        refitted(cut._replace(teacher=cut.student), texts, tmp_path / "out")
    backwards = cut.plan.model_copy(update={"kept_layers": [1, 0, 2, 3]})
    with pytest.raises(UserError, match="changes the order of the layers"):
        refitted(cut._replace(plan=backwards), texts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, texts: Texts, cut: Cut) -> None:
    cut.plan.save(tmp_path / "plan.json")
    options = ["--teacher", cut.teacher, "--tokens", texts.tokens, "--plan", tmp_path / "plan.json"]
    options += ["--out", tmp_path / "out", "--samples", SAMPLES, "--sequence-length", SEQUENCE_LENGTH]
    result = CliRunner().invoke(app, ["refit", str(cut.student), *map(str, options)])
    assert result.exit_code == 0, result.output
    expected = refitted(cut, texts, tmp_path / "expected")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def test_progress_counts_every_token_once_in_every_layer(
    tmp_path: Path, texts: Texts, cut: Cut, capsys: pytest.CaptureFixture[str]
) -> None:
    refitted(cut, texts, tmp_path / "out")
    said = [line for line in capsys.readouterr().err.splitlines() if "layer 5/5" in line]
    done = f"{5 * SAMPLES * SEQUENCE_LENGTH:,}"
    assert said[-1].startswith(f"refit: {done}/{done} token-layers, ")  # every pass was counted, and none twice
