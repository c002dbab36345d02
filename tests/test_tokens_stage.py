"""What the tokens stage makes of text: splits, conversations, the tokens around documents, and what it says of it all."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from slimqwen.checkpoint.identity import vocabulary_fingerprint
from slimqwen.core.errors import UserError
from slimqwen.data import overlap as overlap_module
from slimqwen.data.announcement import announce, context_of, notes_of_length, notes_of_passes
from slimqwen.data.division import divide
from slimqwen.data.documents import Document
from slimqwen.data.mixture import check_weights
from slimqwen.data.overlap import Overlap
from slimqwen.data.packed import PackedTokens
from slimqwen.data.store import load_manifest, training_stream
from slimqwen.data.tokenize import tokenize
from slimqwen.data.tokenizer import load_tokenizer
from slimqwen.recipe import Execution, Recipe, Source
from slimqwen.runs.checks import announce_text

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
WORDS = "the expert reads, the router writes; hello world and layers of 42 tokens.\n"


@pytest.fixture(scope="module")
def trained() -> str:
    """tokenizer.json of a byte-level BPE with the special tokens of an instruct model, <|endoftext|> being 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([WORDS] * 20, trainer)
    return tokenizer.to_str()


Make = Callable[..., Path]


@pytest.fixture
def make(trained: str, tmp_path: Path) -> Make:
    """Writes a tokenizer's folder: its eos, other settings of tokenizer_config.json, and other files."""

    def make(
        eos: str = "<|endoftext|>", template: str | None = None, files: dict[str, Any] | None = None, **config: Any
    ) -> Path:
        folder = tmp_path / "tokenizer"
        folder.mkdir()
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos} | config
        written: dict[str, Any] = {"tokenizer.json": json.loads(trained), "tokenizer_config.json": settings}
        for name, value in (written | (files or {})).items():
            (folder / name).write_text(json.dumps(value))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


@pytest.fixture
def corpus(tmp_path: Path) -> Source:
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": f"{WORDS}{n}"}) + "\n" for n in range(40)))
    return Source(path=tmp_path / "docs.jsonl")


def ids(folder: Path, split: str = "train") -> list[int]:
    tokens = PackedTokens(folder / split)
    return tokens.slice(0, tokens.total_tokens).tolist()


def text(tokenizer: Path, folder: Path, split: str = "train") -> str:
    decoded: str = load_tokenizer(tokenizer).decode(ids(folder, split))
    return decoded


# What is left out, and what is in both splits


def test_what_is_left_out_is_counted_by_reason_and_said(
    make: Make, corpus: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "more").mkdir()
    for n in range(3):
        (tmp_path / "more" / f"{n}.txt").write_bytes("größer".encode("latin-1"))
    (tmp_path / "more" / "u.txt").write_text("x", encoding="utf-16")
    (tmp_path / "more" / "v.txt").write_text(" ")
    (tmp_path / "more" / "good.txt").write_text("good")
    manifest = tokenize([corpus, Source(path=tmp_path / "more")], make(), tmp_path / "out", heldout_fraction=0.3)
    assert manifest.skipped_documents == 5
    assert {reason: (found.documents, found.first) for reason, found in manifest.skipped.items()} == {
        "not UTF-8 but latin-1, it seems": (3, "0.txt"),
        "not UTF-8 but UTF-16": (1, "u.txt"),
        "empty": (1, "v.txt"),
    }
    said = "3 not UTF-8 but latin-1, it seems (the first 0.txt), 1 not UTF-8 but UTF-16 (u.txt), 1 empty (v.txt)"
    assert said in capsys.readouterr().err
    assert load_manifest(tmp_path / "out") == manifest


def test_held_out_text_that_is_trained_on_is_counted(
    make: Make, corpus: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"{WORDS}{n}  \n" for n in (3, 5, 5)] + ["new text"]  # white space at the end makes no difference
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    held = Source(path=tmp_path / "held.jsonl")
    manifest = tokenize([corpus], make(), tmp_path / "out", heldout_sources=[held])
    assert (manifest.heldout_in_training, manifest.heldout.documents) == (3, 4)
    assert "3 of 4 held-out documents are training documents too" in capsys.readouterr().err
    assert tokenize([corpus], tmp_path / "tokenizer", tmp_path / "out", heldout_fraction=0.3).heldout_in_training == 0


