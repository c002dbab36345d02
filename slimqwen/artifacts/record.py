"""Marks of ownership: a record in each folder that slimqwen writes, a first line in each file."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARKER = ".slimqwen"  # in every folder that slimqwen makes, from its creation on
FORMAT = "slimqwen.folder/1"
HASHED_BYTES = 1 << 20  # of larger files only the size is recorded: a record must be cheap to compare
HEAD_BYTES = 4096
# How a file of ours begins, and no file of another tool or written by hand.
MARKS = (
    rb'\s*\{\s*"format":\s*"slimqwen\.',  # JSON
    rb'.{8}\{"__metadata__":\{"slimqwen":',  # safetensors
    rb"# Written by slimqwen",  # YAML
    rb'<!DOCTYPE html>.{,1024}<meta name="generator" content="slimqwen">',
)
TEXT_MARK = "# Written by slimqwen"


@dataclass(frozen=True)
class Record:
    """The content of the file `.slimqwen` in a folder of ours.

    key: identifies the inputs of resumable work. files: of a complete folder, name -> sha256, or the size of a larger file, or
    "-> target" of a link; None while the folder is being made, when everything in it is ours.
    """

    key: str | None = None
    files: Mapping[str, str | int] | None = None

    def __post_init__(self) -> None:
        """Raise TypeError for values that slimqwen never writes."""
        if not (isinstance(self.key, str | None) and isinstance(self.files, dict | None)):
            raise TypeError(f"a record cannot have the key {self.key!r} and the files {self.files!r}")

    @classmethod
    def read(cls, folder: Path) -> "Record | None":
        """Read the record of `folder`; None where there is no valid one."""
        try:
            with _open_without_following(folder / MARKER) as stream:
                found = json.load(stream)
            assert found["format"] == FORMAT
            assert all(_is_inside(name) for name in found["files"] or ())
            return cls(found["key"], found["files"])
        except (OSError, ValueError, TypeError, KeyError, AssertionError, RecursionError):
            return None

    def write(self, folder: Path) -> None:
        """Write the record atomically."""
        new = folder / f"{MARKER}.new"
        new.unlink(missing_ok=True)
        with open(new, "x", encoding="utf-8") as stream:
            json.dump({"format": FORMAT, "key": self.key, "files": self.files}, stream, indent=1)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(new, folder / MARKER)

    def foreign(self, folder: Path) -> list[str]:
        """List the names of files in `folder` that this record lacks, or records with other content."""
        if self.files is None:
            return []
        return [name for name in names_in(folder) if self.files.get(name) != _entry(folder / name)]


def names_in(folder: Path) -> list[str]:
    """List every file and link in a folder, recursively, by relative name, except the folder's own record."""
    found = []
    for parent, folders, files in os.walk(folder, onerror=_fail):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        found += [(Path(parent) / name).relative_to(folder).as_posix() for name in [*files, *links]]
    return sorted(set(found) - {MARKER, f"{MARKER}.new"})


def describe_files(folder: Path) -> dict[str, str | int]:
    """Return what `Record.files` holds for a complete folder."""
    return {name: _entry(folder / name) for name in names_in(folder)}


def _is_inside(name: str) -> bool:
    """Return whether a name stays inside the folder: the record may have been edited."""
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


def is_old(folder: Path) -> bool:
    """Return whether the folder has the empty marker of earlier versions, which lists no files."""
    path = folder / MARKER
    return path.is_file() and not path.is_symlink() and path.stat().st_size == 0


def is_marked(path: Path) -> bool:
    """Return whether a file begins with a mark of slimqwen."""
    try:
        with path.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
    except OSError:
        return False
    return any(re.match(mark, head, re.DOTALL) for mark in MARKS)


def kind_of(path: Path) -> str:
    """Return the kind of a marked file: "plan" where its format is `slimqwen.plan/1`, "safetensors", or "text"."""
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    found = re.match(MARKS[0] + rb"(\w+)", head)
    if found:
        return found[1].decode()
    return "safetensors" if re.match(MARKS[1], head, re.DOTALL) else "text"


def kind_of_folder(folder: Path) -> str:
    """Return the kind of a folder of ours: "checkpoint", or the format of its manifest ("tokens"), else "folder"."""
    if (folder / "config.json").is_file():
        return "checkpoint"
    manifest = folder / "manifest.json"
    return kind_of(manifest) if manifest.is_file() and is_marked(manifest) else "folder"


def _entry(path: Path) -> str | int:
    if path.is_symlink():
        return f"-> {os.readlink(path)}"
    if not path.is_file():
        return "neither file nor link"
    size = path.stat().st_size
    return hashlib.sha256(path.read_bytes()).hexdigest() if size <= HASHED_BYTES else size


def _fail(error: OSError) -> None:
    raise error


def _open_without_following(path: Path) -> Any:
    return open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), encoding="utf-8")
