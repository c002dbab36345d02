"""Training on several ranks (gloo): the same losses and weights as on one, whatever the cut; kills, resumes, exports."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, run_ranks
from rounding import FORWARD, GRADIENT, TRAINED, assert_trained_alike, error
from safetensors.torch import load_file
from settings import sections
from tiny import tiny_tokens, write_tiny_checkpoint, write_tiny_tokens
from tiny_families import FAMILIES_NATIVE
from torch import Tensor
from torch.distributed.tensor import DTensor

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.cli import app
from slimqwen.core.errors import UserError
from slimqwen.data.store import training_stream
from slimqwen.data.tokenize import tokenize
from slimqwen.losses.loss import count_targets
from slimqwen.model.model import load
from slimqwen.parallel.ranks import join_ranks
from slimqwen.parallel.sharded_checkpoint import export, load_sharded
from slimqwen.recipe import DistilRecipe, DocumentBoundaries, Source, TextSettings
from slimqwen.training import heldout, trainer
from slimqwen.training.distil import distil
from slimqwen.training.inputs import TrainingInputs
from slimqwen.training.trainer import Trainer

SEQUENCE_LENGTH = 16
BATCH_SIZE = 4
STEPS = 4
TWO_LAYERS = {"num_hidden_layers": 2, "full_attention_interval": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`student`, `tied`, a `teacher` of another width, and `tokens`; read-only."""
    folder = tmp_path_factory.mktemp("parallel")
    tokenizer, _ = write_tiny_tokens(folder)
    write_tiny_checkpoint(folder / "student", tokenizer=tokenizer, **TWO_LAYERS)
    write_tiny_checkpoint(folder / "tied", tokenizer=tokenizer, tie_word_embeddings=True, **TWO_LAYERS)
    write_tiny_checkpoint(folder / "teacher", seed=1, tokenizer=tokenizer, hidden_size=40, num_experts=3, **TWO_LAYERS)
    return folder


def train(
    folder: Path,
    out: Path,
    changes: dict[str, Any],
    student: str = "student",
    steps: int = STEPS,
    documents: DocumentBoundaries = "packed",
) -> None:
    """`distil` on the files of `folder`, by one process or, called in each, by several."""
    settings = {
        "tokens": steps * BATCH_SIZE * SEQUENCE_LENGTH,
        "batch_size": BATCH_SIZE,
        "learning_rate": 1e-3,
        "final_learning_rate": 1e-4,
        "warmup": "2 steps",
        "save_every": "2 steps",
        "loss_chunk_tokens": 24,
        "load_balancing_coefficient": 0.5,  # large, so that experts counted per rank would be seen
    }
    distil(
        TrainingInputs(folder / student, folder / "tokens", teacher=folder / "teacher"),
        out,
        **sections(DistilRecipe, settings | changes),
        text=TextSettings(sequence_length=SEQUENCE_LENGTH, documents=documents),
    )


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of it, all rows in one micro-batch."""
    out = tmp_path_factory.mktemp("alone") / "out"
    train(folder, out, {})
    return out


@pytest.fixture(scope="module")
def pair(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks make of it."""
    out = tmp_path_factory.mktemp("pair") / "out"
    run_ranks(2, train, folder, out, {})
    return out


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what measures time and memory."""
    lines = [json.loads(line) for line in (out.parent / "metrics.jsonl").read_text().splitlines()]
    for name in ("seconds", "tokens_per_second", "memory_bytes"):
        assert all(line.pop(name) > 0 for line in lines)
    return [{name: line[name] for name in line if not name.startswith("busiest_rank")} for line in lines]


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model.safetensors")


def assert_equal_but_for_rounding(out: Path, expected: Path) -> None:
    lines, expected_lines = metrics(out), metrics(expected)
    assert len(lines) == len(expected_lines)
    for line, expected_line in zip(lines, expected_lines, strict=True):
        assert line.pop("run") == expected_line.pop("run")
        assert line == pytest.approx(expected_line, rel=TRAINED if line["step"] else GRADIENT)
    assert_trained_alike(weights(out), weights(expected))


# --- the same step on any number of ranks ------------------------------------------------------------------------------


def test_two_ranks_are_one(pair: Path, alone: Path) -> None:
    assert_equal_but_for_rounding(pair, alone)
    assert sorted(path.name for path in pair.parent.iterdir()) == sorted(path.name for path in alone.parent.iterdir())
    assert sorted(path.name for path in pair.iterdir()) == sorted(path.name for path in alone.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 1, "recompute_activations": True},
        {"shard_ranks": 1, "micro_batch_size": 1, "reshard_student": False, "reshard_teacher": False},
    ],
)
def test_however_it_is_cut_and_sharded(folder: Path, tmp_path: Path, alone: Path, changes: dict[str, Any]) -> None:
    run_ranks(2, train, folder, tmp_path / "out", changes)
    assert_equal_but_for_rounding(tmp_path / "out", alone)


def test_tied_embeddings_and_no_mtp_term(folder: Path, tmp_path: Path) -> None:
    """The embedding gets gradients as embedding and as lm_head; the MTP module, which has no term, gets none."""
    changes = {"terms": ["lm", "kd"]}
    train(folder, tmp_path / "alone" / "out", changes, "tied")
    run_ranks(2, train, folder, tmp_path / "pair" / "out", changes, "tied")
    assert_equal_but_for_rounding(tmp_path / "pair" / "out", tmp_path / "alone" / "out")
    assert "lm_head.weight" not in weights(tmp_path / "pair" / "out")


def train_isolated(folder: Path, out: Path, changes: dict[str, Any]) -> None:
    train(folder, out, changes, documents="isolated")


def test_ranks_with_more_and_less_padding(folder: Path, tmp_path: Path) -> None:
    """One document to a row: the ranks' rows have different numbers of real tokens, and one number divides them all.

    The load balancing's counts run from one row of each rank to the next, as over pairs of rows on one rank.
    """
    (tmp_path / "text").mkdir()
    for i in range(60):
        (tmp_path / "text" / f"{i}.txt").write_text("index[tail] = left\n" * (1 + i % 5))
    text = [Source(path=tmp_path / "text")]
    tokenize(text, folder / "student", tmp_path / "tokens", heldout_sources=[Source(path=folder / "heldout_text")])
    for name in ("student", "teacher"):
        (tmp_path / name).symlink_to(folder / name)
    batch = training_stream(tmp_path / "tokens", SEQUENCE_LENGTH, 0, "isolated").batch(0, BATCH_SIZE)
    assert batch.mask is not None
    halves = [count_targets(batch.tokens[rank::2], batch.mask[rank::2]) for rank in range(2)]
    assert halves[0] != halves[1]
    running = {"load_balancing_counts": {"rows": 2}}  # a row of each rank
    train(tmp_path, tmp_path / "alone" / "out", running, documents="isolated")
    run_ranks(2, train_isolated, tmp_path, tmp_path / "pair" / "out", running | {"micro_batch_size": 1})
    assert_equal_but_for_rounding(tmp_path / "pair" / "out", tmp_path / "alone" / "out")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"shard_ranks": 2, "micro_batch_size": 1}])
def test_four_ranks_are_one(folder: Path, tmp_path: Path, alone: Path, changes: dict[str, Any]) -> None:
    """The teacher's three experts on four ranks: one rank holds none of them. A rank has one row: experts rest."""
    run_ranks(4, train, folder, tmp_path / "out", changes)
    assert_equal_but_for_rounding(tmp_path / "out", alone)


