"""Settings of a training that fit the GPUs that there are, the fastest by estimate first. No weights, no torch.

Memory and traffic are predicted (`training_memory`, `traffic`); the times are estimated from them, and nothing here was measured on a GPU.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from slimqwen.core.errors import UserError
from slimqwen.families import Config, Family
from slimqwen.families.count import count
from slimqwen.recipe import BalancingCounts, Execution, OptimizerName, TrainedPart
from slimqwen.shapes.footprint import forward_flops
from slimqwen.shapes.hardware import Hardware
from slimqwen.shapes.step_time import StepTime, estimate
from slimqwen.shapes.traffic import predict_traffic
from slimqwen.shapes.training_memory import (
    FLOAT32,
    Model,
    Offload,
    TeacherKind,
    TrainingMemory,
    TrainingSettings,
    measure,
    moments_bytes,
    pinning_bytes,
    predict,
)

# What a GPU holds beside tensors: CUDA's context and cuBLAS' workspaces, and among several the buffers of NCCL. Then what the
# allocator cannot use, between segments. Assumed, not measured.
CONTEXT_BYTES, NCCL_BYTES = 1_000_000_000, 1_500_000_000
FRAGMENTS_FRACTION = 0.05
IMBALANCE = 1.25  # pairs of the busiest rank over the mean, which memory is left for. Assumed
MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)
MOST, OTHERS = 6, 2  # shown of the choices that change as little as the recommended one, and of each that changes more

Change = Literal["cache", "adamw_8bit", "frozen"]


@dataclass(frozen=True)
class Student:
    """A student of the schedule: its config, and the share of the training tokens that it is trained on."""

    config: Config
    token_fraction: float = 1.0


@dataclass(frozen=True)
class Work:
    """The training that is planned for.

    rows: sequences per optimiser step, which are counted for the load balancing in groups of group_rows. tokens: of the whole run; None
    where not known. execution: the recipe's, of which what is not chosen here stays.
    """

    family: Family
    teacher: Config
    students: tuple[Student, ...]
    rows: int
    sequence_length: int = 4096
    tokens: int | None = None
    is_taught: bool = True
    teacher_kind: TeacherKind = "live"
    optimizer: OptimizerName = "adamw"
    frozen: tuple[TrainedPart, ...] = ()
    execution: Execution = field(default_factory=Execution)
    group_rows: int = BalancingCounts.model_fields["rows"].default


class Placement(BaseModel):
    """One choice of settings, with its predicted memory and its estimated speed.

    settings, memory: of the student that needs the most. needed_bytes: of a GPU, with what is assumed beside the tensors; host_bytes: of a
    node's memory. async_save: whether the copy that a state is written from fits too. change: what it does to the result: nothing
    beyond rounding, a cached teacher, 8-bit moments, frozen experts. step: of the last student. tokens_per_second: of all
    GPUs, over all students by their tokens. gpu_hours: for the tokens of the recipe.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: TrainingSettings
    memory: TrainingMemory
    needed_bytes: int
    host_bytes: int
    async_save: bool
    change: list[Change]
    step: StepTime
    tokens_per_second: float
    gpu_hours: float | None


