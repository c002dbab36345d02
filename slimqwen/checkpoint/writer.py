"""Writing a Hugging Face checkpoint folder: shards that flush as they fill, the index and config last."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from slimqwen.checkpoint.reader import INDEX_FILE, SINGLE_FILE
from slimqwen.families import Config

DEFAULT_SHARD_BYTES = 5_000_000_000


class CheckpointWriter:
    """Collects tensors up to `shard_bytes`, writes a shard, goes on; `finish` names the shards and writes the index.

    The folder must be a temporary one (`atomic_folder`): until `finish` it is not a checkpoint.
    """

    def __init__(self, folder: Path, shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += size
        self._total_bytes += size

    def _flush(self) -> None:
        save_file(self._pending, self.folder / f"shard-{len(self._shards)}", metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def finish(self, config: Config) -> None:
        """Write the last shard, the index (where there is more than one shard), and config.json."""
        self._flush()
        if len(self._shards) == 1:
            (self.folder / "shard-0").rename(self.folder / SINGLE_FILE)
        else:
            weight_map: dict[str, str] = {}
            for i, names in enumerate(self._shards):
                file = f"model-{i + 1:05d}-of-{len(self._shards):05d}.safetensors"
                (self.folder / f"shard-{i}").rename(self.folder / file)
                weight_map |= dict.fromkeys(names, file)
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        (self.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: Path, destination: Path) -> None:
    """Copy what makes a checkpoint usable beside its weights: tokenizer, generation config, chat template, licence.

    Code (*.py), pickles and the old README stay behind: the first two are never run, and the card is rewritten.
    """
    for file in sorted(source.iterdir()):
        weights = file.name == "config.json" or file.name.endswith(".index.json")
        wanted = file.suffix in (".json", ".txt", ".jinja", ".model") or file.name.upper().startswith("LICENSE")
        if file.is_file() and wanted and not weights and not file.name.startswith("."):
            shutil.copyfile(file, destination / file.name)
