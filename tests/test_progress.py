import contextlib
import io
from collections.abc import Iterator

import pytest

from slimqwen.core import progress
from slimqwen.core.bytesize import bytes_of
from slimqwen.core.errors import UserError
from slimqwen.core.progress import Progress, duration, say


class Clock:
    """Time that passes when the test says so."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Iterator[Terminal]:
    """A terminal on stderr. (Not a fixture: pytest's own capture takes stderr back before the test begins.)"""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "150", **environment}.items():
        monkeypatch.setenv(name, value)
    progress._console.cache_clear()
    with contextlib.redirect_stderr(Terminal()) as screen:
        yield screen
    progress._console.cache_clear()


def test_plain_lines_come_every_ten_seconds_and_at_the_end(capsys):
    clock = Clock()
    with Progress("distil stage 2/2 slimqwen", total=540_000, unit="tokens", clock=clock) as bar:
        for step in range(1, 10):
            clock.seconds += 4
            bar.advance(2048, loss=3.21 / step, kl=0.41)
        clock.seconds += 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        # 3 steps in 12 s; (540,000 - 6,144) / 512 = 1,043 s
        "distil stage 2/2 slimqwen: 6,144/540,000 tokens, 512 tokens/s, 17 min 23 s left, loss 1.070, kl 0.410",
        "distil stage 2/2 slimqwen: 12,288/540,000 tokens, 512 tokens/s, 17 min 11 s left, loss 0.535, kl 0.410",
        "distil stage 2/2 slimqwen: 18,432/540,000 tokens, 512 tokens/s, 16 min 59 s left, loss 0.357, kl 0.410",
        # 18,432 tokens in 37 s
        "distil stage 2/2 slimqwen: 18,432/540,000 tokens, 498 tokens/s, took 37 s, loss 0.357, kl 0.410",
    ]


def test_what_was_done_before_counts_for_the_bar_but_not_for_the_rate(capsys):
    clock = Clock()
    with Progress("prune", total=1000, unit="tensors", start=800, clock=clock) as bar:
        clock.seconds += 10
        bar.advance(100)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "prune: 900/1,000 tensors, 10.000 tensors/s, 10 s left"
    assert last == "prune: 900/1,000 tensors, 10.000 tensors/s, took 10 s"


def test_the_time_left_follows_a_change_of_speed(capsys):
    clock = Clock()
    with Progress("tokens", total=10_000, unit="tokens", clock=clock) as bar:
        for _ in range(10):  # 1 token/s for 100 s
            clock.seconds += 10
            bar.advance(10)
        for _ in range(10):  # 100 tokens/s for 20 s
            clock.seconds += 2
            bar.advance(200)
    before_the_end = capsys.readouterr().err.splitlines()[-2]
    # (10,000 - 2,100) / 100 = 79 s: nothing of the slow beginning is left in the rate.
    assert before_the_end == "tokens: 2,100/10,000 tokens, 100 tokens/s, 1 min 19 s left"


def test_a_step_longer_than_the_window_has_a_rate(capsys):
    clock = Clock()
    with Progress("distil", total=4, unit="steps", clock=clock) as bar:
        for _ in range(2):
            clock.seconds += 60
            bar.advance(1)
    assert "distil: 2/4 steps, 0.017 steps/s, 2 min 00 s left" in capsys.readouterr().err


def test_unknown_total_and_nothing_done(capsys):
    clock = Clock()
    with Progress("read", total=None, unit="documents", clock=clock) as bar:
        clock.seconds += 10
        bar.advance(5000, file="a.py", learning_rate=4e-4, step=12_000)
    assert capsys.readouterr().err.splitlines()[0] == (
        "read: 5,000 documents, 500 documents/s, file a.py, learning_rate 4.00e-04, step 12,000"
    )
    with Progress("read", total=0, unit="documents", clock=clock):
        pass
    assert capsys.readouterr().err == "read: 0/0 documents, took 0 s\n"


def test_the_end_is_told_when_the_work_fails(capsys):
    with pytest.raises(KeyboardInterrupt), Progress("distil", total=10, unit="steps", clock=Clock()) as bar:
        bar.advance(3)
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "distil: 3/10 steps, took 0 s\n"


def test_no_escape_codes_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich take anything for a terminal
    with Progress("distil [x]", total=10, unit="steps") as bar:
        bar.advance(10)
        say("stage [1] is done")
    error = capsys.readouterr().err
    assert "distil [x]: 10/10 steps" in error and "stage [1] is done\n" in error
    assert "\x1b" not in error and "\r" not in error


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    with terminal(monkeypatch, TERM="dumb") as screen, Progress("distil", total=10, unit="steps") as bar:
        bar.advance(10)
    assert "distil: 10/10 steps" in screen.getvalue() and "\x1b" not in screen.getvalue()


def test_a_terminal_gets_one_live_line_with_everything_on_it(monkeypatch, capsys):
    clock = Clock()
    with (
        terminal(monkeypatch) as stderr,
        Progress("distil [stage 2/2]", total=540_000, unit="tokens", clock=clock) as bar,
    ):
        clock.seconds += 4
        bar.advance(2048, loss=3.21)
        say("a notice [in] between")
        print("a result")
    screen = stderr.getvalue()
    assert "\x1b[" in screen
    assert "distil [stage 2/2]" in screen
    assert "2,048/540,000 tokens, 512 tokens/s, 17 min 31 s left, loss 3.210" in screen
    assert "a notice [in] between\n" in screen
    assert capsys.readouterr().out == "a result\n"  # stdout is not the terminal here: results stay out of the bar


def test_no_color_is_respected(monkeypatch):
    color = "\x1b[38;5;"

    def drawn(**environment: str) -> str:
        with terminal(monkeypatch, **environment) as screen, Progress("distil", total=10, unit="steps") as bar:
            bar.advance(5)
        return screen.getvalue()

    assert color in drawn()
    assert color not in drawn(NO_COLOR="1")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (143, "2 min 23 s"),
        (3600 * 5 + 60 * 7, "5 h 07 min"),
        (86400 * 3 + 3600 * 4 + 59, "3 d 04 h"),
    ],
)
def test_duration(seconds, words):
    assert duration(seconds) == words


def test_bytes_are_told_as_people_do(capsys):
    clock = Clock()
    with Progress("prune", total=160_000_000_000, unit="bytes", start=2_000_000_000, clock=clock) as bar:
        clock.seconds += 10
        bar.advance(8_500_000_000)
    with Progress("read", total=None, unit="bytes", clock=clock) as bar:
        clock.seconds += 10
        bar.advance(850)
    assert capsys.readouterr().err.splitlines() == [
        "prune: 10.5/160.0 GB, 850.0 MB/s, 2 min 56 s left",
        "prune: 10.5/160.0 GB, 850.0 MB/s, took 10 s",
        "read: 850 B, 85 B/s",
        "read: 850 B, 85 B/s, took 10 s",
    ]


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 << 29), ("4096", 4096), ("1kB", 1000)]
)
def test_a_size_in_words(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0GB", "5 parrots", "1e400", "nan", "9999999 TB"])
def test_what_is_no_size_is_one_sentence(text):
    with pytest.raises(UserError, match="is not a size in bytes"):
        bytes_of(text)
