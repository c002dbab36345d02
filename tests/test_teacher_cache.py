"""A teacher on disk: at k = vocabulary it is the live one, below that never further away; no cache is taken for another."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from rounding import FORWARD, GRADIENT, TRAINED, assert_trained_alike, error
from safetensors.torch import load_file
from settings import sections
from test_pipeline import tiny_recipe
from tiny import VOCAB_SIZE, write_tiny_checkpoint, write_tiny_tokens
from tiny_families import FAMILIES_NATIVE
from torch import Tensor
from typer.testing import CliRunner

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.cli import app
from slimqwen.core.errors import UserError
from slimqwen.data.mixture import drawn_from, shares_of
from slimqwen.data.store import training_stream
from slimqwen.data.tokenize import tokenize
from slimqwen.families import FAMILIES
from slimqwen.losses.divergence import Distribution, Divergence
from slimqwen.losses.loss import LossWeights, align, chunked_loss
from slimqwen.losses.signal import LiveSignal, StoredSignal, TopTokens
from slimqwen.model.model import load
from slimqwen.recipe import DistilRecipe, Source, TeacherRecipe, TextSettings
from slimqwen.runs.recipe_run import run
from slimqwen.teacher_cache import predict, write
from slimqwen.teacher_cache.folder import MANIFEST, TeacherCache
from slimqwen.teacher_cache.records import bytes_per_token, pack, unpack
from slimqwen.teacher_cache.write import write_teacher_cache
from slimqwen.training import loading
from slimqwen.training.cached_teacher import open_teacher_cache
from slimqwen.training.distil import distil
from slimqwen.training.inputs import TrainingInputs
from slimqwen.training.teacher import LiveTeacher
from slimqwen.training.trainer import Trainer

pytestmark = pytest.mark.rounding

SEQUENCE_LENGTH = 16
BATCH_SIZE = 4
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`student`, a wider `teacher`, `tokens`, and the teacher's `exact` cache of the whole vocabulary; read-only."""
    folder = tmp_path_factory.mktemp("teacher_cache")
    tokenizer, _ = write_tiny_tokens(folder)
    write_tiny_checkpoint(folder / "student", tokenizer=tokenizer)
    write_tiny_checkpoint(folder / "teacher", seed=1, tokenizer=tokenizer, hidden_size=40, num_experts=4)
    cached(folder, folder / "exact", top_k=VOCAB_SIZE, exact=True, with_mtp=True)
    return folder


def cached(folder: Path, out: Path, *, teacher: str = "teacher", tokens: str = "tokens", **changes: Any) -> Path:
    """A cache with shards of a few sequences; what is not an argument of the stage is the recipe's."""
    stage = {name: changes.pop(name) for name in ("with_mtp", "sequences") if name in changes}
    text = {name: changes.pop(name) for name in ("seed", "documents") if name in changes}
    usual = {"cache_file_bytes": 200_000, "batch_size": 3}
    return write_teacher_cache(
        folder / teacher,
        out,
        tokens=folder / tokens,
        text=TextSettings(sequence_length=SEQUENCE_LENGTH, **text),
        **sections(TeacherRecipe, usual | changes),
        **stage,
    )


def settings(**changes: Any) -> dict[str, Any]:
    """Return the arguments `recipe` and `execution`."""
    usual = {
        "tokens": STEPS * BATCH_SIZE * SEQUENCE_LENGTH,
        "batch_size": BATCH_SIZE,
        "learning_rate": 1e-3,
        "final_learning_rate": 1e-4,
        "warmup": "1 steps",
        "save_every": "2 steps",
    }
    return sections(DistilRecipe, usual | changes)


def train(folder: Path, out: Path, cache: Path | None, *, tokens: str = "tokens", **changes: Any) -> Path:
    """`distil` with the live teacher, or with a cache alone."""
    text = {name: changes.pop(name) for name in ("documents", "seed") if name in changes}
    return distil(
        TrainingInputs(
            folder / "student",
            folder / tokens,
            teacher=folder / "teacher" if cache is None else None,
            teacher_cache=cache,
        ),
        out,
        **settings(teacher="live" if cache is None else "cache", **changes),
        text=TextSettings(sequence_length=SEQUENCE_LENGTH, **text),
    )


