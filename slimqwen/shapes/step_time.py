"""The time of an optimiser step, estimated: nothing here was measured on a GPU. No torch.

What the GPUs compute, what they launch and what they send are bounds, each by an assumed share of what the data sheets promise.
"""

import math

from pydantic import BaseModel, ConfigDict, computed_field

from slimqwen.shapes.hardware import Hardware, gpu_of
from slimqwen.shapes.traffic import Traffic
from slimqwen.shapes.training_memory import BFLOAT16, FLOAT32, Model, TrainingSettings

COMPUTE_FRACTION = 0.4  # of the peak, for all kernels of a pass together
LINK_FRACTION = 0.7  # of NVLink's, PCIe's and the network's speed
LAUNCH_SECONDS = 14e-6
# Calls that launch a kernel, traced (benchmarks/trace_step.py): of a layer in one pass, a backward pass being two; of the
# loss per chunk of `loss_chunk_tokens`.
LAYER_LAUNCHES, CHUNK_LAUNCHES = 103, 630
HOST_UPDATE_BYTES, HOST_SPEED = 28, 100e9  # AdamW on the CPU reads and writes 28 bytes per parameter
DISK_SPEED = 5e9  # of the checkpoint, where the teacher runs layer by layer


class StepTime(BaseModel):
    """The estimated seconds of one optimiser step.

    compute_seconds, launch_seconds: of a micro-batch; the longer one counts. exchange_seconds: tokens on their way to experts and
    back, for which the computation waits. weights_seconds: gathering weights and summing gradients, while something is
    computed: what is longer counts. once_seconds: per step: gradients between copies of the models, the optimiser on the CPU, reading a teacher
    that runs layer by layer. cache_seconds_per_token: the teacher's pass for its cache, before the training.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    micro_batches: int
    compute_seconds: float
    launch_seconds: float
    exchange_seconds: float
    weights_seconds: float
    once_seconds: float
    cache_seconds_per_token: float

    @computed_field  # type: ignore[prop-decorator]
    @property
    def seconds(self) -> float:
        busy = max(self.compute_seconds, self.launch_seconds, self.weights_seconds)
        return self.micro_batches * (busy + self.exchange_seconds) + self.once_seconds


def estimate(
    student: Model,
    teacher: Model | None,
    settings: TrainingSettings,
    hardware: Hardware,
    traffic: Traffic,
    flops: tuple[int, int],
) -> StepTime:
    """Estimate the time of a step. flops: of a token's forward pass through the student and through the teacher."""
    gpu = gpu_of(hardware.gpu)
    speed = COMPUTE_FRACTION * gpu.flops
    passes = 3 + settings.recompute_activations + settings.counts_ahead
    taught = 0 if teacher is None or settings.teacher == "cache" else 1
    chunks = math.ceil(settings.tokens / settings.loss_chunk_tokens)
    layers = passes * len(student.weights.layers) + taught * (0 if teacher is None else len(teacher.layers))
    return StepTime(
        micro_batches=settings.micro_batches,
        compute_seconds=settings.tokens * (passes * flops[0] + taught * flops[1]) / speed,
        launch_seconds=LAUNCH_SECONDS * (LAYER_LAUNCHES * layers + CHUNK_LAUNCHES * chunks),
        exchange_seconds=traffic.exchanged_bytes / _speed(settings.expert_ranks, hardware),
        weights_seconds=_weights_seconds(student, teacher, settings, hardware, traffic),
        once_seconds=_once_seconds(student, teacher, settings, hardware, traffic),
        cache_seconds_per_token=flops[1] / speed / hardware.gpus if teacher and settings.teacher == "cache" else 0.0,
    )


def _speed(ranks: int, hardware: Hardware) -> float:
    """Return the bytes per second that a GPU receives from a group of so many neighbours."""
    gpu = gpu_of(hardware.gpu)
    return LINK_FRACTION * (gpu.links if ranks <= hardware.node_gpus else gpu.network)


def _weights_seconds(
    student: Model, teacher: Model | None, settings: TrainingSettings, hardware: Hardware, traffic: Traffic
) -> float:
    everywhere = traffic.gathered_bytes + traffic.reduced_bytes
    everywhere += traffic.experts_gathered_bytes + traffic.experts_reduced_bytes
    seconds = everywhere / _speed(settings.copy_ranks, hardware)
    if settings.offload != "none":  # up for the forward and for the backward pass, gradients down
        weights, passes = student.weights.all, 2 + settings.counts_ahead
        moved = passes * BFLOAT16 * (weights.total - weights.trained) + (passes + 1) * FLOAT32 * weights.trained
        if settings.offload == "all" and settings.teacher == "live" and teacher is not None:
            moved += BFLOAT16 * teacher.weights.all.total
        seconds += moved / settings.copy_ranks / (LINK_FRACTION * gpu_of(hardware.gpu).host)
    return seconds


def _once_seconds(
    student: Model, teacher: Model | None, settings: TrainingSettings, hardware: Hardware, traffic: Traffic
) -> float:
    seconds = traffic.all_reduced_bytes / _speed(hardware.gpus, hardware)
    own = student.weights.all.trained / settings.copy_ranks
    if settings.offload != "none":
        seconds += HOST_UPDATE_BYTES * own * hardware.node_gpus / HOST_SPEED
    if teacher is not None and settings.teacher == "layer_by_layer":
        seconds += (
            hardware.node_gpus * BFLOAT16 * teacher.weights.all.total / DISK_SPEED
        )  # each GPU's process reads all
    return seconds