def test_a_data_set_is_trained_and_measured_on_by_its_splits(make: Make, tmp_path: Path) -> None:
    (tmp_path / "ds").mkdir()
    for split, number in (("train", 5), ("test", 3), ("validation", 2)):
        rows = "".join(json.dumps({"text": f"{split} {n}"}) + "\n" for n in range(number))
        (tmp_path / "ds" / f"{split}.jsonl").write_text(rows)
    data_set = Source(path=tmp_path / "ds")
    manifest = tokenize([data_set], make(), tmp_path / "out", heldout_sources=[data_set])
    assert (manifest.train.documents, manifest.heldout.documents, manifest.heldout_in_training) == (5, 5, 0)


def test_an_estimate_takes_the_place_of_a_count_of_very_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap_module, "MOST_HASHES", 1000)
    overlap = Overlap()
    for n in range(20_000):
        overlap.add(str(n), heldout=False)
        if n % 4 == 0:
            overlap.add(f" {n if n % 8 else -n - 1}\n", heldout=True)  # every other one of 5,000 is new
    assert len(overlap._training) <= 1000
    assert 2000 < overlap.documents < 3000  # of 2,500


def test_manifests_of_earlier_versions_are_read(make: Make, corpus: Source, tmp_path: Path) -> None:
    tokenize([corpus], make(), tmp_path / "out", heldout_fraction=0.3)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for field in ("skipped", "heldout_in_training", "bos_token_ids"):
        del manifest[field]
    for source in manifest["sources"]:
        del source["format"]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    assert load_manifest(tmp_path / "out").heldout_in_training == 0


# One long document


def test_the_end_of_a_book_is_held_out(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paragraphs = [f"Paragraph {n}. {WORDS * 3}" for n in range(40)]
    (tmp_path / "book.txt").write_text("\n".join(paragraphs))
    tokenizer = make()
    manifest = tokenize([Source(path=tmp_path / "book.txt")], tokenizer, tmp_path / "out", heldout_fraction=0.1)
    assert text(tokenizer, tmp_path / "out") == "\n".join(paragraphs[:36]) + "\n<|endoftext|>"
    assert text(tokenizer, tmp_path / "out", "heldout") == "\n".join(paragraphs[36:]) + "<|endoftext|>"
    whole = len("\n".join(paragraphs))
    assert manifest.train.text_bytes + manifest.heldout.text_bytes == whole
    tail = manifest.heldout.text_bytes
    assert f"the last {tail:,} of its {whole:,} characters are held out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("texts", "fraction", "heldout"),
    [
        (["one two three four"], 0.25, "four"),  # no paragraph, no line: between words
        (["abcdefghij"], 0.3, "hij"),  # nor words: anywhere
        (["title\n\n" + "x" * 90], 0.2, "x" * 19),  # a paragraph too far from the fifth that is asked for
        (["first\n\nsecond\n\nthird"], 0.2, "third"),
        (["a" * 50, "b" * 30, "c" * 20], 0.2, "c" * 20),  # whole documents where they end there
        (["a" * 50, "b" * 30, "c" * 20], 0.4, "b" * 20 + "c" * 20),
    ],
)
def test_where_a_text_is_divided(texts: list[str], fraction: float, heldout: str) -> None:
    names = iter(name for name in map(str, range(1000)) if not divided_by_name(name, fraction))
    documents = [Document(next(names), text) for text in texts]
    divided = list(divide(documents, fraction, "the text"))
    assert "".join(document.text for document, _ in divided) == "".join(texts)
    assert "".join(document.text for document, is_heldout in divided if is_heldout) == heldout


def divided_by_name(name: str, fraction: float) -> bool:
    from slimqwen.data.sources import is_heldout

    return is_heldout(name, fraction)


def test_enough_documents_are_divided_by_their_names_as_ever() -> None:
    documents = [Document(f"{n}", "x" * 100) for n in range(200)]
    divided = list(divide(documents, 0.1, "the text"))
    assert [document for document, _ in divided] == documents
    assert [is_heldout for _, is_heldout in divided] == [divided_by_name(d.name, 0.1) for d in documents]


# Conversations


def chat_rows(path: Path, rows: list[Any]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=path)


TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world", "tool_calls": None}]
SHAREGPT = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "world"}]
RENDERED = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nworld<|im_end|>\n<|endoftext|>"