def opened(
    folder: Path, cache: Path, *, seed: int = 0, rows: int = 8, teacher: str | None = None, **changes: Any
) -> Any:
    on_bad_step = changes.pop("on_bad_step", "stop")
    documents = changes.pop("documents", "packed")
    length = changes.pop("sequence_length", SEQUENCE_LENGTH)
    return open_teacher_cache(
        cache,
        training_stream(folder / changes.pop("tokens", "tokens"), length, seed, documents),
        rows=rows,
        recipe=settings(teacher="cache", **changes)["recipe"],
        on_bad_step=on_bad_step,
        documents=documents,
        student=Checkpoint(folder / "student"),
        teacher=None if teacher is None else folder / teacher,
    )


def metrics(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out.parent / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("lm", "kd", "mtp_lm", "mtp_kd", "loss", "grad_norm")} for line in lines]


def assert_same_training(one: Path, other: Path) -> None:
    """Losses and gradients of every step, and weights."""
    for step, (found, expected) in enumerate(zip(metrics(one), metrics(other), strict=True)):
        assert found == pytest.approx(expected, rel=TRAINED if step else GRADIENT)
    assert_trained_alike(*(load_file(folder / "model.safetensors") for folder in (one, other)))


# --- the loss ---------------------------------------------------------------------------------------------------------


class Case:
    """Random logits of teacher and student, [rows, vocab] float64; hidden states are logits, and heads the identity."""

    def __init__(self, rows: int = 6, vocab: int = 13) -> None:
        g = torch.Generator().manual_seed(0)
        self.teacher, self.teacher_mtp = (2 * torch.randn(rows, vocab, generator=g).double() for _ in range(2))
        self.student, self.mtp = (torch.randn(1, rows, vocab, generator=g).double().requires_grad_() for _ in range(2))
        self.head = torch.eye(vocab, dtype=torch.float64).requires_grad_()
        self.tokens = torch.randint(vocab, (1, rows + 1), generator=g)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.student, self.mtp, self.head]

    def live(self) -> LiveSignal:
        return LiveSignal(self.teacher, self.head.detach(), self.teacher_mtp)

    def stored(self, k: int) -> StoredSignal:
        return StoredSignal(*(TopTokens.of(Distribution.of(x), k) for x in (self.teacher, self.teacher_mtp)))

    def loss(self, signal: LiveSignal | StoredSignal, divergence: Divergence) -> tuple[Tensor, Any]:
        weights = LossWeights(0.3, 0.7, 0.11, 0.19)
        predictions = align(self.tokens, self.student, self.mtp)
        return chunked_loss(predictions, self.head, weights, teacher=signal, divergence=divergence, chunk_tokens=4)


DIVERGENCES = [Divergence("forward_kl"), Divergence("reverse_kl"), Divergence("jsd", jsd_beta=0.2)]


@pytest.mark.parametrize("divergence", [*DIVERGENCES, Divergence("forward_kl", temperature=2.0)], ids=str)
def test_all_tokens_are_the_live_teacher(divergence: Divergence) -> None:
    case = Case()
    live, live_sums = case.loss(case.live(), divergence)
    stored, stored_sums = case.loss(case.stored(13), divergence)
    torch.testing.assert_close(stored, live, rtol=1e-13, atol=0)
    assert stored_sums.means() == pytest.approx(live_sums.means(), rel=1e-13)
    expected = torch.autograd.grad(live, case.leaves)
    for ours, theirs in zip(torch.autograd.grad(stored, case.leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def coarse(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Of each listed token and of all others together, in logarithms: [rows, k + 1]."""
    others = torch.ones_like(log_probs, dtype=torch.bool).scatter(1, ids, False)
    tail = log_probs.masked_fill(~others, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([log_probs.gather(1, ids), tail], 1)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("k", [1, 4, 12])
def test_the_loss_is_autograd_of_the_coarse_divergence(divergence: Divergence, k: int) -> None:
    """The referee sees k + 1 probabilities and nothing of how the teacher's tail is spread."""
    case = Case()
    student = case.student[0].detach().requires_grad_()
    teacher = case.teacher.log_softmax(1)
    ids = teacher.topk(k).indices
    log_p, log_q = coarse(teacher, ids), coarse(student.log_softmax(1), ids)
    p, q = log_p.exp(), log_q.exp()
    match divergence.name:
        case "forward_kl":
            expected = (p * (log_p - log_q)).sum(1)
        case "reverse_kl":
            expected = (q * (log_q - log_p)).sum(1)
        case "jsd":
            beta = divergence.jsd_beta
            log_m = (beta * p + (1 - beta) * q).log()
            expected = (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(1)
    top = TopTokens.of(Distribution.of(case.teacher), k)
    room = Distribution.of(torch.zeros_like(student))
    said = Distribution.of(student.detach())
    value, gradient = divergence.value_and_gradient(top.spread_like(said, room), said)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), student)[0], rtol=1e-9, atol=1e-12)
    if divergence.name == "forward_kl":
        assert (value <= Distribution.of(case.teacher).kl(said) + 1e-12).all()


def test_agreement_is_about_the_teachers_own_favourite() -> None:
    """The tail has 0.6 of the teacher's probability and the student puts all its own on one of its tokens."""
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).double()
    hidden, head = torch.tensor([[[-9.0, 9.0, -9.0, -9.0]]]).double(), torch.eye(4).double()
    signal = StoredSignal(TopTokens.of(Distribution.of(probs.log()), 1))
    weights = LossWeights(0.0, 1.0, 0.0, 0.0)
    _, sums = chunked_loss(align(torch.tensor([[0, 1]]), hidden), head, weights, teacher=signal, chunk_tokens=1)
    assert sums.top1_agreement == 0


