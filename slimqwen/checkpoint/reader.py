"""Reading a Hugging Face checkpoint folder, one memory-mapped tensor at a time."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from slimqwen.artifacts import fingerprint
from slimqwen.checkpoint.config import read_config, read_json
from slimqwen.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class Checkpoint:
    """A checkpoint folder: its config, its tensors by name, nothing in memory but the headers.

    Opening it checks that every tensor of the family's table is there with its shape and nothing else is
    (a checkpoint without the MTP module is accepted: its config then says so, `num_nextn_predict_layers` 0).
    Raises UserError for anything missing, unknown, truncated or outside the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.family, self.config = read_config(folder)
        self._files = {name: file for file in self._shards() for name in self._open(file).keys()}  # noqa: SIM118
        self._check_index()
        if not any(name in self._files for name in self.family.mtp_tensors(self.config)):
            self.config = {**self.config, "num_nextn_predict_layers": 0}
        self.layouts = self.family.detect_layouts(self.config, set(self._files))
        self.specs = {spec.name: spec for spec in self.family.tensors(self.config, self.layouts)}
        self._check_tensors()

    def _shards(self) -> list[Path]:
        """The safetensors files, none of which may lie outside the folder."""
        self._handles: dict[Path, Any] = {}
        self._index: dict[str, str] = {}
        if (self.folder / INDEX_FILE).exists():
            index = read_json(self.folder / INDEX_FILE)
            weight_map = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
                raise UserError(f"{self.folder / INDEX_FILE} has no weight_map: download the checkpoint's index again.")
            for file in sorted(set(weight_map.values())):
                if Path(file).name != file or not file.endswith(".safetensors"):
                    raise UserError(
                        f"{self.folder / INDEX_FILE} names '{file}', which is not a safetensors file in the folder."
                    )
                if not (self.folder / file).is_file():
                    raise UserError(f"{self.folder} lacks {file}, which its index names: download it again.")
            self._index = weight_map
            return [self.folder / file for file in sorted(set(weight_map.values()))]
        if (self.folder / SINGLE_FILE).is_file():
            return [self.folder / SINGLE_FILE]
        raise UserError(f"{self.folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: slimqwen reads safetensors only.")

    def _open(self, file: Path) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{file} is not a readable safetensors file (corrupt or truncated?): {error}."
                ) from error
        return self._handles[file]

    def _check_index(self) -> None:
        for name, file in self._index.items():
            if name not in self._files:
                raise UserError(f"{self.folder}: the index places '{name}' in {file}, which does not hold it.")

    def _check_tensors(self) -> None:
        missing = [name for name in self.specs if name not in self._files]
        unknown = [name for name in self._files if name not in self.specs]
        if missing or unknown:
            problems = [f"lacks {len(missing)} tensors ({_some(missing)})"] * bool(missing)
            problems += [f"has {len(unknown)} that its config does not account for ({_some(unknown)})"] * bool(unknown)
            raise UserError(
                f"{self.folder} {' and '.join(problems)}: config.json and the weights do not belong together."
            )
        for name, spec in self.specs.items():
            found = tuple(self._slice(name).get_shape())
            if found != spec.shape:
                raise UserError(
                    f"{self.folder}: '{name}' has shape {found}, config.json implies {spec.shape}: they do not belong together."
                )
            if self._slice(name).get_dtype() not in SAFETENSORS_DTYPES:
                raise UserError(
                    f"{self.folder}: '{name}' is {self._slice(name).get_dtype()}; slimqwen reads bfloat16, float16 and "
                    "float32 weights: use the original, unquantised checkpoint."
                )

    def _slice(self, name: str) -> Any:
        return self._open(self._files[name]).get_slice(name)

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype."""
        return self._open(self._files[name]).get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        return SAFETENSORS_DTYPES[self._slice(name).get_dtype()]

    def bytes(self) -> int:
        """Size of all weights."""
        return sum(file.stat().st_size for file in self._handles)

    @property
    def has_mtp(self) -> bool:
        return bool(self.config["num_nextn_predict_layers"])

    def fingerprint(self) -> str:
        return fingerprint(self.folder)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
