"""Memory of training, predicted per device from the configs of student and teacher and the settings. No weights, no torch."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

from slimqwen.families import Config, Family
from slimqwen.losses.blocks import BLOCKS, block_rows
from slimqwen.recipe import Execution
from slimqwen.recipe.distil import OptimizerName, TrainedPart
from slimqwen.shapes.activations import CPU, GPU, SHARDED_GPU, Precision, exchanged_bytes, saved_bytes
from slimqwen.shapes.weights import Unit, Weights, language_blocks, weigh

BFLOAT16, FLOAT32 = 2, 4
LAYER_SCRATCH = 0.15  # measured on the reference DeltaNet layer, by far the largest
UNSAVED_FRACTION = 0.25  # of what a layer saves, alive at one time where nothing is saved: traced 0.21 of an MoE layer
MOMENTS_BYTES = {"adamw": 8.0, "muon": 8.0, "adamw_8bit": 2 + 2 * FLOAT32 / 256}
"""Bytes of both moments per parameter; in 8 bits with a float32 scale per 256 (torchao). Muon's matrices: one moment, 4 bytes."""

Offload = Literal["none", "student", "all"]
TeacherKind = Literal["live", "layer_by_layer", "cache"]


class TrainingSettings(BaseModel):
    """The settings, beside the models, that the memory of training depends on.

    gpus: all devices; more than one shards everything (FSDP2). shard_ranks: those that share one copy of the models; None: all.
    expert_ranks: those that share the routed experts, and exchange tokens. expert_imbalance: the pairs of tokens and experts that the
    busiest of them gets, as a multiple of the mean. counts_ahead: one more forward pass of the student counts how often experts are
    chosen. micro_batches: forward passes per optimiser step. device: 'cuda' has bfloat16
    products and fused kernels (activations.GPU), 'cpu' float32 and the reference kernels. fused_deltanet: False has the reference's
    DeltaNet on a GPU too. frozen: parts that are not trained, held in bfloat16. offload: what is in the host's memory: the
    student's weights, gradients and moments, or the teacher's weights too. memory_budget: of a teacher that runs layer by layer, for its activations.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpus: int = 8
    shard_ranks: int | None = None
    expert_ranks: int = 1
    expert_imbalance: float = 1.0
    micro_batch_size: int = 1
    micro_batches: int = 1
    sequence_length: int = 4096
    recompute_activations: bool = False
    counts_ahead: bool = False
    reshard_student: bool = True
    reshard_teacher: bool = True
    loss_chunk_tokens: int = Execution.model_fields["loss_chunk_tokens"].default
    device: Literal["cpu", "cuda"] = "cuda"
    fused_deltanet: bool = True
    optimizer: OptimizerName = "adamw"
    frozen: tuple[TrainedPart, ...] = ()
    offload: Offload = "none"
    teacher: TeacherKind = "live"
    memory_budget: int = Execution.model_fields["memory_budget"].default

    @property
    def tokens(self) -> int:
        """The tokens of one forward pass."""
        return self.micro_batch_size * self.sequence_length

    @property
    def copy_ranks(self) -> int:
        """The devices that share one copy of the models."""
        return self.shard_ranks or self.gpus

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 gathers the weights layer by layer: on several devices, and from the host's memory on one."""
        return self.gpus > 1 or self.offload != "none"

    @property
    def precision(self) -> Precision:
        if self.device == "cpu":
            return CPU
        known = SHARDED_GPU if self.is_sharded else GPU
        return Precision(known.compute_bytes, known.casts, self.fused_deltanet)