class Placements(BaseModel):
    """The settings that fit, the recommended one first, the best of each layout and way to hold the models.

    tried: choices of settings. smallest: the one that lacks the least memory, or needs the least of a GPU. Where none fits: enough_gpus, how many of these
    GPUs would do, and enough_host_memory, how much memory of a node; None where no number of them would. trained, execution: of the recipe.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    hardware: Hardware
    rows: int
    tokens: int | None
    tried: int
    fitting: list[Placement]
    smallest: Placement
    enough_gpus: int | None = None
    enough_host_memory: int | None = None
    trained: list[TrainedPart] = Field(exclude=True)
    execution: Execution = Field(exclude=True)


def place(work: Work, hardware: Hardware) -> Placements:
    """Return the settings that fit the GPUs: first those that change no result beyond rounding, each kind by estimated speed.

    On several GPUs the host's memory and a teacher layer by layer are tried where nothing else leaves the result as it is.

    Raises UserError where the GPUs do not divide the batch, or cannot share the optimiser's work.
    """
    if work.rows % hardware.gpus:
        raise UserError(f"the batch of {work.rows:,} sequences is not a multiple of the {hardware.gpus} GPUs.")
    if work.optimizer != "adamw" and hardware.gpus > 1:
        raise UserError(f"distil.optimizer {work.optimizer} is for one GPU alone: choose adamw.")
    planner = _Planner(work, hardware)
    tried = [planner.placement(settings) for settings in candidates(work, hardware, _ways(work, hardware))]
    if hardware.gpus > 1 and not any(_fits(placement, hardware) and not placement.change for placement in tried):
        by_host = _ways(work, hardware, by_host=True)
        tried += [planner.placement(settings) for settings in candidates(work, hardware, by_host)]
    fitting = [placement for placement in tried if _fits(placement, hardware)]
    fitting.sort(key=lambda placement: (_severity(placement), -placement.tokens_per_second))
    least = min(tried, key=lambda placement: (_excess(placement, hardware), placement.needed_bytes))
    held = [placement.host_bytes for placement in tried if placement.needed_bytes <= hardware.gpu_memory]
    return Placements(
        hardware=hardware,
        rows=work.rows,
        tokens=work.tokens,
        tried=len(tried),
        fitting=_to_show(fitting),
        smallest=least,
        enough_gpus=None if fitting else _enough_gpus(work, hardware),
        enough_host_memory=None if fitting else min(held, default=None),
        trained=trained_parts(work),
        execution=work.execution,
    )


def trained_parts(work: Work) -> list[TrainedPart]:
    """Return the parts of the students that the recipe trains."""
    found = set().union(*(count(work.family, student.config).parts for student in work.students))
    return [part for part in get_args(TrainedPart) if part in found and part not in work.frozen]


def placement_of(work: Work, hardware: Hardware, settings: TrainingSettings) -> Placement:
    """Predict and estimate one choice of settings."""
    return _Planner(work, hardware).placement(settings)


def _enough_gpus(work: Work, hardware: Hardware) -> int | None:
    """Return how many times as many GPUs, doubled again and again, would do; None where they do not divide the batch before."""
    while work.rows % (2 * hardware.gpus) == 0:
        hardware = hardware.model_copy(update={"gpus": 2 * hardware.gpus})
        planner = _Planner(work, hardware)
        ways = _ways(work, hardware)
        if any(_fits(planner.placement(settings), hardware) for settings in candidates(work, hardware, ways)):
            return hardware.gpus
    return None


Way = dict[str, object]
"""Fields of `TrainingSettings` by which the models are held in another way."""


def candidates(work: Work, hardware: Hardware, ways: Sequence[Way]) -> Iterator[TrainingSettings]:
    """Yield every setting that is tried: layouts of the GPUs, micro-batches, recomputation, and ways to hold the models."""
    rows = work.rows // hardware.gpus
    sizes = [size for size in MICRO_BATCH_SIZES if rows % size == 0]
    for (shard, experts), size, recompute, way in product(layouts(work, hardware), sizes, (False, True), ways):
        base = TrainingSettings(
            gpus=hardware.gpus,
            shard_ranks=shard,
            expert_ranks=experts,
            expert_imbalance=IMBALANCE if experts > 1 else 1.0,
            micro_batch_size=size,
            micro_batches=rows // size,
            sequence_length=work.sequence_length,
            recompute_activations=recompute,
            loss_chunk_tokens=work.execution.loss_chunk_tokens,
            memory_budget=work.execution.memory_budget,
        ).model_copy(update=way)
        yield base
        if hardware.gpus > 1 and base.teacher == "live" and work.is_taught:
            yield base.model_copy(update={"reshard_teacher": False})


def layouts(work: Work, hardware: Hardware) -> list[tuple[int, int]]:
    """List how many GPUs may share a copy of the models, and how many of those the routed experts: within a node."""
    if hardware.gpus == 1:
        return [(1, 1)]
    node = hardware.node_gpus
    shards = [n for n in range(node, hardware.gpus + 1, node) if hardware.gpus % n == 0]
    configs = [work.teacher, *(student.config for student in work.students)] if work.is_taught else None
    configs = configs or [student.config for student in work.students]
    shared = [n for n in range(2, node + 1) if node % n == 0 and all(c["num_experts"] % n == 0 for c in configs)]
    return [(shard, experts) for shard in shards for experts in (1, *shared)]


def _ways(work: Work, hardware: Hardware, *, by_host: bool = False) -> list[Way]:
    """List the ways to hold the models: as the recipe has it, and those that need less memory.

    by_host: only those with something in the host's memory, or on its disk; on one GPU they are among the others.
    """
    teachers: list[TeacherKind] = [work.teacher_kind]
    alone = hardware.gpus == 1
    if work.is_taught and work.teacher_kind == "live":
        teachers = ["live", "layer_by_layer", "cache"] if alone or by_host else ["live", "cache"]
    offloads: list[Offload] = ["none", "student", "all"] if alone or by_host else ["none"]
    optimizers = [work.optimizer, "adamw_8bit"] if alone and work.optimizer == "adamw" else [work.optimizer]
    experts: TrainedPart = "routed_experts"
    frozen = [work.frozen]
    if len(trained := trained_parts(work)) > 1 and experts in trained:
        frozen.append(tuple(part for part in get_args(TrainedPart) if part in (*work.frozen, experts)))
    return [
        {"teacher": teacher, "offload": offload, "optimizer": optimizer, "frozen": parts}
        for teacher, offload, optimizer, parts in product(teachers, offloads, optimizers, frozen)
        if not (offload == "all" and (teacher != "live" or not work.is_taught))
        and not (offload != "none" and optimizer == "muon")
        and not (by_host and offload == "none" and teacher != "layer_by_layer")
    ]


class _Planner:
    """The numbers of all models of a training, computed once for each precision, sharing of experts and choice of frozen parts."""

    def __init__(self, work: Work, hardware: Hardware) -> None:
        self.work = work
        self.hardware = hardware
        self._measured: dict[object, Model] = {}
        configs = [*(student.config for student in work.students), work.teacher]  # the teacher's number is -1
        self._flops = [forward_flops(work.family, config, work.sequence_length) for config in configs]

    def placement(self, settings: TrainingSettings) -> Placement:
        """Predict the memory and estimate the speed of all students of the schedule with the same settings."""
        work, hardware = self.work, self.hardware
        settings = settings.model_copy(update={"counts_ahead": counts_ahead(work, settings)})
        teacher = self._model(-1, settings) if work.is_taught else None
        memories, steps = [], []
        for index, _ in enumerate(work.students):
            student = self._model(index, settings)
            memories.append(predict(student, teacher, settings))
            traffic = predict_traffic(student, teacher, settings)
            taught = self._flops[-1] if work.is_taught else 0
            steps.append(estimate(student, teacher, settings, hardware, traffic, (self._flops[index], taught)))
        largest = max(memories, key=lambda memory: memory.peak_bytes)
        seconds = sum(step.seconds * student.token_fraction for step, student in zip(steps, work.students, strict=True))
        rate = work.rows * work.sequence_length / seconds
        once = steps[0].cache_seconds_per_token  # the teacher's pass for its cache: its GPUs are these, all of them
        hours = None if work.tokens is None else work.tokens * (1 / rate + once) * hardware.gpus / 3600
        return Placement(
            settings=settings,
            memory=largest,
            needed_bytes=needed_bytes(largest.peak_bytes, hardware.gpus),
            change=_changes(work, settings),
            step=steps[-1],
            tokens_per_second=rate,
            gpu_hours=hours,
            **self._in_host(memories, teacher, settings),
        )

    def _in_host(
        self, memories: Sequence[TrainingMemory], teacher: Model | None, settings: TrainingSettings
    ) -> dict[str, int | bool]:
        """Return the bytes of a node's memory, and whether a state's copy fits into it too."""
        gpus = self.hardware.node_gpus
        copies = gpus / settings.copy_ranks  # of the models, in a node
        students = [self._model(index, settings) for index, _ in enumerate(self.work.students)]
        pinning = max(pinning_bytes(student, teacher, settings) for student in students)
        held = round(gpus * max(memory.host_bytes for memory in memories) + copies * pinning)
        units = [student.weights.all for student in students]
        state = copies * max(FLOAT32 * unit.trained + moments_bytes(unit, settings) for unit in units)
        limit = self.hardware.host_memory
        with_copy = limit is None or held + state <= limit  # from which a state is written
        return {"host_bytes": held + round(state) * with_copy, "async_save": with_copy}

    def _model(self, index: int, settings: TrainingSettings) -> Model:
        """Return the numbers of a student, or of the teacher (-1)."""
        work = self.work
        frozen = settings.frozen if index >= 0 else ()
        key = (index, settings.precision, settings.expert_ranks > 1, frozen)
        if key not in self._measured:
            config = work.teacher if index < 0 else work.students[index].config
            self._measured[key] = measure(work.family, config, settings, trains=index >= 0)
        return self._measured[key]


def counts_ahead(work: Work, settings: TrainingSettings) -> bool:
    """Return whether a step counts its experts in a forward pass of their own (`training/balancing.py`)."""
    at_once = settings.gpus * settings.micro_batch_size
    return at_once < work.rows and at_once % min(work.group_rows, work.rows) != 0


def needed_bytes(peak_bytes: int, gpus: int) -> int:
    """Return the memory of a GPU that a peak of so many bytes of tensors needs, where so many GPUs work together."""
    beside = CONTEXT_BYTES + (NCCL_BYTES if gpus > 1 else 0)
    return round((1 + FRAGMENTS_FRACTION) * peak_bytes) + beside


def _fits(placement: Placement, hardware: Hardware) -> bool:
    in_host = hardware.host_memory is None or placement.host_bytes <= hardware.host_memory
    return placement.needed_bytes <= hardware.gpu_memory and in_host


def _excess(placement: Placement, hardware: Hardware) -> float:
    """Return what a choice lacks of a GPU's and of a node's memory, as shares of these."""
    over = max(placement.needed_bytes / hardware.gpu_memory - 1, 0)
    return over if hardware.host_memory is None else over + max(placement.host_bytes / hardware.host_memory - 1, 0)


def _changes(work: Work, settings: TrainingSettings) -> list[Change]:
    found: list[Change] = []
    if settings.teacher == "cache" != work.teacher_kind:
        found.append("cache")
    if settings.optimizer != work.optimizer:
        found.append("adamw_8bit")
    if settings.frozen != work.frozen:
        found.append("frozen")
    return found


def _severity(placement: Placement) -> int:
    """Return how much a choice changes of the result: 0 nothing beyond rounding; frozen experts more than all others together."""
    return sum({"cache": 1, "adamw_8bit": 1, "frozen": 3}[change] for change in placement.change)


def _to_show(fitting: Sequence[Placement]) -> list[Placement]:
    """Return the first of `fitting` for each layout of the GPUs and each way to hold the models, a few of each change, in their order."""
    best: dict[object, Placement] = {}
    for placement in fitting:
        s = placement.settings
        best.setdefault((s.shard_ranks, s.expert_ranks, s.teacher, s.offload, s.optimizer, s.frozen), placement)
    shown: dict[tuple[Change, ...], list[Placement]] = {}
    for placement in best.values():
        of_this_change = shown.setdefault(tuple(placement.change), [])
        if len(of_this_change) < (MOST if len(shown) == 1 else OTHERS):
            of_this_change.append(placement)
    return [placement for placements in shown.values() for placement in placements]
