"""Lazy reading of a Hugging Face checkpoint folder, one memory-mapped tensor at a time."""

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from slimqwen.artifacts import fingerprint, fingerprint_value
from slimqwen.checkpoint.config import read_config_with_notes, read_json
from slimqwen.checkpoint.folder import explain_folder
from slimqwen.checkpoint.header import Entry, read_header
from slimqwen.checkpoint.identity import content_fingerprint
from slimqwen.checkpoint.match import first_names, match
from slimqwen.core.errors import UserError, shown
from slimqwen.core.warning import warn_once

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
OPEN_FILES = 32  # size of the LRU cache: a checkpoint may have a thousand shards, and a process 256 descriptors

SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class Checkpoint:
    """A checkpoint folder: its config, and its tensors by name, read lazily. Only the headers are in memory.

    Opening it checks that it has every tensor of the family's table with its shape, and no others except those that
    Transformers and vLLM also drop or rename (`match`): these are listed in `notes` and passed to `on_note`.
    (A checkpoint without the MTP module is accepted; its `config` then has `num_nextn_predict_layers` 0.)
    Raises UserError for anything missing, unknown, truncated or outside the folder. The names in the index must
    be in the folder, but may be links to elsewhere, as in every download of the Hugging Face hub.
    """

    def __init__(self, folder: Path, on_note: Callable[[str], None] = warn_once) -> None:
        self.folder = folder
        parsed = read_config_with_notes(folder)
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: give the folder of a Hugging Face checkpoint.")
        self.notes = list(parsed.notes)
        present = {path.name for path in folder.iterdir() if path.is_file()}
        self.index = self._read_index() if INDEX_FILE in present else None
        self.files = self._find_files(present)
        stored = self._read_headers()
        self._opened = lru_cache(OPEN_FILES)(open_weights)
        for file in self.files:  # so that a file that safetensors refuses is reported before any work
            open_weights(file)
        found = match(folder, parsed.family, parsed.config, stored, self._read)
        self.family, self.config, self.layouts, self.specs, self._entries, notes = found
        self.notes += notes
        self._check_tensors()
        for note in self.notes:
            on_note(f"note: {note}")

    def _read_index(self) -> dict[str, Any]:
        """Read the index: {"weight_map": {tensor: file}, "metadata": {"total_size": bytes}}."""
        path = self.folder / INDEX_FILE
        index = read_json(path)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{path} has no weight_map of names to files: download the checkpoint's index again.")
        return dict(index)

    def _find_files(self, present: set[str]) -> list[Path]:
        """List the safetensors files. Raises UserError for a name outside the folder."""
        if self.index is None:
            return [self.folder / SINGLE_FILE] if SINGLE_FILE in present else self._shards_without_index(present)
        files = sorted(set(self.index["weight_map"].values()))
        for file in files:
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise UserError(
                    f"{self.folder / INDEX_FILE} names {shown(file)}, which is not a safetensors file in the folder."
                )
            if file not in present:
                raise UserError(f"{self.folder} lacks {shown(file)[1:-1]}, which its index names: download it again.")
        if SINGLE_FILE in present and SINGLE_FILE not in files:  # Transformers reads the one, vLLM the others
            raise UserError(
                f"{self.folder} has a {SINGLE_FILE} and an index that does not name it: remove the one that is stale."
            )
        return [self.folder / file for file in files]

    def _shards_without_index(self, present: set[str]) -> list[Path]:
        """List the shards of a folder without an index. Raises UserError where their numbers show that one is missing."""
        numbers = {name: found.groups() for name in sorted(present) if (found := SHARD.fullmatch(name))}
        if not numbers:
            advice = explain_folder(self.folder) or "slimqwen reads safetensors only."
            raise UserError(f"{self.folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: {advice}")
        totals = {int(total) for _, total in numbers.values()}
        if len(totals) > 1 or len(numbers) != max(totals):
            raise UserError(
                f"{self.folder} has no {INDEX_FILE}, and {len(numbers)} shards of {max(totals)}: download what is missing."
            )
        self.notes.append(
            f"{self.folder} has no {INDEX_FILE}, which Transformers needs to find the {len(numbers)} shards: they are read "
            "by their numbers."
        )
        return [self.folder / name for name in numbers]

    def _read_headers(self) -> dict[str, Entry]:
        """Read the entries of all files. Raises UserError for duplicate names, and where the index disagrees."""
        weight_map = None if self.index is None else self.index["weight_map"]
        entries: dict[str, Entry] = {}
        for file in self.files:
            for name, entry in read_header(file).items():
                if name in entries:
                    raise UserError(
                        f"{self.folder} has {shown(name)} twice, in {entries[name].file.name} and in {file.name}: "
                        "remove the file that does not belong."
                    )
                entries[name] = entry
        for name, file_name in (weight_map or {}).items():
            if name not in entries or entries[name].file.name != file_name:
                raise UserError(
                    f"{self.folder}: the index places {shown(name)} in {file_name}, which does not hold it: "
                    "download the index and the file again."
                )
        if weight_map is not None and len(weight_map) < len(entries):
            name = next(name for name in entries if name not in weight_map)
            raise UserError(
                f"{self.folder}: {entries[name].file.name} holds {shown(name)}, which the index does not name: "
                "download the index and the file again."
            )
        return entries

    def _check_tensors(self) -> None:
        missing = [name for name in self.specs if name not in self._entries]
        unknown = [name for name in self._entries if name not in self.specs]
        cut_off = len(self.specs) > 2 * len(self._entries)
        if missing or unknown:
            number = f"at least {len(missing)}" if cut_off else f"{len(missing)}"
            tensors = "tensor" if len(missing) == 1 and not cut_off else "tensors"
            problems = [f"lacks {number} {tensors} ({first_names(missing)})"] * bool(missing)
            # Where the list of expected names was cut off, a seemingly unknown name may be beyond the cut.
            if unknown and not cut_off:
                problems.append(f"has {len(unknown)} that its config does not account for ({first_names(unknown)})")
            raise UserError(
                f"{self.folder} {' and '.join(problems)}: config.json and the weights do not belong together."
            )
        for name, spec in self.specs.items():
            found = self._entries[name].shape
            if found != spec.shape:
                raise UserError(
                    f"{self.folder}: '{name}' has shape {found}, config.json implies {spec.shape}: they do not belong together."
                )

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor in its stored dtype.

        It is a view of the memory-mapped file (a private mapping: writing to it changes no file). Reading uses page
        cache, which the system reclaims as needed, and no anonymous memory: measured with safetensors 0.8
        on a tensor of 200 MB, RssAnon +0, RssFile +200 MB once it is touched.
        """
        return self._read(self._entries[name])

    def _read(self, entry: Entry) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self._opened(entry.file).get_tensor(entry.name)
            return tensor
        except (SafetensorError, RuntimeError, OSError) as error:  # torch, which maps the file, raises RuntimeError
            raise UserError(f"{entry.file}: {shown(entry.name)} cannot be read: {_one_line(error)}.") from error

    def read_slice(self, name: str, index: Any) -> torch.Tensor:
        """Return `read(name)[index]`, e.g. one expert of a fused tensor; the rest of the tensor is not touched."""
        return self.read(name)[index]

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype of a tensor."""
        return SAFETENSORS_DTYPES[self._entries[name].dtype]

    def file_of(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self._entries[name].file

    def nbytes(self, name: str) -> int:
        """Return the size of one tensor on disk."""
        return self._entries[name].nbytes

    def bytes(self) -> int:
        """Return the size of all files of weights."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def model_files(self) -> list[Path]:
        """The files that define the model: config.json, the index where there is one, and the files of weights."""
        return [self.folder / "config.json", *[self.folder / INDEX_FILE] * (self.index is not None), *self.files]

    @property
    def has_mtp(self) -> bool:
        """Whether the checkpoint has an MTP module."""
        return bool(self.config["num_nextn_predict_layers"])

    def fingerprint(self) -> str:
        """Hash config.json and the files of weights with their names.

        Other files in the folder have no effect, and the index adds no information to the files' headers.
        """
        return fingerprint_value([content_fingerprint(self.folder / "config.json"), *map(fingerprint, self.files)])


def open_weights(file: Path) -> Any:
    """Memory-map a safetensors file. Raises UserError where safetensors refuses it."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is not a readable safetensors file (corrupt or truncated?): {_one_line(error)}."
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