class TrainingMemory(BaseModel):
    """The predicted memory of distillation, in bytes per device; on a CPU within 15 % of measurements (docs/training-speed.md).

    n: the devices that share a copy of the models. Parameters are counted with MTP.

    student_bytes: (weights 4 + AdamW's two moments 8 bytes) x trained parameters / n, in float32, and 2 bytes x frozen ones / n. Other
        optimisers: MOMENTS_BYTES. Without what is offloaded.
    gradient_bytes: 4 bytes x trained parameters / n.
    teacher_bytes: (2 bytes on a GPU, 4 on a CPU) x parameters / n. Layer by layer lm_head alone, from a cache nothing.
    gathered_bytes: weights that a step has in bfloat16 beside those it holds. Sharded: what surrounds the layers, of both models,
        and the layers too of one that is not resharded. On one GPU autocast's copies of the student live until the backward
        pass, 2 bytes x trained parameters; with recomputation those of the largest block. On a CPU none.
    layer_weights_bytes: sharded, around the layer whose backward pass runs: its gathered weights, those of the next one
        (prefetched), its gradient, and the gradient of the one before on its way to be summed, in float32.
    teacher_layer_bytes: in the teacher's forward pass: sharded, the gathered weights of a layer and twice those of the next (its
        buffer and the weights copied out of it), and UNSAVED_FRACTION of what it would save; layer by layer two layers, and
        `memory_budget`.
    loss_bytes: all that loss.py holds at once: a chunk of student's and of teacher's logits, BLOCKS blocks of it (losses/blocks.py) in
        float32, the gradient of lm_head in float32 (on a GPU one product more, and unless sharded one cast), of both final hidden
        states, and these, teacher's included.
    activation_bytes_per_token: saved by a forward pass for its backward pass: the sum of `activations.saved_bytes` over
        all blocks; with recomputation the layers' inputs, and all of the MTP module, which is not recomputed.
    layer_inputs_bytes: the layers' inputs alone, of all tokens of a forward pass, with recomputation; else 0.
    layer_bytes: of the largest layer, the teacher's included, in its forward or backward pass: what it saves of all tokens,
        and LAYER_SCRATCH of that for intermediate gradients.
    around_gradient_bytes: sharded, the gradient of what surrounds the layers in bfloat16 and in float32, on its way to be summed.
    host_bytes: of the host's memory per device, what `offload` moves there, and a step's hidden states of a teacher that runs layer
        by layer.
    peak_bytes: student, teacher, gathered weights, and the largest of five peaks: in the teacher's forward pass, at the loss (activations,
        loss, the gradients of earlier micro-batches), at the beginning of the backward pass (activations, a layer's weights),
        in its layers (their inputs, all gradients, a layer), and at its end (all gradients, those around the layers).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: TrainingSettings
    student_bytes: int
    gradient_bytes: int
    teacher_bytes: int
    gathered_bytes: int
    layer_weights_bytes: int
    teacher_layer_bytes: int
    loss_bytes: int
    activation_bytes_per_token: int
    layer_inputs_bytes: int
    layer_bytes: int
    around_gradient_bytes: int
    host_bytes: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def activation_bytes(self) -> int:
        return self.settings.tokens * self.activation_bytes_per_token

    @computed_field  # type: ignore[prop-decorator]
    @property
    def peak_bytes(self) -> int:
        held = self.student_bytes + self.teacher_bytes + self.gathered_bytes
        before = self.gradient_bytes if self.settings.micro_batches > 1 else 0
        return held + max(
            before + self.teacher_layer_bytes,
            before + self.activation_bytes + self.loss_bytes,
            before + self.activation_bytes + self.layer_weights_bytes if self.settings.is_sharded else 0,
            self.gradient_bytes + self.layer_inputs_bytes + self.layer_bytes + self.layer_weights_bytes,
            self.gradient_bytes + self.around_gradient_bytes,
        )


@dataclass(frozen=True)
class Model:
    """What the memory of training needs of a model's config, in numbers; made once for many settings.

    layers, around: bytes saved per token by each layer, and by all other blocks, MTP's layer among them.
    """

    weights: Weights
    vocab: int
    hidden: int
    num_experts_per_tok: int
    layers: tuple[int, ...]
    around: int

    @property
    def largest_layer(self) -> int:
        return max(self.layers, default=0)


def measure(family: Family, config: Config, settings: TrainingSettings, *, trains: bool) -> Model:
    """Compute a model's numbers for the settings' precision, frozen parts and sharing of experts."""
    frozen = settings.frozen if trains else ()
    sizes = family.sizes(config)
    layers, around = _saved_per_token(family, config, settings, frozen)
    return Model(
        weights=weigh(family, config, frozen),
        vocab=sizes[family.vocab],
        hidden=sizes[family.hidden],
        num_experts_per_tok=config["num_experts_per_tok"],
        layers=tuple(layers),
        around=sum(around),
    )


def training_memory(
    family: Family, student: Config, teacher: Config | None, settings: TrainingSettings
) -> TrainingMemory:
    """Predict the bytes per device of distilling `student` from `teacher` (None: of training it on data alone).

    The formulas are in `TrainingMemory`.
    """
    taught_by = None if teacher is None else measure(family, teacher, settings, trains=False)
    return predict(measure(family, student, settings, trains=True), taught_by, settings)


def predict(student: Model, teacher: Model | None, settings: TrainingSettings) -> TrainingMemory:
    """Predict the memory of training from the numbers of `measure`."""
    trained = student.weights.all
    share = settings.copy_ranks
    runs = teacher if settings.teacher != "cache" else None
    weights = FLOAT32 * trained.trained + BFLOAT16 * (trained.total - trained.trained)
    moments = moments_bytes(trained, settings)
    gradients = FLOAT32 * trained.trained
    is_offloaded = settings.offload != "none"
    on_device = 0 if is_offloaded else weights + moments
    on_host = weights + moments + gradients if is_offloaded else 0
    if runs is not None and settings.teacher == "live" and settings.offload == "all":
        on_host += settings.precision.compute_bytes * runs.weights.all.total
    layer_count = len(student.layers)
    inputs = (FLOAT32 if not settings.is_sharded else settings.precision.compute_bytes) * student.hidden * layer_count
    saved = max(student.largest_layer, 0 if runs is None else runs.largest_layer)
    around = student.weights.around.trained
    return TrainingMemory(
        settings=settings,
        student_bytes=math.ceil(on_device / share),
        gradient_bytes=0 if is_offloaded else math.ceil(gradients / share),
        teacher_bytes=_teacher_bytes(runs, settings),
        gathered_bytes=_gathered_bytes(student, runs, settings),
        layer_weights_bytes=_layer_weights_bytes(student, settings),
        teacher_layer_bytes=_teacher_layer_bytes(runs, settings),
        loss_bytes=_loss_bytes(student, teacher, settings),
        activation_bytes_per_token=student.around + (inputs if settings.recompute_activations else sum(student.layers)),
        layer_inputs_bytes=settings.tokens * inputs if settings.recompute_activations else 0,
        layer_bytes=round((1 + LAYER_SCRATCH) * settings.tokens * saved),
        around_gradient_bytes=(settings.precision.compute_bytes + FLOAT32) * around if settings.is_sharded else 0,
        host_bytes=math.ceil(on_host / share) + _hidden_states_bytes(runs, settings),
    )


def moments_bytes(weights: Unit, settings: TrainingSettings) -> float:
    """Return the bytes of the optimiser's moments, of all devices together."""
    by_muon = weights.muon if settings.optimizer == "muon" else 0
    return MOMENTS_BYTES[settings.optimizer] * (weights.trained - by_muon) + FLOAT32 * by_muon


