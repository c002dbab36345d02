"""Verification of checkpoints: after each write, and by the command `slimqwen check` for any folder."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from slimqwen.checkpoint.config import drop_runtime_keys, read_json, sections
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError, shown
from slimqwen.core.progress import Progress
from slimqwen.core.terminal import visible
from slimqwen.serving.caveats import dtype_name, find_warnings
from slimqwen.serving.requirements import (
    LoadResult,
    Obstacles,
    check_loader,
    describe_load,
    expert_parallel,
    find_engines,
    replicated_kv_heads,
    tensor_parallel,
)

SAMPLED_TENSORS = 16
SAMPLED_BYTES = 1 << 30  # in all: a fused tensor of an 80B checkpoint alone has 2 GB
BYTES_WITH_PROGRESS = 1 << 30  # fewer take about a second
CHUNK_BYTES = 1 << 24  # read at once, so that the check needs no more memory than the streaming that wrote the weights
BITS_OF = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32), 8: (torch.int64, np.uint64)}  # by bytes
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
MTP_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")


class CheckResult(BaseModel):
    """The content of a checkpoint that loads, with warnings.

    `tensor_parallel`, `expert_parallel`: number of ranks -> the sizes that it does not divide (empty: it works);
    `replicated_kv_heads`: the numbers of ranks at which several hold, and cache, the same KV head.
    `sampled`: tensor -> SHA-256 of its bytes, of a sample. `read_tensors`, `read_bytes`: the tensors and bytes that were
    checked to be finite. `dtypes`: dtype -> number of tensors. `has_tokenizer`: there is one, and it loads.
    `engines`: whether it loads in each of the requested engines.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str
    model_type: str
    files: int
    tensors: int
    weight_bytes: int
    dtypes: dict[str, int]
    layouts: dict[str, int]
    has_mtp: bool
    tensor_parallel: Obstacles
    replicated_kv_heads: list[int]
    expert_parallel: Obstacles
    sampled: dict[str, str]
    read_tensors: int
    read_bytes: int
    has_tokenizer: bool
    warnings: list[str]
    engines: dict[str, LoadResult] = {}

    def refusing(self) -> list[str]:
        """List the engines that cannot load it, among those requested."""
        return [name for name, result in self.engines.items() if result.problems]


def check_checkpoint(
    folder: Path,
    *,
    expected: Mapping[str, str] | None = None,
    engines: Iterable[str] = (),
    quick: bool = False,
) -> CheckResult:
    """Check that a checkpoint folder is complete and loads in Transformers, vLLM and SGLang, and in every stage here.

    The folder must have exactly the tensors that config.json implies, with their shapes, in the files of the index; the
    config must be consistent with itself and with the MTP tensors; Transformers must be able to build the model, and a
    tokenizer, if any, must load; the tensors that are read must be finite.

    Args:
        expected: tensor name -> `tensor_hash` of what was written: these tensors are the sample, and must match.
            For the check after writing: no model is built, and the tokenizer, a copy, is not loaded.
        engines: names of engines, or 'all'. Whether their loaders accept it is in the result, not raised.
        quick: read only a sample of the tensors.

    Raises UserError for a broken checkpoint; limits on how the model can be served are in `warnings`.
    """
    from slimqwen.model.native import check_buildable, native_config  # seconds to import

    requested = find_engines(engines)
    checkpoint = Checkpoint(folder, on_note=lambda note: None)  # its notes are in `warnings`
    native_config(drop_runtime_keys(read_json(folder / "config.json")), str(folder))
    if expected is None:
        check_buildable(checkpoint.family, checkpoint.config, str(folder))
    _check_orphans(checkpoint)
    _check_mtp(checkpoint)
    tokens = _vocabulary_size(folder) if expected is None else None
    sampled = _hash_sample(checkpoint, expected)
    read = list(sampled)
    if expected is None and not quick:
        read += (others := [name for name in checkpoint.specs if name not in sampled])
        _check_finite(checkpoint, others)
    family, config = checkpoint.family, checkpoint.config
    return CheckResult(
        checkpoint=str(folder),
        model_type=family.model_type,
        files=len(checkpoint.files),
        tensors=len(checkpoint.specs),
        weight_bytes=sum(map(checkpoint.nbytes, checkpoint.specs)),
        dtypes=dict(Counter(dtype_name(checkpoint.dtype(name)) for name in checkpoint.specs).most_common()),
        layouts=dict(Counter(checkpoint.layouts.values())),
        has_mtp=checkpoint.has_mtp,
        tensor_parallel=tensor_parallel(family, config),
        replicated_kv_heads=replicated_kv_heads(config),
        expert_parallel=expert_parallel(family, config),
        sampled=sampled,
        read_tensors=len(read),
        read_bytes=sum(map(checkpoint.nbytes, read)),
        has_tokenizer=tokens is not None,
        warnings=[*checkpoint.notes, *find_warnings(checkpoint, tokens)],
        engines={engine.name: check_loader(engine, checkpoint) for engine in requested},
    )


