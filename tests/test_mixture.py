"""Several sources as one stream by weights, from text or from token ids that others made."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny import tiny_text, write_tiny_checkpoint, write_tiny_tokens
from typer.testing import CliRunner

from slimqwen.calibration.calibrate import calibrate
from slimqwen.cli import app
from slimqwen.core.errors import UserError
from slimqwen.data.isolated import DocumentStream
from slimqwen.data.mixture import MixedStream, drawn_from
from slimqwen.data.packed import PackedTokens, PackedWriter, bin_path
from slimqwen.data.sources import check_sources, name_of, named_sources
from slimqwen.data.store import load_manifest, training_stream
from slimqwen.data.stream import TokenStream
from slimqwen.data.tokenize import tokenize
from slimqwen.data.tokenizer import load_tokenizer
from slimqwen.evaluation.evaluate import evaluate
from slimqwen.recipe import CalibrationRecipe, DistilRecipe, EvaluationRecipe, Execution, Recipe, Source, TextSettings
from slimqwen.runs.recipe_run import run
from slimqwen.training.distil import distil
from slimqwen.training.inputs import TrainingInputs


def pack(prefix: Path, documents: list[list[int]], vocab_size: int = 300) -> PackedTokens:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with PackedWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add(document)
    return PackedTokens(prefix)


def mixed(folder: Path, weights: dict[str, float], sequence_length: int = 4, seed: int = 0) -> MixedStream:
    """Sources of 5, 9, 13, ... rows; those of the first begin with the tokens 0, 1, 2, ..., of the second with 50, ..."""
    streams = {}
    for number, name in enumerate(weights):
        rows = 5 + 4 * number
        tokens = pack(folder / name, [[50 * number + i // sequence_length for i in range(rows * sequence_length + 1)]])
        streams[name] = TokenStream(tokens, sequence_length, seed)
    return MixedStream(streams, weights)


# --- which row comes from where ---------------------------------------------------------------------------------------


def test_rows_are_drawn_as_the_docstring_says() -> None:
    drawn = [drawn_from(row, [3, 4]) for row in range(8)]
    assert drawn == [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (0, 4), (1, 1), (0, 5)]


@pytest.mark.parametrize("sources", [1, 2, 3, 5, 8, 13])
def test_any_beginning_is_near_the_weights_and_no_row_is_left_out(sources: int) -> None:
    weights = np.random.default_rng(sources).integers(1, 1000, sources).tolist()
    ends, total, counts = np.cumsum(weights).tolist(), sum(weights), [0] * sources
    halvings = (sources - 1).bit_length()
    for row in range(4000):
        source, position = drawn_from(row, ends)
        assert position == counts[source]
        counts[source] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (row + 1) * weight / total) <= halvings / 2


def test_far_rows_are_exact() -> None:
    """Where float64 has no whole numbers any more, too: neighbours are neighbours within a source."""
    ends = [7, 10, 1_000_003]
    places = [drawn_from(10**18 + i, ends) for i in range(300_000)]
    positions: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for source, position in places:
        positions[source].append(position)
    for found in positions.values():
        assert found == list(range(found[0], found[0] + len(found)))
    assert len(positions[2]) == pytest.approx(300_000 * 999_993 / 1_000_003, abs=1)


def test_any_cut_and_any_rank_sees_the_same_rows(tmp_path: Path) -> None:
    stream = mixed(tmp_path, {"a": 0.2, "b": 0.5, "c": 0.3})
    whole = stream.batch(0, 60).tokens  # into later epochs of each
    assert whole.shape == (60, 5)
    pieces = [stream.batch(first, rows).tokens for first, rows in ((0, 7), (7, 1), (8, 30), (38, 22))]
    assert torch.equal(torch.cat(pieces), whole)
    ranks = [torch.cat([stream.batch(step * 12 + rank * 4, 4).tokens for rank in range(3)]) for step in range(5)]
    assert torch.equal(torch.cat(ranks), whole)
    assert torch.equal(
        torch.stack([stream.batch(first, 30, step=2).tokens for first in (0, 1)], 1).flatten(0, 1), whole
    )


def test_each_source_goes_through_its_own_epochs(tmp_path: Path) -> None:
    """5 rows at 4 of 5 parts, 9 rows at 1: after 25 rows of the mixture the first source was seen four times."""
    streams = {}
    for name, rows in (("a", 5), ("b", 9)):
        first = 0 if name == "a" else 100
        streams[name] = TokenStream(pack(tmp_path / name, [list(range(first, first + rows + 1))]), 1, seed=3)
    stream = MixedStream(streams, {"a": 0.8, "b": 0.2})
    assert stream.rows_per_epoch == 6  # 5 / 0.8 = 6.25: then the first row of "a" comes again
    seen = stream.batch(0, 25).tokens[:, 0].tolist()
    assert Counter(token for token in seen if token < 100) == dict.fromkeys(range(5), 4)
    assert len({token for token in seen if token >= 100}) == 5
    expected = [streams["a"].row(i)[0] for i in range(20)]
    assert [token for token in seen if token < 100] == expected


def test_the_seed_changes_the_rows_and_not_their_sources(tmp_path: Path) -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 2.0}
    one, other = (mixed(tmp_path / str(seed), weights, seed=seed).batch(0, 50).tokens[:, 0] for seed in (0, 1))
    assert torch.equal(one // 50, other // 50)
    assert (one != other).sum() > 25


def test_weights_are_shares_of_tokens_and_not_of_rows(tmp_path: Path) -> None:
    """A source of short documents, nine tenths padding, gives the same tokens as one of long ones by ten times the rows."""
    streams = {
        "long": DocumentStream(pack(tmp_path / "long", [[1] * 41] * 3), sequence_length=40, seed=0),
        "short": DocumentStream(pack(tmp_path / "short", [[2] * 5] * 7), sequence_length=40, seed=0),
    }
    stream = MixedStream(streams, {"long": 3.0, "short": 1.0})
    batch = stream.batch(0, 130)
    assert batch.mask is not None
    targets = batch.mask[:, 1:].sum(dim=1)
    from_long = batch.tokens[:, 0] == 1
    assert targets[from_long].sum() == 3 * targets[~from_long].sum() == 30 * 40
    assert stream.padding_fraction == pytest.approx(1 - float(targets.sum()) / (130 * 40))


# --- the stage --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tokenizer`, the texts `wiki` (12 documents) and `code` (5 longer ones), and `heldout.txt`."""
    folder = tmp_path_factory.mktemp("mixture")
    write_tiny_tokens(folder)
    for name, documents, lines in (("wiki", 12, 10), ("code", 5, 60)):
        (folder / name).mkdir()
        for i in range(documents):
            (folder / name / f"{i}.txt").write_text(tiny_text(len(name) * 100 + i, lines))
    (folder / "heldout.txt").write_text(tiny_text(99))
    return folder


