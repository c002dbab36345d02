"""Text to tokens to rows: the order is deterministic, the format is Megatron's, the cursor is one integer."""

import gzip
import json
import shutil
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimqwen.builtin import TEACHER
from slimqwen.core.errors import StageFailed, UserError
from slimqwen.data.packed import MAGIC, PackedTokens, PackedWriter
from slimqwen.data.sources import EXCLUDED_FOLDERS, documents, is_heldout
from slimqwen.data.store import load_manifest
from slimqwen.data.stream import TokenStream, shuffled
from slimqwen.data.tokenize import tokenize
from slimqwen.data.tokenizer import load_tokenizer, train_tokenizer
from slimqwen.recipe import Execution, Source

CODE = (
    'class A(dict):\n    def get(self, key):\n        return self.items["x"] + 42  # é 漢字 🎉\n\n\n    value = None\n'
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_tokenizer(iter([CODE] * 20), 300, folder)
    return folder


def pack(prefix: Path, texts: Iterable[Iterable[int]], vocab_size: int = 1000) -> PackedTokens:
    with PackedWriter(prefix, vocab_size) as writer:
        for ids in texts:
            writer.add(list(ids))
    return PackedTokens(prefix)


def names(source: Source) -> list[str]:
    return [document.name for document in documents(source)]


# Sources


def test_stdlib_is_sorted_relative_and_without_excluded_folders() -> None:
    found = names(Source(builtin="python-stdlib"))
    assert "json/decoder.py" in found and found == sorted(found)
    assert not any(EXCLUDED_FOLDERS & set(name.split("/")) for name in found)


def test_packages_are_those_installed_beside_us() -> None:
    stream = documents(Source(builtin="python-packages"))
    first = [next(stream).name for _ in range(20)]
    assert first == sorted(first)
    roots = [Path(sysconfig.get_path(scheme)) for scheme in ("purelib", "platlib")]
    assert all(any((root / name).is_file() for root in roots) for name in first)


def test_folder_reads_every_kind_of_file_sorted_by_relative_path(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "sub" / ".hidden").mkdir(parents=True)
    (tmp_path / "tables").mkdir()
    (tmp_path / "sub" / "b.py").write_bytes(b"x = 1\r\n")
    (tmp_path / "sub" / ".hidden" / "c.py").write_text("y = 2\n")
    (tmp_path / "sub.md").write_text("# title")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "a.txt").write_text("two\n\nparagraphs")
    (tmp_path / "tables" / "rows.jsonl").write_text('{"text": "first"}\n\n{"text": "third", "url": [1]}\n')
    table = pyarrow.table({"text": ["p0", None, "p2"], "n": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "tables" / "table.parquet")

    skipped: list[tuple[str, str]] = []
    found = [(d.name, d.text) for d in documents(Source(path=tmp_path), lambda *skip: skipped.append(skip))]
    assert found == [
        ("a.txt", "two\n\nparagraphs"),
        ("sub.md", "# title"),
        ("sub/b.py", "x = 1\r\n"),
        ("tables/rows.jsonl:0", "first"),
        ("tables/rows.jsonl:2", "third"),
        ("tables/table.parquet:0", "p0"),
        ("tables/table.parquet:2", "p2"),
    ]
    assert skipped == [("tables/table.parquet:1", "empty")]


def test_text_field_names_the_column(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"content": "body"}\n')
    assert [d.text for d in documents(Source(path=tmp_path / "rows.jsonl", text_field="content"))] == ["body"]


def test_what_is_not_utf8_or_empty_is_skipped_and_told(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "rows.jsonl").write_bytes(
        b'{"text": "\xff"}\n{"text": "half a pair \\ud800"}\n{"text": "fine"}\n'
    )
    skipped: list[tuple[str, str]] = []
    found = [d.name for d in documents(Source(path=tmp_path), lambda *skip: skipped.append(skip))]
    assert found == ["good.txt", "rows/rows.jsonl:2"]
    assert skipped == [
        ("empty.txt", "empty"),
        ("latin.txt", "not UTF-8 but latin-1, it seems"),
        ("rows/rows.jsonl:0", "not UTF-8 but latin-1, it seems"),
        ("rows/rows.jsonl:1", "not UTF-8"),
    ]


def test_weight_keeps_a_share_that_says_nothing_about_being_held_out() -> None:
    everything = names(Source(builtin="python-stdlib"))
    half = names(Source(builtin="python-stdlib", keep_fraction=0.5))
    assert half == names(Source(builtin="python-stdlib", keep_fraction=0.5))
    assert set(half) < set(everything) and 0.4 < len(half) / len(everything) < 0.6
    assert 0.3 < sum(is_heldout(name, 0.5) for name in half) / len(half) < 0.7


def test_heldout_is_a_fixed_function_of_the_name() -> None:
    # `printf json/decoder.py | sha256sum` begins with 3b2e3cb3, and 0x3b2e3cb3 / 2^32 = 0.23117.
    assert is_heldout("json/decoder.py", 0.2312)
    assert not is_heldout("json/decoder.py", 0.2311)
    every_name = [f"file{i}.py" for i in range(4000)]
    share = sum(is_heldout(name, 0.05) for name in every_name) / len(every_name)
    assert 0.04 < share < 0.06
    assert all(is_heldout(name, 0.2) for name in every_name if is_heldout(name, 0.05))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"txt": "x", "id": 1}\n',
            r"line 1 has no column 'text' \(did you mean 'txt'\?\); it has 'txt', 'id'",
        ),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"a":' * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b'"text"\n', "line 1 is not a JSON object"),
        ("a.jsonl", b'{"text": 7}\n', "holds int, not text"),
        ("a.parquet", b"PAR1 nonsense", "not a readable Parquet file"),
        ("a.txt", b"  \n", "no document with text"),
        ("a.bin", b"\xff", "a suffix that is not read"),
    ],
)
def test_bad_files_are_explained(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(documents(Source(path=tmp_path / file)))


def test_missing_parquet_column_is_explained(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"content": ["x"], "url": ["y"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column 'text'.*it has 'content', 'url'"):
        list(documents(Source(path=tmp_path)))


def test_missing_path_and_empty_folder_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        list(documents(Source(path=tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"no file that is read: slimqwen reads rows from \.json"):
        list(documents(Source(path=tmp_path)))


# Tokenizer


@pytest.mark.parametrize(
    "text",
    [
        CODE,
        "  leading, and trailing \t\n \r\n\n   ",
        "don't  'split'  this, please ; a  b",
        "\x00\x7f\u200b\ufeff e\u0301 🏳️‍🌈 ﷽",
        "before <|endoftext|> after",
        "",
    ],
)
def test_decoding_gives_back_any_text(tokenizer: Path, text: str) -> None:
    loaded = load_tokenizer(tokenizer)
    assert loaded.decode(loaded(text)["input_ids"]) == text


def test_tokenizer_is_what_a_checkpoint_needs(tokenizer: Path) -> None:
    loaded = load_tokenizer(tokenizer)
    assert (loaded.eos_token, loaded.eos_token_id, len(loaded)) == ("<|endoftext|>", 0, 300)
    assert set(loaded("x")) == {"input_ids", "attention_mask"}  # token_type_ids would stop generate()
    assert json.loads((tokenizer / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_text_is_cut_so_that_indentation_can_be_one_token(tokenizer: Path) -> None:
    cut = load_tokenizer(tokenizer).backend_tokenizer.pre_tokenizer.pre_tokenize_str
    assert [piece for piece, _ in cut("if x:\n        return y1\n\n\n    a_b  # c")] == (
        ["if", "Ġx", ":", "ĊĠĠĠĠĠĠĠĠ", "return", "Ġy", "1", "ĊĊĊĠĠĠĠ", "a", "_b", "Ġ", "Ġ#", "Ġc"]
    )


def test_tokenizer_survives_beside_a_qwen3_next_config(tokenizer: Path, tmp_path: Path) -> None:
    """Transformers may replace a tokenizer by the class it registers for the model type: ours must stay itself."""
    for file in tokenizer.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_next"}')
    assert load_tokenizer(tmp_path)(CODE)["input_ids"] == load_tokenizer(tokenizer)(CODE)["input_ids"]


def test_bad_tokenizers_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither tokenizer\.json, nor vocab\.json with"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match=r"tokenizer\.json is not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a JSON object"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="too small"):
        train_tokenizer(iter(["text"]), 256, tmp_path / "tiny")


# Packed tokens


def test_files_are_megatrons_to_the_byte(tmp_path: Path) -> None:
    pack(tmp_path / "train.v1", [[7, 8, 9], [5]])
    assert (tmp_path / "train.v1.bin").read_bytes() == bytes([7, 0, 8, 0, 9, 0, 5, 0])
    assert (tmp_path / "train.v1.idx").read_bytes() == (
        b"MMIDIDX\x00\x00"
        b"\x01\x00\x00\x00\x00\x00\x00\x00"  # version 1
        b"\x08"  # uint16
        b"\x02\x00\x00\x00\x00\x00\x00\x00"  # two sequences
        b"\x03\x00\x00\x00\x00\x00\x00\x00"  # three document indices
        b"\x03\x00\x00\x00\x01\x00\x00\x00"  # lengths 3, 1
        b"\x00\x00\x00\x00\x00\x00\x00\x00\x06\x00\x00\x00\x00\x00\x00\x00"  # pointers 0, 6
        b"\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00"
    )


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(300, "uint16"), (65_536, "uint16"), (65_537, "int32"), (151_936, "int32")]
)
def test_round_trip_up_to_the_largest_id(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    largest = vocab_size - 1
    tokens = pack(tmp_path / "t", [[0, largest], [], [largest, 1, 2]], vocab_size)
    assert (tokens.dtype.name, tokens.documents, tokens.total_tokens) == (dtype, 3, 5)
    assert tokens.slice(0, 5).tolist() == [0, largest, largest, 1, 2]
    assert tokens.slice(1, 3).tolist() == [largest, largest] and tokens.slice(1, 3).dtype == np.int64
    assert tokens.slice(5, 5).tolist() == []
    with pytest.raises(IndexError):
        tokens.slice(4, 6)


def test_reads_what_others_wrote(tmp_path: Path) -> None:
    """int64 ids, a document of two sequences, an empty document, and the modes of a multimodal index at the end."""
    np.array([1, 2, 3, 4], "<i8").tofile(tmp_path / "t.bin")
    (tmp_path / "t.idx").write_bytes(
        MAGIC
        + struct.pack("<QBQQ", 1, 5, 3, 4)
        + struct.pack("<3i3q4q", 2, 1, 1, 0, 16, 24, 0, 2, 2, 3)
        + b"\x00\x01\x00"
    )
    tokens = PackedTokens(tmp_path / "t")
    assert (tokens.documents, tokens.slice(0, 4).tolist()) == (3, [1, 2, 3, 4])


def test_unfinished_writer_leaves_no_index(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), PackedWriter(tmp_path / "t", 10) as writer:
        writer.add([1, 2])
        raise KeyboardInterrupt
    with pytest.raises(UserError, match=r"t\.idx cannot be read"):
        PackedTokens(tmp_path / "t")


@pytest.mark.parametrize("file", ["t.bin", "t.idx"])
@pytest.mark.parametrize("keep_bytes", [0, 20, -1])
def test_truncated_files_are_named(tmp_path: Path, file: str, keep_bytes: int) -> None:
    pack(tmp_path / "t", [range(20), range(5)])
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[:keep_bytes])
    with pytest.raises(UserError, match=file.replace(".", r"\.")):
        PackedTokens(tmp_path / "t")


@pytest.mark.parametrize(
    ("offset", "patch", "message"),
    [
        (0, b"X", "does not begin with"),
        (9, b"\x02", "version 2"),
        (17, b"\x07", "dtype code 7"),
        (18, b"\xff\xff\xff\xff\xff\xff\xff\x7f", "header implies"),
        (34, b"\x04", "do not follow one another"),  # the first length
        (34, b"\xfd\xff\xff\xff", "do not follow one another"),
        (42, b"\x02", "do not follow one another"),  # the first pointer
        (38, b"\x02", "where its index implies 10"),  # the last length
        (58, b"\x01", "do not run from 0 to its 2 sequences"),  # the first document index
        (74, b"\x05", "do not run from 0 to its 2 sequences"),
    ],
)
def test_corrupt_indices_are_explained(tmp_path: Path, offset: int, patch: bytes, message: str) -> None:
    pack(tmp_path / "t", [[7, 8, 9], [5]])
    content = bytearray((tmp_path / "t.idx").read_bytes())
    content[offset : offset + len(patch)] = patch
    (tmp_path / "t.idx").write_bytes(content)
    with pytest.raises(UserError, match=message):
        PackedTokens(tmp_path / "t")


def test_missing_bin_and_no_tokens_are_explained(tmp_path: Path) -> None:
    pack(tmp_path / "t", [[1]])
    (tmp_path / "t.bin").unlink()
    with pytest.raises(UserError, match=r"t\.bin is missing"):
        PackedTokens(tmp_path / "t")
    with pytest.raises(UserError, match="lists no document"):
        pack(tmp_path / "none", [])
    with pytest.raises(UserError, match="holds no token"):
        pack(tmp_path / "empty", [[], []])


# The stream


@pytest.mark.parametrize("size", [*range(1, 40), 63, 64, 65, 1000, 4097])
def test_shuffle_is_a_bijection(size: int) -> None:
    assert sorted(shuffled(i, size, seed=7, epoch=3) for i in range(size)) == list(range(size))


def test_shuffle_is_the_same_for_ever() -> None:
    """A change would silently show a resumed run some rows twice and others never."""
    assert [shuffled(i, 5, seed=0, epoch=0) for i in range(5)] == [2, 0, 4, 1, 3]  # the docstring's example


def test_shuffle_depends_on_seed_and_epoch() -> None:
    orders = {(s, e): tuple(shuffled(i, 1000, s, e) for i in range(1000)) for s in (0, 1) for e in (0, 1)}
    orders["unshuffled", 0] = tuple(range(1000))
    assert len(set(orders.values())) == 5
    # Two random orders of 1,000 agree in one place on average.
    assert all(
        sum(a == b for a, b in zip(x, y, strict=True)) < 10 for x in orders.values() for y in orders.values() if x != y
    )


def test_rows_overlap_by_one_token(tmp_path: Path) -> None:
    """The docstring's example: ten tokens, S = 3; with eleven, the last one is left out."""
    for count in (10, 11):
        stream = TokenStream(pack(tmp_path / "t", [range(4), range(4, count)]), sequence_length=3, seed=0)
        assert stream.rows_per_epoch == 3
        assert stream.in_order(range(3)).tokens.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
        assert stream.in_order([1]).tokens.tolist() == [[3, 4, 5, 6]]
    with pytest.raises(IndexError):
        stream.in_order([3])


def test_every_epoch_visits_every_row_once_in_its_own_order(tmp_path: Path) -> None:
    stream = TokenStream(pack(tmp_path / "t", [range(601)]), sequence_length=6, seed=1)
    epochs = [stream.batch(100 * epoch, 100).tokens[:, 0].tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(0, 600, 6)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_any_cut_into_batches_sees_the_same_rows(tmp_path: Path) -> None:
    import torch

    tokens = pack(tmp_path / "t", [range(47)])
    whole = TokenStream(tokens, sequence_length=5, seed=2).batch(0, 30).tokens  # 9 rows an epoch: into the fourth
    assert whole.shape == (30, 6) and whole.dtype == torch.int64
    again = TokenStream(tokens, sequence_length=5, seed=2)
    for cut in ([30], [1] * 30, [7, 8, 9, 6]):
        first, pieces = 0, []
        for rows in cut:
            pieces.append(again.batch(first, rows).tokens)
            first += rows
        assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(torch.from_numpy(again.row(29)), whole[29])


def test_less_than_one_row_is_explained(tmp_path: Path) -> None:
    tokens = pack(tmp_path / "t", [range(8)])
    assert TokenStream(tokens, sequence_length=7, seed=0).rows_per_epoch == 1
    with pytest.raises(UserError, match="8 tokens, fewer than the 9 of one row"):
        TokenStream(tokens, sequence_length=8, seed=0)


# The stage


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(40):
        (folder / f"file{i:02}.py").write_text(f"x = {i}  # é\n")
    (folder / "empty.py").write_text("")
    return folder


def test_tokenize_splits_by_name_and_ends_each_document_with_eos(tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    source = Source(path=corpus)
    manifest = tokenize([source], tokenizer, tmp_path / "out", heldout_fraction=0.3)
    loaded = load_tokenizer(tokenizer)
    for split, counts in (("train", manifest.train), ("heldout", manifest.heldout)):
        expected = [d.text for d in documents(source) if is_heldout(d.name, 0.3) == (split == "heldout")]
        tokens = PackedTokens(tmp_path / "out" / split)
        decoded = loaded.decode(tokens.slice(0, tokens.total_tokens))
        assert decoded.split("<|endoftext|>") == [*expected, ""]
        assert (
            (counts.documents, counts.tokens)
            == (len(expected), tokens.total_tokens)
            == (tokens.documents, counts.tokens)
        )
        assert counts.text_bytes == sum(len(text.encode()) for text in expected)
    assert manifest.train.documents + manifest.heldout.documents == 40
    assert (manifest.skipped_documents, manifest.eos_token_id, manifest.vocab_size) == (1, 0, 300)
    assert load_manifest(tmp_path / "out") == manifest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "out"]


def test_batches_do_not_change_the_result(
    tokenizer: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize([Source(path=corpus)], tokenizer, tmp_path / "one", heldout_fraction=0.3)
    monkeypatch.setattr("slimqwen.data.reader.BATCH_CHARACTERS", 30)
    tokenize([Source(path=corpus)], tokenizer, tmp_path / "many", heldout_fraction=0.3)
    for file in ("train.bin", "train.idx", "heldout.bin", "heldout.idx", "manifest.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "many" / file).read_bytes()


FILES = ("train.bin", "train.idx", "heldout.bin", "heldout.idx", "manifest.json")


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that a few files are worth other processes."""
    monkeypatch.setattr("slimqwen.data.reader.BATCH_CHARACTERS", 50)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Those that are started meanwhile."""
    started: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    return started


def test_any_number_of_processes_writes_the_same(
    tokenizer: Path, corpus: Path, tmp_path: Path, small_batches: None, processes: list[subprocess.Popen[bytes]]
) -> None:
    (corpus / "special.txt").write_text("before <|endoftext|> after\u2028\n\x00\n" + CODE)
    for workers in (1, 2, 3):
        out = tmp_path / str(workers)
        tokenize([Source(path=corpus)], tokenizer, out, heldout_fraction=0.3, execution=Execution(workers=workers))
        assert [(out / file).read_bytes() for file in FILES] == [(tmp_path / "1" / file).read_bytes() for file in FILES]
    assert len(processes) == 2 + 3 and all(process.poll() is not None for process in processes)


def test_little_text_starts_no_process(
    tokenizer: Path, corpus: Path, tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    tokenize([Source(path=corpus)], tokenizer, tmp_path / "out", heldout_fraction=0.3, execution=Execution(workers=8))
    assert processes == []


def test_an_interrupt_leaves_neither_files_nor_processes(
    tokenizer: Path,
    corpus: Path,
    tmp_path: Path,
    small_batches: None,
    processes: list[subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add = PackedWriter.add

    def interrupted(self: PackedWriter, ids: Any) -> None:
        if self.total_tokens > 100:
            raise KeyboardInterrupt
        add(self, ids)

    monkeypatch.setattr(PackedWriter, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize(
            [Source(path=corpus)], tokenizer, tmp_path / "out", heldout_fraction=0.3, execution=Execution(workers=2)
        )
    assert len(processes) == 2 and all(process.poll() is not None for process in processes)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_a_killed_process_is_explained(
    tokenizer: Path,
    corpus: Path,
    tmp_path: Path,
    small_batches: None,
    processes: list[subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add = PackedWriter.add

    def add_and_kill(self: PackedWriter, ids: Any) -> None:
        add(self, ids)
        processes[1].kill()

    monkeypatch.setattr(PackedWriter, "add", add_and_kill)
    with pytest.raises(StageFailed, match="a tokenizing process was killed"):
        tokenize(
            [Source(path=corpus)], tokenizer, tmp_path / "out", heldout_fraction=0.3, execution=Execution(workers=2)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_a_script_needs_no_guard(tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    """multiprocessing would run it again, from its first line, in every process."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nimport slimqwen.data.reader as reader\nfrom slimqwen import Execution, Source, tokenize\n"
        "print('running')\nreader.BATCH_CHARACTERS = 50\ncorpus, tokenizer, out = map(Path, sys.argv[1:])\n"
        "tokenize([Source(path=corpus)], tokenizer, out, heldout_fraction=0.3, execution=Execution(workers=2))\n"
    )
    paths = [corpus, tokenizer, tmp_path / "out"]
    ran = subprocess.run([sys.executable, script, *paths], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert ran.stdout == "running\n"
    assert load_manifest(tmp_path / "out").train.documents > 0


def test_a_tokenizer_that_would_truncate_or_pad_does_not(tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer, tmp_path / "bpe")
    settings = json.loads((tokenizer / "tokenizer.json").read_text())
    settings["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    settings["padding"] = {"strategy": {"Fixed": 90}, "direction": "Right", "pad_to_multiple_of": None}
    settings["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    (tmp_path / "bpe" / "tokenizer.json").write_text(json.dumps(settings))
    for name, folder in (("one", tokenizer), ("other", tmp_path / "bpe")):
        tokenize([Source(path=corpus)], folder, tmp_path / name, heldout_fraction=0.3)
    assert (tmp_path / "one" / "train.bin").read_bytes() == (tmp_path / "other" / "train.bin").read_bytes()


def test_progress_is_told_in_bytes_of_the_files(
    tokenizer: Path, tmp_path: Path, small_batches: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file's bytes, of any kind, whether a document is kept or not."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "text"
    (folder / "tables").mkdir(parents=True)
    (folder / "a.txt").write_text("é" * 50)
    (folder / "empty.txt").write_text("  ")
    (folder / "utf16.txt").write_text("not read", encoding="utf-16")
    (folder / "tables" / "rows.jsonl").write_text('{"text": "first"}\n\n{"text": "second"}\n')
    (folder / "tables" / "rows.csv.gz").write_bytes(gzip.compress(b"text\nthird\n"))
    table = pyarrow.table({"text": [f"row {i}" for i in range(3000)]})
    pyarrow.parquet.write_table(table, folder / "tables" / "t.parquet")
    size = sum(file.stat().st_size for file in folder.rglob("*.*"))
    tokenize([Source(path=folder)], tokenizer, tmp_path / "out", heldout_fraction=0.3)
    assert f"tokens: {size / 1000:.1f}/{size / 1000:.1f} kB" in capsys.readouterr().err


def test_heldout_sources_leave_all_sources_to_training(tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("held out")
    manifest = tokenize(
        [Source(path=corpus)], tokenizer, tmp_path / "out", heldout_sources=[Source(path=tmp_path / "held.txt")]
    )
    assert (manifest.train.documents, manifest.heldout.documents) == (40, 1)


def test_tokenize_explains_what_it_cannot_do(tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    out, source = tmp_path / "out", Source(path=corpus)
    with pytest.raises(UserError, match="none falls into the held-out share"):
        tokenize([source], tokenizer, out, heldout_fraction=1e-9)
    with pytest.raises(UserError, match=r"all documents of .*corpus fall into the held-out share"):
        tokenize([source], tokenizer, out, heldout_fraction=1 - 1e-9)
    with pytest.raises(UserError, match="nowhere does not exist"):
        tokenize([source, Source(path=tmp_path / "nowhere")], tokenizer, out)
    (tmp_path / "bpe").mkdir()
    (tmp_path / "bpe" / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="no eos token"):
        tokenize([source], tmp_path / "bpe", out)
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))


def test_bad_manifests_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is .* a folder of tokens"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "slimqwen.tokens/9"}')
    with pytest.raises(UserError, match=r"manifest.json is not a manifest of slimqwen.tokens/1 \(format"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="whole file"):
        load_manifest(tmp_path)


def test_english_prose_survives_the_built_in_tokenizer(shared_data: Path, tmp_path: Path) -> None:
    """A vocabulary learnt from Python source spells any text: a megabyte of Wikipedia comes back as it was."""
    text = (shared_data / "wikitext2-valid.txt").read_text(encoding="utf-8")
    lines = [line + "\n" for line in text.split("\n") if line.strip()]
    (tmp_path / "articles").mkdir()
    for i in range(0, len(lines), 200):
        (tmp_path / "articles" / f"{i:06}.txt").write_text("".join(lines[i : i + 200]), encoding="utf-8")
    manifest = tokenize([Source(path=tmp_path / "articles")], TEACHER, tmp_path / "tokens", heldout_fraction=0.3)
    assert manifest.train.text_bytes + manifest.heldout.text_bytes == len("".join(lines).encode())
    tokens = PackedTokens(tmp_path / "tokens" / "train")
    decoded = load_tokenizer(TEACHER).decode(tokens.slice(0, tokens.total_tokens))
    kept = [d.text for d in documents(Source(path=tmp_path / "articles")) if not is_heldout(d.name, 0.3)]
    assert decoded == "".join(document + "<|endoftext|>" for document in kept)
