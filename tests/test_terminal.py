"""What is printed: data from files reaches a terminal as text, whatever it holds and whatever the terminal can show."""

import io
import json
import sys

import pytest

from slimqwen.core.progress import Progress, say
from slimqwen.core.terminal import DataTable, accept_every_character, show, show_generated, show_json, visible
from slimqwen.evaluation.result import Evaluation, ModelEvaluation, Sample
from slimqwen.reporting.table import print_table

EVIL = "a\x1b[31mred\x1b]0;title\x07\x9b2J\r\nb\x7f\u202ec\u2028\ud800"
SHOWN = r"a\x1b[31mred\x1b]0;title\x07\x9b2J\r\nb\x7f\u202ec\u2028\ud800"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_control_characters_are_written_out() -> None:
    assert visible(EVIL) == SHOWN
    ordinary = "héllo wörld 中文 🙂 ‘q’ a\u00a0b"
    assert visible(ordinary) == ordinary
    assert visible("a\nb\tc\r", keep="\n\t") == "a\nb\tc\\r"


@pytest.mark.parametrize("stream_type", [io.StringIO, Terminal])
def test_a_line_said_is_one_line_without_control_characters(
    stream_type: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimqwen.core.progress import _console

    stream = stream_type()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    _console.cache_clear()  # it keeps the stderr that it was made for
    try:
        say(f"{EVIL} [bold]m[/b] :smile:", "second")
    finally:
        _console.cache_clear()
    assert stream.getvalue() == f"{SHOWN} [bold]m[/b] :smile:\nsecond\n"


def test_a_progress_title_is_data(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(f"evaluate {EVIL}", total=1, unit="tokens") as progress:
        progress.advance(1, **{"file": "x\x1b[2J"})
    (line,) = capsys.readouterr().err.splitlines()
    assert f"evaluate {SHOWN}" in line and r"file x\x1b[2J" in line


def test_cells_headers_and_titles_are_never_markup() -> None:
    table = DataTable("m[red]x", "a[/b]", title="[/] t\x1b[31m")
    table.add("m[red]x", "a[/b]")
    table.add(r"back\[slash", "line\nbreak")
    title, head, first, second = table.as_text(80).splitlines()
    assert title.rstrip() == r"[/] t\x1b[31m"
    assert head.split() == first.split() == ["m[red]x", "a[/b]"]
    assert second.split() == [r"back\[slash", r"line\nbreak"]


def test_names_of_checkpoints_stand_in_the_final_table_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    model = ModelEvaluation(
        checkpoint="x",
        total_parameters=1000,
        active_parameters=100,
        mtp_parameters=0,
        loss=2.5,
        perplexity=12.18,
        bits_per_byte=1.1,
        kl_to_teacher=None,
        top1_agreement=None,
        mtp_loss=None,
        mtp_kl_to_teacher=None,
        mtp_acceptance=[],
        expert_utilisation={},
        sample=Sample(prompt="a", completion="b"),
    )
    models = {"m[red]x": model, "a[/b]": model, "e\x1b[31m": model}
    print_table(Evaluation(format="slimqwen.evaluation/1", tokens=64, sequence_length=16, models=models))
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[-3:]] == ["m[red]x", "a[/b]", r"e\x1b[31m"]


def test_results_go_to_stdout_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    show("one", EVIL, "tab\tkept")
    assert capsys.readouterr().out == f"one\n{SHOWN}\ntab\tkept\n"


def test_a_models_text_is_exact_in_a_pipe_and_harmless_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "def f():\n\treturn '\x1b[31m'\r\n"
    for stream, expected in ((io.StringIO(), text), (Terminal(), "def f():\n\treturn '\\x1b[31m'\\r\n")):
        monkeypatch.setattr(sys, "stdout", stream)
        show_generated(text)
        assert stream.getvalue() == expected


def test_json_is_ascii_and_the_same_value(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"text": "é 中 🙂 \x7f \x9b \u2028 \ud800", "name": "a\nb"}
    show_json(json.dumps(value, indent=2, ensure_ascii=False))
    printed = capsys.readouterr().out
    assert printed.isascii() and json.loads(printed) == value
    assert not any((ord(character) < 32 and character != "\n") or ord(character) == 127 for character in printed)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_a_terminal_of_any_encoding_takes_everything(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    accept_every_character()
    text = "é 中文 🙂 ± ’ ─"
    show(text)
    show_generated(text + "\ud800\n")
    say(text)
    table = DataTable(text, title=text)
    table.add(text)
    table.show()
    with Progress(text, total=2, unit="tokens") as progress:
        progress.advance(2, note="…")
    out.flush()
    err.flush()
    printed = out.buffer.getvalue() + err.buffer.getvalue()  # type: ignore[attr-defined]
    assert printed.decode(encoding).count("中文" if encoding == "utf-8" else r"\u4e2d\u6587") >= 5


@pytest.mark.parametrize("columns", ["10", "25", "40", "80", "200"])
def test_a_narrow_terminal_cuts_no_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: str
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", columns)
    table = DataTable("model", "parameters", "KL to teacher")
    table.add("models/teacher", "30,532,122,624", "0.123456")
    table.show()
    printed = capsys.readouterr().out
    assert all(cell in printed for cell in ("30,532,122,624", "0.123456", "parameters", "teacher"))
    assert "…" not in printed
