"""Intermediate results, kept beside the final one: each model's measurements, and the teacher's hidden states.

They are identified by the content that they depend on, so an interrupted evaluation continues where it was, and one
with an additional model measures only that one.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file

from slimqwen.artifacts import (
    atomic_file,
    check_replaceable,
    claim_folder,
    discard,
    fingerprint_value,
    full_disk_explained,
    is_marked,
    write_json,
)
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.bytesize import bytes_in_words
from slimqwen.core.progress import say
from slimqwen.data.stream import Batch
from slimqwen.evaluation.fidelity import ALONE, Recording
from slimqwen.evaluation.result import ModelEvaluation
from slimqwen.evaluation.shares import Share
from slimqwen.losses.loss import align
from slimqwen.model.arithmetic import arithmetic, warn_of_other_arithmetic
from slimqwen.model.device import aligned
from slimqwen.model.model import head_name, weightless
from slimqwen.parallel.job import Job

REVISION = 1  # raised when the code changes the results of the same model and text: kept results are then invalid
LARGEST_RECORDING_BYTES = (
    2_000_000_000  # 0.5M tokens of a bfloat16 teacher of hidden_size 2048; larger ones are not kept
)
FORMAT = "slimqwen.hidden/1"
HIDDEN = "hidden"


class _Measured(BaseModel):
    """One model's measurements, in a file of their own."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["slimqwen.measured/1"] = "slimqwen.measured/1"
    key: str
    arithmetic: dict[str, Any]  # the numerical environment of the computation
    numbers: ModelEvaluation


def kept_folder(out: Path) -> Path:
    """Return the hidden folder beside a result, `.evaluation.json.measured`."""
    return out.parent / f".{out.name}.measured"


def check_kept_folder(out: Path) -> None:
    """Raise UserError where something that is not ours has the folder's name."""
    check_replaceable(kept_folder(out))


@contextmanager
def keep_numbers(out: Path, made_from: Mapping[str, Any]) -> Iterator["KeptNumbers"]:
    """Create the folder beside `out`, and remove it again if it stays empty. made_from: as in `KeptNumbers`.

    Raises UserError where something that is not ours has the folder's name.
    """
    folder = kept_folder(out)
    check_kept_folder(out)
    claim_folder(folder, fingerprint_value(FORMAT))
    try:
        yield KeptNumbers(out, made_from)
    finally:
        if all(name.startswith(".") for name in os.listdir(folder)):
            discard(folder)


class KeptNumbers:
    """The measurements kept for the result `out`.

    made_from: all that the measurements of every model depend on beside the checkpoint.
    """

    def __init__(self, out: Path, made_from: Mapping[str, Any]) -> None:
        self._folder = kept_folder(out)
        self._out = out
        self._made_from = {"slimqwen": version("slimqwen"), "revision": REVISION, **made_from}
        self._has_compared = False

    def find(self, checkpoint: str) -> ModelEvaluation | None:
        """Read the measurements of a checkpoint by its fingerprint; None where there are no valid ones."""
        key, file = self._place(checkpoint)
        try:
            found = _Measured.model_validate_json(file.read_bytes())
        except (OSError, ValidationError):  # damaged: measured again
            return None
        if found.key != key:
            return None
        if not self._has_compared and found.arithmetic != arithmetic():
            self._has_compared = True
            warn_of_other_arithmetic(found.arithmetic, f"the evaluation for {self._out}")
        return found.numbers

    def keep(self, checkpoint: str, numbers: ModelEvaluation) -> None:
        """Write the measurements of a checkpoint under its fingerprint."""
        key, file = self._place(checkpoint)
        write_json(file, _Measured(key=key, arithmetic=arithmetic(), numbers=numbers).model_dump(mode="json"))

    def _place(self, checkpoint: str) -> tuple[str, Path]:
        key = fingerprint_value({**self._made_from, "checkpoint": checkpoint})
        return key, self._folder / f"{key[:16]}.json"


