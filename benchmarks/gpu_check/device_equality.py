"""A step on the device equals the same step on the CPU in float32: its loss terms, its gradient norm, its gradients.

In float32 to 1e-4, in bfloat16 to 2e-2. With `--device cpu` the bfloat16 step is the CPU's own autocast, which shows what
the dtype alone costs.
"""

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from material import recipe_of, write_student, write_tokens
from section import Section

from slimqwen.builtin import TEACHER
from slimqwen.data.store import training_stream
from slimqwen.model.model import load
from slimqwen.recipe import Execution
from slimqwen.training.teacher import LiveTeacher
from slimqwen.training.trainer import Span, Student, Trainer

# So many that bfloat16's other choices of experts average out: on a CPU its gradient norm was 3 % off with 64 tokens.
BATCH_SIZE, SEQUENCE_LENGTH = 8, 64
LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}
TERMS = ("loss", "lm", "kd", "mtp_lm", "mtp_kd", "load_balancing", "grad_norm")


def step(folder: Path, device: str, dtype: str) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Make one step; return its values, and the clipped gradients by name, on the CPU."""
    compute = torch.float32 if dtype == "float32" else torch.bfloat16
    teacher = LiveTeacher(load(TEACHER, compute, device), teaches_mtp=True)
    model = load(folder / "student", torch.float32, device).train()
    trainer = Trainer(
        Student(model, model.family, model.config),
        teacher,
        training_stream(folder / "tokens", SEQUENCE_LENGTH, 0, "packed"),
        recipe_of(4, BATCH_SIZE, SEQUENCE_LENGTH),
        Span(0, 4, 4),
        execution=Execution(device=device),
    )
    context: Any = torch.autocast(device, dtype=torch.bfloat16) if dtype == "bfloat16" else nullcontext()
    with patch.object(Trainer, "mixed_precision", lambda self: context):
        values = trainer.step(0)
    return values, {name: p.grad.float().cpu() for name, p in model.tensors().items() if p.grad is not None}


def main() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    with Section() as section, tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_student(folder)
        write_tokens(folder)
        expected, gradients = step(folder, "cpu", "float32")
        for dtype, limit in LIMITS.items():
            with section.part(f"{section.device} in {dtype}") as part:
                found, own = step(folder, section.device, dtype)
                for name in TERMS:
                    part.check_below(f"{name}_error", abs(found[name] - expected[name]) / abs(expected[name]), limit)
                part.check("the same parameters have gradients", own.keys() == gradients.keys())
                differences = sum(float((own[name] - gradients[name]).square().sum()) for name in gradients)
                size = sum(float(gradient.square().sum()) for gradient in gradients.values())
                part.note(gradient_error=(differences / size) ** 0.5)
                if dtype == "float32":
                    part.check_below("gradient_error", (differences / size) ** 0.5, limit)


if __name__ == "__main__":
    main()
