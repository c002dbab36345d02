"""The training loop: any cut of the batch is the same step, resumed is uninterrupted, and the heads learn their tokens."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import FORWARD, GRADIENT, SUM, TRAINED, assert_trained_alike, error
from safetensors.torch import load_file, save_file
from settings import sections
from tiny import VOCAB_SIZE, tiny_config, tiny_stream, write_tiny_checkpoint, write_tiny_tokens
from torch import Tensor

from slimqwen.artifacts import MARKER, claim_folder
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import Preempted, StageFailed, UserError
from slimqwen.data.packed import PackedTokens
from slimqwen.data.stream import TokenStream
from slimqwen.families.qwen3_next import QWEN3_NEXT
from slimqwen.losses.loss import LossWeights, count_targets
from slimqwen.model.model import MtpCausalLM, initialise, load
from slimqwen.recipe import DistilRecipe, TextSettings
from slimqwen.training.distil import distil
from slimqwen.training.inputs import TrainingInputs, check_terms
from slimqwen.training.metrics import StepLog
from slimqwen.training.span import total_steps
from slimqwen.training.teacher import LiveTeacher
from slimqwen.training.trainer import MAX_SKIPPED_IN_A_ROW, Span, Student, Trainer

pytestmark = pytest.mark.rounding

SEQUENCE_LENGTH = 16
BATCH_SIZE = 4
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`student`, a `teacher` of another width, and `tokens`; read-only."""
    folder = tmp_path_factory.mktemp("trainer")
    tokenizer, _ = write_tiny_tokens(folder)
    write_tiny_checkpoint(folder / "student", tokenizer=tokenizer)
    write_tiny_checkpoint(folder / "teacher", seed=1, tokenizer=tokenizer, hidden_size=40, num_experts=4)
    return folder


def recipe(**changes: Any) -> dict[str, Any]:
    """Return the arguments `recipe` and `execution`."""
    usual = {
        "tokens": STEPS * BATCH_SIZE * SEQUENCE_LENGTH,
        "batch_size": BATCH_SIZE,
        "learning_rate": 1e-3,
        "final_learning_rate": 1e-4,
        "warmup": "2 steps",
        "save_every": "2 steps",
        "loss_chunk_tokens": 24,
    }
    return sections(DistilRecipe, usual | changes)


def train(folder: Path, out: Path, *, teacher: str | None = "teacher", seed: int = 0, **changes: Any) -> Path:
    """`distil` on the files of `folder`; `span`, `stage` and `run` may be given, all else is the recipe's."""
    span = changes.pop("span", None)
    labels = {name: changes.pop(name) for name in ("stage", "run") if name in changes}
    return distil(
        TrainingInputs(
            folder / changes.pop("student", "student"),
            folder / "tokens",
            teacher=None if teacher is None else folder / teacher,
        ),
        out,
        **recipe(**changes),
        text=TextSettings(sequence_length=SEQUENCE_LENGTH, seed=seed),
        span=span,
        log=StepLog(**labels),
    )


def trainer(folder: Path, **changes: Any) -> Trainer:
    checkpoint = Checkpoint(folder / "student")
    stream = TokenStream(PackedTokens(folder / "tokens" / "train"), SEQUENCE_LENGTH, seed=0)
    student = Student(load(folder / "student"), checkpoint.family, checkpoint.config)
    student.model.train()
    teacher = LiveTeacher(load(folder / "teacher"), teaches_mtp=False)
    return Trainer(student, teacher, stream, span=Span(0, STEPS, STEPS), **recipe(**changes))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what measures time and memory."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for name in ("seconds", "tokens_per_second", "memory_bytes"):
        assert all(line.pop(name) > 0 for line in lines)
    return lines


