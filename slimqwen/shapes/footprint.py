"""Costs of a shape on disk, in serving and in training, from its config and the axis table. No weights, no torch.

Bytes of tensors (checkpoint, cache) are exact; FLOPs follow the conventions below; training memory is predicted.
"""

import math
from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

from slimqwen.core.errors import UserError, did_you_mean
from slimqwen.families import Config, Family
from slimqwen.families.axes import Sizes, size
from slimqwen.families.count import active, count, parameters
from slimqwen.families.family import Block
from slimqwen.losses.blocks import BLOCKS, block_rows
from slimqwen.recipe import Execution
from slimqwen.shapes.activations import CPU, GPU, Precision, saved_bytes

BYTES_OF = {"bfloat16": 2, "float16": 2, "float32": 4}
BFLOAT16, FLOAT32 = BYTES_OF["bfloat16"], BYTES_OF["float32"]
LAYER_SCRATCH = 0.15  # measured on the reference DeltaNet layer, by far the largest


class TrainingSettings(BaseModel):
    """The settings, beside the models, that the memory of training depends on.

    micro_batches: forward passes per optimiser step. device: 'cuda' has bfloat16 products and fused kernels
    (activations.GPU), 'cpu' float32 and the reference kernels. gpus: more than one shards everything (FSDP2).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpus: int = 8
    micro_batch_size: int = 1
    micro_batches: int = 1
    sequence_length: int = 4096
    recompute_activations: bool = False
    loss_chunk_tokens: int = Execution.model_fields["loss_chunk_tokens"].default
    device: Literal["cpu", "cuda"] = "cuda"

    @property
    def tokens(self) -> int:
        """The tokens of one forward pass."""
        return self.micro_batch_size * self.sequence_length


class TrainingMemory(BaseModel):
    """The predicted memory of distillation, in bytes per device; on a CPU within 15 % of measurements (docs/training-speed.md).

    student_bytes: (weights 4 + AdamW's two moments 8 bytes) x parameters with MTP / gpus, in float32.
    gradient_bytes: 4 bytes x parameters with MTP / gpus.
    teacher_bytes: (2 bytes on a GPU, 4 on a CPU) x parameters with MTP / gpus.
    gathered_bytes: weights in bfloat16 beside the float32 ones. When sharded, one layer is gathered for its computation
        while the next is being prefetched: twice the largest block, plus its gradient in the student; teacher and student
        alternate, so the larger of the two. On one GPU autocast's copies of the student live until the backward pass, 2
        bytes x parameters; with recomputation those of the largest block. On a CPU none.
    loss_bytes: all that loss.py holds at once: a chunk of student's and of teacher's logits, BLOCKS blocks of it (losses/blocks.py) in
        float32, the gradient of lm_head in float32 (on a GPU both heads cast and one product more), of both final hidden
        states, and these, teacher's included.
    activation_bytes_per_token: saved by a forward pass for its backward pass: the sum of `activations.saved_bytes` over
        all blocks; with recomputation the layers' inputs, and all of the MTP module, which is not recomputed.
    layer_inputs_bytes: the layers' inputs alone, of all tokens of a forward pass, with recomputation; else 0.
    layer_bytes: of the largest layer, the teacher's included, in its forward or backward pass: what it saves of all tokens,
        and LAYER_SCRATCH of that for intermediate gradients.
    peak_bytes: student, teacher, gathered weights, and the larger of two peaks: at the loss (activations, loss, the gradients
        of earlier micro-batches) and in the backward pass (layers' inputs, all gradients, a layer).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: TrainingSettings
    student_bytes: int
    gradient_bytes: int
    teacher_bytes: int
    gathered_bytes: int
    loss_bytes: int
    activation_bytes_per_token: int
    layer_inputs_bytes: int
    layer_bytes: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def activation_bytes(self) -> int:
        return self.settings.tokens * self.activation_bytes_per_token

    @computed_field  # type: ignore[prop-decorator]
    @property
    def peak_bytes(self) -> int:
        held = self.student_bytes + self.teacher_bytes + self.gathered_bytes
        gradients_before = self.gradient_bytes if self.settings.micro_batches > 1 else 0
        loss = gradients_before + self.activation_bytes + self.loss_bytes
        return held + max(loss, self.layer_inputs_bytes + self.gradient_bytes + self.layer_bytes)


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


def training_memory(
    family: Family, student: Config, teacher: Config | None, settings: TrainingSettings
) -> TrainingMemory:
    """Predict the bytes per device of distilling `student` from `teacher` (None: of training it on data alone).

    The formulas are in `TrainingMemory`.
    """
    sizes, tokens, gpus = family.sizes(student), settings.tokens, settings.gpus
    on_gpu = settings.device == "cuda"
    precision = GPU if on_gpu else CPU
    units = _parameters_of_blocks(family, student)
    teacher_units = _parameters_of_blocks(family, teacher) if teacher is not None else [0]
    layers, around = _saved_per_token(family, student, precision)
    teacher_layers, _ = _saved_per_token(family, teacher, precision) if teacher is not None else ([], [])
    inputs = FLOAT32 * sizes[family.hidden] * len(layers)
    return TrainingMemory(
        settings=settings,
        student_bytes=math.ceil(12 * sum(units) / gpus),
        gradient_bytes=math.ceil(4 * sum(units) / gpus),
        teacher_bytes=math.ceil(precision.compute_bytes * sum(teacher_units) / gpus),
        gathered_bytes=_gathered_bytes(units, teacher_units, settings),
        loss_bytes=_loss_bytes(family, sizes, None if teacher is None else family.sizes(teacher), settings),
        activation_bytes_per_token=sum(around) + (inputs if settings.recompute_activations else sum(layers)),
        layer_inputs_bytes=tokens * inputs if settings.recompute_activations else 0,
        layer_bytes=round((1 + LAYER_SCRATCH) * tokens * max(layers + teacher_layers)),
    )


def _language_blocks(family: Family, config: Config) -> list[Block]:
    """List the blocks that are trained; a vision tower is copied on disk but never loaded."""
    return [block for block in family.blocks(config) if "vision" not in block.tables]


def _parameters_of_blocks(family: Family, config: Config) -> list[int]:
    sizes = family.sizes(config)
    return [parameters([block], sizes).total() for block in _language_blocks(family, config)]


def _saved_per_token(family: Family, config: Config, precision: Precision) -> tuple[list[int], list[int]]:
    """Return the bytes saved per token by each layer, and by each other block: final norm, MTP module."""
    sizes, top_k = family.sizes(config), config["num_experts_per_tok"]
    layers: list[int] = []
    around: list[int] = []
    for block in _language_blocks(family, config):
        is_layer = block.recall is not None and not block.is_mtp
        (layers if is_layer else around).append(saved_bytes(block, sizes, family.hidden, top_k, precision))
    return layers, around


def _gathered_bytes(units: list[int], teacher_units: list[int], settings: TrainingSettings) -> int:
    if settings.device == "cpu":
        return 0
    if settings.gpus > 1:
        return BFLOAT16 * max(3 * max(units), 2 * max(teacher_units))
    return BFLOAT16 * (max(units) if settings.recompute_activations else sum(units))


def _loss_bytes(family: Family, sizes: Sizes, teacher: Sizes | None, settings: TrainingSettings) -> int:
    """Predict `TrainingMemory.loss_bytes`; without a teacher half the chunks and blocks."""
    vocab, hidden = sizes[family.vocab], sizes[family.hidden]
    on_gpu = settings.device == "cuda"
    models, width = (1, 0) if teacher is None else (2, teacher[family.hidden])
    chunk = min(settings.loss_chunk_tokens, settings.tokens)
    block = block_rows(vocab, chunk, on_cpu=not on_gpu)
    compute = BFLOAT16 if on_gpu else FLOAT32
    logits = vocab * (models * compute * chunk + FLOAT32 * (BLOCKS - 2 * (models == 1)) * block)
    heads = vocab * (FLOAT32 * hidden + (BFLOAT16 * (2 * hidden) if on_gpu else 0))
    return logits + heads + settings.tokens * (FLOAT32 * 4 * hidden + compute * width)
