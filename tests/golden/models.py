"""Tiny checkpoints whose every bit is the same on all machines: no random number passes through a logarithm or a cosine.

`tiny.tiny_tensors` draws by torch.randn, whose last bit depends on the processor's vector instructions. Here each weight is
the sum of four 16-bit integers, which floats hold exactly, times a float: one rounding, the same everywhere.
"""

import hashlib
import shutil
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tiny import ONE_PLUS_WEIGHT, QWEN3_NEXT, canonical, put_json
from tiny_families import GLM4_MOE, MIXTRAL
from torch import Tensor

from slimqwen.families import FAMILIES, Config
from slimqwen.families.family import TensorSpec

DEVIATION = 2 * (65536.0**2 / 12) ** 0.5  # of the sum of four integers below 65,536

MODELS: dict[str, Config] = {
    "qwen3_next": QWEN3_NEXT | {"layer_types": ["linear_attention", "full_attention"] * 2},
    "mixtral": MIXTRAL,
    "glm4_moe": GLM4_MOE,
}


def write_checkpoint(folder: Path, native: Config, tokenizer: Path) -> None:
    """Write a float32 checkpoint of `native`, one tensor per expert, and copy the tokenizer's files into it."""
    config = canonical(native)
    family = FAMILIES[config["model_type"]]
    layouts = dict.fromkeys(family.detect_layouts(config, set()), "per_expert")
    one = 0.0 if config["model_type"] in ONE_PLUS_WEIGHT else 1.0
    shutil.copytree(tokenizer, folder)
    tensors = {spec.name: exact_weights(spec, one) for spec in family.tensors(config, layouts)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    put_json(folder / "config.json", family.to_disk(config))


def exact_weights(spec: TensorSpec, one: float) -> Tensor:
    """Nearly normal weights of one tensor, drawn by its name and scaled as in `tiny.tiny_tensors`; float32.

    one: what the gain of a norm is random around.
    """
    count = prod(spec.shape)
    bits = np.frombuffer(hashlib.shake_256(spec.name.encode()).digest(8 * count), dtype="<u2")
    centred = bits.reshape(count, 4).astype(np.int64).sum(axis=1) - 2 * 65535
    values = torch.from_numpy(centred.astype(np.float32)).reshape(spec.shape)  # exact: below 2^18
    if spec.pattern.endswith("linear_attn.norm.weight"):  # multiplies by weight, not by 1 + weight
        return 1.0 + (0.3 / DEVIATION) * values
    if len(spec.shape) == 1:
        centre = one if spec.pattern.endswith("norm.weight") else 0.0
        return centre + (0.3 / DEVIATION) * values
    if spec.pattern == "model.embed_tokens.weight":
        return (1.0 / DEVIATION) * values
    gain = 2.0 if spec.part == "router" else 1.0  # clear choices of experts
    return (gain * prod(spec.shape[1:]) ** -0.5 / DEVIATION) * values