def sources(world: Path, wiki: float | None = 0.25, code: float | None = 0.75) -> list[Source]:
    return [Source(path=world / "wiki", weight=wiki), Source(path=world / "code", weight=code)]


@pytest.fixture(scope="module")
def store(world: Path) -> Path:
    tokenize(sources(world), world / "tokenizer", world / "store", heldout_fraction=0.2)
    return world / "store"


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name[0] != ".")


def test_each_source_has_a_folder_that_is_a_store_itself(world: Path, store: Path, tmp_path: Path) -> None:
    trains = [f"{name}/{file}" for name in ("code", "wiki") for file in ("manifest.json", "train.bin", "train.idx")]
    assert files(store) == sorted([*trains, "heldout.bin", "heldout.idx", "manifest.json"])
    whole = load_manifest(store)
    assert whole.mixture == {"wiki": 0.25, "code": 0.75}

    alone = tokenize([Source(path=world / "wiki")], world / "tokenizer", tmp_path / "wiki", heldout_fraction=0.2)
    assert (store / "wiki" / "train.bin").read_bytes() == (tmp_path / "wiki" / "train.bin").read_bytes()
    together = tokenize(sources(world, None, None), world / "tokenizer", tmp_path / "both", heldout_fraction=0.2)
    assert files(tmp_path / "both") == ["heldout.bin", "heldout.idx", "manifest.json", "train.bin", "train.idx"]
    assert (store / "heldout.bin").read_bytes() == (tmp_path / "both" / "heldout.bin").read_bytes()
    assert together.mixture == {}
    assert (whole.train, whole.heldout) == (together.train, together.heldout)
    parts = {name: load_manifest(store / name) for name in whole.mixture}
    assert parts["wiki"].train == alone.train and parts["wiki"].sources == [whole.sources[0]]
    assert parts["wiki"].train + parts["code"].train == whole.train
    assert all(part.heldout.documents == 0 and part.mixture == {} for part in parts.values())