class KeptRecording:
    """The teacher's final hidden states, in `folder/teacher-KEY.safetensors`; with the checkpoint's lm_head they give the KL.

    They are tokens x hidden_size numbers in the dtype of the computation: 268 MB for 65,536 tokens of a bfloat16 teacher of
    hidden_size 2048, where distributions over a vocabulary of 152k would be 20 GB. Above `LARGEST_RECORDING_BYTES` they are
    not kept. made_from: all that they depend on, including the teacher. job: whose ranks each have a share of the rows; the file
    holds all of them, so that any number of ranks can read it.
    """

    def __init__(self, folder: Path, made_from: Mapping[str, Any], job: Job = ALONE) -> None:
        self._folder, self._job = folder, job
        self._key = fingerprint_value({"slimqwen": version("slimqwen"), "revision": REVISION, **made_from})
        self._file = folder / f"teacher-{self._key[:16]}.safetensors"

    def find(
        self, teacher: Checkpoint, rows: Batch, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> Recording | None:
        """Read the recording of this rank's share of `rows`, in batches, with all that `compare` needs of a teacher.

        None where there is no valid one.
        """
        count, length = rows.tokens[:, 1:].shape
        hidden = self._read((count * length, teacher.config["hidden_size"]), dtype)
        if any(self._job.gather(hidden is None)) or hidden is None:
            return None
        share = Share.of(count, self._job)
        hidden = hidden.view(count, length, -1)
        parts = (hidden if share.own == count else hidden[share.numbers]).to(device).split(batch_size)
        batches = share.rows(rows).to(device).split(batch_size)
        head = teacher.read(head_name(teacher, weightless(teacher, dtype, device)))
        return Recording(
            [align(batch.tokens, part, mask=batch.mask) for batch, part in zip(batches, parts, strict=True)],
            aligned(head.to(device, dtype)),
            utilisation={},
        )

    def _read(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor | None:
        """Map the hidden states of all rows, [tokens, hidden]; None where they are not there, or not valid."""
        if not is_marked(self._file):
            return None
        try:
            hidden = load_file(self._file).get(HIDDEN)
        except Exception:  # safetensors may raise anything on a damaged file, which is recorded again
            return None
        return hidden if hidden is not None and hidden.shape == shape and hidden.dtype == dtype else None

    def keep(self, recording: Recording, rows: Batch) -> None:
        """Write the recording of all ranks' shares of `rows`, or print a message where it is too large."""
        tokens = rows.tokens[:, 1:].numel()
        size = tokens * recording.predictions[0].hidden[0].nbytes
        if size > LARGEST_RECORDING_BYTES:
            say(
                f"the teacher's hidden states take {bytes_in_words(size)} and are not kept: the next call runs the teacher "
                "again for models not yet measured"
            )
            return
        hidden = torch.cat([predictions.hidden.cpu() for predictions in recording.predictions])
        rank, ranks = self._job.share
        if ranks == 1:
            self._write(hidden)
            return
        with full_disk_explained(self._part(rank)):
            save_file({HIDDEN: hidden}, self._part(rank))
        self._job.wait()
        self._job.lead(lambda: self._join([self._part(rank) for rank in range(ranks)], tokens))

    def _join(self, parts: list[Path], tokens: int) -> str:
        """Write the recording of all rows from those of the ranks' shares; return its file."""
        self._write(torch.cat([load_file(part)[HIDDEN] for part in parts])[:tokens])
        for part in parts:
            part.unlink()
        return str(self._file)

    def _part(self, rank: int) -> Path:
        """Return the file of a rank's share. It is hidden: what a killed process leaves is removed with all that is unfinished."""
        return self._folder / f".teacher-{self._key[:16]}.{rank}"

    def _write(self, hidden: torch.Tensor) -> None:
        with atomic_file(self._file) as partial:
            save_file({HIDDEN: hidden}, partial, metadata={"slimqwen": FORMAT})

    def forget_others(self) -> None:
        """Remove the recordings of other teachers or text, which are no longer needed."""
        for file in self._folder.glob("teacher-*.safetensors"):
            if file != self._file and is_marked(file):
                file.unlink()
