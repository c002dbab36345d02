"""Documents that do not see each other: one to a row, and nothing that is padding counts anywhere."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rounding import FORWARD, GRADIENT, TRAINED, error
from settings import sections
from tiny import VOCAB_SIZE, tiny_tokens, write_tiny_checkpoint, write_tiny_tokens
from tiny_families import FAMILIES_NATIVE
from torch import Tensor

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.data.isolated import DocumentStream
from slimqwen.data.packed import PackedTokens, PackedWriter
from slimqwen.data.store import load_manifest
from slimqwen.data.stream import Batch, Place, TokenStream
from slimqwen.evaluation.evaluate import evaluate
from slimqwen.evaluation.fidelity import compare, heldout_rows, record
from slimqwen.losses.balance import expert_counts
from slimqwen.losses.loss import LossWeights, count_targets
from slimqwen.model.model import MtpCausalLM, load
from slimqwen.model.routing import Routing
from slimqwen.recipe import DistilRecipe, EvaluationRecipe, Execution, TextSettings
from slimqwen.training.balancing import StepCounts
from slimqwen.training.distil import distil
from slimqwen.training.inputs import TrainingInputs
from slimqwen.training.teacher import LiveTeacher
from slimqwen.training.trainer import Span, Student, Trainer

pytestmark = pytest.mark.rounding


def pack(prefix: Path, documents: list[list[int]]) -> PackedTokens:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with PackedWriter(prefix, VOCAB_SIZE) as writer:
        for document in documents:
            writer.add(document)
    return PackedTokens(prefix)


def random_documents(*lengths: int, seed: int = 0) -> list[list[int]]:
    return [tiny_tokens(1, length, seed + i)[0].tolist() for i, length in enumerate(lengths)]


# --- the rows ---------------------------------------------------------------------------------------------------------


def test_a_row_holds_one_document_or_a_piece_of_one(tmp_path: Path) -> None:
    """The docstring's example, and a document of one token, which has nothing to predict."""
    stream = DocumentStream(pack(tmp_path / "t", [[10, 11, 12, 13, 14], [30], [], [20, 21]]), sequence_length=3, seed=0)
    assert (stream.rows_per_epoch, stream.targets_per_epoch) == (3, 5)
    assert stream.padding_fraction == pytest.approx(4 / 9)
    batch = stream.in_order(range(3))
    assert batch.tokens.tolist() == [[10, 11, 12, 13], [13, 14, 0, 0], [20, 21, 0, 0]]
    assert batch.mask is not None
    assert batch.mask.tolist() == [[True] * 4, [True, True, False, False], [True, True, False, False]]
    assert count_targets(batch.tokens, batch.mask) == (5, 2)
    assert stream.in_order([0]).mask is None
    for outside in (-1, 3):
        with pytest.raises(IndexError):
            stream.in_order([outside])