def test_a_stream_of_a_mixture_draws_by_its_weights(store: Path) -> None:
    stream = training_stream(store, sequence_length=16, seed=5)
    assert isinstance(stream, MixedStream) and stream.token_shares == stream.row_shares == {"wiki": 0.25, "code": 0.75}
    wiki = TokenStream(PackedTokens(store / "wiki" / "train"), 16, seed=5)
    code = TokenStream(PackedTokens(store / "code" / "train"), 16, seed=5)
    found = sorted(stream.batch(0, 200).tokens.tolist())
    assert found == sorted(wiki.batch(0, 50).tokens.tolist() + code.batch(0, 150).tokens.tolist())


def test_one_source_of_a_mixture_can_be_calibrated_on(world: Path, store: Path, tmp_path: Path) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "model", tokenizer=world / "tokenizer")
    settings: dict[str, Any] = {"text": TextSettings(sequence_length=16), "execution": Execution(device="cpu")}
    by_source = CalibrationRecipe(sources={"wiki": store / "wiki", "code": store / "code"}, samples=4)
    apart = calibrate(checkpoint, tmp_path / "apart", recipe=by_source, **settings)
    assert apart.sources == {"wiki": 32, "code": 32}
    whole = calibrate(checkpoint, tmp_path / "whole", tokens=store, recipe=CalibrationRecipe(samples=4), **settings)
    assert whole.sources == {"training": 64}
    with pytest.raises(UserError, match="is a source of the mixture in"):
        models, recipe = {"teacher": checkpoint}, EvaluationRecipe(tokens=16)
        evaluate(
            models, tmp_path / "e.json", tokens=store / "wiki", recipe=recipe, text=TextSettings(sequence_length=16)
        )


def test_distillation_says_what_it_draws(
    world: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "model", tokenizer=world / "tokenizer", max_position_embeddings=15)
    recipe = DistilRecipe(tokens=16 * 4 * 2, batch_size=4, warmup="0 steps", terms=["lm"])
    distil(
        TrainingInputs(checkpoint, store),
        tmp_path / "out",
        recipe=recipe,
        text=TextSettings(sequence_length=16),
        execution=Execution(device="cpu"),
    )
    epochs = 2 / TokenStream(PackedTokens(store / "wiki" / "train"), 16, 0).rows_per_epoch
    said = capsys.readouterr().err
    assert f"wiki: 25.0% of the training tokens, {epochs:.3g} times its text" in said
    assert "sequences of 16 tokens are longer than the model's context of 15" in said