def test_a_batch_that_the_ranks_cannot_share(folder: Path, tmp_path: Path) -> None:
    codes, said = Ranks(2, train, folder, tmp_path / "out", {"batch_size": 3}).end()
    assert codes == [2, 2] and "batch_size 3 cannot be shared by 2 ranks" in said
    codes, said = Ranks(2, train, folder, tmp_path / "out", {"shard_ranks": 3}).end()
    assert codes == [2, 2] and "shard_ranks 3 does not divide the 2 ranks" in said
    assert list(tmp_path.iterdir()) == []


def test_studies_are_not_for_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="'pretrain' is work for one process, and torchrun has started 2"):
        app(["pretrain", "nowhere"], standalone_mode=False)


# --- in and out of shards ----------------------------------------------------------------------------------------------


def write_every_family(folder: Path) -> list[str]:
    """A checkpoint of each family, one of them in bfloat16 with stacked experts; their names."""
    for name, native in FAMILIES_NATIVE.items():
        write_tiny_checkpoint(folder / name, native=native)
    write_tiny_checkpoint(folder / "stacked", layout="fused", dtype=torch.bfloat16)
    return [*FAMILIES_NATIVE, "stacked"]


def load_and_export(folder: Path, names: list[str]) -> None:
    device = torch.device("cpu")
    with join_ranks(device) as ranks, torch.no_grad():
        for name in names:
            checkpoint, tokens = Checkpoint(folder / name), tiny_tokens()
            model = load_sharded(checkpoint, ranks, torch.float32, device, trains=True, reshard_after_forward=True)
            of_all = sum(parameter.numel() for parameter in model.parameters())
            sharded = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
            whole = [key for key, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
            own = sum(parameter.to_local().numel() for parameter in sharded)
            assert all(key.endswith(model.family.float32_tensors) for key in whole), whole
            assert 0.45 * of_all < own < 0.55 * of_all, f"{name}: rank {ranks.rank} holds {own} of {of_all}"
            found, expected = model(tokens), load(folder / name)(tokens)
            assert error(found.main, expected.main) < FORWARD, name
            assert not checkpoint.has_mtp or error(found.mtp, expected.mtp) < FORWARD, name
            model.reshard()
            (folder / f"{name}-exported").mkdir(exist_ok=True)
            export(model, folder / f"{name}-exported" if ranks.is_first else None, checkpoint)
            ranks.wait()


def test_every_family_is_sharded_and_put_together_again(tmp_path: Path) -> None:
    names = write_every_family(tmp_path)
    run_ranks(2, load_and_export, tmp_path, names)
    for name in names:
        before, after = weights(tmp_path / name), weights(tmp_path / f"{name}-exported")
        assert before.keys() == after.keys()
        for tensor in before:
            assert before[tensor].dtype == after[tensor].dtype and torch.equal(before[tensor], after[tensor]), tensor
        configs = [(tmp_path / folder / "config.json").read_text() for folder in (name, f"{name}-exported")]
        assert json.loads(configs[0]) == json.loads(configs[1])


# --- interrupted and resumed -------------------------------------------------------------------------------------------


def train_until(step: int, folder: Path, out: Path, steps: int = STEPS) -> None:
    """Ends like a killed process, without a word, when `step` begins."""
    original = Trainer.step

    def step_or_end(self: Trainer, number: int) -> dict[str, float]:
        if number == step:
            os._exit(9)
        return original(self, number)

    Trainer.step = step_or_end  # type: ignore[method-assign]
    train(folder, out, {}, "student", steps)


def test_resumed_on_as_many_ranks_is_uninterrupted_bit_for_bit(folder: Path, tmp_path: Path, pair: Path) -> None:
    Ranks(2, train_until, 3, folder, tmp_path / "out").end()
    assert [path.name for path in (tmp_path / ".out.state").glob("step-*")] == ["step-000000002"]
    run_ranks(2, train, folder, tmp_path / "out", {})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (pair / "model.safetensors").read_bytes()
    assert metrics(tmp_path / "out") == metrics(pair)


def test_resumed_on_one_rank_and_on_two_again(folder: Path, tmp_path: Path) -> None:
    """Two steps by two ranks, two by one, two by two."""
    train(folder, tmp_path / "alone" / "out", {}, "student", 6)
    out = tmp_path / "changing" / "out"
    for ranks, step in ((2, 2), (1, 4)):
        Ranks(ranks, train_until, step, folder, out, 6).end()
        newest = max(path.name for path in (out.parent / ".out.state").glob("step-*"))
        assert newest == f"step-{step:09d}"
    run_ranks(2, train, folder, out, {}, "student", 6)
    assert_equal_but_for_rounding(out, tmp_path / "alone" / "out")


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, [75, 75]), (signal.SIGKILL, [1, -9])])
def test_a_signal_to_one_rank(folder: Path, tmp_path: Path, number: signal.Signals, expected: list[int]) -> None:
    """SIGTERM: all save after the same step. SIGKILL: the other ends with a sentence; what was saved is whole."""
    out = tmp_path / "out"
    ranks = Ranks(2, train, folder, out, {"async_save": True}, "student", 10_000)
    log = tmp_path / "metrics.jsonl"
    end = time.monotonic() + 60
    saved = tmp_path / ".out.state"
    while not (log.exists() and len(log.read_text().splitlines()) >= 3 and any(saved.glob("step-*"))):
        assert time.monotonic() < end and all(process.is_alive() for process in ranks.processes)
        time.sleep(0.02)
    os.kill(ranks.processes[1].pid, number)
    codes, said = ranks.end(timeout_seconds=60)
    assert codes == expected
    states = sorted((tmp_path / ".out.state").glob("step-*"))
    if number == signal.SIGTERM:
        assert f"stopped by SIGTERM after step {len(metrics(out))}, state saved" in said
        assert states[-1].name == f"step-{len(metrics(out)):09d}"
    else:
        assert "rank 0 has lost " in said and "Traceback" not in said
        assert states
    assert len(states) <= 2
    for state in states:
        files = [load_file(file) for file in sorted(state.glob("*.safetensors"))]
        parameters = {name for name in files[0] | files[1] if name.startswith("parameter.")}
        moments = {name for name in files[0] | files[1] if name.startswith("exp_avg.")}
        assert len(files) == 2 and len(parameters) == len(moments) > 30


