"""Costs of a shape on disk, in serving and in training, from its config and the axis table. No weights, no torch.

Bytes of tensors (checkpoint, cache) are exact; FLOPs follow the conventions below; training memory is predicted.
"""

import math
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from slimqwen.core.errors import UserError, did_you_mean
from slimqwen.families import Config, Family
from slimqwen.families.axes import Sizes, size
from slimqwen.families.count import active, count, parameters
from slimqwen.families.family import Block
from slimqwen.shapes.training_memory import TrainingMemory, TrainingSettings, training_memory

BYTES_OF = {"bfloat16": 2, "float16": 2, "float32": 4}


class Footprint(BaseModel):
    """The costs of one model. Checkpoint and training include the MTP module; cache and FLOPs are the main model's.

    checkpoint_bytes: every parameter in `dtype`, config.json's (file headers add about 0.01 %).
    kv_cache_bytes: of one sequence of context_length tokens, in `dtype`, without sliding windows.
    state_bytes: of one sequence of any length, as in Transformers (modeling_qwen3_next.py, cache_utils.py of
        5.23): DeltaNet's recurrent state in float32, its last conv_kernel inputs of the convolution in `dtype`.
    forward_flops_per_token: mean over the tokens of a prefill of context_length; see `forward_flops`.
    training, checkpointed_training: without and with recompute_activations.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: str
    checkpoint_bytes: int
    context_length: int
    kv_cache_bytes: int
    state_bytes: int
    forward_flops_per_token: int
    training: TrainingMemory
    checkpointed_training: TrainingMemory


def footprint(
    family: Family, config: Config, teacher: Config, context_length: int, settings: TrainingSettings
) -> Footprint:
    """Compute the costs of `config`; training is distillation from `teacher`. Raises UserError for an unknown dtype."""
    sizes = family.sizes(config)
    blocks = [block for block in family.blocks(config) if not block.is_mtp]
    dtype, counts = dtype_of(config), count(family, config)
    state = state_elements(blocks, sizes)
    recurrent = state.pop("recurrent", 0)
    return Footprint(
        dtype=dtype,
        checkpoint_bytes=(counts.total_parameters + counts.mtp_parameters) * BYTES_OF[dtype],
        context_length=context_length,
        kv_cache_bytes=cached_elements(blocks, sizes) * context_length * BYTES_OF[dtype],
        state_bytes=recurrent * BYTES_OF["float32"] + sum(state.values()) * BYTES_OF[dtype],
        forward_flops_per_token=forward_flops(family, config, context_length),
        training=training_memory(family, config, teacher, settings),
        checkpointed_training=training_memory(
            family, config, teacher, settings.model_copy(update={"recompute_activations": True})
        ),
    )


def dtype_of(config: Config) -> str:
    """Return the checkpoint's dtype from config.json (`torch_dtype` in older ones); bfloat16 where it has none."""
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if dtype not in BYTES_OF:
        raise UserError(
            f"config.json: dtype {dtype!r}{did_you_mean(str(dtype), BYTES_OF)} must be one of {', '.join(BYTES_OF)}."
        )
    return str(dtype)


def cached_elements(blocks: Iterable[Block], sizes: Sizes) -> int:
    """Count the elements that the token mixers cache per past token."""
    return sum(size(term, sizes) for block in blocks if block.recall for term in block.recall.cached.values())


def state_elements(blocks: Iterable[Block], sizes: Sizes) -> dict[str, int]:
    """Count the elements that the token mixers keep per sequence of any length, by the name of the state."""
    elements: dict[str, int] = {}
    for block in blocks:
        for name, dims in block.recall.state.items() if block.recall else ():
            elements[name] = elements.get(name, 0) + math.prod(size(term, sizes) for term in dims)
    return elements


def forward_flops(family: Family, config: Config, context_length: int) -> int:
    """Return the FLOPs of one token's forward pass, mean over a prefill of `context_length`; two per multiply-add.

    Multiply-adds: one per element of every matrix that the token passes through (router, convolution and lm_head included;
    the embedding is a lookup, vectors are not counted), attention's `recall.read` times the mean number of past tokens,
    context_length / 2, and four per element of the recurrent state. The delta rule uses each element four times,
    S <- decay S; S k; S <- S + k delta^T; S q (`torch_recurrent_gated_delta_rule`). It is ignored that the first only
    multiplies, and that the chunked form of a prefill does more.
    """
    sizes = family.sizes(config)
    blocks = [block for block in family.blocks(config) if not block.is_mtp]
    used: int = active(parameters(blocks, sizes, min_dims=2), sizes[family.expert], config["num_experts_per_tok"])
    if not config["tie_word_embeddings"]:
        used -= sizes[family.vocab] * sizes[family.hidden]
    read = sum(size(term, sizes) for block in blocks if block.recall for term in block.recall.read.values())
    return 2 * used + read * context_length + 2 * 4 * state_elements(blocks, sizes).get("recurrent", 0)


def training_flops(student: int, teacher: int = 0) -> int:
    """Return the FLOPs of one training token, from those of each model's forward pass; teacher: 0 where none runs.

    Three times the student's, as its backward pass takes two products per weight where the forward takes one, and the teacher's.
    Recomputed activations (as PaLM counts, arXiv 2204.02311, appendix B) and the pass that counts expert assignments are left out:
    what is done beyond this is no progress.
    """
    return 3 * student + teacher