@pytest.mark.parametrize("documents_per_entry", [1, 3, 1024])
def test_every_token_but_the_first_of_its_document_is_a_target_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents_per_entry: int
) -> None:
    monkeypatch.setattr("slimqwen.data.isolated.DOCUMENTS_PER_ENTRY", documents_per_entry)
    lengths = [*np.random.default_rng(0).integers(0, 23, size=40).tolist(), 0, 1, 1, 0]
    documents = random_documents(*lengths)
    stream = DocumentStream(pack(tmp_path / "t", documents), sequence_length=7, seed=1)
    expected = [d[start : start + 8] for d in documents for start in range(0, len(d) - 1, 7)]
    batch = stream.in_order(range(stream.rows_per_epoch))
    assert batch.mask is not None
    assert [row[real].tolist() for row, real in zip(batch.tokens, batch.mask, strict=True)] == expected
    assert stream.targets_per_epoch == sum(max(length - 1, 0) for length in lengths)

    epochs = [[stream.row(epoch * len(expected) + i).tolist() for i in range(len(expected))] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(expected)
    assert epochs[0] != epochs[1] != expected
    whole = stream.batch(5, 2 * len(expected))
    pieces = [stream.batch(5 + i, 1) for i in range(2 * len(expected))]
    assert torch.equal(torch.cat([piece.tokens for piece in pieces]), whole.tokens)


def test_documents_of_several_sequences_are_one_document(tmp_path: Path) -> None:
    """As others' .idx files may have them: here the sequences [1, 2] and [3] are a document, and [] one of its own."""
    np.array([1, 2, 3, 4, 5], "<u2").tofile(tmp_path / "t.bin")
    header = b"MMIDIDX\x00\x00" + np.array([1], "<u8").tobytes() + b"\x08" + np.array([4, 4], "<u8").tobytes()
    arrays = (np.array([2, 1, 0, 2], "<i4"), np.array([0, 4, 6, 6], "<i8"), np.array([0, 2, 3, 4], "<i8"))
    (tmp_path / "t.idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))
    tokens = PackedTokens(tmp_path / "t")
    assert tokens.boundaries(0, 3).tolist() == [0, 3, 3, 5] and tokens.boundaries(1, 2).tolist() == [3, 3]
    stream = DocumentStream(tokens, 8, 0)
    assert [stream.stored(Place(row)).tolist() for row in range(2)] == [[1, 2, 3], [4, 5]]


# --- the models -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES_NATIVE)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MtpCausalLM:
    folder = tmp_path_factory.mktemp("isolation") / request.param
    return load(write_tiny_checkpoint(folder, native=FAMILIES_NATIVE[request.param]))


@torch.no_grad()
def logits(model: MtpCausalLM, batch: Batch) -> list[Tensor]:
    """Of the main head and, if there is one, of the MTP head: [rows, seq, vocab] each."""
    hidden = model(batch.tokens)
    return [head @ model.head.T for head in (hidden.main, hidden.mtp) if head is not None]


def difference(some: list[Tensor], others: list[Tensor]) -> float:
    return max(error(*pair) for pair in zip(some, others, strict=True))


A, B, OTHER_B = random_documents(11, 9, 9, seed=7)


def test_no_document_changes_another_ones_logits(model: MtpCausalLM, tmp_path: Path) -> None:
    """And the row of a document says what the document alone says."""
    found = []
    for name, b in (("one", B), ("other", OTHER_B)):
        rows = DocumentStream(pack(tmp_path / name, [b, A]), sequence_length=16, seed=0).in_order([0, 1])
        found.append([head[1, : len(A) - 1] for head in logits(model, rows)])
    alone = [head[0] for head in logits(model, Batch(torch.tensor([A])))]
    assert difference(found[0], found[1]) < FORWARD
    assert difference(found[0], alone) < FORWARD


def test_packed_documents_do(model: MtpCausalLM, tmp_path: Path) -> None:
    found = []
    for name, b in (("one", B), ("other", OTHER_B)):
        row = TokenStream(pack(tmp_path / name, [b, A]), sequence_length=len(A + B) - 1, seed=0).in_order([0])
        found.append([head[0, len(B) :] for head in logits(model, row)])
    assert difference(found[0], found[1]) > 1e-2


def test_the_models_need_no_mask(model: MtpCausalLM, tmp_path: Path) -> None:
    """Padding stands at the right, where no real token looks: attention, DeltaNet and MTP are the same with a mask."""
    batch = DocumentStream(pack(tmp_path / "t", [B, A]), sequence_length=16, seed=0).in_order([0, 1])
    assert batch.mask is not None
    with torch.no_grad():
        plain, masked = model(batch.tokens), model(batch.tokens, batch.mask)
    real = batch.mask[:, 1:]  # where both the position and its target are
    assert difference([plain.main[real]], [masked.main[real]]) < FORWARD
    if plain.mtp is not None:
        assert difference([plain.mtp[real]], [masked.mtp[real]]) < FORWARD


# --- training ---------------------------------------------------------------------------------------------------------

LENGTHS = (12, 3, 17, 2)  # the last one has no token that the MTP head could predict


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`student` and `teacher`, and `tokens` of text."""
    folder = tmp_path_factory.mktemp("training")
    tokenizer, _ = write_tiny_tokens(folder)
    write_tiny_checkpoint(folder / "student", tokenizer=tokenizer)
    write_tiny_checkpoint(folder / "teacher", seed=1, tokenizer=tokenizer, hidden_size=40)
    return folder


def trainer(folder: Path, tmp_path: Path, documents: list[list[int]], **changes: Any) -> Trainer:
    checkpoint = Checkpoint(folder / "student")
    usual = {"tokens": 1000, "batch_size": len(documents), "warmup": "0 steps", "load_balancing_coefficient": 0.5}
    stream = DocumentStream(pack(tmp_path / "train", documents), sequence_length=20, seed=0)
    student = Student(load(folder / "student"), checkpoint.family, checkpoint.config)
    student.model.train()
    teacher = LiveTeacher(load(folder / "teacher"), teaches_mtp=False)
    return Trainer(student, teacher, stream, span=Span(0, 3, 3), **sections(DistilRecipe, usual | changes))


class Met(StepCounts):
    """Counts that all rows meet."""

    def __init__(self, counts: list[Tensor]) -> None:
        self.counts = counts

    def meet(self, routing: Sequence[Routing], mask: Tensor, rows: int) -> list[Tensor]:
        return self.counts


def test_the_loss_of_a_padded_batch_is_the_mean_over_its_documents_alone(folder: Path, tmp_path: Path) -> None:
    """All four terms, load balancing and every gradient."""
    documents = random_documents(*LENGTHS)
    padded, alone = trainer(folder, tmp_path, documents), trainer(folder, tmp_path, documents)
    batches = [Batch(torch.tensor([document])) for document in documents]
    targets = [count_targets(batch.tokens) for batch in batches]
    main, mtp = (sum(counts) for counts in zip(*targets, strict=True))
    assert (main, mtp) == (11 + 2 + 16 + 1, 10 + 1 + 15)

    weights = LossWeights.from_terms(alone.recipe.terms, 1.0, 0.3).per_token(main, mtp)
    counts: list[Tensor] = []
    with torch.no_grad():
        for batch in batches:
            _, routing = alone.forward(batch)
            every = torch.ones(batch.tokens[:, 1:].numel(), dtype=torch.bool)
            assignments = [expert_counts(seen.experts, every, seen.logits.shape[-1]) for seen in routing]
            counts = [a + b for a, b in zip(counts, assignments, strict=True)] if counts else assignments
    expected = {"loss": 0.0, "load_balancing": 0.0}
    sums = None
    for batch in batches:
        loss, part, balance = alone.backward(batch, weights, Met(counts), main)
        expected["loss"] += float(loss)
        expected["load_balancing"] += float(balance)
        sums = part if sums is None else sums + part
    assert sums is not None
    expected |= sums.means()

    found = padded.step(0)
    assert {"lm", "kd", "mtp_lm", "mtp_kd"} <= expected.keys()
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=FORWARD)
    torch.nn.utils.clip_grad_norm_(alone.parameters.values(), alone.recipe.optimizer.max_grad_norm)
    for name, parameter in alone.parameters.items():
        assert error(padded.parameters[name].grad, parameter.grad) < GRADIENT, name


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_any_cut_of_a_padded_batch_is_the_same_step(folder: Path, tmp_path: Path, micro_batch_size: int) -> None:
    documents = random_documents(*LENGTHS)
    whole = trainer(folder, tmp_path, documents)
    parts = trainer(folder, tmp_path, documents, micro_batch_size=micro_batch_size)
    for step in range(2):
        assert parts.step(step) == pytest.approx(whole.step(step), rel=TRAINED if step else GRADIENT)


def test_what_padding_holds_changes_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = random_documents(*LENGTHS)
    before = trainer(folder, tmp_path, documents).step(0)
    batch = DocumentStream._padded

    def with_other_padding(self: DocumentStream, rows: list[Any]) -> Batch:
        padded = batch(self, rows)
        assert padded.mask is not None
        return Batch(torch.where(padded.mask, padded.tokens, 17), padded.mask)

    monkeypatch.setattr(DocumentStream, "_padded", with_other_padding)
    assert trainer(folder, tmp_path, documents).step(0) == pytest.approx(before, rel=GRADIENT)


def test_distillation_says_what_padding_costs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = DistilRecipe(tokens=2 * 4 * 300, batch_size=4, warmup="0 steps")
    for documents in ("packed", "isolated"):
        distil(
            TrainingInputs(folder / "student", folder / "tokens", teacher=folder / "teacher"),
            tmp_path / documents,
            recipe=recipe,
            text=TextSettings(sequence_length=300, documents=documents),
            execution=Execution(device="cpu"),
        )
        said = capsys.readouterr().err
        if documents == "isolated":
            train = PackedTokens(folder / "tokens" / "train")
            rows = sum(-(-(length - 1) // 300) for length in np.diff(train.boundaries(0, train.documents)))
            share = 1 - (train.total_tokens - train.documents) / (300 * rows)
            assert f"{share:.1%} of the positions are padding" in said
        else:
            assert "padding" not in said
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [1200, 2400]  # positions: the budget pays for padding


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_measures_real_tokens_only(folder: Path) -> None:
    """Loss, KL and the experts' shares are those of each row alone, without its padding."""
    student, teacher = Checkpoint(folder / "student"), Checkpoint(folder / "teacher")
    rows = heldout_rows(folder / "tokens", 450, 10**6, "isolated")
    assert rows.mask is not None and not rows.mask.all()
    models = [(load(c.folder), c.family, c.config) for c in (student, teacher)]
    found = [record(*one, rows, batch_size=2, title="") for one in models]
    alone = [Batch(row[real][None]) for row, real in zip(rows.tokens, rows.mask, strict=True)]
    parts = [[record(*one, row, batch_size=1, title="") for row in alone] for one in models]
    weights = [row.tokens.shape[1] - 1 for row in alone]
    each = [compare(*pair) for pair in zip(*parts, strict=True)]
    expected = {name: float(np.average([means[name] for means in each], weights=weights)) for name in ("lm", "kd")}
    means = compare(*found)
    assert {name: means[name] for name in expected} == pytest.approx(expected, rel=FORWARD)
    for block, shares in found[0].utilisation.items():
        by_row = [part.utilisation[block] for part in parts[0]]
        assert shares == pytest.approx(np.average(by_row, weights=weights, axis=0).tolist(), abs=1e-9)


def test_about_as_many_held_out_tokens_as_were_asked_for(folder: Path, tmp_path: Path) -> None:
    tokens = folder / "tokens"
    rows = heldout_rows(tokens, 16, 200, "isolated")
    assert 150 < count_targets(rows.tokens, rows.mask)[0] <= 216
    recipe = EvaluationRecipe(tokens=10**6, acceptance={"prompts": 1, "prompt_tokens": 4, "new_tokens": 6, "depth": 2})
    models = {"teacher": folder / "teacher"}
    result = evaluate(
        models,
        tmp_path / "e.json",
        tokens=tokens,
        recipe=recipe,
        text=TextSettings(sequence_length=64, documents="isolated"),
        execution=Execution(device="cpu"),
    )
    heldout = load_manifest(tokens).heldout
    assert result.tokens == heldout.tokens - heldout.documents  # the first token of each document is given
