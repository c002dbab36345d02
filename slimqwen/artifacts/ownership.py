"""What may be replaced or removed: what slimqwen wrote, and nothing else."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from slimqwen.artifacts.lock import alone, hidden
from slimqwen.artifacts.record import MARKER, Record, is_marked, is_old, kind_of, kind_of_folder, names_in
from slimqwen.core.errors import UserError, shown
from slimqwen.core.progress import say

WORDS = {"checkpoint": "a checkpoint", "tokens": "tokens", "teacher_cache": "a teacher cache"}  # kinds of folders
_working: list[Path] = []  # folders that this process is making: what lies in them is ours


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Note that `folder` is being made by this process."""
    _working.append(folder)
    try:
        yield
    finally:
        _working.remove(folder)


def is_within_work(path: Path) -> bool:
    """Whether `path` lies in a folder that this process is making: nobody else has anything there."""
    return any(folder in path.parents for folder in _working)


def check_replaceable(out: Path, *inputs: Path, kind: str | None = None) -> None:
    """Raise UserError where writing the folder `out` would destroy something: an input, or what we did not write.

    What slimqwen wrote is known by the folder's record: one file more, or another content, and it is not replaced.
    kind: what is to be written, as `kind_of_folder` names it; something else that slimqwen wrote is not replaced by it.
    """
    out = out.resolve()
    _check_place(out, inputs)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, and a folder is to be written there: choose another name.")
    if out.is_dir() and any(out.iterdir()) and not is_within_work(out):
        _check_unchanged(out)
        found = kind_of_folder(out)
        if kind is not None and found != kind:
            raise UserError(
                f"{out} holds {WORDS.get(found, 'other work of slimqwen')}, and {WORDS[kind]} would take its place: choose another "
                "name, or remove it first."
            )


def check_file_replaceable(out: Path, *inputs: Path, kind: str | None = None) -> None:
    """Raise UserError where writing the file `out` would destroy something: an input, or what we did not write.

    What slimqwen wrote says so at its beginning (`is_marked`). An empty file may be replaced. kind: what is to be written, as
    `kind_of` names it; something else that slimqwen wrote is not replaced by it.
    """
    out = out.resolve()
    _check_place(out, inputs)
    if is_within_work(out):
        return
    if out.is_dir():
        raise UserError(f"{out} is a folder, and a file is to be written there: choose another name.")
    if out.exists() and not out.is_file():
        raise UserError(f"{out} is neither a file nor a folder: choose another name.")
    if out.exists() and out.stat().st_size and not is_marked(out):
        raise UserError(f"{out} exists and was not written by slimqwen: choose another name, or remove it first.")
    if kind is not None and out.exists() and out.stat().st_size and kind_of(out) != kind:
        raise UserError(f"{out} exists and is no earlier {kind}: choose another name, or remove it first.")


def _check_place(out: Path, inputs: tuple[Path, ...]) -> None:
    for path in inputs:
        source = path.resolve()
        if out == source or out in source.parents:
            raise UserError(f"writing {out} would destroy {path}, which is read here: choose another name.")
        if source in out.parents:
            raise UserError(f"{out} lies in {path}, which is read here: choose a place outside of it.")
    if len(os.fsencode(hidden(out, "replaced").name)) > 255:  # NAME_MAX of every usual file system
        raise UserError(f"the name {shown(out.name)} is too long to write: choose a shorter one.")
    for kind in ("partial", "replaced", "removed"):
        _check_remains(hidden(out, kind))


def _check_remains(folder: Path) -> None:
    """Raise UserError where what lies under one of our hidden names is not ours."""
    if os.path.lexists(folder) and not _is_remains(folder):
        raise UserError(
            f"{folder} is in the way and was not written by slimqwen, or by an earlier version of it: move it elsewhere, or "
            "remove it."
        )