def _hash_sample(checkpoint: Checkpoint, expected: Mapping[str, str] | None) -> dict[str, str]:
    """Hash a sample of the tensors, or the `expected` ones. Raises UserError where one is not finite or has another hash."""
    names = _sample(checkpoint) if expected is None else list(expected)
    sampled = {name: _hash_on_disk(checkpoint, name) for name in names}
    for name, digest in (expected or {}).items():
        if sampled[name] != digest:
            raise UserError(
                f"{checkpoint.folder}: {shown(name)} is not what was written (SHA-256 {sampled[name][:16]}, expected "
                f"{digest[:16]}): check the disk and write it again."
            )
    return sampled


def _vocabulary_size(folder: Path) -> int | None:
    """Load the tokenizer and return its number of tokens; None where there is none. Raises UserError for a broken one."""
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    from slimqwen.data.tokenizer import load_tokenizer

    return len(load_tokenizer(folder))


def _check_finite(checkpoint: Checkpoint, names: list[str]) -> None:
    """Read tensors in full. Raises UserError for the first that holds NaN or infinity."""
    total = sum(map(checkpoint.nbytes, names))
    shown_progress = Progress(f"check {checkpoint.folder.name}", total=total, unit="bytes")
    with shown_progress if total >= BYTES_WITH_PROGRESS else nullcontext() as progress:
        for name in names:
            for chunk in _finite_chunks(checkpoint, name):
                if progress is not None:
                    progress.advance(chunk.nbytes)


