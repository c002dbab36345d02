"""Selection of the files of a folder that are read as text: tables or texts, and of a data set the right split."""

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

# Words in a file's or folder's name that identify a data set's split, by the conventions of the Hugging Face hub.
TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev"), VALIDATION),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), TEST),
}
ABOUT = re.compile(r"(readme|licen[cs]e|notice|copying|copyright|citation)\b", re.IGNORECASE)  # texts about other files
PEEKED = ("json", "csv", "tsv")  # formats of settings files too: distinguished by their first row
KINDS_SHOWN = 6


@dataclass
class Selection:
    """The files of a folder that are read, and those that are not.

    files: (name, path, format), sorted by name. skipped: counts by kind (".bin", "README.md", "FIFO"). left_out: the
    names of the files of a data set's other splits, by split. beside_tables: whether texts were skipped because they
    are beside tables.
    """

    files: list[tuple[str, Path, TextFormat]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    beside_tables: bool = False

    def note(self, folder: str) -> str | None:
        """Return a note about the files that are not read; None where all are."""
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
    """Select the files below the folder of `source` that are read.

    - Hidden files and files that are not regular are skipped; links are followed, and each folder is read once.
    - Where `source.format` is given, exactly the files of this format are read.
    - Otherwise tables are read, and the texts of folders without tables: beside tables a text is a data set's card, its
      licence or a script. In folders above tables, a README, LICENSE or NOTICE is skipped too where there is no other
      text, and so is every text beside a data set's card (a README.md that begins with "---").
    - A .json, .csv or .tsv file is a table if its first row has the text's column; otherwise it holds settings.
    - Of tables in splits, those not named test or validation are read; as held-out text (`heldout`) those that are, if any.
      The same holds for prose where one file is called train: test.txt beside train.txt.
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
    for name in _texts_to_skip(texts, tables):
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
    """Return the folder, or its snapshot where it is a repository in the Hugging Face cache."""
    if not ((folder / "snapshots").is_dir() and (folder / "blobs").is_dir()):
        return folder
    snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    current = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else ""
    chosen = [path for path in snapshots if path.name == current] or snapshots
    if len(chosen) != 1:
        raise UserError(
            f"{folder} holds {len(snapshots)} snapshots and refs/main names none of them: give the folder of one of them."
        )
    return chosen[0]


def _walk(root: Path, entered: set[tuple[int, int]]) -> Iterator[Path]:
    """Yield every file below `root` that is not hidden; of a repository in the Hugging Face cache, one snapshot.

    Linked folders are entered, each once: `entered` holds the device and inode of those entered so far.
    """
    for folder, subfolders, files in os.walk(root, onerror=raise_unreadable, followlinks=True):
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


def raise_unreadable(error: OSError) -> None:
    """Raise UserError for a folder that os.walk cannot read: by default os.walk skips it without a message."""
    raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from error


def _texts_to_skip(texts: Mapping[str, tuple[Path, TextFormat]], tables: Mapping[str, object]) -> list[str]:
    """List the names of the texts that are skipped because they are beside or above tables."""
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
    """Return whether the folder's README.md is a data set's card, which begins with a block of YAML."""
    readme = texts.get((folder / "README.md").as_posix())
    if readme is None:
        return False
    with readme[0].open("rb") as stream:
        return stream.read(4).strip() == b"---"


def _splits(tables: Iterable[str], texts: Iterable[str]) -> dict[str, str | None]:
    """Return the split of each table, and of prose in a folder with a file called train; not of code, whose tests differ."""
    prose = {name: split_of(PurePosixPath(name).name) for name in texts if is_prose(name)}
    with_train = {PurePosixPath(name).parent for name, split in prose.items() if split == TRAIN}
    own = {name: split for name, split in prose.items() if PurePosixPath(name).parent in with_train}
    return {name: split_of(name) for name in tables} | own


def _unwanted(files: Iterable[str], splits: Mapping[str, str | None], *, heldout: bool) -> list[tuple[str, str]]:
    """List (name, split) of the files whose split is not read."""
    measured = {name for name, split in splits.items() if split in (VALIDATION, TEST)}
    unwanted = (set(files) - measured if measured else set()) if heldout else measured
    return [(name, splits.get(name) or TRAIN) for name in sorted(unwanted)]


def split_of(name: str) -> str | None:
    """Return the split in a table's name, the file's own words before its folders'; None where there is none."""
    for part in (uncompressed(PurePosixPath(name).name), *(folder.name for folder in PurePosixPath(name).parents)):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return None


def _kind(name: str) -> str:
    """Return the kind under which a skipped file is counted: its name for a README or licence, else its suffixes."""
    file = PurePosixPath(name).name
    if ABOUT.match(file):
        return file
    return file.removeprefix(PurePosixPath(uncompressed(file)).stem) or "without a suffix"


def _counted(kinds: Counter[str]) -> str:
    most = kinds.most_common(KINDS_SHOWN)
    others = kinds.total() - sum(number for _, number in most)
    return ", ".join(f"{number} {kind}" for kind, number in most) + (f" and {others} of other kinds" if others else "")
