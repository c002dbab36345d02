"""What says that an artefact is ours: a record in each folder, a mark in each file."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARKER = ".slimqwen"  # in every folder that slimqwen makes, from its first moment on
FORMAT = "slimqwen.folder/1"
HASHED_BYTES = 1 << 20  # larger files are known by their size: a record must be cheap to compare
HEAD_BYTES = 4096
# How a file of ours begins: what other tools write, or people by hand, does not.
MARKS = (
    rb'\s*\{\s*"format":\s*"slimqwen\.',  # JSON
    rb'.{8}\{"__metadata__":\{"slimqwen":',  # safetensors
    rb"# Written by slimqwen",  # YAML
    rb'<!DOCTYPE html>.{,1024}<meta name="generator" content="slimqwen">',
)
TEXT_MARK = "# Written by slimqwen"


@dataclass(frozen=True)
class Record:
    """The file `.slimqwen` of a folder of ours.

    key: what resumable work is made from. files: what a complete folder holds, name -> sha256, or size of a larger file, or
    "-> target" of a link; None while the folder is being made, and then everything in it is ours.
    """

    key: str | None = None
    files: Mapping[str, str | int] | None = None

    def __post_init__(self) -> None:
        """Raises TypeError for what only a record made by hand holds."""
        if not (isinstance(self.key, str | None) and isinstance(self.files, dict | None)):
            raise TypeError(f"no record has the key {self.key!r} and the files {self.files!r}")

    @classmethod
    def read(cls, folder: Path) -> "Record | None":
        """The record of `folder`; None where there is none that can be understood."""
        try:
            with _open_without_following(folder / MARKER) as stream:
                found = json.load(stream)
            assert found["format"] == FORMAT
            assert all(_is_inside(name) for name in found["files"] or ())
            return cls(found["key"], found["files"])
        except (OSError, ValueError, TypeError, KeyError, AssertionError, RecursionError):
            return None

    def write(self, folder: Path) -> None:
        """At once or not at all."""
        new = folder / f"{MARKER}.new"
        new.unlink(missing_ok=True)
        with open(new, "x", encoding="utf-8") as stream:
            json.dump({"format": FORMAT, "key": self.key, "files": self.files}, stream, indent=1)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(new, folder / MARKER)

    def foreign(self, folder: Path) -> list[str]:
        """The files in `folder` that this record does not list, or lists otherwise, by name."""
        if self.files is None:
            return []
        return [name for name in names_in(folder) if self.files.get(name) != _entry(folder / name)]


def names_in(folder: Path) -> list[str]:
    """Every file and link in a folder and those below it, by relative name, but for the folder's own record."""
    found = []
    for parent, folders, files in os.walk(folder, onerror=_fail):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        found += [(Path(parent) / name).relative_to(folder).as_posix() for name in [*files, *links]]
    return sorted(set(found) - {MARKER, f"{MARKER}.new"})


def listed(folder: Path) -> dict[str, str | int]:
    """What `Record.files` says of a complete folder."""
    return {name: _entry(folder / name) for name in names_in(folder)}


def _is_inside(name: str) -> bool:
    """Whether a name leads nowhere out of the folder: a record is a file that anyone may have written."""
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


def is_old(folder: Path) -> bool:
    """Whether the folder has the empty marker of earlier versions, which does not say what was written."""
    path = folder / MARKER
    return path.is_file() and not path.is_symlink() and path.stat().st_size == 0


def is_marked(path: Path) -> bool:
    """Whether a file says at its beginning that slimqwen wrote it."""
    try:
        with path.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
    except OSError:
        return False
    return any(re.match(mark, head, re.DOTALL) for mark in MARKS)


def kind_of(path: Path) -> str:
    """What a marked file holds: "plan" where it begins with the format `slimqwen.plan/1`, "safetensors", or "text"."""
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    found = re.match(MARKS[0] + rb"(\w+)", head)
    if found:
        return found[1].decode()
    return "safetensors" if re.match(MARKS[1], head, re.DOTALL) else "text"


def kind_of_folder(folder: Path) -> str:
    """What a folder of ours holds: "checkpoint", or what the format of its manifest says ("tokens"); "folder" where nothing does."""
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
