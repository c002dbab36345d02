"""What a shape costs on disk, in serving and in training: from its config and the axis table alone, no weights, no torch.

Bytes are exact where they are tensors (checkpoint, cache); FLOPs follow the conventions below; training memory is a
prediction.
"""

import math
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, computed_field

from slimqwen.errors import UserError, did_you_mean
from slimqwen.families import Config, Family
from slimqwen.families.axes import Sizes, size
from slimqwen.families.count import active, count, parameters
from slimqwen.families.family import Block
from slimqwen.recipe import DistilRecipe

BYTES_OF = {"bfloat16": 2, "float16": 2, "float32": 4}
COMPUTE_BYTES = 2  # training multiplies in bfloat16
LOSS_MATRICES = 5  # [chunk, vocab] that loss.py holds at once: two log-softmaxes, two softmaxes, the gradient


class TrainingMemory(BaseModel):
    """Bytes per GPU while distilling, everything sharded over `gpus` (FSDP2). A prediction, not yet held to a GPU.

    student_bytes: (weights 4 + gradients 4 + AdamW's two moments 8 bytes) x parameters with MTP / gpus, in float32.
    teacher_bytes: 2 x parameters with MTP / gpus, in bfloat16.
    gathered_bytes: a layer is put together to run, while the next one is on its way: twice the largest block in
        bfloat16, and in the student its gradient too; teacher and student take turns, so the larger of the two.
    loss_bytes: LOSS_MATRICES x loss_chunk_tokens x vocabulary, and the lm_head's gradient, in float32.
    activation_bytes_per_token: what the backward pass needs of one token of a micro-batch, 2 bytes x (rows + columns)
        of every matrix that the token meets, i.e. its output and its input. Beside the tensors that autograd keeps of
        Transformers' layers: within 10 % for attention at hidden 1024 (at 256 a third too low); half too low for
        DeltaNet without its fused kernels, whose reference code keeps float32 chunks.
    checkpointed_activation_bytes_per_token: with recomputation, the input of every block and all of the largest one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpus: int
    student_bytes: int
    teacher_bytes: int
    gathered_bytes: int
    loss_bytes: int
    activation_bytes_per_token: int
    checkpointed_activation_bytes_per_token: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def total_bytes(self) -> int:
        """All but the activations."""
        return self.student_bytes + self.teacher_bytes + self.gathered_bytes + self.loss_bytes


class Footprint(BaseModel):
    """Costs of one model. The MTP module is in the checkpoint and in training; cache and FLOPs are the main model's.

    checkpoint_bytes: every parameter in `dtype`, config.json's (file headers add about 0.01 %).
    kv_cache_bytes: of one sequence of context_length tokens, in `dtype`; every layer keeps all of them (no windows).
    state_bytes: of one sequence of any length. As Transformers keeps it (modeling_qwen3_next.py, cache_utils.py of
        5.23): DeltaNet's recurrent state in float32, its last conv_kernel inputs of the convolution in `dtype`.
    forward_flops_per_token: mean over the tokens of a prefill of context_length; see `forward_flops`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: str
    checkpoint_bytes: int
    context_length: int
    kv_cache_bytes: int
    state_bytes: int
    forward_flops_per_token: int
    training: TrainingMemory


def footprint(family: Family, config: Config, teacher: Config, context_length: int, gpus: int) -> Footprint:
    """The costs of `config`; training is distillation from `teacher`. Raises UserError for an unknown dtype."""
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
        training=training_memory(family, config, teacher, gpus),
    )


def dtype_of(config: Config) -> str:
    """The checkpoint's dtype as config.json gives it (`torch_dtype` in older ones); bfloat16 where it says nothing."""
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if dtype not in BYTES_OF:
        raise UserError(
            f"config.json: dtype {dtype!r}{did_you_mean(str(dtype), BYTES_OF)} must be one of {', '.join(BYTES_OF)}."
        )
    return str(dtype)


