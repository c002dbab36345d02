"""What a checkpoint, a tokenizer and a text are recognised by: what is read of them, and nothing that lies beside it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from shutil import copyfile, copytree

import pytest
from tiny import write_tiny_checkpoint, write_tiny_tokens
from tokenizers import Tokenizer

from slimqwen.artifacts import fingerprint
from slimqwen.checkpoint.identity import content_fingerprint, vocabulary_fingerprint
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.checkpoint.writer import companions_fingerprint
from slimqwen.data.identity import MOST_BYTES, text_identity
from slimqwen.data.store import check_vocabulary, load_manifest
from slimqwen.evaluation.benchmark_results import identity_of
from slimqwen.recipe import DataRecipe, Source


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identity")
    tokenizer, _ = write_tiny_tokens(folder)
    write_tiny_checkpoint(folder / "teacher", tokenizer=tokenizer)
    return folder


@pytest.fixture
def teacher(original: Path, tmp_path: Path) -> Path:
    return Path(copytree(original / "teacher", tmp_path / "teacher"))


def rewrite(file: Path) -> None:
    """The same JSON with other spaces and in another order of keys."""
    value = json.loads(file.read_bytes())
    file.write_text(json.dumps(dict(reversed(value.items())), indent=7))


BESIDE: dict[str, Callable[[Path], object]] = {
    "README": lambda folder: (folder / "README.md").write_text("# A fine model\n"),
    "notes": lambda folder: (folder / "notes.bin").write_bytes(b"remember"),
    "backup": lambda folder: copyfile(folder / "model.safetensors", folder / "model.safetensors.bak"),
    "hidden": lambda folder: (folder / ".gitattributes").write_text("*.safetensors filter=lfs"),
    "subfolder": lambda folder: (folder / "onnx").mkdir() or (folder / "onnx" / "config.json").write_text("{}"),  # type: ignore[func-returns-value]
    "touched": lambda folder: os.utime(folder / "model.safetensors", (0, 0)),
    "config written anew": lambda folder: rewrite(folder / "config.json"),
    "tokenizer written anew": lambda folder: rewrite(folder / "tokenizer.json"),
}


@pytest.mark.parametrize("what", BESIDE)
def test_what_lies_beside_a_model_is_no_part_of_it(teacher: Path, what: str) -> None:
    before = Checkpoint(teacher).fingerprint(), companions_fingerprint(teacher), identity_of(teacher)
    BESIDE[what](teacher)
    assert (Checkpoint(teacher).fingerprint(), companions_fingerprint(teacher), identity_of(teacher)) == before


def test_weights_config_and_companions_are_told_apart(teacher: Path) -> None:
    def seen() -> tuple[str, str, str]:
        return Checkpoint(teacher).fingerprint(), companions_fingerprint(teacher), identity_of(teacher)

    first = seen()
    (teacher / "chat_template.jinja").write_text("{{ messages }}")
    template = seen()
    assert template[0] == first[0] and template[1] != first[1] and template[2] != first[2]
    config = json.loads((teacher / "config.json").read_bytes())
    (teacher / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    other_config = seen()
    assert other_config[0] != template[0] and other_config[1] == template[1]
    weights = bytearray((teacher / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (teacher / "model.safetensors").write_bytes(weights)
    other_weights = seen()
    assert other_weights[0] != other_config[0] and other_weights[1] == template[1] and other_weights[2] != template[2]


def test_a_tokenizer_that_was_only_written_anew_is_the_same_tokenizer(original: Path, teacher: Path) -> None:
    tokens, file = original / "tokens", teacher / "tokenizer.json"
    before = vocabulary_fingerprint(teacher)
    assert load_manifest(tokens).tokenizer_fingerprint == before
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(512)
    tokenizer.enable_padding()
    tokenizer.save(str(file), pretty=False)
    assert vocabulary_fingerprint(teacher) == before
    value = json.loads(file.read_bytes())
    value["model"]["merges"] = [" ".join(pair) for pair in value["model"]["merges"]]  # as older versions write them
    file.write_text(json.dumps(value))
    Tokenizer.from_file(str(file))
    assert vocabulary_fingerprint(teacher) == before
    check_vocabulary(load_manifest(tokens), tokens, teacher, 300)

    value["model"]["merges"].reverse()
    file.write_text(json.dumps(value))
    assert vocabulary_fingerprint(teacher) != before


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"{", b"[" * 100_000, b'{"a": 1, "a": 2}', b"1" * 10_000, b"null"])
def test_what_is_no_json_is_recognised_by_its_bytes(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    seen = content_fingerprint(file)
    file.write_bytes(content + b" 1")
    assert content_fingerprint(file) != seen


def test_a_record_made_by_hand_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("one")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("a")
    plain = fingerprint(folder)
    for name in ("../secret", str(tmp_path / "secret"), "a/../../secret"):
        record = {"format": "slimqwen.folder/1", "key": None, "files": {name: 3}}
        (folder / ".slimqwen").write_text(json.dumps(record))
        assert fingerprint(folder) == plain, "it is no record"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(f"the text of {name}")
    return folder


def test_text_is_recognised_by_content_and_not_by_time(original: Path, text: Path) -> None:
    data = DataRecipe(sources=[Source(path=text)])

    def seen() -> str:
        return json.dumps(text_identity(data, original / "teacher"))

    first, stat = seen(), (text / "a.txt").stat()
    os.utime(text / "b.txt", (0, 0))
    (text / ".git").mkdir()
    (text / ".git" / "index.txt").write_text("what is not read does not count")
    assert seen() == first
    (text / "a.txt").write_text("the text of A.txt")
    os.utime(text / "a.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (text / "a.txt").stat().st_size == stat.st_size
    second = seen()
    assert second != first
    (text / "b.txt").rename(text / "c.txt")  # a document's name decides whether it is held out
    assert seen() not in (first, second)


def test_a_tokenizer_config_and_a_chat_template_belong_to_the_text(original: Path, teacher: Path, text: Path) -> None:
    data = DataRecipe(sources=[Source(path=text)])
    seen = [text_identity(data, teacher)]
    (teacher / "LICENSE").write_text("free")
    assert text_identity(data, teacher) == seen[0]
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (teacher / name).write_text('{"eos_token": "<other>"}')
        assert text_identity(data, teacher) not in seen
        seen.append(text_identity(data, teacher))


def test_little_is_read_of_a_large_file(tmp_path: Path) -> None:
    """A tebibyte, nearly all of it a hole: read whole, it would take the test an hour."""
    path = tmp_path / "text.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    seen = [fingerprint(path, most_bytes=MOST_BYTES)]
    for place in (0, (1 << 40) - 1):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        seen.append(fingerprint(path, most_bytes=MOST_BYTES))
    path.write_bytes(bytes(MOST_BYTES))
    for place in (0, MOST_BYTES // 2 + 17, MOST_BYTES - 1):  # anywhere in what is read whole
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        seen.append(fingerprint(path, most_bytes=MOST_BYTES))
    assert len(set(seen)) == len(seen)
