"""The border of the program: every error leaves it as one sentence and an exit code.

A fault of slimqwen itself is a sentence too. Its traceback goes into a file, to be sent with a report; SLIMQWEN_TRACEBACK=1 prints
it instead.
"""

import errno
import os
import platform
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import NoReturn

from slimqwen.core.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EndedElsewhere,
    Interrupted,
    UserError,
)
from slimqwen.core.progress import say
from slimqwen.core.terminal import NOT_FOR_A_TERMINAL, accept_every_character, visible

TRACEBACK = "SLIMQWEN_TRACEBACK"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OF_THE_PATH = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EROFS,
    errno.EINVAL,
    errno.EBUSY,
    errno.ENXIO,
)


def guarded(program: Callable[[], object]) -> None:
    """Run the program and end the process as its result says."""
    accept_every_character()
    try:
        check_arguments(sys.argv[1:])
        program()
    except Interrupted as error:
        if os.environ.get("RANK", "0") == "0":
            say(*error.lines)
        way_to_exit()(error.exit_code)
    except KeyboardInterrupt:
        say("interrupted.")
        way_to_exit()(EXIT_INTERRUPTED)
    except EndedElsewhere as error:
        end(error.exit_code, *error.lines, is_told=True)
    except UserError as error:
        end(exit_code_of(error), *error.lines)
    except OSError as error:
        end(EXIT_BAD_INPUT if error.errno in OF_THE_PATH else EXIT_FAILED, sentence_of(error))
    except Exception as error:
        if str(error).startswith("Symlink loop from"):  # pathlib's RuntimeError, until Python 3.13
            end(EXIT_BAD_INPUT, f"{error}: the links lead to one another. Check the path.")
        if is_out_of_memory(error):
            reason = (str(error).splitlines() or ["none is left"])[0]
            end(
                EXIT_FAILED,
                f"there is not enough memory ({reason}): lower the batch size or the sequence length, or leave other "
                "programs less. What was finished stays; see the command's --help for how it continues.",
            )
        end(EXIT_FAULT, report_fault(error))


def end(code: int, *lines: str, is_told: bool = False) -> NoReturn:
    """Print an error and exit; of several processes the first that fails prints it, with its rank.

    is_told: another process of the job failed, and this one ends for its reason.
    """
    leave = leave_where_another_failed(code, is_told=is_told)
    prefix = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    first, *others = lines
    say(f"{prefix}error: {first}", *others)
    leave(code)


def leave_where_another_failed(code: int, *, is_told: bool = False) -> Callable[[int], NoReturn]:
    """Exit with the code of the process of the job that failed before this one, if any; else return how this one exits."""
    leave = way_to_exit()
    if leave is not sys.exit:
        from slimqwen.parallel import ending

        if (entered := ending.end_code(code, is_told=is_told)) is not None:
            leave(entered)
    return leave


def way_to_exit() -> Callable[[int], NoReturn]:
    """Return how this process exits: one of several without waiting for the others (`parallel.ending.leave`)."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal() or int(size) < 2:
        return sys.exit
    from slimqwen.parallel import ending

    return ending.leave


def check_arguments(arguments: list[str]) -> None:
    """Raise UserError for an argument whose bytes are no text: it could be neither recorded nor tokenized."""
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            encoding = sys.getfilesystemencoding().upper()
            raise UserError(f"the argument {argument} is not {encoding}: give it as {encoding}, or rename the file.")


def exit_code_of(error: UserError) -> int:
    """Return the error's own exit code, or EXIT_FAILED where its cause was a full disk, which is no wrong input."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in FULL_DISK:
            return EXIT_FAILED
        cause = cause.__cause__ or cause.__context__
    return error.exit_code


def sentence_of(error: OSError) -> str:
    """Return the file, the system's description of the error, and what to do."""
    problem = f"{error.filename or 'a file'}: {error.strerror or error}"
    if error.errno in FULL_DISK:
        return f"{problem}. Free some space and run the same command again."
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{problem}. Allow this process more open files (`ulimit -n`) and run the same command again."
    if error.errno in OF_THE_PATH:
        return f"{problem}. Check the path and its permissions."
    return f"{problem}. The machine, its disk or its network failed: run the same command again."


def is_out_of_memory(error: Exception) -> bool:
    """Return whether the host's or a device's memory ran out (PyTorch's class is not imported for it)."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )


def report_fault(error: Exception) -> str:
    """Write the traceback to a file, or print it, and return the sentence that names the place."""
    about = f"slimqwen {version('slimqwen')}, Python {platform.python_version()}, {platform.platform()}"
    text = visible(
        f"{about}\n{shlex.join(['slimqwen', *sys.argv[1:]])}\n\n{''.join(traceback.format_exception(error))}",
        keep="\n\t",
    )
    message = " ".join(str(error).split())[:300]
    problem = f"{type(error).__name__}{f': {message}' if message else ''}. This is a fault of slimqwen: please report it with "
    if not os.environ.get(TRACEBACK):
        try:
            with tempfile.NamedTemporaryFile(
                "w", prefix="slimqwen-fault-", suffix=".txt", encoding="utf-8", delete=False
            ) as file:
                file.write(text)
            return f"{problem}the traceback in {file.name}."
        except OSError:
            pass
    say(*text.splitlines())
    return f"{problem}the traceback above."


@contextmanager
def safe_usage_error() -> Iterator[None]:
    """Replace control characters in a usage error, which typer prints with the words that were given: of several processes one."""
    try:
        yield
    except Exception as error:
        message = getattr(error, "message", None)
        if getattr(error, "exit_code", None) == EXIT_BAD_INPUT and isinstance(message, str):
            error.message = NOT_FOR_A_TERMINAL.sub("?", message)  # type: ignore[attr-defined]
            leave_where_another_failed(EXIT_BAD_INPUT)
        raise