def cached_elements(blocks: Iterable[Block], sizes: Sizes) -> int:
    """Elements that the token mixers keep of each past token."""
    return sum(size(term, sizes) for block in blocks if block.recall for term in block.recall.cached.values())


def state_elements(blocks: Iterable[Block], sizes: Sizes) -> dict[str, int]:
    """Elements that the token mixers keep of a sequence however long it is, by the name of the state."""
    elements: dict[str, int] = {}
    for block in blocks:
        for name, dims in block.recall.state.items() if block.recall else ():
            elements[name] = elements.get(name, 0) + math.prod(size(term, sizes) for term in dims)
    return elements


def forward_flops(family: Family, config: Config, context_length: int) -> int:
    """FLOPs of one token's forward pass, mean over the tokens of a prefill of `context_length`; two per multiply-add.

    Multiply-adds: one per element of every matrix that the token meets (router, convolution and lm_head included; the
    embedding is looked up, vectors are not counted), attention's `recall.read` times the mean number of past tokens,
    context_length / 2, and four per element of the recurrent state. The delta rule touches each element four times,
    S <- decay S; S k; S <- S + k delta^T; S q (`torch_recurrent_gated_delta_rule`); that the first only multiplies and
    that the chunked form of a prefill does more are left aside.
    """
    sizes = family.sizes(config)
    blocks = [block for block in family.blocks(config) if not block.is_mtp]
    met: int = active(parameters(blocks, sizes, min_dims=2), sizes[family.expert], config["num_experts_per_tok"])
    if not config["tie_word_embeddings"]:
        met -= sizes[family.vocab] * sizes[family.hidden]
    read = sum(size(term, sizes) for block in blocks if block.recall for term in block.recall.read.values())
    return 2 * met + read * context_length + 2 * 4 * state_elements(blocks, sizes).get("recurrent", 0)


def training_memory(family: Family, student: Config, teacher: Config, gpus: int) -> TrainingMemory:
    """Bytes per GPU of distilling `student` from `teacher`; the formulas are at `TrainingMemory`."""
    sizes = family.sizes(student)
    student_blocks, teacher_blocks = (_language_blocks(family, config) for config in (student, teacher))
    student_units = [parameters([block], sizes).total() for block in student_blocks]
    teacher_units = [parameters([block], family.sizes(teacher)).total() for block in teacher_blocks]
    layers = [block for block in student_blocks if block.recall]
    met = [_activations(block, sizes, student["num_experts_per_tok"]) for block in layers]
    chunk_tokens: int = DistilRecipe.model_fields["loss_chunk_tokens"].default
    return TrainingMemory(
        gpus=gpus,
        student_bytes=math.ceil(16 * sum(student_units) / gpus),
        teacher_bytes=math.ceil(COMPUTE_BYTES * sum(teacher_units) / gpus),
        gathered_bytes=COMPUTE_BYTES * max(3 * max(student_units), 2 * max(teacher_units)),
        loss_bytes=4 * sizes[family.vocab] * (LOSS_MATRICES * chunk_tokens + sizes[family.hidden]),
        activation_bytes_per_token=COMPUTE_BYTES * sum(met),
        checkpointed_activation_bytes_per_token=COMPUTE_BYTES * (len(layers) * sizes[family.hidden] + max(met)),
    )


def _language_blocks(family: Family, config: Config) -> list[Block]:
    """What is trained: a vision tower is carried along on disk and never loaded."""
    return [block for block in family.blocks(config) if "vision" not in block.tables]


def _activations(block: Block, sizes: Sizes, num_experts_per_tok: int) -> int:
    """Rows + columns of every matrix of a layer that one token meets."""
    tables = [table for part, table in block.tables.items() if part != "embedding"]
    matrices = [dims for table in tables for dims in table.values() if len(dims) > 1]
    if block.experts is not None:
        matrices += list(block.experts.per_expert.values()) * num_experts_per_tok
    return sum(size(dims[0], sizes) + size(dims[1], sizes) for dims in matrices)