def pinning_bytes(student: Model, teacher: Model | None, settings: TrainingSettings) -> float:
    """Return what PyTorch's host allocator adds to pinned tensors, which it rounds up to a power of two: weights and gradients of all devices.

    Of shares as large as each other, by a power of two of devices; moments are not pinned.
    """
    if settings.offload == "none":
        return 0
    unit = student.weights.all
    added = 2 * FLOAT32 * unit.trained_rounding + BFLOAT16 * (unit.rounding - unit.trained_rounding)
    if settings.offload == "all" and teacher is not None and settings.teacher == "live":
        added += settings.precision.compute_bytes * teacher.weights.all.rounding
    return added


def _saved_per_token(
    family: Family, config: Config, settings: TrainingSettings, frozen: Collection[str]
) -> tuple[list[int], list[int]]:
    """Return the bytes saved per token by each layer, and by each other block: final norm, MTP module."""
    sizes, top_k = family.sizes(config), config["num_experts_per_tok"]
    layers: list[int] = []
    around: list[int] = []
    for block in language_blocks(family, config):
        is_layer = block.recall is not None and not block.is_mtp
        saved = saved_bytes(block, sizes, family.hidden, top_k, settings.precision, frozen)
        if settings.expert_ranks > 1 and block.experts is not None:
            saved += exchanged_bytes(
                block, sizes, family.hidden, top_k, settings.precision, frozen, settings.expert_imbalance
            )
        (layers if is_layer else around).append(saved)
    return layers, around


