"""Ownership: only what slimqwen wrote may be replaced or removed."""

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
_working: list[Path] = []  # folders that this process is making: everything in them is ours


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Register `folder` as being made by this process."""
    _working.append(folder)
    try:
        yield
    finally:
        _working.remove(folder)


def is_within_work(path: Path) -> bool:
    """Return whether `path` is in a folder that this process is making, where every file is ours."""
    return any(folder in path.parents for folder in _working)


def check_replaceable(out: Path, *inputs: Path, kind: str | None = None) -> None:
    """Raise UserError where writing the folder `out` would destroy an input, or anything slimqwen did not write.

    A folder of ours has a record; if a file was added or changed since, it is not replaced.
    kind: of what is to be written, as in `kind_of_folder`; an artefact of another kind is not replaced.
    """
    out = out.resolve()
    _check_place(out, inputs)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, and a folder would be written there: choose another name.")
    if out.is_dir() and any(out.iterdir()) and not is_within_work(out):
        _check_unchanged(out)
        found = kind_of_folder(out)
        if kind is not None and found != kind:
            raise UserError(
                f"{out} holds {WORDS.get(found, 'other work of slimqwen')}, and {WORDS[kind]} would take its place: choose another "
                "name, or remove it first."
            )


def check_file_replaceable(out: Path, *inputs: Path, kind: str | None = None) -> None:
    """Raise UserError where writing the file `out` would destroy an input, or anything slimqwen did not write.

    A file of ours begins with a mark (`is_marked`). An empty file may be replaced. kind: of what is to be written, as in
    `kind_of`; an artefact of another kind is not replaced.
    """
    out = out.resolve()
    _check_place(out, inputs)
    if is_within_work(out):
        return
    if out.is_dir():
        raise UserError(f"{out} is a folder, and a file would be written there: choose another name.")
    if out.exists() and not out.is_file():
        raise UserError(f"{out} is neither a file nor a folder: choose another name.")
    if out.exists() and out.stat().st_size and not is_marked(out):
        raise UserError(f"{out} exists and was not written by slimqwen: choose another name, or remove it first.")
    if kind is not None and out.exists() and out.stat().st_size and kind_of(out) != kind:
        raise UserError(f"{out} exists and is not an earlier {kind}: choose another name, or remove it first.")


def _check_place(out: Path, inputs: tuple[Path, ...]) -> None:
    for path in inputs:
        source = path.resolve()
        if out == source or out in source.parents:
            raise UserError(f"writing {out} would destroy {path}, which is read here: choose another name.")
        if source in out.parents:
            raise UserError(f"{out} is inside {path}, which is read here: choose a place outside it.")
    if len(os.fsencode(hidden(out, "replaced").name)) > 255:  # NAME_MAX of every usual file system
        raise UserError(f"the name {shown(out.name)} is too long to write: choose a shorter one.")
    for kind in ("partial", "replaced", "removed"):
        _check_remains(hidden(out, kind))


def _check_remains(folder: Path) -> None:
    """Raise UserError where something that is not ours has one of our hidden names."""
    if os.path.lexists(folder) and not _is_remains(folder):
        raise UserError(
            f"{folder} is in the way and was not written by slimqwen, or by an earlier version of it: move it elsewhere, or "
            "remove it."
        )


def _is_remains(folder: Path) -> bool:
    """Return whether a folder with one of our hidden names is ours: it has a record, or is empty."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return Record.read(folder) is not None or is_old(folder) or not set(os.listdir(folder)) - {f"{MARKER}.new"}


def _check_unchanged(folder: Path) -> None:
    record = Record.read(folder)
    if record is None and is_old(folder):
        raise UserError(
            f"{folder} was written by an earlier version of slimqwen, which kept no record of its files: remove it, or move it "
            "elsewhere."
        )
    if record is None:
        raise UserError(f"{folder} exists and was not written by slimqwen: choose another folder, or remove it first.")
    for name in record.foreign(folder):
        what = "was changed since" if name in (record.files or {}) else "would be lost, and it was not there when"
        raise UserError(
            f"{shown(name)[1:-1]} in {folder} {what} slimqwen wrote this folder: move it elsewhere and run the same command "
            "again."
        )


def claim_folder(folder: Path, key: str | None) -> None:
    """Create `folder` as a working folder, or reuse the one there: finished files in it stay if it has the same `key`.

    Unfinished files have a hidden name and are removed. A working folder of ours with another key is removed, with a
    message. Raises UserError where the folder is not ours.
    """
    folder = folder.resolve()
    _check_remains(folder)
    _clear(_removed_name(folder))
    if folder.exists():
        record = Record.read(folder)
        if record is not None and record.key == key is not None:
            for entry in list(os.scandir(folder)):
                if entry.name.startswith(".") and entry.name != MARKER:  # unfinished, or partly removed
                    shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
            return
        if any(not name.startswith(".") for name in os.listdir(folder)) and key is not None:
            say(f"{folder} was left behind by other work (another plan, source or option) and is removed")
        discard(folder)
    folder.mkdir(parents=True)
    Record(key).write(folder)


def recover(path: Path) -> None:
    """Clean up what a killed process left beside the artefact `path`: an old one not yet replaced, or partly removed.

    A partial artefact stays; `claim_folder` reuses or removes it.
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
    """Remove a folder of ours after renaming it, so that a partly removed one never looks complete."""
    removed = _removed_name(folder)
    _clear(removed)
    os.rename(folder, removed)
    _delete(removed)


def _removed_name(folder: Path) -> Path:
    """Return the name of `folder` during its removal: `.NAME.removed`, for `.NAME.partial` too."""
    is_hidden = folder.name.startswith(".") and folder.suffix in (".partial", ".replaced")
    return folder.with_suffix(".removed") if is_hidden else hidden(folder, "removed")


def _clear(remains: Path) -> None:
    if os.path.lexists(remains):
        _check_remains(remains)
        _delete(remains)


def _delete(folder: Path) -> None:
    """Delete a folder, its record last, so that an interrupted deletion leaves a folder that is still ours."""
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name != MARKER:
            os.unlink(entry.path)
    (folder / MARKER).unlink(missing_ok=True)
    folder.rmdir()


def remove_ours(path: Path) -> bool:
    """Remove what slimqwen wrote of an artefact, and print what stays. Returns whether nothing is left."""
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
    for name in names_in(path):  # not those of the record: a folder may have been replaced by a link
        if name not in foreign:
            (path / name).unlink()
    (path / MARKER).unlink()
    for parent, _, _ in os.walk(path, topdown=False):
        with contextlib.suppress(OSError):  # not empty
            os.rmdir(parent)
    say(f"{path}: {shown(foreign[0])[1:-1]}{' and others stay' if foreign[1:] else ' stays'}: not as slimqwen wrote it")
    return False
