"""The cost of a step: seconds, tokens per second, their share of the device's peak (MFU), memory."""

import resource
import sys

import torch

from slimqwen.model.peaks import dense_bf16_flops
from slimqwen.shapes.footprint import forward_flops
from slimqwen.training.teacher import LiveTeacher
from slimqwen.training.trainer import Trainer


class Speed:
    """Speed of one training's steps.

    mfu, model FLOPs utilisation: `training_flops` x tokens / (seconds x peak of all ranks' devices); only where the
    device's peak is known.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._device = trainer.device
        self._flops = training_flops(trainer)
        peak = dense_bf16_flops(trainer.device)
        self._peak = None if peak is None else peak * trainer.ranks.size

    def log_entry(self, tokens: int, seconds: float) -> dict[str, float]:
        """Return what metrics.jsonl gets of a step over `tokens` that took `seconds`; memory is the process's peak so far."""
        values = {"seconds": seconds, "tokens_per_second": tokens / seconds, "memory_bytes": peak_memory(self._device)}
        if self._peak is not None:
            values["mfu"] = self._flops * tokens / (seconds * self._peak)
        return values


def training_flops(trainer: Trainer) -> int:
    """Return the FLOPs per token: the teacher's forward pass and three times the student's.

    The backward pass has two products per weight where the forward pass has one. MTP modules are left out (as in
    `forward_flops`), and so are recomputed activations (as PaLM counts, arXiv 2204.02311, appendix B) and the pass that
    counts expert assignments: MFU counts only work that the training needs.
    """
    student, teacher, length = trainer.student, trainer.teacher, trainer.stream.sequence_length
    flops = 3 * forward_flops(student.family, student.config, length)
    if isinstance(teacher, LiveTeacher):
        flops += forward_flops(teacher.model.family, teacher.model.config, length)
    return flops


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes of tensors on a GPU, or of this process in the host's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