def _is_gathered(settings: TrainingSettings) -> bool:
    """Return whether a live teacher's weights are gathered layer by layer."""
    return settings.gpus > 1 or settings.offload == "all"


def _teacher_bytes(teacher: Model | None, settings: TrainingSettings) -> int:
    if teacher is None:
        return 0
    compute = settings.precision.compute_bytes
    if settings.teacher == "layer_by_layer":
        return compute * teacher.vocab * teacher.hidden
    if settings.offload == "all":
        return 0
    return math.ceil(compute * teacher.weights.all.total / settings.copy_ranks)


def _gathered_bytes(student: Model, teacher: Model | None, settings: TrainingSettings) -> int:
    weights, compute = student.weights, settings.precision.compute_bytes
    if not settings.is_sharded:
        if settings.device == "cpu":
            return 0
        blocks = [*(unit.trained for unit in weights.layers), weights.around.trained]
        return BFLOAT16 * (max(blocks) if settings.recompute_activations else sum(blocks))
    gathered = weights.around.total
    if not settings.reshard_student:
        gathered += sum(unit.gathered(settings.expert_ranks) for unit in weights.layers)
    if teacher is not None and settings.teacher == "live" and _is_gathered(settings):
        gathered += teacher.weights.around.total
        if not settings.reshard_teacher:
            gathered += sum(unit.gathered(settings.expert_ranks) for unit in teacher.weights.layers)
    return compute * gathered


def _layer_weights_bytes(student: Model, settings: TrainingSettings) -> int:
    if not settings.is_sharded:
        return 0
    compute, experts = settings.precision.compute_bytes, settings.expert_ranks
    two_gathered = 2 * compute * student.weights.largest_layer(experts) if settings.reshard_student else 0
    trained = max((unit.trained_gathered(experts) for unit in student.weights.layers), default=0)
    own = FLOAT32 * student.weights.largest_layer() // settings.copy_ranks if settings.offload != "none" else 0
    return two_gathered + (compute + FLOAT32) * trained + own


def _teacher_layer_bytes(teacher: Model | None, settings: TrainingSettings) -> int:
    if teacher is None:
        return 0
    compute = settings.precision.compute_bytes
    layer = compute * teacher.weights.largest_layer(settings.expert_ranks)
    activations = round(UNSAVED_FRACTION * settings.tokens * teacher.largest_layer)
    if settings.teacher == "layer_by_layer":
        return 2 * layer + settings.memory_budget
    if _is_gathered(settings) and settings.reshard_teacher:
        return 3 * layer + activations
    return activations


def _hidden_states_bytes(teacher: Model | None, settings: TrainingSettings) -> int:
    if teacher is None or settings.teacher != "layer_by_layer":
        return 0
    return settings.precision.compute_bytes * settings.micro_batches * settings.tokens * teacher.hidden


def _loss_bytes(student: Model, teacher: Model | None, settings: TrainingSettings) -> int:
    """Predict `TrainingMemory.loss_bytes`; without a teacher half the chunks and blocks."""
    vocab, hidden = student.vocab, student.hidden
    on_gpu = settings.device == "cuda"
    models, width = (1, 0) if teacher is None else (2, teacher.hidden)
    chunk = min(settings.loss_chunk_tokens, settings.tokens)
    block = block_rows(vocab, chunk, on_cpu=not on_gpu)
    compute = settings.precision.compute_bytes
    logits = vocab * (models * compute * chunk + FLOAT32 * (BLOCKS - 2 * (models == 1)) * block)
    casts = 0 if not on_gpu else 1 if settings.is_sharded else 2
    heads = vocab * hidden * (FLOAT32 + BFLOAT16 * casts)
    return logits + heads + settings.tokens * (FLOAT32 * 4 * hidden + compute * width)
