"""A live teacher that does not fit beside the student: run layer by layer, on all rows of an optimiser step at once."""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core import torchrun
from slimqwen.core.bytesize import bytes_in_words
from slimqwen.core.free_memory import limit_bytes
from slimqwen.core.progress import say
from slimqwen.data.stream import Batch
from slimqwen.losses.loss import align
from slimqwen.losses.signal import LiveSignal
from slimqwen.model.model import MtpCausalLM
from slimqwen.parallel.ranks import Ranks
from slimqwen.recipe import Execution
from slimqwen.teacher_cache.predict import LayerByLayer
from slimqwen.training.teacher import ignore


class StreamedTeacher:
    """Teacher whose weights are read once for each batch that is prepared (`LayerByLayer`); its final hidden states wait in memory.

    Beside them and one layer lm_head is held, on the device. A row that was not prepared is computed when its signal is asked for.

    Args:
        rows: of the largest batch that is prepared, which the memory is allotted for.
        teaches_mtp: the student's MTP head learns from the teacher's MTP head, and not from its main head.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        execution: Execution,
        *,
        teaches_mtp: bool,
        rows: int,
        sequence_length: int,
        dtype: torch.dtype,
    ) -> None:
        self.checkpoint = checkpoint
        self.teaches_mtp = teaches_mtp
        self._predictor = LayerByLayer(
            checkpoint,
            execution,
            with_mtp=teaches_mtp,
            sequences=rows,
            sequence_length=sequence_length,
            dtype=dtype,
        )
        self._states: dict[bytes, tuple[Tensor, Tensor | None]] = {}  # by the tokens of a row; [seq, hidden] each

    @torch.no_grad()
    def prepare(self, batch: Batch, pause: Callable[[], None] = ignore) -> None:
        """Run the teacher on a batch; what was prepared before is dropped. pause: called after each chunk of each layer."""
        self._states.clear()
        on_host = batch.to(torch.device("cpu"))
        for pieces in self._predictor.hidden_states([on_host], lambda _: pause()):
            for piece, hidden in pieces:
                for row, tokens in enumerate(piece.tokens):
                    mtp = None if hidden.mtp is None else hidden.mtp[row].cpu()
                    self._states[_key(tokens)] = hidden.main[row].cpu(), mtp

    @torch.no_grad()
    def signal(self, batch: Batch) -> LiveSignal:
        """Return the waiting hidden states of these rows and the head, aligned with the student's predictions (`align`)."""
        keys = [_key(tokens) for tokens in batch.tokens]
        if not self._states.keys() >= set(keys):
            self.prepare(batch)
        device = batch.tokens.device
        main = torch.stack([self._states[key][0] for key in keys]).to(device)
        drafts = [mtp for _, mtp in (self._states[key] for key in keys) if mtp is not None]
        aligned = align(batch.tokens, main, torch.stack(drafts).to(device) if drafts else None, batch.mask)
        return LiveSignal(aligned.hidden, self._predictor.head, aligned.mtp_hidden)


def _key(tokens: Tensor) -> bytes:
    """Return what tells a row from others: rows of the same tokens have the same hidden states."""
    return tokens.cpu().numpy().tobytes()


def goes_layer_by_layer(
    teacher: Checkpoint, student: MtpCausalLM, execution: Execution, dtype: torch.dtype, ranks: Ranks
) -> bool:
    """Return whether a live teacher is streamed: as `execution.streaming_teacher` says, or where it does not fit, which is printed.

    Counted are the teacher's weights and the student's, with gradients and AdamW's moments, against all of the device's memory, and
    not what is free: the same command does the same after an interruption. Activations are not counted.
    """
    if execution.streaming_teacher is not None:
        return execution.streaming_teacher
    device = ranks.device_of(student)
    if execution.offload == "all" and device.type != "cpu":
        return False
    sharing = ranks.copy_ranks
    needed = dtype.itemsize * sum(prod(spec.shape) for spec in teacher.specs.values() if spec.part != "vision")
    is_elsewhere = execution.offload != "none" and device.type != "cpu"
    held = 0 if is_elsewhere else sum(_training_bytes(tensor) for tensor in student.tensors().values())
    available = limit_bytes() if device.type == "cpu" else torch.cuda.get_device_properties(device).total_memory
    processes = torchrun.local_world_size() if device.type == "cpu" else 1
    if available is None or processes * (needed + held) // sharing <= available:
        return False
    if ranks.is_first:
        say(
            f"the teacher goes layer by layer (execution.streaming_teacher): it takes {bytes_in_words(needed)} in "
            f"{str(dtype).removeprefix('torch.')} and the student in training {bytes_in_words(held)}, of {bytes_in_words(available)} of memory"
        )
    return True


def _training_bytes(parameter: Tensor) -> int:
    """Return the bytes of a parameter over all ranks, with its gradient and moments where it is trained."""
    moments = 3 * torch.float32.itemsize if parameter.requires_grad else 0
    return parameter.numel() * (parameter.itemsize + moments)