def test_a_certain_teacher_and_a_certain_student_are_finite() -> None:
    """Neither has any probability left in the tail that float32 could tell."""
    teacher = Distribution.of(torch.tensor([[0.0, -200.0, -300.0]]))
    student = Distribution.of(torch.tensor([[200.0, 0.0, -100.0]]))
    top = TopTokens.of(teacher, 1)
    spread = top.spread_like(student, Distribution.of(torch.zeros(1, 3)))
    for divergence in DIVERGENCES:
        value, gradient = divergence.value_and_gradient(spread, student)
        assert value.abs().item() < 1e-6 and gradient.abs().max() < 1e-6


# --- the records ------------------------------------------------------------------------------------------------------


def test_bytes_of_a_token_at_full_size() -> None:
    assert bytes_per_token(64, 151_936, exact=False) == 128 + 16 + 128 + 4 <= 300


@pytest.mark.parametrize("vocab_size", [300, 65_536, 65_537, 151_936, 2**20])
def test_ids_of_any_vocabulary_come_back(vocab_size: int) -> None:
    k, rows = 5, 40
    ids = torch.stack([torch.randperm(min(vocab_size, 100_000))[:k] for _ in range(rows)])
    ids[0, 0], ids[1, 1] = vocab_size - 1, 0
    top = TopTokens(ids, torch.full((rows, k), -2.0), torch.full((rows,), -1.13))
    arrays = pack(top, vocab_size, exact=False)
    assert sum(array.nbytes for array in arrays.values()) == rows * bytes_per_token(k, vocab_size, exact=False)
    assert torch.equal(unpack(arrays, vocab_size).ids, ids)


def test_what_is_read_is_a_distribution_as_near_as_it_says() -> None:
    teacher = Distribution.of(3 * torch.randn(500, 1000, generator=torch.Generator().manual_seed(0)).double())
    top = TopTokens.of(Distribution(teacher.log_probs, teacher.probs.clone()), 64)
    found = unpack(pack(top, 1000, exact=False), 1000)
    total = found.log_probs.double().exp().sum(1) + found.log_tail.double().exp()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)
    assert (found.log_probs - top.log_probs).abs().max() < 2 / 4096
    p, q = (
        torch.cat([top.log_probs, top.log_tail[:, None]], 1),
        torch.cat([found.log_probs, found.log_tail[:, None]], 1),
    )
    divergence = (p.exp() * (p - q.double().log_softmax(1))).sum(1)  # without float32's rounding of the sum
    assert 1e-9 < divergence.max() < 3e-8


