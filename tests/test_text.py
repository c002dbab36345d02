"""Text as people have it: formats, compressed or not, folders of data sets, links, and what must not be opened."""

import gzip
import json
import os
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from slimqwen.core.errors import UserError
from slimqwen.data import rows as rows_module
from slimqwen.data.folder import split_of
from slimqwen.data.sources import check_source, documents, files_of, name_of, source_named
from slimqwen.recipe import Source

TEXTS = ["first, with a comma", 'second "quoted"\nof two lines', "dritter, größer 漢字"]


def texts(source: Source, **given: Any) -> list[str]:
    return [document.text for document in documents(source, **given)]


def parquet(path: Path, **columns: list[Any]) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def csv_of(delimiter: str) -> bytes:
    quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
    rows = [f"{number}{delimiter}{text}{delimiter}x\r\n" for number, text in enumerate(quoted)]
    return f"id{delimiter}text{delimiter}url\r\n{''.join(rows)}".encode()


ROWS = [{"id": [n], "text": text} for n, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
FORMATS = {
    "rows.jsonl": LINES,
    "rows.ndjson": LINES.replace(b"\n", b"\r\n"),
    "ROWS.JSONL": b"\xef\xbb\xbf" + LINES,
    "lines.json": LINES,
    "list.json": json.dumps(ROWS).encode(),
    "misnamed.jsonl": json.dumps(ROWS, indent=2).encode(),
    "indented.Json": json.dumps(ROWS, indent=4, ensure_ascii=False).encode(),
    "one-after-the-other.json": "".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "rows.csv": csv_of(","),
    "ROWS.TSV": b"\xef\xbb\xbf" + csv_of("\t"),
}
COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".GZ": lambda content: gzip.compress(content[:9]) + gzip.compress(content[9:]),  # as `cat a.gz b.gz` makes it
    ".zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("file", FORMATS)
def test_every_format_gives_the_same_rows_compressed_or_not(tmp_path: Path, file: str, suffix: str) -> None:
    path = tmp_path / (file + suffix)
    path.write_bytes(COMPRESSED[suffix](FORMATS[file]))
    read: list[int] = []
    assert texts(Source(path=path), on_read=read.append) == TEXTS
    assert sum(read) == path.stat().st_size
    assert name_of(Source(path=path)) == file.split(".")[0]


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_a_csv_may_have_another_delimiter_and_rows_that_end_early(tmp_path: Path, delimiter: str) -> None:
    (tmp_path / "t.csv").write_text("id;text\n1;a, b\n2\n3;c\n".replace(";", delimiter))
    skipped: list[str] = []
    assert texts(Source(path=tmp_path / "t.csv"), on_skip=lambda name, reason: skipped.append(f"{name} {reason}")) == [
        "a, b",
        "c",
    ]
    assert skipped == ["t.csv:1 empty"]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary()])
def test_texts_of_a_parquet_file_that_are_not_utf8_are_left_out_one_by_one(tmp_path: Path, kind: Any) -> None:
    stored = pyarrow.array([b"one", b"caf\xe9", b"three"], {"large_string": "large_binary"}.get(str(kind), "binary"))
    column = pyarrow.Array.from_buffers(kind, 3, stored.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "t.parquet")
    skipped: list[str] = []
    read = texts(Source(path=tmp_path / "t.parquet"), on_skip=lambda name, reason: skipped.append(f"{name} {reason}"))
    assert (read, skipped) == (["one", "three"], ["t.parquet:1 not UTF-8 but latin-1, it seems"])


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_parquet_and_prose_too(tmp_path: Path, suffix: str) -> None:
    parquet(tmp_path / "plain", text=TEXTS, n=[1, 2, 3])
    (tmp_path / f"t.parquet{suffix}").write_bytes(COMPRESSED[suffix]((tmp_path / "plain").read_bytes()))
    (tmp_path / f"t.MD{suffix}").write_bytes(COMPRESSED[suffix]("\ufeffgrößer".encode()))
    read: list[int] = []
    assert texts(Source(path=tmp_path / f"t.parquet{suffix}"), on_read=read.append) == TEXTS
    assert sum(read) == (tmp_path / f"t.parquet{suffix}").stat().st_size
    assert texts(Source(path=tmp_path / f"t.MD{suffix}")) == ["größer"]


def test_any_cut_of_a_json_file_into_pieces_gives_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"n": [-1.5e-3, None, True, {"a": "]}"}], "text": text + ' \\" \\u00e9 ]'} for text in TEXTS]
    for number, content in enumerate([json.dumps(rows), " \n".join(map(json.dumps, rows)) + "\n"]):
        path = tmp_path / f"{number}.json"
        path.write_text(content)
        for characters in (1, 2, 3, 5, 17):
            monkeypatch.setattr(rows_module, "JSON_CHARACTERS", characters)
            assert texts(Source(path=path)) == [row["text"] for row in rows]