def train_until_a_signal(folder: Path, out: Path, forward: int) -> None:
    """Train with four micro-batches a rank; the second rank gets SIGTERM in its forward pass number `forward`."""
    original, calls = trainer.Trainer.forward, []

    def forward_or_signal(self: Trainer, batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == forward and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    trainer.Trainer.forward = forward_or_signal  # type: ignore[method-assign]
    train(folder, out, FOUR_MICRO_BATCHES)


FOUR_MICRO_BATCHES = {"batch_size": 8, "micro_batch_size": 1}


def test_a_signal_ends_a_step_between_micro_batches_on_both_ranks(folder: Path, tmp_path: Path) -> None:
    """Two steps, each of 4 forward passes that count experts and 4 that train; one rank gets the signal, both leave the step out."""
    expected = tmp_path / "expected" / "out"
    run_ranks(2, train, folder, expected, FOUR_MICRO_BATCHES)
    # While the first step counts, while the second counts and while it trains: the exchange takes a micro-batch more.
    for forward, steps in ((2, 0), (8 + 2, 1), (8 + 5, 1)):
        out = tmp_path / str(forward) / "out"
        codes, said = Ranks(2, train_until_a_signal, folder, out, forward).end()
        assert codes == [75, 75], said
        assert f"stopped by SIGTERM after step {steps}, state saved" in said
        (state,) = (out.parent / ".out.state").glob("step-*")
        assert state.name == f"step-{steps:09d}"
        run_ranks(2, train, folder, out, FOUR_MICRO_BATCHES)
        assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
        assert metrics(out) == metrics(expected)


def train_all_the_while(folder: Path, out: Path, terms: list[str]) -> None:
    """Train 60 steps while states are written all the time, and stop for held-out text at every third."""
    heldout.PROMPTS, heldout.NEW_TOKENS = 2, 4
    step_tokens = BATCH_SIZE * SEQUENCE_LENGTH
    changes = {"terms": terms, "save_every": "1 steps", "async_save": True}
    changes |= {"evaluate_every": f"{3 * step_tokens} tokens", "evaluate_tokens": 3 * SEQUENCE_LENGTH}
    train(folder, out, changes, "student", 60)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "terms"), [(1, ["lm", "kd", "mtp_lm", "mtp_kd"]), (2, ["lm", "mtp_lm"])])
