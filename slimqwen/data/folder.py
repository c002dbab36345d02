"""Which files of a folder are read as text: its tables or its texts, and of a data set the split that was asked for."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from slimqwen.core.errors import UserError
from slimqwen.data.documents import has_text
from slimqwen.data.formats import format_of, is_prose, kind_of_special_file, uncompressed
from slimqwen.recipe import Source, TextFormat

# Words of a file's or folder's name that say which split of a data set it is, as the Hugging Face hub reads them.
TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev"), VALIDATION),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), TEST),
}
ABOUT = re.compile(r"(readme|licen[cs]e|notice|copying|copyright|citation)\b", re.IGNORECASE)  # texts about other files
PEEKED = ("json", "csv", "tsv")  # formats of settings and small tables, too: told apart by their first row
KINDS_SHOWN = 6


@dataclass
class Selection:
    """What of a folder is read, and what is not.

    files: (name, path, format), sorted by name. skipped: files by kind (".bin", "README.md", "FIFO"). left_out: the
    names of the files of a data set's other splits, by split. beside_tables: whether texts are among the skipped for
    the tables that they lie with.
    """

    files: list[tuple[str, Path, TextFormat]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    beside_tables: bool = False

    def note(self, folder: str) -> str | None:
        """A sentence about what is not read; None where all is."""
        parts = []
        if self.skipped:
            parts.append(f"skipped {_counted(self.skipped)}")
        if self.beside_tables:
            parts.append("beside tables only the tables are read (name other files, or give `format`, to read them)")
        for split, names in sorted(self.left_out.items()):
            shown = names[0] if len(names) == 1 else f"{len(names)} files, the first {names[0]}"
            parts.append(f"left out the {split} split ({shown}): to read it, name it")
        return f"note: {folder}: {'; '.join(parts)}" if parts else None


def select(source: Source, *, heldout: bool) -> Selection:
    """The files below the folder of `source` that are read.

    - Hidden files are not, nor what is no regular file; links are followed, each folder once.
    - Where `source.format` is given, all files of this format and no others.
    - Else the tables, and the texts of folders in which no tables lie: beside tables a text is a data set's card, its
      licence or its scripts. In folders above tables a README, LICENSE or NOTICE that is the only kind of text there
      is left out too, and every text beside a data set's card (a README.md that begins with "---").
    - A .json, .csv or .tsv file counts as a table where its first row has the column of the text: others are settings.
    - Of tables in splits, those that are not marked test or validation; to be held out (`heldout`) those that are, if any.
      So with prose of which one file is called train: test.txt beside train.txt.
    - Of each data set in the Hugging Face cache, the snapshot that refs/main names, or the only one.

    Raises UserError for a folder that cannot be read, and for several snapshots.
    """
    assert source.path is not None
    selection = Selection()
    tables: dict[str, tuple[Path, TextFormat]] = {}
    texts: dict[str, tuple[Path, TextFormat]] = {}
    root = _snapshot_of(source.path)
    for path in _walk(root, set()):
        name = path.relative_to(root).as_posix()
        text_format = format_of(name)
        kind = kind_of_special_file(path)
        if kind is not None or text_format is None or source.format not in (None, text_format):
            selection.skipped[kind or _kind(name)] += 1
        elif text_format == "text":
            texts[name] = path, text_format
        elif source.format is None and text_format in PEEKED and not has_text(path, text_format, source.text_field):
            selection.skipped[f"{_kind(name)} without a column {source.text_field!r}"] += 1
        else:
            tables[name] = path, text_format
    for name in _beside(texts, tables):
        selection.beside_tables = True
        selection.skipped[_kind(name)] += 1
        del texts[name]
    files = tables | texts
    for name, split in _unwanted(files, _splits(tables, texts), heldout=heldout):
        selection.left_out.setdefault(split, []).append(name)
        del files[name]
    selection.files = [(name, *found) for name, found in sorted(files.items())]
    return selection


def _snapshot_of(folder: Path) -> Path:
    """The folder, or the snapshot in it where it is a repository in the Hugging Face cache."""
    if not ((folder / "snapshots").is_dir() and (folder / "blobs").is_dir()):
        return folder
    snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    current = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else ""
    chosen = [path for path in snapshots if path.name == current] or snapshots
    if len(chosen) != 1:
        raise UserError(
            f"{folder} holds {len(snapshots)} snapshots and refs/main names none of them: give one of them."
        )
    return chosen[0]


def _walk(root: Path, entered: set[tuple[int, int]]) -> Iterator[Path]:
    """Everything below `root` that is not hidden and no folder; of a repository in the Hugging Face cache one snapshot.

    Linked folders are entered, each once: `entered` has device and inode of those that were.
    """
    for folder, subfolders, files in os.walk(root, onerror=unreadable, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:
            subfolders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        if (snapshot := _snapshot_of(Path(folder))) != Path(folder):
            yield from _walk(snapshot, entered)
            subfolders.clear()
            continue
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for file in sorted(files):
            if not file.startswith("."):
                yield Path(folder, file)


def unreadable(error: OSError) -> None:
    """For os.walk, which would go on in silence."""
    raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from error


def _beside(texts: Mapping[str, tuple[Path, TextFormat]], tables: Mapping[str, object]) -> list[str]:
    """The names of the texts that are left out for the tables that they lie with or above."""
    with_tables = {PurePosixPath(name).parent for name in tables}
    above_tables = {folder for table in tables for folder in PurePosixPath(table).parents}
    of_data_sets = {folder for folder in above_tables if _is_card(texts, folder)}
    with_own_text = {PurePosixPath(name).parent for name in texts if not ABOUT.match(PurePosixPath(name).name)}

    def is_left_out(name: str) -> bool:
        folder = PurePosixPath(name).parent
        if folder in with_tables or of_data_sets & {folder, *folder.parents}:
            return True
        return folder in above_tables and folder not in with_own_text

    return [name for name in texts if is_left_out(name)]


def _is_card(texts: Mapping[str, tuple[Path, TextFormat]], folder: PurePosixPath) -> bool:
    """Whether the folder's README.md is a data set's card: it begins with a block of YAML."""
    readme = texts.get((folder / "README.md").as_posix())
    if readme is None:
        return False
    with readme[0].open("rb") as stream:
        return stream.read(4).strip() == b"---"


def _splits(tables: Iterable[str], texts: Iterable[str]) -> dict[str, str | None]:
    """The split of each table, and of prose in a folder where one file is called train; code has tests of another kind."""
    prose = {name: split_of(PurePosixPath(name).name) for name in texts if is_prose(name)}
    with_train = {PurePosixPath(name).parent for name, split in prose.items() if split == TRAIN}
    own = {name: split for name, split in prose.items() if PurePosixPath(name).parent in with_train}
    return {name: split_of(name) for name in tables} | own


def _unwanted(files: Iterable[str], splits: Mapping[str, str | None], *, heldout: bool) -> list[tuple[str, str]]:
    """(name, split) of the files of other splits than are read."""
    measured = {name for name, split in splits.items() if split in (VALIDATION, TEST)}
    unwanted = (set(files) - measured if measured else set()) if heldout else measured
    return [(name, splits.get(name) or TRAIN) for name in sorted(unwanted)]


def split_of(name: str) -> str | None:
    """The split that a table's name says it is of, the file's own words before its folders'; None where none does."""
    for part in (uncompressed(PurePosixPath(name).name), *(folder.name for folder in PurePosixPath(name).parents)):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return None


def _kind(name: str) -> str:
    """What a file is counted as: by its name where this says that it is about others, else by its suffixes."""
    file = PurePosixPath(name).name
    if ABOUT.match(file):
        return file
    return file.removeprefix(PurePosixPath(uncompressed(file)).stem) or "without a suffix"


def _counted(kinds: Counter[str]) -> str:
    most = kinds.most_common(KINDS_SHOWN)
    others = kinds.total() - sum(number for _, number in most)
    return ", ".join(f"{number} {kind}" for kind, number in most) + (f" and {others} of other kinds" if others else "")