def test_a_file_that_is_no_table_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "LONGEST_ROW", 10_000_000)
    with (tmp_path / "annotations.json").open("w") as stream:
        stream.write('{"images": [' + "1, " * 12_000_000 + "1]}")
    read: list[int] = []
    with pytest.raises(UserError, match=r"row 0 is not JSON \(longer than 10,000,000 characters\)"):
        texts(Source(path=tmp_path / "annotations.json"), on_read=read.append)
    assert sum(read) < 25_000_000


def test_a_long_json_list_is_read_in_little_memory(tmp_path: Path) -> None:
    with (tmp_path / "long.json").open("w") as stream:
        stream.write("[" + ",\n".join(json.dumps({"text": "word " * 2000}) for _ in range(2000)) + "]")
    assert (tmp_path / "long.json").stat().st_size > 20_000_000
    tracemalloc.start()
    assert sum(1 for _ in documents(Source(path=tmp_path / "long.json"))) == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.json", b'[{"text": "x"}, {"text": "y"', r"row 1 is not JSON \(.*\): it must hold a list of rows"),
        ("a.json", b'[{"text": "x"} {"text": "y"}]', "row 1 is not JSON"),
        ("a.json", b'[{"text": "x"},]', "row 1 is not JSON"),
        ("a.json", b'[{"text": "x"}] more', "row 1 is not JSON"),
        ("a.json", b"[" * 100_000, "row 0 is not JSON"),
        ("a.json", b'{"rows": [{"text": "x"}]}', "row 0 has no column 'text'; it has 'rows': set text_field"),
        ("a.json", b"[1, 2]", "row 0 is not a JSON object"),
        ("a.json", b"", "its tables have no rows"),
        ("a.csv", b"id;body\n1;x\n", "row 0 has no column 'text'; it has 'id', 'body'"),
        ("a.csv", b"id,text\n1,it is, well, cut\n", "line 2 has 4 cells where the header names 2: .* double quotes"),
        ("a.csv", b'text\n"not closed\n', "line 2 is not CSV"),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz cannot be read"),
        ("a.jsonl.zst", gzip.compress(LINES, mtime=0), "a.jsonl.zst cannot be read"),
        ("a.jsonl.gz", gzip.compress(LINES * 99, mtime=0)[:40], "a.jsonl.gz cannot be read"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a git-lfs pointer"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a git-lfs pointer"),
        (
            "a.txt",
            "kein Text".encode("utf-16"),
            r"holds no document with text: 1 not UTF-8 but UTF-16 \(a.txt\); convert",
        ),
        ("a.txt", "no mark".encode("utf-16-le"), "1 not UTF-8 but UTF-16"),
        ("a.txt", "kein Text".encode("utf-32"), "1 not UTF-8 but UTF-32"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", r"line 1 is not JSON \(Exceeds the limit"),
        ("a.jsonl", LINES.decode().encode("utf-16"), "1 not UTF-8 but UTF-16"),
        ("a.txt", "größer".encode("latin-1"), "1 not UTF-8 but latin-1, it seems"),
        ("a.csv", "text\ngrößer\nübel\n".encode("latin-1"), r"2 not UTF-8 but latin-1, it seems \(the first a.csv:0\)"),
    ],
)
def test_what_cannot_be_read_is_explained(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        texts(Source(path=tmp_path / file))


def test_other_suffixes_are_refused_by_name_and_read_when_asked(tmp_path: Path) -> None:
    (tmp_path / "notes.log").write_text("prose")
    (tmp_path / "export.dat").write_bytes(LINES)
    with pytest.raises(
        UserError, match=r"notes\.log has a suffix that is not read.*\.parquet.*'text'.*data\.sources\.format"
    ):
        check_source(Source(path=tmp_path / "notes.log"))
    assert texts(Source(path=tmp_path / "notes.log", format="text")) == ["prose"]
    assert texts(Source(path=tmp_path / "export.dat", format="jsonl")) == TEXTS
    with pytest.raises(ValueError, match="format says how the files of a 'path' are read"):
        Source(builtin="python-stdlib", format="text")


# Folders


def fill(folder: Path, *files: str) -> Path:
    """Each file with content as its suffix promises; rows say the file's name."""
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.endswith(".parquet"):
            parquet(path, text=[file])
        elif file.endswith((".json", ".jsonl")):
            path.write_text(json.dumps({"text": file}) + "\n")
        else:
            path.write_text(f"text of {file}")
    return folder


def read_names(folder: Path, **given: Any) -> list[str]:
    return [name for name, _ in files_of(Source(path=folder, **given.pop("source", {})), **given)]


def test_a_data_sets_card_licence_and_other_splits_are_no_training_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = [
        "README.md",
        "LICENSE.txt",
        "load.py",
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
    ]
    folder = fill(
        tmp_path / "ds",
        *card,
        "data/test-00000-of-00001.parquet",
        "validation/a.jsonl",
        "extra.bin",
        "LICENSE",
        "blob",
        "x.y.bin",
    )
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A data set\n")
    assert texts(Source(path=folder)) == card[3:]
    said = capsys.readouterr().err
    assert (
        "skipped 2 .bin, 1 LICENSE, 1 without a suffix, 1 LICENSE.txt, 1 README.md, 1 .py; beside tables only the tables are read"
        in said
    )
    assert "left out the test split (data/test-00000-of-00001.parquet): to read it, name it" in said
    assert "left out the validation split (validation/a.jsonl)" in said
    # What was left out can be had: a split by its file or folder, texts by `format`, and to be held out by itself.
    assert texts(Source(path=folder / "validation")) == ["validation/a.jsonl"]
    assert read_names(folder, source={"format": "text"}) == ["LICENSE.txt", "README.md", "load.py"]
    assert read_names(folder, heldout=True) == ["data/test-00000-of-00001.parquet", "validation/a.jsonl"]


def test_a_folder_of_nothing_but_a_test_split_is_not_trained_on_unasked(tmp_path: Path) -> None:
    folder = fill(tmp_path, "test.jsonl")
    with pytest.raises(UserError, match=r"no file that is read.*left out the test split \(test.jsonl\)"):
        texts(Source(path=folder))
    assert texts(Source(path=folder), heldout=True) == texts(Source(path=folder / "test.jsonl")) == ["test.jsonl"]


def test_prose_has_splits_where_one_file_is_called_train_and_code_has_not(tmp_path: Path) -> None:
    fill(tmp_path / "wiki", "wiki.train.txt", "wiki.valid.txt", "wiki.test.txt", "more.txt")
    assert read_names(tmp_path / "wiki") == ["more.txt", "wiki.train.txt"]
    assert read_names(tmp_path / "wiki", heldout=True) == ["wiki.test.txt", "wiki.valid.txt"]
    assert len(read_names(fill(tmp_path / "code", "train.py", "test.py", "eval.py"))) == 3
    assert len(read_names(fill(tmp_path / "essays", "my-test.txt", "other.txt"))) == 2


def test_a_source_tree_is_read_with_its_readme_and_without_its_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fill(tmp_path, "README.md", "src/app.py", "src/test/test_app.py", "test/rows.jsonl", "docs/index.rst")
    (folder / "package.json").write_text('{"name": "app"}')
    (folder / "tsconfig.json").write_text("// not even JSON\n{}")
    (folder / "src" / "labels.csv").write_text("id,label\n1,x\n")
    code = ["docs/index.rst", "src/app.py", "src/test/test_app.py"]
    assert read_names(folder) == code  # test/ holds a split; README is the only text above it
    (folder / "setup.py").write_text("setup()")
    assert read_names(folder) == ["README.md", *code[:1], "setup.py", *code[1:]]
    list(documents(Source(path=folder)))
    assert "skipped 2 .json without a column 'text', 1 .csv without a column 'text'" in capsys.readouterr().err


def test_tables_with_another_column_are_told_from_settings(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,body\n1,x\n")
    with pytest.raises(UserError, match=r"skipped 1 .csv without a column 'text'.*the column is named by text_field"):
        texts(Source(path=tmp_path))
    assert texts(Source(path=tmp_path, text_field="body")) == ["x"]
    (tmp_path / "settings.json").write_text('{"text": 5}')
    (tmp_path / "b.json").write_text('{"text": null}{"text": "y"}')
    assert texts(Source(path=tmp_path)) == ["y"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        (gzip.compress(LINES, mtime=0)[:20], "be read"),
    ],
)
def test_a_table_that_cannot_be_looked_into_is_no_setting(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.json.gz").write_bytes(content)
    with pytest.raises(UserError, match=message):
        texts(Source(path=tmp_path))


def test_texts_and_tables_of_a_corpus_lie_in_folders_of_their_own(tmp_path: Path) -> None:
    folder = fill(
        tmp_path, "README.md", "books/a.txt", "books/README.md", "web/a.jsonl", "web/NOTICE.txt", "web/b.json"
    )
    assert read_names(folder) == ["books/README.md", "books/a.txt", "web/a.jsonl", "web/b.json"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00001.parquet", "train"),
        ("test.jsonl.gz", "test"),
        ("validation/part-0.parquet", "validation"),
        ("wiki_dev.jsonl", "validation"),
        ("test/train.jsonl", "train"),
        ("latest.jsonl", None),
        ("contest/values.jsonl", None),
    ],
)
def test_a_split_is_a_word_of_the_name(name: str, split: str | None) -> None:
    assert split_of(name) == split


# Links, and what is no file


def test_the_hubs_cache_is_read_through_its_links(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    fill(tmp_path / "blobs", "1", "2").joinpath("1").write_bytes(LINES)
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "data" / "train.jsonl").symlink_to("../../../blobs/1")
    (snapshot / "README.md").symlink_to("../../blobs/2")
    assert texts(Source(path=snapshot)) == TEXTS
    (tmp_path / "snapshots" / "old").mkdir()
    (tmp_path / "snapshots" / "old" / "train.jsonl").symlink_to("../../blobs/1")
    with pytest.raises(UserError, match="holds 2 snapshots and refs/main names none of them"):
        texts(Source(path=tmp_path))
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "main").write_text("abc\n")
    assert next(document.name for document in documents(Source(path=tmp_path))) == "data/train.jsonl:0"
    (tmp_path / "named.jsonl").symlink_to(snapshot / "data" / "train.jsonl")
    assert texts(Source(path=tmp_path / "named.jsonl")) == TEXTS