def test_kills_at_random_moments(folder: Path, tmp_path: Path, size: int, terms: list[str]) -> None:
    """kill -9 of any rank, while it starts, trains, measures or saves; what is there in the end has not one other bit.

    What is expected comes from a run that neither saves nor measures before its end. Two ranks do without a teacher,
    of which no state is kept, since most of the time goes into starting them.
    """
    expected, out = tmp_path / "expected" / "out", tmp_path / "killed" / "out"
    at_its_end = {"terms": terms, "save_every": "1000 steps"}
    run_ranks(size, train, folder, expected, at_its_end, "student", 60)
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    log = out.parent / "metrics.jsonl"
    for _ in range(8):
        before = len(log.read_bytes().splitlines()) if log.exists() else 0
        ranks = Ranks(size, train_all_the_while, folder, out, terms)
        wanted = before + chance.randrange(3)
        end = time.monotonic() + 60
        while (not log.exists() or len(log.read_bytes().splitlines()) < wanted) and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 0.2))
        ranks.processes[chance.randrange(size)].kill()
        if size > 1:
            time.sleep(chance.uniform(0.0, 0.2))
        for process in ranks.processes:  # as torchrun does: the other may wait for this one to come up
            process.kill()
        codes, said = ranks.end()
        assert -signal.SIGKILL in codes and "Traceback" not in said, (codes, said, seed)
    assert not out.exists(), seed
    run_ranks(size, train, folder, out, at_its_end, "student", 60)
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes(), seed
    lines = metrics(out)
    assert {line["step"] % 3 for line in lines if "acc_0" in line} <= {2}, (
        seed
    )  # none, where every kill came before the third
    lines = [{name: line[name] for name in line if not name.startswith(("heldout_", "acc_"))} for line in lines]
    assert lines == metrics(expected), seed


# --- what is not finite ------------------------------------------------------------------------------------------------


def train_with_a_bad_batch(folder: Path, out: Path) -> None:
    """The second step's loss is not a number on the last rank alone."""
    original, calls = trainer.chunked_loss, []

    def sometimes_nan(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        loss, sums = original(*arguments, **named)
        return (loss * torch.nan if len(calls) == 2 and os.environ["RANK"] == "1" else loss), sums

    trainer.chunked_loss = sometimes_nan  # type: ignore[assignment]
    train(folder, out, {"bad_steps": "skip"})


def test_ranks_skip_the_same_step(folder: Path, tmp_path: Path) -> None:
    run_ranks(2, train_with_a_bad_batch, folder, tmp_path / "out")
    lines = metrics(tmp_path / "out")
    assert [line.get("skipped", 0) for line in lines] == [0, 1, 0, 0]
    assert "loss" not in lines[1] and lines[2]["loss"] > 0
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "out").values())