@pytest.mark.parametrize(
    ("given", "heldout", "message"),
    [
        ([{"path": "wiki", "weight": 1.0}, {"path": "code"}], [], "code has no weight and others have one"),
        ([{"path": "wiki", "weight": 1.0}, {"path": "wiki", "weight": 1.0}], [], "two data sources are called 'wiki'"),
        ([{"path": "wiki", "weight": 1.0, "name": "a/b"}], [], "'a/b' cannot be a source's name"),
        ([{"path": "wiki", "weight": 1.0, "name": ".."}], [], "'..' cannot be a source's name"),
        ([{"path": "wiki"}], [{"path": "code", "weight": 1.0}], "code must be text, and has no weight"),
        ([{"megatron": "elsewhere"}], [], r"elsewhere has no elsewhere\.idx"),
        ([{"megatron": "store/wiki/train"}], [], "nothing is held out"),
        ([{"path": "wiki"}], [{"megatron": "store/wiki/train"}], "must be text"),
    ],
)
def test_sources_that_do_not_go_together(
    store: Path, monkeypatch: pytest.MonkeyPatch, given: list[Any], heldout: list[Any], message: str
) -> None:
    monkeypatch.chdir(store.parent)
    with pytest.raises(UserError, match=message):
        check_sources([Source(**s) for s in given], [Source(**s) for s in heldout])


def test_a_source_is_called_as_its_file_or_folder() -> None:
    assert name_of(Source(path=Path("data/wiki.v2"))) == "wiki.v2"
    assert name_of(Source(path=Path("data/wiki.jsonl"))) == "wiki"
    assert name_of(Source(megatron=Path("data/c4.en"))) == "c4.en"
    assert name_of(Source(builtin="python-stdlib")) == "python-stdlib"
    assert name_of(Source(path=Path("wiki"), name="w")) == "w"