def test_a_cache_of_several_repositories_gives_one_snapshot_of_each(tmp_path: Path) -> None:
    for name in ("datasets--a--b", "datasets--c--d"):
        repository = fill(
            tmp_path / name, "blobs/1", "refs/main", "snapshots/abc/train.jsonl", "snapshots/old/train.jsonl"
        )
        (repository / "refs" / "main").write_text("abc")
        for snapshot in ("abc", "old"):
            (repository / "snapshots" / snapshot / "train.jsonl").write_bytes(LINES)
        (repository / "snapshots" / "abc" / "up").symlink_to("../..")
    names = [f"datasets--{name}/snapshots/abc/train.jsonl" for name in ("a--b", "c--d")]
    assert [name for name, _ in files_of(Source(path=tmp_path))] == names


def test_linked_folders_are_read_once_and_loops_end(tmp_path: Path) -> None:
    folder = fill(tmp_path / "all", "a.txt", "z/b.txt")
    fill(tmp_path / "elsewhere", "c.txt")
    for name in ("m", "n"):
        (folder / name).symlink_to(tmp_path / "elsewhere")
    (folder / "z" / "up").symlink_to("..")
    (folder / "self.txt").symlink_to("self.txt")
    assert read_names(folder) == ["a.txt", "m/c.txt", "z/b.txt"]