# --- the stage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("documents", ["packed", "isolated"])
def test_the_whole_vocabulary_is_the_live_teacher(folder: Path, tmp_path: Path, documents: Any) -> None:
    """In another order and other batches than it was written in, which moves logits of 10 by 1e-5."""
    rows, cache = 60, folder / "exact"
    if documents == "isolated":
        whole = {"top_k": VOCAB_SIZE, "exact": True, "with_mtp": True, "sequences": rows, "seed": 5}
        cache = cached(folder, tmp_path / "c", documents=documents, **whole)
    assert len(TeacherCache(cache).manifest.shards) > 3
    batch = training_stream(folder / "tokens", SEQUENCE_LENGTH, 5, documents).batch(0, rows)
    counts = align(batch.tokens, batch.tokens[:, 1:, None], mask=batch.mask).main_mask
    assert bool(counts.all()) == (documents == "packed")
    stored = opened(folder, cache, seed=5, rows=rows, mtp_target="mtp", documents=documents).signal(batch)
    said = LiveTeacher(load(folder / "teacher"), teaches_mtp=True).signal(batch)
    has_draft = torch.arange(len(counts)) % SEQUENCE_LENGTH > 0
    for hidden, top, which in ((said.hidden, stored.main, counts), (said.mtp_hidden, stored.mtp, counts & has_draft)):
        assert hidden is not None and top is not None
        expected = Distribution.of((hidden @ said.head.T)[which]).log_probs
        found = torch.zeros_like(expected).scatter(1, top.ids[which], top.log_probs[which])
        assert error(found, expected) < FORWARD


@pytest.mark.parametrize("mtp_target", ["main", "mtp"])
def test_training_on_the_whole_vocabulary_is_training_live(folder: Path, tmp_path: Path, mtp_target: str) -> None:
    live = train(folder, tmp_path / "a" / "live", None, mtp_target=mtp_target)
    cache = train(folder, tmp_path / "b" / "cache", folder / "exact", mtp_target=mtp_target, micro_batch_size=2)
    assert_same_training(cache, live)


def test_one_cache_serves_any_seed_and_isolated_documents_theirs(folder: Path, tmp_path: Path) -> None:
    for number, changes in enumerate([{"seed": 3}, {"documents": "isolated"}]):
        cache = folder / "exact"
        if "documents" in changes:
            whole = {"top_k": VOCAB_SIZE, "exact": True, "sequences": STEPS * BATCH_SIZE}
            cache = cached(folder, tmp_path / "isolated", documents="isolated", **whole)
        live = train(folder, tmp_path / f"a{number}" / "out", None, **changes)
        assert_same_training(train(folder, tmp_path / f"b{number}" / "out", cache, **changes), live)


@pytest.mark.parametrize("k", [8, 64])
def test_the_coarse_divergence_is_never_more(folder: Path, tmp_path: Path, k: int) -> None:
    cache = cached(folder, tmp_path / "cache", top_k=k, sequences=12)
    batch = training_stream(folder / "tokens", SEQUENCE_LENGTH, 0).batch(0, 12)
    student = load(folder / "student")
    measured = LossWeights(0.0, 0.0, 0.0, 0.0)
    with torch.no_grad():
        predictions = align(batch.tokens, student(batch.tokens).main)
        sums = [
            chunked_loss(predictions, student.head, measured, teacher=teacher.signal(batch), chunk_tokens=64)[1].means()
            for teacher in (opened(folder, cache, rows=12), LiveTeacher(load(folder / "teacher"), teaches_mtp=False))
        ]
    assert 0.2 * sums[1]["kd"] < sums[0]["kd"] < sums[1]["kd"]
    assert sums[0]["lm"] == sums[1]["lm"] and sums[0]["top1_agreement"] == sums[1]["top1_agreement"]


