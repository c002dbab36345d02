"""Writing of a Hugging Face checkpoint folder: tensors directly at their offsets, index and config last."""

import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType

import torch

from slimqwen.artifacts import fingerprint_value
from slimqwen.checkpoint.config import parse_json
from slimqwen.checkpoint.identity import content_fingerprint
from slimqwen.checkpoint.reader import INDEX_FILE
from slimqwen.checkpoint.shards import DEFAULT_SHARD_BYTES, Shard, TensorInfo, plan_shards
from slimqwen.families import Config

MOST_FLUSHES = 16  # pending: each keeps its shard open, and a process may have 256 files
FLUSH_EVERY_BYTES = 256 << 20  # by default Linux buffers up to a tenth of its memory before it writes


class CheckpointWriter:
    """A writer of a checkpoint's tensors into shards of at most `shard_bytes`, without buffering them in memory.

        with CheckpointWriter(folder, [TensorInfo("lm_head.weight", torch.bfloat16, (1000, 64)), ...]) as writer:
            for tensor in writer.missing():
                writer.add(tensor.name, ...)
            writer.finish(config)

    The folder must be a temporary one (`atomic_folder`): until `finish` it is not a checkpoint. A shard has its final
    name once it is complete and on the disk, and a hidden one before; shards that exist already, from an earlier
    process with the same `tensors` and `shard_bytes` (`resumable_folder`), are kept.

    Args:
        share: the number of this process among those that write the checkpoint together, and how many these are. Each writes
            every `share[1]`-th of the missing shards, and the first calls `finish` once all have called `complete`.
        lead: does what it is given on the first of them, and returns what that returns on each (`Job.lead`).
    """

    def __init__(
        self,
        folder: Path,
        tensors: Iterable[TensorInfo],
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        *,
        share: tuple[int, int] = (0, 1),
        lead: Callable[[Callable[[], str]], str] = lambda action: action(),
    ) -> None:
        self.folder = folder
        self.shards = plan_shards(tensors, shard_bytes)
        missing = json.loads(lead(self._list_missing))  # by one: another may have finished a shard since
        self.found = [shard for number, shard in enumerate(self.shards) if number not in missing]
        self._places: dict[str, tuple[_ShardFile, TensorInfo, int]] = {}
        for number in missing[share[0] :: share[1]]:
            file = _ShardFile(folder, self.shards[number])
            self._places |= {tensor.name: (file, tensor, place) for tensor, place in self.shards[number].places()}
        self._flusher = ThreadPoolExecutor(1)
        self._flushes: deque[Future[None]] = deque()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove the shards that are not complete."""
        self._flusher.shutdown()  # waits for pending flushes, which may complete a shard
        for file, _, _ in self._places.values():
            file.abandon()

    @property
    def total_bytes(self) -> int:
        """Size of all tensors."""
        return sum(shard.tensor_bytes for shard in self.shards)

    @property
    def found_bytes(self) -> int:
        """Size of the tensors in the shards that existed already."""
        return sum(shard.tensor_bytes for shard in self.found)

    @property
    def missing_file_bytes(self) -> int:
        """Size of the files still to be written, by all processes, headers included."""
        return sum(shard.nbytes for shard in self.shards) - sum(shard.nbytes for shard in self.found)

    @property
    def own_bytes(self) -> int:
        """Size of the tensors that this process writes."""
        return sum(tensor.nbytes for tensor in self.missing())

    def missing(self) -> list[TensorInfo]:
        """List the tensors still to be written by this process, in the order of the files."""
        return [tensor for _, tensor, _ in self._places.values()]

    def _list_missing(self) -> str:
        """Return the numbers of the shards that are not there, as JSON."""
        shards = enumerate(self.shards)
        return json.dumps([number for number, shard in shards if not _is_complete(self.folder / shard.file, shard)])

    def add(self, name: str, rows: torch.Tensor, first_row: int = 0) -> None:
        """Write a tensor, or consecutive rows of it from `first_row` on.

        A tensor of more than two dimensions may also be written by the rows of its last ones: `[experts, rows, columns]`
        as `[n, columns]`, where row `expert * rows + row` is the first. Each row is written once, in any order, by any thread.
        """
        file, tensor, place = self._places[name]
        assert rows.dtype == tensor.dtype and rows.shape[1:] == tensor.shape[len(tensor.shape) - rows.dim() + 1 :], name
        data = rows.contiguous().reshape(-1).view(torch.uint8).numpy().data
        if file.write(data, place + first_row * (len(data) // len(rows))):
            self._flushes.append(self._flusher.submit(file.flush))
            if len(self._flushes) > MOST_FLUSHES:
                self._flushes.popleft().result()

    def complete(self) -> None:
        """Wait until all that this process has written is on the disk, its shards under their names."""
        while self._flushes:
            self._flushes.popleft().result()

    def finish(self, config: Config) -> None:
        """Write the index (where there is more than one shard) and config.json."""
        self.complete()
        unfinished = [shard.file for shard in self.shards if not (self.folder / shard.file).exists()]
        assert not unfinished, f"not every tensor of {unfinished} was added"
        if len(self.shards) > 1:
            weight_map = {tensor.name: shard.file for shard in self.shards for tensor in shard.tensors}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        config = _with_both_dtype_keys(config)
        (self.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class _ShardFile:
    """A shard that is being written, by several threads; the last flush gives it its final name."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        self._path = folder / shard.file
        self._partial = folder / f".{shard.file}.partial"
        self._header = shard.header
        self._bytes_left = shard.tensor_bytes
        self._unflushed_bytes = 0
        self._descriptor: int | None = None
        self._lock = threading.Lock()

    def write(self, data: memoryview, place: int) -> bool:
        """Write at an offset of the file. Returns whether it is time to flush."""
        with self._lock:
            if self._descriptor is None:
                self._descriptor = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
                _write_all(self._descriptor, memoryview(self._header), 0)
        _write_all(self._descriptor, data, place)
        with self._lock:
            self._bytes_left -= len(data)
            self._unflushed_bytes += len(data)
            is_time = self._unflushed_bytes >= FLUSH_EVERY_BYTES or not self._bytes_left
            if is_time:
                self._unflushed_bytes = 0
        return is_time

    def flush(self) -> None:
        """Flush the file to the disk and, if everything is written, complete the shard."""
        if self._descriptor is None:  # an earlier flush was late, and completed the shard
            return
        is_complete = not self._bytes_left
        os.fsync(self._descriptor)
        if is_complete:
            os.close(self._descriptor)
            self._descriptor = None
            self._partial.rename(self._path)

    def abandon(self) -> None:
        """Remove the file where it is not complete."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            self._partial.unlink()


def _is_complete(path: Path, shard: Shard) -> bool:
    return path.is_file() and path.stat().st_size == shard.nbytes


def _write_all(descriptor: int, data: memoryview, place: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, place)  # at most 2 GiB at once on Linux
        data, place = data[written:], place + written


def _with_both_dtype_keys(config: Config) -> Config:
    """Set `torch_dtype` to `dtype` where a config has both, also in its sections."""
    new = {key: _with_both_dtype_keys(value) if isinstance(value, dict) else value for key, value in config.items()}
    return new | {"torch_dtype": new["dtype"]} if {"dtype", "torch_dtype"} <= new.keys() else new


# Companions of the weights: tokenizer, processors, generation config, chat templates, licence.
COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "*.jinja", "chat_template.json"),
    *("generation_config.json", "*processor_config.json", "license*", "licence*", "notice*", "copying*"),
)
TEMPLATES = "additional_chat_templates"  # a folder with one named template per file


def copy_companions(source: Path, destination: Path) -> None:
    """Copy COMPANIONS and named chat templates, and nothing else, such as optimizer states.

    Code is never run and the model card is rewritten, so neither is copied; references to code in JSON files
    (`auto_map`) are removed from the copy.
    """
    for file in companions(source):
        to = destination / file.relative_to(source)
        to.parent.mkdir(exist_ok=True)
        to.write_bytes(_without_code(file))


def companions(folder: Path) -> list[Path]:
    """List the files that `copy_companions` copies."""
    named = (file for file in folder.iterdir() if any(fnmatchcase(file.name.lower(), name) for name in COMPANIONS))
    return [file for file in [*sorted(named), *sorted((folder / TEMPLATES).glob("*.jinja"))] if file.is_file()]


def companions_fingerprint(folder: Path) -> str:
    """Hash the content of the files that `copy_companions` copies."""
    files = {file.relative_to(folder).as_posix(): file for file in companions(folder)}
    return fingerprint_value({name: content_fingerprint(file) for name, file in files.items()})


def _without_code(file: Path) -> bytes:
    """Read a file, without references to code (`auto_map`)."""
    content = file.read_bytes()
    if file.suffix == ".json" and b'"auto_map"' in content:
        with suppress(ValueError):  # not JSON: reported when it is used
            parsed = parse_json(content)
            if isinstance(parsed, dict) and parsed.pop("auto_map", None) is not None:
                content = (json.dumps(parsed, indent=2, ensure_ascii=False) + "\n").encode()
    return content
