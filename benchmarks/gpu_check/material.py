"""Small real inputs of the sections: the built-in teacher, a student beside it, and tokens of slimqwen's own source."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from slimqwen.builtin import TEACHER
from slimqwen.data.tokenize import tokenize
from slimqwen.recipe import DistilRecipe, Execution, Source

ROOT = Path(__file__).resolve().parents[2]
SEQUENCE_LENGTH = 32
NOISE = 0.3  # of each tensor's standard deviation: the divergence from the teacher is well above rounding


def write_tokens(folder: Path, source: str = "slimqwen/training") -> Path:
    """Tokenize a part of slimqwen's source into `folder/tokens`."""
    out = folder / "tokens"
    tokenize([Source(path=ROOT / source)], TEACHER, out, heldout_fraction=0.1, execution=Execution(workers=1))
    return out


def write_student(folder: Path) -> Path:
    """Copy the built-in teacher to `folder/student`, with noise on every weight, so that it has something to learn."""
    out = folder / "student"
    shutil.copytree(TEACHER, out)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(TEACHER / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() > 1:
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * NOISE
            tensors[name] = (tensor.float() + noise).to(tensor.dtype)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def recipe_of(steps: int, batch_size: int = 2, sequence_length: int = SEQUENCE_LENGTH) -> DistilRecipe:
    """Return a distillation of a few steps with all four terms."""
    return DistilRecipe.model_validate(
        {
            "tokens": steps * batch_size * sequence_length,
            "batch_size": batch_size,
            "terms": ["lm", "kd", "mtp_lm", "mtp_kd"],
            "learning_rate": 1e-3,
            "final_learning_rate": 1e-4,
            "warmup": "1 steps",
            "load_balancing_coefficient": 0.01,
        }
    )