def test_a_source_whose_documents_are_all_held_out_is_named(world: Path, tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    shutil.copy(world / "wiki" / "0.txt", tmp_path / "few" / "json")  # no suffix that is read
    (tmp_path / "few" / "a.txt").write_text("ab")  # of which 85 % is all
    given = [*sources(world), Source(path=tmp_path / "few", weight=1.0)]
    with pytest.raises(UserError, match=r"all documents of .*few fall into the held-out share"):
        tokenize(given, world / "tokenizer", tmp_path / "out", heldout_fraction=0.85)
    assert not (tmp_path / "out").exists()


# --- token ids made elsewhere -----------------------------------------------------------------------------------------


def test_a_megatron_pair_is_read_where_it_is(world: Path, tmp_path: Path) -> None:
    theirs = pack(tmp_path / "elsewhere" / "c4", [[5, 6, 7] * 20, [8, 9] * 9])
    given = [Source(path=world / "wiki"), Source(megatron=theirs.prefix)]
    manifest = tokenize(
        given, world / "tokenizer", tmp_path / "out", heldout_sources=[Source(path=world / "heldout.txt")]
    )
    ours = load_manifest(tmp_path / "out" / "wiki").train.tokens
    assert manifest.mixture == {"wiki": ours, "c4": 78}  # no weights: as many tokens as there are
    assert (manifest.train.documents, manifest.train.tokens) == (14, ours + 78)
    linked = tmp_path / "out" / "c4" / "train.bin"
    assert linked.is_symlink() and linked.resolve() == bin_path(theirs.prefix)
    rows = {tuple(row) for row in training_stream(tmp_path / "out", 8, seed=0).batch(0, 200).tokens.tolist()}
    assert {tuple(theirs.slice(8 * i, 8 * i + 9).tolist()) for i in range(9)} <= rows


def test_ids_that_the_tokenizer_has_not_are_found(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimqwen.data.packed.CHECKED_AT_ONCE", 4)
    vocab_size = max(load_tokenizer(world / "tokenizer").get_vocab().values()) + 1
    theirs = pack(tmp_path / "c4", [[1, 2, 3], [4, 5, vocab_size]], vocab_size + 1)
    heldout = [Source(path=world / "heldout.txt")]
    given = [Source(megatron=theirs.prefix)]
    with pytest.raises(UserError, match=rf"c4\.bin holds the id {vocab_size} \(token 5\).*has {vocab_size} tokens"):
        tokenize(given, world / "tokenizer", tmp_path / "out", heldout_sources=heldout)
    signed = np.fromfile(tmp_path / "c4.bin", "<i2")
    signed[-1] = -1
    signed.tofile(tmp_path / "c4.bin")
    header = bytearray((tmp_path / "c4.idx").read_bytes())
    header[17] = 3  # the code of int16
    (tmp_path / "c4.idx").write_bytes(header)
    with pytest.raises(UserError, match=r"holds the id -1 \(token 5\)"):
        tokenize(given, world / "tokenizer", tmp_path / "out", heldout_sources=heldout)
    assert not (tmp_path / "out").exists()


# --- from the outside -------------------------------------------------------------------------------------------------


def slimqwen(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_line_mixes(world: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    options = ("--tokenizer", "tokenizer", "--heldout-fraction", 0.2, "--workers", 1)
    result = slimqwen(
        "tokens", "w=wiki", "code", "--weight", "w=1", "--weight", "code=3", "--out", tmp_path / "out", *options
    )
    assert result.exit_code == 0, result.output
    assert load_manifest(tmp_path / "out").mixture == {"w": 1.0, "code": 3.0}
    assert (tmp_path / "out" / "w" / "train.bin").read_bytes() == (store / "wiki" / "train.bin").read_bytes()
    one, other = training_stream(tmp_path / "out", 16, seed=0), training_stream(store, 16, seed=0)
    assert torch.equal(one.batch(0, 40).tokens, other.batch(0, 40).tokens)


def test_words_of_a_command_line(world: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    (world / "lang=en").mkdir(exist_ok=True)
    found = named_sources(["wiki", "x=code", "lang=en", "store/wiki/train", "python-stdlib"], "text", {})
    assert [name_of(source) for source in found] == ["wiki", "x", "lang=en", "train", "python-stdlib"]
    assert found[1].path == Path("code") and found[2].path == Path("lang=en")
    assert found[3].megatron == Path("store/wiki/train") and found[4].builtin == "python-stdlib"
    with pytest.raises(UserError, match=r"weight is given for 'wikki' \(did you mean 'wiki'\?\)"):
        named_sources(["wiki"], "text", {"wikki": 1.0})
    with pytest.raises(UserError, match="must be positive, not 0"):
        named_sources(["wiki"], "text", {"wiki": 0.0})


def test_a_recipe_mixes_and_isolates(world: Path, tmp_path: Path) -> None:
    """The whole pipeline on a mixture of text and of others' token ids, one document to a row."""
    teacher = write_tiny_checkpoint(
        tmp_path / "teacher",
        tokenizer=world / "tokenizer",
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    )
    theirs = pack(tmp_path / "elsewhere" / "c4", [[5, 6, 7, 0] * 9, [8, 9, 0] * 3])
    values = {
        "run_dir": tmp_path / "run",
        "teacher": str(teacher),
        "target": {"num_experts": 4},
        "schedule": "one_shot",
        "data": {
            "sources": [{"path": world / "wiki", "weight": 3}, {"megatron": theirs.prefix, "weight": 1}],
            "heldout_sources": [{"path": world / "heldout.txt"}],
            "sequence_length": 32,
            "documents": "isolated",
        },
        "calibration": {"samples": 2},
        "distil": {"tokens": 32 * 2 * 2, "batch_size": 2, "warmup": "0 steps"},
        "evaluation": {
            "tokens": 64,
            "acceptance": {"prompts": 1, "prompt_tokens": 4, "new_tokens": 6, "depth": 2},
        },
    }
    recipe = Recipe.model_validate(values)
    run(recipe)
    assert (tmp_path / "run" / "final" / "config.json").is_file()
    assert load_manifest(tmp_path / "run" / "tokens").mixture == {"wiki": 3.0, "c4": 1.0}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of 'builtin', 'path' and 'megatron'"),
        ({"path": "wiki", "megatron": "c4"}, "exactly one of 'builtin', 'path' and 'megatron'"),
        ({"megatron": "c4", "keep_fraction": 0.5}, "keep_fraction chooses among documents of text"),
        ({"path": "wiki", "weight": 0}, "greater than 0"),
    ],
)
def test_a_source_of_a_recipe_says_what_is_wrong_with_it(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Source.model_validate(given)