def weights(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


# --- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "micro_batch_size", "forwards"),
    [("exact", 1, 2), ("running", 2, 2), ({"rows": 2}, 2, 1), ({"rows": 2}, 1, 2)],
)
def test_any_cut_of_the_batch_is_the_same_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch, counts: Any, micro_batch_size: int, forwards: int
) -> None:
    """Losses, gradients and weights, load balancing over the whole batch included (its weight is large here).

    forwards: of the student, of each micro-batch. Only counts of a later micro-batch take a second one: with counts that run in
    portions of two rows, two rows at a time take none.
    """
    changes = {"load_balancing_coefficient": 0.5, "load_balancing_counts": counts, "warmup": "0 steps"}
    whole = trainer(folder, **changes)
    parts = trainer(folder, **changes, micro_batch_size=micro_batch_size)
    made: list[Trainer] = []
    original = Trainer.forward
    monkeypatch.setattr(Trainer, "forward", lambda self, batch: (made.append(self), original(self, batch))[1])
    for step in range(2):
        expected, found = whole.step(step), parts.step(step)
        assert found.keys() == expected.keys() and {"lm", "kd", "mtp_lm", "mtp_kd", "load_balancing"} <= found.keys()
        assert found == pytest.approx(expected, rel=TRAINED if step else GRADIENT)
        if step == 0:
            for name, parameter in whole.parameters.items():
                assert error(parts.parameters[name].grad, parameter.grad) < GRADIENT, name
    assert_trained_alike(parts.parameters, whole.parameters)
    assert made.count(whole) == 2 and made.count(parts) == 2 * forwards * BATCH_SIZE // micro_batch_size


def test_counts_that_run_are_seen(folder: Path) -> None:
    """Each row meets its own counts and those of the rows before: another load balancing, and the same other terms."""
    exact, running = (trainer(folder, load_balancing_counts=counts).step(0) for counts in ("exact", {"rows": 1}))
    assert abs(running["load_balancing"] - exact["load_balancing"]) > 1e-3
    assert running["loss"] == pytest.approx(exact["loss"], rel=FORWARD)


def test_recomputed_activations_have_the_same_gradients(folder: Path) -> None:
    gradients, forwards = [], []
    for checkpointing in (False, True):
        one = trainer(folder, recompute_activations=checkpointing, load_balancing_coefficient=0.5)
        calls: list[int] = []
        one.student.model.backbone.get_decoder().layers[0].mlp.register_forward_pre_hook(
            lambda *_, c=calls: c.append(1)
        )
        batch = one.stream.batch(0, BATCH_SIZE)
        terms = LossWeights.from_terms(one.recipe.terms, 0.5, 0.3).per_token(*count_targets(batch.tokens))
        one.backward(batch, terms, one.count_ahead([batch]), BATCH_SIZE * SEQUENCE_LENGTH)
        gradients.append({name: parameter.grad for name, parameter in one.parameters.items()})
        forwards.append(len(calls))
    assert forwards == [1, 2]  # the second did compute the layer again
    for name, expected in gradients[0].items():
        assert expected is not None and expected.any(), name
        assert error(gradients[1][name], expected) < GRADIENT, name


def test_a_step_reports_the_terms_of_the_recipe(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path / "out", run="name", stage=3)
    lines = metrics(tmp_path)
    terms = {"lm", "kd", "mtp_lm", "mtp_kd"}
    labels = {"run", "stage", "step", "tokens", "loss", "lambda", "beta", "learning_rate", "grad_norm"}
    assert all(labels | terms | {"load_balancing", "top1_agreement"} == line.keys() for line in lines)
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert [line["tokens"] for line in lines] == [64 * (step + 1) for step in range(STEPS)]
    assert {(line["run"], line["stage"]) for line in lines} == {("name", 3)}
    assert [line["lambda"] for line in lines] == pytest.approx([1.0, 0.95, 0.9, 0.85, 0.8, 0.75])
    assert (lines[0]["beta"], lines[-1]["beta"]) == pytest.approx((0.3, 0.1))
    assert (lines[0]["learning_rate"], lines[1]["learning_rate"]) == pytest.approx((5e-4, 1e-3))
    assert lines[-1]["learning_rate"] == pytest.approx(1e-4)
    first = lines[0]
    combined = first["kd"] + 0.3 * first["mtp_kd"]  # lambda is 1 at the first step
    assert first["loss"] == pytest.approx(combined, rel=SUM)
    assert lines[-1]["kd"] < first["kd"]


def test_a_growing_batch_reads_each_row_once(folder: Path, tmp_path: Path) -> None:
    """2 rows for 64 tokens (2 steps), then 4: the rows in order, and lambda by the tokens before each step."""
    original, read = TokenStream.batch, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenStream, "batch", lambda self, *rows: (read.append(rows[:2]), original(self, *rows))[1])
        ramp = {"start": 2, "tokens": 64}
        train(folder, tmp_path / "out", teacher=None, terms=["lm"], tokens=12 * 16, batch_size_ramp=ramp)
    assert read == [(0, 2), (2, 2), (4, 4), (8, 4)]
    lines = metrics(tmp_path)
    assert [line["tokens"] for line in lines] == [32, 64, 128, 192]
    assert [line["lambda"] for line in lines] == pytest.approx([1 - 0.25 * row / 8 for row in (0, 2, 4, 8)])