def test_the_teacher_is_not_loaded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr(loading, "load", lambda path, *rest: (loaded.append(path), load(path, *rest))[1])
    train(folder, tmp_path / "out", folder / "exact")
    assert loaded == [folder / "student"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_layer_by_layer_says_the_same(folder: Path, tmp_path: Path, model_type: str) -> None:
    native = FAMILIES_NATIVE[model_type]
    write_tiny_checkpoint(tmp_path / "t", native=native, tokenizer=folder / "tokenizer")
    (tmp_path / "tokens").symlink_to(folder / "tokens")
    with_mtp = Checkpoint(tmp_path / "t").has_mtp
    usual = {
        "teacher": "t",
        "top_k": 8,
        "exact": True,
        "sequences": 20,
        "with_mtp": with_mtp,
        "cache_file_bytes": 10_000,
    }
    caches = []
    for name, changes in {"memory": {}, "layers": {"streaming": True, "memory_budget": 1}}.items():
        cached(tmp_path, tmp_path / name, **usual, **changes)
        caches.append(TeacherCache(tmp_path / name))
    one, other = caches
    assert one.manifest.model_copy(update={"shards": []}) == other.manifest.model_copy(update={"shards": []})
    stream = training_stream(folder / "tokens", SEQUENCE_LENGTH, 0)
    for index in range(20):
        row = stream.place(index).row
        expected, found = one.read(row), other.read(row)
        assert found.keys() == expected.keys()
        for head in expected:
            assert error(found[head].log_probs, expected[head].log_probs) < FORWARD
            assert error(found[head].log_tail, expected[head].log_tail) < FORWARD


def test_the_checkpoint_is_read_once_per_pass_of_shards_and_their_bytes_stay(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass per shard; as many as the memory holds, after the first which measures; as many as the time allows."""
    read: list[str] = []
    original = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: (read.append(name), original(self, name))[1])
    # Three sequences of two heads in a shard; their hidden states of 40 float32.
    usual = {"sequences": 17, "cache_file_bytes": 10_000, "streaming": True, "with_mtp": True, "top_k": 24}
    shard_hidden_bytes = 2 * 3 * SEQUENCE_LENGTH * 40 * 4
    made = {}
    for name, passes, changes in (
        ("one by one", 6, {"hidden_states_bytes": 1}),
        ("three at most", 3, {"hidden_states_bytes": 4 * shard_hidden_bytes - 1}),  # 1, 3, 2
        ("all", 2, {}),
        ("no time", 6, {"seconds": 1e-9}),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(predict, "PASS_SECONDS", changes.pop("seconds", 1e9))
            read.clear()
            made[name] = cached(folder, tmp_path / name, **usual, **changes)
        assert TeacherCache(made[name]).manifest.number_of_shards == 6
        assert read.count("model.layers.3.self_attn.q_proj.weight") == read.count("mtp.fc.weight") == passes, name
    for other in made.values():
        for file in made["one by one"].glob("shard-*"):
            assert (other / file.name).read_bytes() == file.read_bytes()


# --- interrupted, and several sources ---------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for kill -9: nothing is tidied up by the code under test but what an exception leaves."""


def test_a_killed_writer_goes_on_with_the_next_shard(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"sequences": 14, "cache_file_bytes": 10_000}
    whole, written = cached(folder, tmp_path / "whole", **few), []
    original = write.write_shard

    def write_or_die(path: Path, *rest: Any) -> None:
        if len(written) == 2:
            raise Killed
        written.append(path.name)
        original(path, *rest)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(write, "write_shard", write_or_die)
        cached(folder, tmp_path / "out", **few)
    assert not (tmp_path / "out").exists()
    (tmp_path / ".out.partial" / ".shard-000002.safetensors.partial").write_bytes(b"half of it")

    again: list[str] = []
    monkeypatch.setattr(write, "write_shard", lambda path, *rest: (again.append(path.name), original(path, *rest))[1])
    cached(folder, tmp_path / "out", **few)
    assert (
        written == ["shard-000000.safetensors", "shard-000001.safetensors"] and again[0] == "shard-000002.safetensors"
    )
    assert not set(written) & set(again)
    for file in whole.glob("*.*"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]

    again.clear()
    cached(folder, tmp_path / "out", **few)  # done already
    assert not again


def test_shares_are_what_is_drawn() -> None:
    for ends in ([4], [3, 4], [1, 5, 6, 13, 14], [2, 2 + 7, 2 + 7 + 11]):
        counts = [0] * len(ends)
        for row in range(60):
            assert shares_of(row, ends) == counts
            counts[drawn_from(row, ends)[0]] += 1


@pytest.fixture(scope="module")
def mixture(folder: Path) -> Path:
    sources = [
        Source(path=folder / "text", name="a", weight=3.0),
        Source(path=folder / "heldout_text", name="b", weight=1.0),
    ]
    tokenize(sources, folder / "tokenizer", folder / "mixture", heldout_sources=[Source(path=folder / "heldout_text")])
    return folder / "mixture"


@pytest.mark.parametrize("sequences", [None, STEPS * BATCH_SIZE])
def test_each_source_of_a_mixture_has_its_cache(
    folder: Path, tmp_path: Path, mixture: Path, sequences: int | None
) -> None:
    cache = cached(folder, tmp_path / "c", tokens="mixture", top_k=VOCAB_SIZE, exact=True, sequences=sequences)
    assert sorted(path.name for path in cache.iterdir()) == ["a", "b"]
    shutil.rmtree(cache / "b")  # what an interruption between the two leaves: the first is not written again
    made = (cache / "a" / MANIFEST).stat().st_mtime_ns
    cached(folder, tmp_path / "c", tokens="mixture", top_k=VOCAB_SIZE, exact=True, sequences=sequences)
    assert (cache / "a" / MANIFEST).stat().st_mtime_ns == made
    live = train(folder, tmp_path / "live" / "out", None, tokens="mixture")
    assert_same_training(train(folder, tmp_path / "cached" / "out", cache, tokens="mixture"), live)
    if sequences is not None:
        kept = {name: TeacherCache(cache / name).manifest.sequences for name in ("a", "b")}
        assert kept == {"a": 12, "b": 4}
        with pytest.raises(UserError, match="not all of those that this run trains on"):
            opened(folder, cache, tokens="mixture", rows=STEPS * BATCH_SIZE + 4)
        with pytest.raises(UserError, match="not all of those"):
            opened(folder, cache, tokens="mixture", rows=STEPS * BATCH_SIZE, seed=1)


def test_resumed_is_uninterrupted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cached(folder, tmp_path / "cache", top_k=16, sequences=16)
    expected = train(folder, tmp_path / "a" / "out", cache)
    original = Trainer.step

    def die(self: Trainer, number: int) -> dict[str, float]:
        if number == 3:
            raise Killed
        return original(self, number)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Trainer, "step", die)
        train(folder, tmp_path / "b" / "out", cache)
    shutil.move(cache, tmp_path / "elsewhere")  # what counts is what a cache says
    found = train(folder, tmp_path / "b" / "out", tmp_path / "elsewhere")
    assert (found / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def test_the_state_of_another_cache_is_not_resumed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Trainer.step

    def die(self: Trainer, number: int) -> dict[str, float]:
        if number == 3:
            raise Killed
        return original(self, number)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Trainer, "step", die)
        train(folder, tmp_path / "out", folder / "exact")
    train(folder, tmp_path / "out", cached(folder, tmp_path / "cache", top_k=8, sequences=16))
    assert "left behind by other work" in capsys.readouterr().err


def test_two_ranks_read_their_own_rows(folder: Path, tmp_path: Path) -> None:
    alone = train(folder, tmp_path / "alone" / "out", folder / "exact")
    run_ranks(2, train, folder, tmp_path / "two" / "out", folder / "exact")
    assert_same_training(tmp_path / "two" / "out", alone)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(folder: Path) -> Path:
    """Of the 16 sequences that a run trains on, the 8 most likely tokens."""
    return cached(folder, folder / "small", top_k=8, sequences=16)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sequence_length": 32}, "sequences of 16 tokens, and this run trains on sequences of 32"),
        ({"documents": "isolated"}, "'packed' documents, and this run trains on 'isolated'"),
        ({"teacher": "student"}, "another teacher than"),
        ({"tokens": "other_tokens"}, "other token ids than"),
        ({"mtp_target": "mtp"}, "holds no MTP head"),
        ({"divergence": {"temperature": 2.0}}, "keeps the 8 most likely tokens"),
        ({"on_bad_step": "roll_back"}, "'roll_back' goes on to later rows of the text, and .* holds 16 sequences"),
    ],
)
def test_a_cache_of_something_else_is_refused(folder: Path, small: Path, changes: dict[str, Any], words: str) -> None:
    if "tokens" in changes and not (folder / "other_tokens").exists():
        tokenize(
            [Source(path=folder / "heldout_text")],
            folder / "tokenizer",
            folder / "other_tokens",
            heldout_sources=[Source(path=folder / "text")],
        )
    with pytest.raises(UserError, match=words):
        opened(folder, small, **changes)
    assert opened(folder, small, teacher="teacher")


