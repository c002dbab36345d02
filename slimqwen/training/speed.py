"""The cost of a step: seconds, tokens per second, their share of the device's peak (MFU), memory."""

import resource
import sys

import torch

from slimqwen.model.peaks import dense_bf16_flops
from slimqwen.shapes.footprint import forward_flops, training_flops
from slimqwen.training.streamed_teacher import StreamedTeacher
from slimqwen.training.teacher import LiveTeacher
from slimqwen.training.trainer import Trainer


class Speed:
    """Speed of one training's steps.

    mfu, model FLOPs utilisation: `flops_per_token` x tokens / (seconds x peak of all ranks' devices); only where the
    device's peak is known.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._device = trainer.device
        self._flops = flops_per_token(trainer)
        peak = dense_bf16_flops(trainer.device)
        self._peak = None if peak is None else peak * trainer.ranks.size

    def log_entry(self, tokens: int, seconds: float) -> dict[str, float]:
        """Return what metrics.jsonl gets of a step over `tokens` that took `seconds`; memory is the process's peak so far."""
        values = {"seconds": seconds, "tokens_per_second": tokens / seconds, "memory_bytes": peak_memory(self._device)}
        if self._peak is not None:
            values["mfu"] = self._flops * tokens / (seconds * self._peak)
        return values


def flops_per_token(trainer: Trainer) -> int:
    """Return the `training_flops` per token of this training, without MTP modules, as in `forward_flops`."""
    student, teacher, length = trainer.student, trainer.teacher, trainer.stream.sequence_length
    taught = 0
    if isinstance(teacher, LiveTeacher | StreamedTeacher):
        running = teacher.model if isinstance(teacher, LiveTeacher) else teacher.checkpoint
        taught = forward_flops(running.family, running.config, length)
    return training_flops(forward_flops(student.family, student.config, length), taught)


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes of tensors on a GPU, or of this process in the host's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