def test_what_is_no_file_is_never_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fill(tmp_path / "f", "a.txt", "rows.txt/b.txt")
    os.mkfifo(folder / "pipe.txt")
    (folder / "zero.txt").symlink_to("/dev/zero")
    (folder / "gone.txt").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(folder / "s.txt"))
        assert texts(Source(path=folder)) == ["text of a.txt", "text of rows.txt/b.txt"]
        said = capsys.readouterr().err
        assert all(kind in said for kind in ("1 FIFO", "1 device", "1 link to nothing", "1 socket"))
        for name, kind in [("pipe.txt", "FIFO"), ("zero.txt", "device"), ("s.txt", "socket")]:
            with pytest.raises(UserError, match=f"{name} is a {kind}: give a file or folder"):
                texts(Source(path=folder / name))
    with pytest.raises(UserError, match=r"gone.txt does not exist"):
        texts(Source(path=folder / "gone.txt"))
    (folder / "self.txt").symlink_to("self.txt")
    with pytest.raises(UserError, match=r"self.txt cannot be read: Too many levels of symbolic links"):
        texts(Source(path=folder / "self.txt"))
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        texts(source_named("x" * 5000))
    with pytest.raises(UserError, match=r"a\\x00b does not exist"):
        texts(source_named("a\0b"))
    (tmp_path / "empty.jsonl").mkdir()
    with pytest.raises(UserError, match="holds no file that is read"):
        texts(Source(path=tmp_path / "empty.jsonl"))


def test_names_that_are_no_text_or_move_the_cursor_are_shown_safely(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fill(tmp_path / "f\x1b[2J", "a\nb.txt", "\x1b]0;title\x07.bin")
    strange = Path(os.fsdecode(os.fsencode(folder) + b"/latin-\xe9.txt"))
    strange.write_text("text of a name that is not UTF-8")
    assert len(texts(Source(path=folder))) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said and "f\\x1b[2J" in said
    with pytest.raises(UserError, match=r"the name of the data source .*latin-\\udce9.txt is not UTF-8: rename it"):
        texts(Source(path=strange))
