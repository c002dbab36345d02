"""The exceptions that a user is meant to see.

Everything a user can get wrong (a path, a recipe key, a corrupt file, a full disk) is raised as
`UserError` with one sentence: what is wrong, where, and what to do. The command line prints
the sentence, without a traceback, and exits. Our own invariants are `assert`s; any other exception is
reported as a bug of slimqwen (`slimqwen.cli.border`).
"""

import difflib
from collections.abc import Iterable
from reprlib import Repr

EXIT_FAILED = 1  # the input was understood, and the work failed (a full disk, a non-finite loss)
EXIT_BAD_INPUT = 2  # the input was wrong: the same command fails again until it is corrected
EXIT_FAULT = 70  # a bug in slimqwen (sysexits.h: EX_SOFTWARE)
EXIT_PREEMPTED = 75  # SIGTERM while training: the state is saved, run the same command again to continue
EXIT_INTERRUPTED = 130  # Ctrl-C: run the same command again to continue


class UserError(Exception):
    """A problem in the user's input or environment, in one sentence; items that it lists follow, one argument each."""

    exit_code = EXIT_BAD_INPUT

    def __init__(self, sentence: str, *listed: str) -> None:
        super().__init__(sentence, *listed)

    @property
    def lines(self) -> list[str]:
        """The sentence and the listed items, one line each."""
        sentence, *listed = self.args
        return [sentence, *(f"  {item}" for item in listed)]

    def __str__(self) -> str:
        return "\n".join(self.lines)


class StageFailed(UserError):
    """The work itself failed after it had started: full disk, non-finite loss."""

    exit_code = EXIT_FAILED


class EndedElsewhere(StageFailed):
    """Another process of the same job failed, and has printed why."""


class Interrupted(UserError):
    """Ctrl-C, or SIGTERM when there is no state to save."""

    exit_code = EXIT_INTERRUPTED


class Preempted(Interrupted):
    """SIGTERM during training, after the training state was saved."""

    exit_code = EXIT_PREEMPTED


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'hidden_size'?)"`, or an empty string when nothing in `known` resembles `wrong`."""
    near = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


def shown(value: object) -> str:
    """Quote a name or value from a file for a message: on one line, shortened where it is longer than 160 characters."""
    return _SHORT.repr(value)


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 160