def test_a_temperature_is_fine_with_the_whole_vocabulary(folder: Path) -> None:
    assert opened(folder, folder / "exact", divergence={"temperature": 2.0})


def test_going_back_is_fine_with_the_whole_text(folder: Path) -> None:
    assert opened(folder, folder / "exact", on_bad_step="roll_back")


def test_damage_is_found(folder: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(folder / "exact", tmp_path / "cache"))
    sequence = TeacherCache(cache).manifest.sequences_per_shard  # the first of the second shard
    shard = cache / "shard-000001.safetensors"
    whole = shard.read_bytes()
    names = ["sequences", "ends", "sha256", "main.log_tail"]
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    for name in names:
        damaged = bytearray(whole)
        damaged[8 + int.from_bytes(whole[:8], "little") + header[name]["data_offsets"][0]] ^= 1
        shard.write_bytes(damaged)
        with pytest.raises(UserError, match=r"shard-000001.safetensors is corrupt"):
            TeacherCache(cache).read(sequence)
    TeacherCache(cache).read(0)
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="bytes where the manifest says"):
        TeacherCache(cache)
    shard.unlink()
    with pytest.raises(UserError, match="has 0 bytes where the manifest says"):
        TeacherCache(cache)
    (cache / MANIFEST).write_text("{}")
    with pytest.raises(UserError, match="is not the manifest of a teacher's cache"):
        TeacherCache(cache)
    with pytest.raises(UserError, match="cannot be read"):
        TeacherCache(tmp_path / "nowhere")


