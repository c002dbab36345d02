"""What a step costs: seconds, tokens per second, the share of the device's peak that they are, memory."""

import resource
import sys

import torch

from slimqwen.model.peaks import dense_bf16_flops
from slimqwen.shapes.footprint import forward_flops
from slimqwen.training.teacher import LiveTeacher
from slimqwen.training.trainer import Trainer


class Speed:
    """Measures the steps of one training.

    mfu, model FLOPs utilisation: `training_flops` x tokens / (seconds x peak of all ranks' devices); only where the
    device's peak is known.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._device = trainer.device
        self._flops = training_flops(trainer)
        peak = dense_bf16_flops(trainer.device)
        self._peak = None if peak is None else peak * trainer.ranks.size

    def measured(self, tokens: int, seconds: float) -> dict[str, float]:
        """What is logged of a step over `tokens` that took `seconds`; memory is this process's peak so far."""
        values = {"seconds": seconds, "tokens_per_second": tokens / seconds, "memory_bytes": peak_memory(self._device)}
        if self._peak is not None:
            values["mfu"] = self._flops * tokens / (seconds * self._peak)
        return values


def training_flops(trainer: Trainer) -> int:
    """FLOPs of one token: the teacher's forward pass and three times the student's.

    The backward pass takes two products per weight where the forward takes one. MTP modules are left out (as in
    `forward_flops`), and so are recomputed activations (as PaLM counts, arXiv 2204.02311, appendix B) and the pass that
    counts expert assignments: what is done beyond this is no progress.
    """
    student, teacher, length = trainer.student, trainer.teacher, trainer.stream.sequence_length
    flops = 3 * forward_flops(student.family, student.config, length)
    if isinstance(teacher, LiveTeacher):
        flops += forward_flops(teacher.model.family, teacher.model.config, length)
    return flops


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, or that this process took of the host's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
