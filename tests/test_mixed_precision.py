"""A GPU's mixed precision on gloo ranks: gathered in bfloat16, reduced in float32, but for weights that the reference keeps exact."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from settings import sections
from tiny import tiny_tokens, write_tiny_checkpoint, write_tiny_tokens
from tiny_families import FAMILIES_NATIVE, GLM4_MOE

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.model.model import MtpCausalLM, load
from slimqwen.parallel import ranks as ranks_module
from slimqwen.parallel import sharded_checkpoint
from slimqwen.parallel.sharded_checkpoint import whole
from slimqwen.recipe import DistilRecipe, TextSettings
from slimqwen.training import distil as distil_module
from slimqwen.training import trainer as trainer_module
from slimqwen.training.distil import distil
from slimqwen.training.inputs import TrainingInputs

SEQUENCE_LENGTH = 16
BATCH_SIZE = 8
TWO_LAYERS = {"num_hidden_layers": 2, "full_attention_interval": 2}
AS_ON_GPUS = {"expert_ranks": 2, "micro_batch_size": 2, "recompute_activations": True}
LIMIT = 0.005  # of losses and of the gradient's norm
ROUNDED = 0.04  # of the gradient itself, whose entries are products and sums of numbers rounded to 8 bits; 0.012 and 0.021 were seen


def seen_dtypes(model: MtpCausalLM) -> dict[str, set[torch.dtype]]:
    """By parameter, the dtypes that its module's forward passes find it in."""
    seen: dict[str, set[torch.dtype]] = {name: set() for name in model.tensors()}
    for name in seen:
        path, _, own = (name if name.startswith("mtp.") else f"backbone.{name}").rpartition(".")
        module = model.get_submodule(path)
        module.register_forward_pre_hook(
            lambda module, _, own=own, name=name: seen[name].add(getattr(module, own).dtype)
        )
    return seen


def train(folder: Path, student: str, out: Path, changes: dict[str, Any], mixed: bool) -> None:
    """Two optimiser steps of `distil`; the gradients of the first beside `out`. mixed: as on GPUs."""
    seen: list[dict[str, set[torch.dtype]]] = []
    gradients: list[dict[str, torch.Tensor]] = []
    load_student, clip = distil_module.load_student, trainer_module.clip_grad_norm

    def load_and_watch(*arguments: Any) -> MtpCausalLM:
        model = load_student(*arguments)
        seen.append(seen_dtypes(model))
        return model

    def keep_and_clip(parameters: Any, max_norm: float) -> Any:
        parameters = list(parameters)
        gradients.append({str(n): whole(p.grad).clone() for n, p in enumerate(parameters) if p.grad is not None})
        return clip(parameters, max_norm)

    def shard(model: MtpCausalLM, ranks: Any, *, mixed_precision: bool, **settings: Any) -> None:
        trains = any(parameter.requires_grad for parameter in model.parameters())
        ranks_module.shard(model, ranks, mixed_precision=mixed and trains, **settings)

    settings = {
        "tokens": 2 * BATCH_SIZE * SEQUENCE_LENGTH,
        "batch_size": BATCH_SIZE,
        "learning_rate": 1e-3,
        "warmup": "0 steps",
        "loss_chunk_tokens": 24,
    }
    with (
        patch.object(distil_module, "load_student", load_and_watch),
        patch.object(trainer_module, "clip_grad_norm", keep_and_clip),
        patch.object(sharded_checkpoint, "shard", shard),
    ):
        distil(
            TrainingInputs(folder / student, folder / "tokens", teacher=folder / "teacher"),
            out,
            **sections(DistilRecipe, settings | changes),
            text=TextSettings(sequence_length=SEQUENCE_LENGTH),
        )
    if not (out.parent / "gradients.safetensors").exists():
        save_file(gradients[0], out.parent / "gradients.safetensors")
    family = Checkpoint(folder / student).family
    for name, dtypes in seen[0].items():
        exact = not mixed or name.endswith(family.float32_tensors)
        if dtypes:  # those that are used otherwise than by their module's call have none: lm_head, a convolution
            assert dtypes == {torch.float32 if exact else torch.bfloat16}, name
        assert dtypes or not name.endswith(family.float32_tensors), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The students `qwen3_next` and `glm4_moe`, a `teacher` and `tokens`; read-only."""
    folder = tmp_path_factory.mktemp("mixed_precision")
    tokenizer, _ = write_tiny_tokens(folder)
    # All experts are chosen: where rounding decides between two, both are right and their gradients are others.
    write_tiny_checkpoint(folder / "qwen3_next", tokenizer=tokenizer, num_experts_per_tok=8, **TWO_LAYERS)
    glm = {"num_hidden_layers": 2, "num_experts_per_tok": 6}
    write_tiny_checkpoint(folder / "glm4_moe", tokenizer=tokenizer, native=GLM4_MOE, **glm)
    write_tiny_checkpoint(folder / "teacher", seed=1, tokenizer=tokenizer, num_experts=4, **TWO_LAYERS)
    return folder


@pytest.mark.parametrize("student", ["qwen3_next", "glm4_moe"])
def test_mixed_precision_of_ranks_is_float32_but_for_bfloat16_rounding(
    folder: Path, tmp_path: Path, student: str
) -> None:
    train(folder, student, tmp_path / "alone" / "out", {}, False)
    run_ranks(2, train, folder, student, tmp_path / "ranks" / "out", AS_ON_GPUS, True)
    found, expected = (
        [json.loads(line) for line in (tmp_path / side / "metrics.jsonl").read_text().splitlines()]
        for side in ("ranks", "alone")
    )
    for step in range(2):
        for name in ("loss", "lm", "kd", "grad_norm"):
            assert found[step][name] == pytest.approx(expected[step][name], rel=LIMIT), (step, name)
    gradients = [load_file(tmp_path / side / "gradients.safetensors") for side in ("ranks", "alone")]
    assert gradients[0].keys() == gradients[1].keys()
    both = [torch.cat([side[name].flatten() for name in sorted(side)]) for side in gradients]
    assert (both[0] - both[1]).norm() < ROUNDED * both[1].norm()


def set_weight(model: MtpCausalLM, name: str, values: torch.Tensor) -> None:
    """Replace a parameter."""
    path, _, own = (name if name.startswith("mtp.") else f"backbone.{name}").rpartition(".")
    setattr(model.get_submodule(path), own, torch.nn.Parameter(values))


def test_the_reference_takes_these_weights_in_float32(tmp_path: Path) -> None:
    """In a model of bfloat16 they may be float32, and nothing else changes its dtype. Another norm's weight would change it."""
    tokens = tiny_tokens(1)
    for name, native in FAMILIES_NATIVE.items():
        model = load(write_tiny_checkpoint(tmp_path / name, native=native), torch.bfloat16)
        exact = [own for own in model.tensors() if own.endswith(model.family.float32_tensors)]
        assert bool(exact) == name.startswith(("qwen3_next", "qwen3_5_moe", "glm4_moe")), name
        for own in exact:
            set_weight(model, own, model.tensors()[own].detach().float())
        with torch.no_grad():
            assert model(tokens).main.dtype == torch.bfloat16, name
            if name in ("qwen3_moe", "glm4_moe", "olmoe", "mixtral"):
                norm = "model.layers.0.input_layernorm.weight"
                set_weight(model, norm, model.tensors()[norm].detach().float())
                with pytest.raises(RuntimeError, match="dtype"):
                    model(tokens)