def _is_remains(folder: Path) -> bool:
    """Whether a folder under one of our hidden names is ours: it has a record, or nobody put anything into it."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return Record.read(folder) is not None or is_old(folder) or not set(os.listdir(folder)) - {f"{MARKER}.new"}


def _check_unchanged(folder: Path) -> None:
    record = Record.read(folder)
    if record is None and is_old(folder):
        raise UserError(
            f"{folder} was written by an earlier version of slimqwen, which did not note what it wrote: remove it, or move it "
            "elsewhere."
        )
    if record is None:
        raise UserError(f"{folder} exists and was not written by slimqwen: choose another folder, or remove it first.")
    for name in record.foreign(folder):
        what = "was changed since" if name in (record.files or {}) else "would be lost, and it was not there when"
        raise UserError(
            f"{shown(name)[1:-1]} in {folder} {what} slimqwen wrote this folder: move it elsewhere and give the same command "
            "again."
        )


def claim_folder(folder: Path, key: str | None) -> None:
    """Make `folder` a working folder of ours, or find it as one: what is finished in it stays where it is of the same `key`.

    What is not finished has a hidden name, and goes. Other work of ours in its place is removed, and that is said. Raises
    UserError where it is not ours.
    """
    folder = folder.resolve()
    _check_remains(folder)
    _clear(_removed_name(folder))
    if folder.exists():
        record = Record.read(folder)
        if record is not None and record.key == key is not None:
            for entry in list(os.scandir(folder)):
                if entry.name.startswith(".") and entry.name != MARKER:  # unfinished, or half removed
                    shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
            return
        if any(not name.startswith(".") for name in os.listdir(folder)) and key is not None:
            say(f"{folder} was left behind by other work (another plan, source or option) and is removed")
        discard(folder)
    folder.mkdir(parents=True)
    Record(key).write(folder)


def recover(path: Path) -> None:
    """Bring in order what a killed process left beside the artefact `path`: an old one not yet replaced, or half removed.

    A partial one stays, for `claim_folder` to decide.
    """
    _clear(hidden(path, "removed"))
    replaced = hidden(path, "replaced")
    if os.path.lexists(replaced):
        _check_remains(replaced)
        if os.path.lexists(path):
            discard(replaced)
        else:
            os.rename(replaced, path)


def tidy(path: Path) -> None:
    """Remove what a killed process left beside the finished artefact `path`."""
    with alone(path, wait=True):
        recover(path)
        partial = hidden(path.resolve(), "partial")
        if partial.exists() and _is_remains(partial):
            discard(partial)


def discard(folder: Path) -> None:
    """Remove a folder of ours, first of all its name: what is half removed is never taken for whole."""
    removed = _removed_name(folder)
    _clear(removed)
    os.rename(folder, removed)
    _delete(removed)


def _removed_name(folder: Path) -> Path:
    """Where `folder` lies while it is removed: `.NAME.removed`, for `.NAME.partial` too."""
    is_hidden = folder.name.startswith(".") and folder.suffix in (".partial", ".replaced")
    return folder.with_suffix(".removed") if is_hidden else hidden(folder, "removed")


def _clear(remains: Path) -> None:
    if os.path.lexists(remains):
        _check_remains(remains)
        _delete(remains)


def _delete(folder: Path) -> None:
    """The record goes last, so that what is left of the folder is known as ours."""
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name != MARKER:
            os.unlink(entry.path)
    (folder / MARKER).unlink(missing_ok=True)
    folder.rmdir()


def remove_ours(path: Path) -> bool:
    """Remove an artefact as far as slimqwen wrote it, and say what stays. Whether nothing is left."""
    path = path.resolve()
    remains = _removed_name(path)
    if os.path.lexists(remains) and _is_remains(remains):
        _delete(remains)
    if not os.path.lexists(path):
        return True
    if path.is_file():
        if is_marked(path):
            path.unlink()
            return True
        say(f"{path} stays: it was not written by slimqwen")
        return False
    record = Record.read(path)
    foreign = [] if record is None else record.foreign(path)
    if record is not None and not foreign:
        discard(path)
        return True
    if record is None or record.files is None:
        say(f"{path} stays: it was not written by slimqwen")
        return False
    for name in names_in(path):  # and not those of the record: a folder may have become a link to elsewhere
        if name not in foreign:
            (path / name).unlink()
    (path / MARKER).unlink()
    for parent, _, _ in os.walk(path, topdown=False):
        with contextlib.suppress(OSError):  # not empty
            os.rmdir(parent)
    say(f"{path}: {shown(foreign[0])[1:-1]}{' and others stay' if foreign[1:] else ' stays'}: not as slimqwen wrote it")
    return False
