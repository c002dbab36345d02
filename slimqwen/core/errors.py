"""The one exception a user is meant to see.

Everything a user can get wrong (a path, a recipe key, a corrupt file, a full disk) is raised as
`UserError` with one sentence that says what is wrong, where, and what to do. The command line prints
the sentence and exits; it never prints a traceback for it. Our own invariants are `assert`s, and what escapes
them is told as a fault of slimqwen (`slimqwen.cli.border`).
"""

import difflib
from collections.abc import Iterable
from reprlib import Repr

EXIT_FAILED = 1  # the input was understood, and the work failed (a full disk, a non-finite loss)
EXIT_BAD_INPUT = 2  # the input was wrong: mend it first, the same command would end alike
EXIT_FAULT = 70  # slimqwen itself is at fault (sysexits.h: EX_SOFTWARE)
EXIT_PREEMPTED = 75  # SIGTERM while training: the state is saved, run the same command again to continue
EXIT_INTERRUPTED = 130  # Ctrl-C: run the same command again to continue


class UserError(Exception):
    """A problem in the user's input or surroundings, told in one sentence; what it lists follows, an argument each."""

    exit_code = EXIT_BAD_INPUT

    def __init__(self, sentence: str, *listed: str) -> None:
        super().__init__(sentence, *listed)

    @property
    def lines(self) -> list[str]:
        """The sentence, and what it lists, a line each."""
        sentence, *listed = self.args
        return [sentence, *(f"  {item}" for item in listed)]

    def __str__(self) -> str:
        return "\n".join(self.lines)


class StageFailed(UserError):
    """The work itself failed after it had started: full disk, non-finite loss."""

    exit_code = EXIT_FAILED


class Interrupted(UserError):
    """Ctrl-C, or SIGTERM where nothing needs saving."""

    exit_code = EXIT_INTERRUPTED


class Preempted(Interrupted):
    """SIGTERM, answered by saving the training state."""

    exit_code = EXIT_PREEMPTED


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """`" (did you mean 'hidden_size'?)"`, or the empty string where nothing known is near `wrong`."""
    near = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


def shown(value: object) -> str:
    """A name or value out of a file for a sentence: quoted, on one line, and cut where it is longer than one."""
    return _SHORT.repr(value)


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 160