def tensor_hash(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes as safetensors writes them (contiguous, little-endian)."""
    return _digest(_chunks(tensor))


def _hash_on_disk(checkpoint: Checkpoint, name: str) -> str:
    """Hash a stored tensor. Raises UserError where it is missing or not finite."""
    if name not in checkpoint.specs:
        raise UserError(
            f"{checkpoint.folder} lacks {shown(name)}, which was written: check the disk and write it again."
        )
    return _digest(_finite_chunks(checkpoint, name))


def _finite_chunks(checkpoint: Checkpoint, name: str) -> Iterator[torch.Tensor]:
    """Yield a tensor in chunks of CHUNK_BYTES. Raises UserError for one that is not finite."""
    for chunk in _chunks(checkpoint.read(name)):
        if not _is_finite(chunk):
            raise UserError(
                f"{checkpoint.folder}: '{name}' holds NaN or infinity: the file is damaged, or the training that "
                "wrote it diverged."
            )
        yield chunk


def _is_finite(chunk: torch.Tensor) -> bool:
    """Compute `chunk.isfinite().all()` on the bits: a number is finite if its bits, without the sign, are below infinity's.

    1.2 GB/s on one core of a Xeon, where torch's own has 0.15 GB/s in bfloat16.
    """
    if not chunk.numel():
        return True
    bits = chunk.view(BITS_OF[chunk.element_size()][0]).numpy().view(BITS_OF[chunk.element_size()][1])
    infinity = torch.tensor(float("inf"), dtype=chunk.dtype).view(BITS_OF[chunk.element_size()][0]).item()
    return bool(np.left_shift(bits, 1).max() < 2 * infinity)


def _chunks(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    flat = tensor.contiguous().reshape(-1)
    chunks: tuple[torch.Tensor, ...] = flat.split(CHUNK_BYTES // flat.element_size())
    return chunks


def _digest(chunks: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sample(checkpoint: Checkpoint) -> list[str]:
    """Choose up to 16 tensors and 1 GiB, over all files in turn; deterministic for the same names."""
    by_file: dict[Path, list[str]] = {}
    for name in sorted(checkpoint.specs, key=lambda name: hashlib.sha256(name.encode()).digest()):
        by_file.setdefault(checkpoint.file_of(name), []).append(name)
    in_turn = [name for names in zip_longest(*by_file.values()) for name in names if name is not None]
    chosen: list[str] = []
    free = SAMPLED_BYTES
    for name in in_turn:
        if len(chosen) < SAMPLED_TENSORS and checkpoint.nbytes(name) <= free:
            chosen.append(name)
            free -= checkpoint.nbytes(name)
    return chosen


def _check_orphans(checkpoint: Checkpoint) -> None:
    """Raise UserError for a safetensors file outside the checkpoint: some engines load every *.safetensors of a folder."""
    known = {file.name for file in checkpoint.files}
    orphans = sorted(path.name for path in checkpoint.folder.glob("*.safetensors") if path.name not in known)
    if orphans:
        raise UserError(
            f"{checkpoint.folder} has {shown(orphans[0])}, which does not belong to the checkpoint and which serving "
            "engines may load: remove it."
        )


def _check_mtp(checkpoint: Checkpoint) -> None:
    """Raise UserError where config.json, under any of its keys, disagrees with the tensors about the MTP module."""
    on_disk = read_json(checkpoint.folder / "config.json")
    present = checkpoint.config["num_nextn_predict_layers"]
    for section in sections(on_disk):
        for key in MTP_KEYS:
            if section.get(key) is not None and section[key] != present:
                raise UserError(
                    f"{checkpoint.folder}: config.json has {key} {shown(section[key])}, but the checkpoint's tensors are for "
                    f"{present}: add the MTP module's tensors, or set it to {present}."
                )


def describe(result: CheckResult) -> str:
    """Format the result as a list for a terminal."""
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in result.dtypes.items())
    layouts = ", ".join(f"{layout} in {count} blocks" for layout, count in result.layouts.items())
    files = f"{result.files} file" + "s" * (result.files > 1)
    rows = {
        "checkpoint": f"{result.checkpoint} ({result.model_type})",
        "weights": f"{result.weight_bytes:,} bytes, {result.tensors:,} tensors in {files}: {dtypes}",
        "experts": layouts,
        "MTP module": "yes" if result.has_mtp else "no",
        "tensor parallel": _divides(result.tensor_parallel, result.replicated_kv_heads),
        "expert parallel": _divides(result.expert_parallel),
        "tokenizer": "yes" if result.has_tokenizer else "no",
        "read": _read_share(result),
        **{f"  {name}": f"sha256 {digest[:16]}" for name, digest in result.sampled.items()},
    }
    width = max(map(len, rows))
    lines = [visible(f"{name.ljust(width)}  {value}") for name, value in rows.items()]
    lines += [visible(f"warning: {warning}") for warning in result.warnings]
    lines += [describe_load(name, found) for name, found in result.engines.items()]
    refusing = result.refusing()
    return "\n".join([*lines, f"not loadable in {', '.join(refusing)}" if refusing else "loadable"])


def _read_share(result: CheckResult) -> str:
    """Describe what was read: `all 1,234 tensors, all finite`, or the share."""
    if result.read_tensors == result.tensors:
        return f"all {result.tensors:,} tensors, all finite"
    share = result.read_bytes / result.weight_bytes
    return f"{result.read_tensors:,} of {result.tensors:,} tensors ({share:.1%} of the bytes), all finite; the others were not read"


def _divides(obstacles: Obstacles, replicated: Iterable[int] = ()) -> str:
    """Describe which numbers of ranks work: `1, 2, 4 divide (4: KV heads replicated); 3, 5, 6, 7, 8 do not`."""
    even = [ranks for ranks, sizes in obstacles.items() if not sizes]
    uneven = [ranks for ranks, sizes in obstacles.items() if sizes]
    copies = [ranks for ranks in replicated if ranks in even]
    text = f"{_listed(even)} divide" + (f" ({_listed(copies)}: KV heads replicated)" if copies else "")
    return text + (f"; {_listed(uneven)} do not" if uneven else "")


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