# --- what learns and what does not ------------------------------------------------------------------------------------


def test_a_model_has_nothing_to_learn_from_itself(folder: Path, tmp_path: Path) -> None:
    """KD of a model with itself is 0 with no gradient: not one bit of the weights changes."""
    changes = {"terms": ["kd"], "optimizer": {"weight_decay": 0.0}, "load_balancing_coefficient": 0.0}
    out = train(folder, tmp_path / "out", teacher="student", **changes)
    assert same_weights(out, folder / "student")
    for line in metrics(tmp_path):
        assert line["kd"] == line["loss"] == line["grad_norm"] == 0.0 and line["top1_agreement"] == 1.0


def test_weight_decay_is_for_matrices_alone(folder: Path, tmp_path: Path) -> None:
    """With no gradient AdamW only decays: each step multiplies by 1 - learning_rate x weight_decay."""
    changes = {
        "terms": ["kd"],
        "optimizer": {"weight_decay": 0.5},
        "load_balancing_coefficient": 0.0,
        "warmup": "0 steps",
    }
    changes |= {"tokens": BATCH_SIZE * SEQUENCE_LENGTH, "learning_rate": 0.1, "final_learning_rate": 0.1}
    after = weights(train(folder, tmp_path / "out", teacher="student", **changes))
    for name, before in weights(folder / "student").items():
        kept = 1.0 if before.dim() == 1 or name.startswith("mtp.") else 1.0 - 0.1 * 0.5
        torch.testing.assert_close(after[name], before * kept, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize(("terms", "trains_mtp"), [(["lm", "kd"], False), (["lm", "mtp_lm"], True)])
def test_mtp_is_trained_by_its_terms_alone(folder: Path, tmp_path: Path, terms: list[str], trains_mtp: bool) -> None:
    before = weights(folder / "student")
    after = weights(train(folder, tmp_path / "out", teacher="teacher" if "kd" in terms else None, terms=terms))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    main = {name for name in before if not name.startswith("mtp.")}
    assert len(main - changed) < 0.1 * len(main)  # an expert that no token reached may rest
    assert ({"mtp.fc.weight", "mtp.norm.weight"} <= changed) == trains_mtp
    assert trains_mtp or changed <= main
    assert ("mtp_lm" in metrics(tmp_path)[0]) == trains_mtp


def test_a_student_without_mtp_is_trained_without(folder: Path, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "student", num_nextn_predict_layers=0)
    (tmp_path / "tokens").symlink_to(folder / "tokens")
    (tmp_path / "teacher").symlink_to(folder / "teacher")
    out = train(tmp_path, tmp_path / "out")
    assert not Checkpoint(out).has_mtp
    assert "kd" in metrics(tmp_path)[0] and "mtp_kd" not in metrics(tmp_path)[0]


def test_mtp_learns_the_token_after_next(tmp_path: Path) -> None:
    """Pairs (a, f(a)) with a at random: t_{i+2} = f(t_{i+1}) wherever t_{i+1} begins a pair.

    m_i must then know t_{i+2}; at the other positions t_{i+2} is one of 8 at random and cannot be known. A head that was
    shifted by one in either direction could know no second half of a pair, and one that saw its target would know all.
    """
    firsts = torch.randint(8, (600,), generator=torch.Generator().manual_seed(0))
    image = torch.tensor([11, 14, 8, 12, 15, 9, 13, 10])  # f: 0..7 -> 8..15
    pairs = torch.stack([firsts, image[firsts]], dim=1).flatten().tolist()
    config = tiny_config(vocab_size=16, num_hidden_layers=2, full_attention_interval=2, num_experts=4)
    model = initialise(config, seed=0)
    stream = tiny_stream(tmp_path, [pairs], sequence_length=15, vocab_size=16)
    settings = recipe(
        terms=["lm", "mtp_lm"],
        batch_size=8,
        learning_rate=1e-2,
        final_learning_rate=1e-3,
        warmup="5 steps",
        mtp_weight={"start": 1.0, "end": 1.0},
    )
    one = Trainer(Student(model, QWEN3_NEXT, config), None, stream, span=Span(0, 60, 60), **settings)
    model.train()
    losses = [one.step(step) for step in range(60)]

    rows = stream.in_order(range(20, 36)).tokens
    targets = rows[:, 2:]
    with torch.no_grad():
        hidden = model.eval()(rows).mtp
        assert hidden is not None
        nats = -(hidden[:, :-1] @ model.head.T).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    assert nats[targets >= 8].max() < 0.3, "t_{i+2} = f(t_{i+1}) was not learned"
    assert nats[targets < 8].mean() > 0.8 * math.log(8), "what cannot be known was known"
    assert losses[-1]["mtp_lm"] == pytest.approx(0.5 * math.log(8), abs=0.2) and losses[0]["mtp_lm"] > 2.5


# --- interrupted and resumed ------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for kill -9: nothing is tidied up by the code under test."""


def break_at(step: int, monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    """Call `action` when the trainer begins `step`, once."""
    original, done = Trainer.step, []

    def step_or_break(self: Trainer, number: int) -> dict[str, float]:
        if number == step and not done:
            done.append(number)
            action()
        return original(self, number)

    monkeypatch.setattr(Trainer, "step", step_or_break)


def kill() -> None:
    raise Killed


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    return train(folder, out)


@pytest.mark.parametrize("step", [1, 4, 5])
def test_resumed_is_uninterrupted_bit_for_bit(
    folder: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Saved every 2 steps: killed at step 1 it starts again, at 4 it goes on, at 5 it goes back to 4."""
    break_at(step, monkeypatch, kill)
    with pytest.raises(Killed):
        train(folder, tmp_path / "out")
    saved = [path.name for path in (tmp_path / ".out.state").glob("step-*")]
    assert sorted(saved) == ([] if step == 1 else ["step-000000002", "step-000000004"])
    assert not (tmp_path / "out").exists()

    # What a process that died in the middle of a write leaves behind.
    partial = tmp_path / ".out.state" / ".step-000000006.partial"
    claim_folder(partial, None)
    (partial / "state.safetensors").write_bytes(b"half of it")
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"run": "slimqwen", "stage": 1, "st')

    performed: list[int] = []
    original = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, number: (performed.append(number), original(self, number))[1])
    train(folder, tmp_path / "out")
    assert performed == list(range({1: 0, 4: 4, 5: 4}[step], STEPS))
    assert same_weights(tmp_path / "out", uninterrupted)
    assert metrics(tmp_path) == metrics(uninterrupted.parent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [MARKER, "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    )


@pytest.mark.parametrize("terms", [["lm", "kd", "mtp_lm", "mtp_kd"], ["kd"]])
def test_ctrl_c_saves_after_the_step_and_goes_on_from_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terms: list[str]
) -> None:
    expected = train(folder, tmp_path / "expected" / "out", terms=terms)
    with monkeypatch.context() as patch:
        break_at(3, patch, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train(folder, tmp_path / "out", terms=terms, save_every="1000 steps")
    assert [path.name for path in (tmp_path / ".out.state").glob("step-*")] == ["step-000000004"]
    assert len(metrics(tmp_path)) == 4
    train(folder, tmp_path / "out", terms=terms)  # how often states are saved is not part of what is trained
    assert same_weights(tmp_path / "out", expected)
    assert metrics(tmp_path) == metrics(expected.parent)


def test_sigterm_saves_the_state_and_the_same_command_continues(
    folder: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        break_at(2, patch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Preempted, match="after step 3, state saved") as stopped:
            train(folder, tmp_path / "out", save_every="1000 steps", keep_states=1)
    assert stopped.value.exit_code == 75
    assert [path.name for path in (tmp_path / ".out.state").glob("step-*")] == ["step-000000003"]
    train(folder, tmp_path / "out")
    assert same_weights(tmp_path / "out", uninterrupted)


@pytest.mark.parametrize(
    ("forward", "steps"),
    [
        (2 * 8 + 3, 2),  # while the experts of the third step are counted: 4 forwards, then 4 that train
        (2 * 8 + 6, 2),  # in the middle of its backward passes
        (2 * 8 + 8, 3),  # in the last of them: the step is complete
        (1, 0),  # nothing is trained yet
    ],
)
def test_sigterm_ends_a_step_between_two_micro_batches(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forward: int, steps: int
) -> None:
    """The half-made step is left out: the state is that of the last complete one, which is written once."""
    changes = {"micro_batch_size": 1, "terms": ["lm", "kd"]}
    expected = train(folder, tmp_path / "expected" / "out", **changes)
    calls: list[int] = []
    original = Trainer.forward

    def forward_or_signal(self: Trainer, batch: Any) -> Any:
        calls.append(len(batch.tokens))
        if len(calls) == forward:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "forward", forward_or_signal)
        with pytest.raises(Preempted, match=f"after step {steps}, state saved"):
            train(folder, tmp_path / "out", **changes)
    assert len(calls) == forward and set(calls) == {1}  # not one more micro-batch
    newest = max(path.name for path in (tmp_path / ".out.state").glob("step-*"))
    assert newest == f"step-{steps:09d}"
    train(folder, tmp_path / "out", **changes)
    assert same_weights(tmp_path / "out", expected)
    assert metrics(tmp_path) == metrics(expected.parent)


def test_states_are_saved_by_the_clock_too(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_at(4, monkeypatch, kill)
    with pytest.raises(Killed):
        train(folder, tmp_path / "out", save_every=["1000 steps", "0.000000001 min"], keep_states=3)
    saved = sorted(path.name for path in (tmp_path / ".out.state").glob("step-*"))
    assert saved == ["step-000000002", "step-000000003", "step-000000004"]


@pytest.mark.parametrize("change", [{"seed": 1}, {"learning_rate": 2e-3}, {"teacher": "student"}])
def test_a_state_from_other_inputs_is_not_resumed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    with monkeypatch.context() as patch:
        break_at(5, patch, kill)
        with pytest.raises(Killed):
            train(folder, tmp_path / "out")
    train(folder, tmp_path / "out", **change)
    expected = train(folder, tmp_path / "expected" / "out", **change)
    assert same_weights(tmp_path / "out", expected)
    assert metrics(tmp_path) == metrics(expected.parent)


def test_two_spans_share_data_and_schedules_but_not_moments(folder: Path, tmp_path: Path, uninterrupted: Path) -> None:
    first = train(folder, tmp_path / "first", span=Span(0, 3, STEPS), stage=1)
    (tmp_path / "teacher").symlink_to(folder / "teacher")
    (tmp_path / "tokens").symlink_to(folder / "tokens")
    second = train(tmp_path, tmp_path / "second", student="first", span=Span(3, STEPS, STEPS), stage=2)
    one, two = metrics(uninterrupted.parent), metrics(tmp_path)
    assert [line["stage"] for line in two] == [1, 1, 1, 2, 2, 2]
    for name in ("step", "tokens", "learning_rate", "lambda", "beta"):
        assert [line[name] for line in two] == [line[name] for line in one]
    # The first step of the second span sees the same data with the same weights; what it does with them differs.
    assert [line["loss"] for line in two[:4]] == [line["loss"] for line in one[:4]]
    assert two[4]["loss"] != one[4]["loss"]
    assert not same_weights(second, uninterrupted) and not same_weights(first, second)


def test_other_runs_lines_survive(folder: Path, tmp_path: Path) -> None:
    costs = {"seconds": 1.0, "tokens_per_second": 1.0, "memory_bytes": 1}
    other = json.dumps({"run": "other", "stage": 1, "step": 5, **costs})
    (tmp_path / "metrics.jsonl").write_text(other + "\n")
    train(folder, tmp_path / "out")
    train(folder, tmp_path / "out")  # trained anew: its lines are replaced, not repeated
    lines = metrics(tmp_path)
    assert [line["run"] for line in lines] == ["other"] + ["slimqwen"] * STEPS


# --- what can go wrong ------------------------------------------------------------------------------------------------


def poison_weights(model: MtpCausalLM) -> None:
    with torch.no_grad():
        model.tensors()["lm_head.weight"][5, 5] = torch.inf


def poison_gradient(model: MtpCausalLM) -> None:
    model.tensors()["model.norm.weight"].register_hook(lambda gradient: gradient * torch.inf)


@pytest.mark.parametrize("poison", [poison_weights, poison_gradient])
def test_a_step_that_is_not_finite_stops_before_it_changes_anything(folder: Path, poison: Any) -> None:
    one = trainer(folder)
    one.step(0)
    poison(one.student.model)
    before = {name: parameter.detach().clone() for name, parameter in one.parameters.items()}
    moments = [state["exp_avg"].clone() for state in one.optimizer.state.values()]
    with pytest.raises(StageFailed, match=r"before optimiser step 1: .*(nan|inf)") as error:
        one.step(1)
    assert error.value.exit_code == 1
    assert all(torch.equal(before[name], parameter) for name, parameter in one.parameters.items())
    assert all(torch.equal(a, b["exp_avg"]) for a, b in zip(moments, one.optimizer.state.values(), strict=True))


def test_a_bad_step_is_skipped_where_the_recipe_sets_that(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The optimiser has not seen it: the step after it is as if it had not been."""
    one, other = trainer(folder, bad_steps="skip"), trainer(folder)
    one.step(0), other.step(0)
    with monkeypatch.context() as patch:
        original = Trainer.backward
        patch.setattr(
            Trainer, "backward", lambda self, *rest: (original(self, *rest)[0] * torch.nan, *original(self, *rest)[1:])
        )
        values = one.step(1)
    assert values["skipped"] == 1 and "loss" not in values and values["lm"] > 0
    assert "step 1 is left out: loss nan" in capsys.readouterr().err
    assert one.step(2) == other.step(2)
    assert all(torch.equal(one.parameters[name], parameter) for name, parameter in other.parameters.items())


def test_skipping_has_an_end(folder: Path) -> None:
    one = trainer(folder, bad_steps="skip")
    poison_weights(one.student.model)
    assert all(one.step(step)["skipped"] for step in range(3))
    one.guard.skipped_in_a_row = MAX_SKIPPED_IN_A_ROW
    with pytest.raises(StageFailed, match="before optimiser step 3"):
        one.step(3)


def test_training_that_is_not_finite_leaves_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "student")
    tensors = weights(tmp_path / "student")
    tensors["model.layers.3.self_attn.o_proj.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "student" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "tokens").symlink_to(folder / "tokens")
    with pytest.raises(StageFailed, match="before optimiser step 0"):
        train(tmp_path, tmp_path / "out", teacher=None, terms=["lm"])
    assert not (tmp_path / "out").exists()


def test_terms_that_need_a_teacher_say_so(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="need a teacher"):
        train(folder, tmp_path / "out", teacher=None)
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_with_another_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("student", "tokens"):
        (tmp_path / name).symlink_to(folder / name)
    write_tiny_checkpoint(tmp_path / "teacher", vocab_size=320)
    with pytest.raises(UserError, match=r"320 tokens in its vocabulary .* 300"):
        train(tmp_path, tmp_path / "out")


def test_too_few_tokens_for_one_step() -> None:
    assert total_steps(recipe(tokens=127)["recipe"], SEQUENCE_LENGTH) == 1
    with pytest.raises(UserError, match="less than one step"):
        total_steps(recipe(tokens=63)["recipe"], SEQUENCE_LENGTH)


def test_terms_that_student_or_teacher_cannot_serve(tmp_path: Path) -> None:
    whole = Checkpoint(write_tiny_checkpoint(tmp_path / "whole"))
    without_mtp = Checkpoint(write_tiny_checkpoint(tmp_path / "without_mtp", num_nextn_predict_layers=0))
    wider = Checkpoint(write_tiny_checkpoint(tmp_path / "wider", vocab_size=VOCAB_SIZE + 1))

    def terms(*names: str, **settings: str) -> DistilRecipe:
        return DistilRecipe.model_validate({"tokens": 1, "terms": list(names), **settings})

    check_terms(terms("lm", "mtp_lm"), whole, None)
    check_terms(terms("lm", "kd", "mtp_kd"), whole, without_mtp)  # the teacher's main head serves both
    with pytest.raises(UserError, match="need a teacher"):
        check_terms(terms("kd"), whole, None)
    with pytest.raises(UserError, match="nothing else to train"):
        check_terms(terms("mtp_lm"), without_mtp, None)
    with pytest.raises(UserError, match="same vocabulary"):
        check_terms(terms("kd"), whole, wider)
    with pytest.raises(UserError, match="use mtp_target: main"):
        check_terms(terms("mtp_kd", mtp_target="mtp"), whole, without_mtp)