@pytest.mark.parametrize("row", [{"messages": TURNS}, {"conversations": SHAREGPT}, {"text": None, "messages": TURNS}])
def test_conversations_are_rendered_by_the_template(
    make: Make, corpus: Source, tmp_path: Path, row: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make(template=TEMPLATE)
    chat = chat_rows(tmp_path / "chat.jsonl", [row] * 2)
    tokenize([chat], tokenizer, tmp_path / "out", heldout_sources=[corpus])
    assert text(tokenizer, tmp_path / "out") == RENDERED * 2
    assert ids(tmp_path / "out")[0] == SPECIAL.index("<|im_start|>")
    column = "conversations" if "conversations" in row else "messages"
    assert capsys.readouterr().err.count(f"conversations in the column '{column}' are rendered") == 1


def test_tools_and_contents_in_parts_reach_the_template(make: Make, corpus: Source, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f", "strict": None}}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    rows = [{"messages": parts, "tools": tools}, {"messages": parts, "tools": json.dumps(tools)}]
    chat_rows(tmp_path / "chat.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "chat.parquet")
    tokenizer = make(template="{{ tools[0].function | tojson }}{{ messages[0].content }}")
    for file, number in (("chat.jsonl", 2), ("chat.parquet", 1)):
        tokenize([Source(path=tmp_path / file)], tokenizer, tmp_path / f"{file}.out", heldout_sources=[corpus])
        assert text(tokenizer, tmp_path / f"{file}.out") == '{"name": "f"}hello<|endoftext|>' * number


def test_conversations_in_a_csv_are_json(make: Make, corpus: Source, tmp_path: Path) -> None:
    with (tmp_path / "chat.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["messages"], [json.dumps(TURNS)], ["just text"], ["[1]"]])
    tokenizer = make(template=TEMPLATE)
    tokenize([Source(path=tmp_path / "chat.csv")], tokenizer, tmp_path / "out", heldout_sources=[corpus])
    assert text(tokenizer, tmp_path / "out") == f"{RENDERED}just text<|endoftext|>[1]<|endoftext|>"


def test_a_column_of_conversations_may_be_named(make: Make, corpus: Source, tmp_path: Path) -> None:
    chat = chat_rows(tmp_path / "chat.jsonl", [{"text": "not this", "dialogue": TURNS}])
    tokenizer = make(template=TEMPLATE)
    named = chat.model_copy(update={"text_field": "dialogue"})
    tokenize([named], tokenizer, tmp_path / "out", heldout_sources=[corpus])
    assert text(tokenizer, tmp_path / "out") == RENDERED


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (
            None,
            {"messages": TURNS},
            "chat.jsonl line 1: 'messages' holds messages, and the tokenizer in .* no chat template",
        ),
        (TEMPLATE, {"messages": [{"role": "bad", "content": ""}]}, r"line 1: .*template fails .*\(no such role\)"),
        ("{{ messages[0].content.no.such }}", {"messages": TURNS}, "line 1: .*template fails on this conversation"),
        ("{{ ''.__class__.__mro__ }}", {"messages": TURNS}, "line 1: .*template fails on this conversation"),
        (
            TEMPLATE,
            {"conversations": [{"from": "gtp", "value": ""}]},
            r"line 1: a turn is from 'gtp' \(did you mean 'gpt'",
        ),
        (TEMPLATE, {"messages": "hello", "url": 1}, None),
        (TEMPLATE, {"messages": [1, 2]}, r"'messages' holds \[1, 2\], which is not a list of messages"),
    ],
)
def test_conversations_that_cannot_be_rendered_are_explained(
    make: Make, corpus: Source, tmp_path: Path, template: str | None, row: Any, message: str | None
) -> None:
    chat, tokenizer = chat_rows(tmp_path / "chat.jsonl", [row]), make(template=template)
    if message is None:
        tokenize([chat], tokenizer, tmp_path / "out", heldout_sources=[corpus])
        assert text(tokenizer, tmp_path / "out") == "hello<|endoftext|>"
        return
    with pytest.raises(UserError, match=message):
        tokenize([chat], tokenizer, tmp_path / "out", heldout_sources=[corpus])


# Around documents


def ends(folder: Path) -> int:
    return ids(folder)[-1]


@pytest.mark.parametrize(
    ("files", "template", "separator", "said"),
    [
        ({"generation_config.json": {"eos_token_id": [2, 0]}}, TEMPLATE, 0, "an end of text in generation_config.json"),
        ({"config.json": {"text_config": {"eos_token_id": [2, 0]}}}, TEMPLATE, 0, "an end of text in config.json"),
        ({"generation_config.json": {"eos_token_id": 2}}, None, 0, "which ends a text by its name"),
    ],
)
def test_an_eos_that_ends_a_turn_does_not_separate_documents(
    make: Make,
    corpus: Source,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    files: dict[str, Any],
    template: str | None,
    separator: int,
    said: str,
) -> None:
    manifest = tokenize([corpus], make("<|im_end|>", template, files), tmp_path / "out", heldout_fraction=0.3)
    assert manifest.eos_token_id == ends(tmp_path / "out") == separator
    assert f"documents are separated by '<|endoftext|>', {said}" in capsys.readouterr().err


def test_the_separator_is_the_eos_or_what_is_asked_for(
    make: Make, corpus: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make(template=TEMPLATE, files={"generation_config.json": {"eos_token_id": [2, 0]}})
    assert tokenize([corpus], tokenizer, tmp_path / "out", heldout_fraction=0.3).eos_token_id == 0
    assert "documents are separated by '<|endoftext|>', the tokenizer's eos" in capsys.readouterr().err
    tokenize([corpus], tokenizer, tmp_path / "out", heldout_fraction=0.3, separator="<|im_end|>")
    assert ends(tmp_path / "out") == 2
    with pytest.raises(
        UserError, match=r"'<\|im_ends\|>' is not a token .*did you mean '<\|im_end\|>'.*special tokens are"
    ):
        tokenize([corpus], tokenizer, tmp_path / "out", heldout_fraction=0.3, separator="<|im_ends|>")


def test_a_separator_may_be_any_text_that_is_one_token(make: Make, corpus: Source, tmp_path: Path) -> None:
    tokenizer = make()
    encode = load_tokenizer(tokenizer).encode
    newline = encode("\n", add_special_tokens=False)
    assert len(newline) == 1 and "\n" not in load_tokenizer(tokenizer).get_vocab()  # where it is written otherwise
    manifest = tokenize([corpus], tokenizer, tmp_path / "out", heldout_fraction=0.3, separator="\n")
    assert [manifest.eos_token_id] == newline and ends(tmp_path / "out") == newline[0]
    for text_of_several in ("\n\n-- end --\n", "=" * 9 + "\u0000é"):
        several = len(encode(text_of_several, add_special_tokens=False))
        assert several > 1
        with pytest.raises(
            UserError, match=rf"data\.separator '.*' is not a token .* which cuts it into {several}: name one"
        ):
            tokenize([corpus], tokenizer, tmp_path / "two", heldout_fraction=0.3, separator=text_of_several)
    with pytest.raises(UserError, match=r"data\.separator '' is not a token .* which cuts it into 0"):
        tokenize([corpus], tokenizer, tmp_path / "two", heldout_fraction=0.3, separator="")
    assert not (tmp_path / "two").exists()


def test_documents_begin_as_the_tokenizer_begins_a_text(
    make: Make, corpus: Source, tmp_path: Path, trained: str, capsys: pytest.CaptureFixture[str]
) -> None:
    written = Tokenizer.from_str(trained)
    written.post_processor = processors.TemplateProcessing(
        single="<s> $A <|endoftext|>", special_tokens=[("<s>", 3), ("<|endoftext|>", 0)]
    )
    tokenizer = make(template="<s>" + TEMPLATE, files={"tokenizer.json": json.loads(written.to_str())})
    chat = chat_rows(tmp_path / "chat.jsonl", [{"messages": TURNS}])  # whose template writes <s> itself
    manifest = tokenize(
        [corpus, chat], tokenizer, tmp_path / "out", heldout_fraction=0.3, execution=Execution(workers=1)
    )
    assert (manifest.bos_token_ids, manifest.eos_token_id) == ([3], 0)
    rendered = text(tokenizer, tmp_path / "out") + text(tokenizer, tmp_path / "out", "heldout")
    assert rendered.startswith("<s>the expert") and "<s><|im_start|>" in rendered
    assert rendered.count("<s>") == rendered.count("<|endoftext|>") == 41
    assert "each document begins with <s>" in capsys.readouterr().err


# Tokenizers


def test_what_tokenizer_json_says_is_followed_where_transformers_builds_another(
    make: Make, corpus: Source, tmp_path: Path, trained: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Qwen2Tokenizer brings rules of its own: digits apart, among others."""
    written = Tokenizer.from_str(trained)
    written.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # no rules at all
    written.train_from_iterator(
        ["layers of 42"] * 50,
        trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = make(
        template=TEMPLATE, files={"tokenizer.json": json.loads(written.to_str())}, tokenizer_class="Qwen2Tokenizer"
    )
    loaded = load_tokenizer(tokenizer)
    assert loaded.backend_tokenizer.encode("layers of 42").ids == written.encode("layers of 42").ids
    assert len(written.encode("layers of 42").ids) == 1
    assert (loaded.eos_token, loaded.chat_template) == ("<|endoftext|>", TEMPLATE)
    assert "cuts text otherwise than" in capsys.readouterr().err
    tokenize([corpus], tokenizer, tmp_path / "out", heldout_fraction=0.3)
    first = written.encode(f"{WORDS}0").ids
    assert ids(tmp_path / "out")[: len(first)] == first or ids(tmp_path / "out", "heldout")[: len(first)] == first


def test_a_tokenizer_of_vocab_and_merges_is_read(make: Make, corpus: Source, tmp_path: Path, trained: str) -> None:
    tokenizer = make(tokenizer_class="Qwen2Tokenizer")
    model = json.loads(trained)["model"]
    (tokenizer / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in model["merges"]))
    with_file = vocabulary_fingerprint(tokenizer)
    (tokenizer / "tokenizer.json").unlink()
    assert load_tokenizer(tokenizer).decode(load_tokenizer(tokenizer)(WORDS)["input_ids"]) == WORDS
    manifest = tokenize([corpus], tokenizer, tmp_path / "out", heldout_fraction=0.3)
    assert manifest.tokenizer_fingerprint == vocabulary_fingerprint(tokenizer) != with_file
    (tokenizer / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"neither tokenizer.json, nor vocab.json with merges.txt"):
        load_tokenizer(tokenizer)
    assert vocabulary_fingerprint(tokenizer) is None


def test_a_pointer_in_the_place_of_a_tokenizer_is_named(make: Make) -> None:
    tokenizer = make()
    (tokenizer / "tokenizer.json").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7000000\n"
    )
    with pytest.raises(UserError, match=r"tokenizer.json is a git-lfs pointer .* `git lfs pull`"):
        load_tokenizer(tokenizer)


# Before training


@pytest.mark.parametrize("weight", [5e-324, 1e-12, float("inf"), float("nan"), 0.0, -1.0])
def test_weights_by_which_nothing_can_be_drawn_are_refused(weight: float) -> None:
    with pytest.raises(UserError, match="weight of 'wiki'"):
        check_weights({"wiki": weight, "code": 1.0})
    check_weights({"wiki": 1e308, "code": 1e308})


def test_passes_over_the_text_are_said_by_distil_and_before_a_run(
    make: Make, corpus: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenize([corpus], make(), tmp_path / "out", heldout_fraction=0.3)
    stream = training_stream(tmp_path / "out", 16, seed=0)
    assert notes_of_passes(stream, 4 * stream.rows_per_epoch) == []
    (note,) = notes_of_passes(stream, 63 * stream.rows_per_epoch)
    assert note.startswith("note: the training text has") and "is read 63 times" in note
    announce(stream, 63 * stream.rows_per_epoch, "cpu")
    assert note in capsys.readouterr().err
    recipe = Recipe.model_validate(
        {"run_dir": tmp_path / "run", "teacher": "builtin", "target": {}}
        | {"data": {"sequence_length": 16}, "distil": {"tokens": 16 * 4 * 1000, "batch_size": 4}}
    )
    announce_text(tmp_path / "out", recipe, 1000)
    assert f"is read {4000 / stream.rows_per_epoch:.3g} times" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"max_position_embeddings": 1024}, 1024),
        ({"max_position_embeddings": 1024, "rope_scaling": None}, 1024),
        ({"max_position_embeddings": 1024, "rope_parameters": {"rope_type": "default", "factor": 4.0}}, 1024),
        ({"max_position_embeddings": 1024, "rope_scaling": {"type": "linear", "factor": 2.0}}, 2048),
        (
            {
                "max_position_embeddings": 1536,
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
            },
            4096,
        ),
        ({}, None),
    ],
)
def test_sequences_beyond_the_context_are_noted(config: dict[str, Any], context: int | None) -> None:
    assert context_of(config) == context
    if context is None:
        assert notes_of_length(config, 10**9) == []
        return
    assert notes_of_length(config, context) == []
    assert f"longer than the model's context of {context:,}" in notes_of_length(config, context + 1)[0]