def test_a_full_disk_is_told_before_the_work(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1000))
    with pytest.raises(UserError, match=r"are to be written to .*, and 1.0 kB are free"):
        cached(folder, tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_more_tokens_than_the_vocabulary_has(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="top_k 301 is more than the 300 tokens"):
        cached(folder, tmp_path / "cache", top_k=301)
    write_tiny_checkpoint(tmp_path / "teacher", tokenizer=folder / "tokenizer", num_nextn_predict_layers=0)
    (tmp_path / "tokens").symlink_to(folder / "tokens")
    with pytest.raises(UserError, match="no MTP module"):
        cached(tmp_path, tmp_path / "cache", with_mtp=True)


def test_the_command(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "distil.yaml"
    recipe.write_text(json.dumps(settings()["recipe"].model_dump(mode="json", exclude_defaults=True)))
    usual = f"--sequence-length {SEQUENCE_LENGTH} --seed 2 --device cpu"
    commands = [
        f"teacher-cache {folder}/teacher --tokens {folder}/tokens --out {tmp_path}/cache --sequences 16 {usual}",
        f"distil {folder}/student --tokens {folder}/tokens --out {tmp_path}/out --recipe {recipe} "
        f"--teacher-cache {tmp_path}/cache --teacher {folder}/teacher {usual}",
    ]
    for command in commands:
        result = CliRunner().invoke(app, command.split())
        assert result.exit_code == 0, result.output
    assert Checkpoint(tmp_path / "out").has_mtp
    assert TeacherCache(tmp_path / "cache").manifest.sequences == 16


def test_a_run_writes_its_cache_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In two stages, each of which reads the same cache of the sequences that the whole run trains on."""
    changes = {
        "distil": {
            "tokens": 16 * 2 * 5,
            "batch_size": 2,
            "teacher": {"kind": "cache", "top_k": 12},
            "warmup": "1 steps",
        }
    }
    changes |= {"baselines": []}
    recipe = tiny_recipe(tmp_path, tmp_path / "run", **changes)
    run(recipe)
    manifest = TeacherCache(tmp_path / "run" / "teacher_cache").manifest
    assert (manifest.top_k, manifest.sequences) == (12, 10)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == [1, 1, 2, 2, 2] and all(line["kd"] > 0 for line in lines)
    capsys.readouterr()
    run(recipe)
    assert "teacher_cache: done already" in capsys.readouterr().err
    with pytest.raises(UserError, match="temperature 2 needs the teacher's whole distribution"):
        run(
            tiny_recipe(
                tmp_path,
                tmp_path / "run",
                **changes | {"distil": {**changes["distil"], "divergence": {"temperature": 2.0}}},
            )
        )
    with pytest.raises(UserError, match="'roll_back' goes on to later rows"):
        run(tiny_recipe(tmp_path, tmp_path / "run", **changes, execution={"bad_steps": "roll_back"}))


def test_a_run_that_learns_from_the_text_alone_writes_no_cache(tmp_path: Path) -> None:
    distilling = {
        "tokens": 16 * 2 * 3,
        "batch_size": 2,
        "teacher": "cache",
        "warmup": "1 steps",
        "terms": ["lm", "mtp_lm"],
    }
    run(tiny_recipe(tmp_path, tmp_path / "run", distil=distilling, baselines=[]))
    assert not (tmp_path / "run" / "teacher_cache").exists()


def test_numpy_stays_out_of_the_ids() -> None:
    """uint16 has no place in torch's indexing: ids come as int64."""
    top = TopTokens(torch.tensor([[1, 0]]), torch.tensor([[-0.5, -1.5]]), torch.tensor([-1.75]))
    arrays = pack(top, 2, exact=True)
    assert arrays["log_probs"].dtype == np.float32 and unpack(arrays, 2).ids.dtype == torch.int64
