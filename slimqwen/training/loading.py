"""The models of a training, loaded where and in the dtype that the recipe and the execution say."""

import torch

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.model.device import resolve_dtype
from slimqwen.model.model import MtpCausalLM, load
from slimqwen.parallel.ranks import Ranks
from slimqwen.parallel.sharded_checkpoint import load_sharded
from slimqwen.training.inputs import OpenInputs
from slimqwen.training.optimizer import untrained
from slimqwen.training.settings import Settings
from slimqwen.training.streamed_teacher import StreamedTeacher, goes_layer_by_layer
from slimqwen.training.teacher import LiveTeacher, Teacher


def load_student(checkpoint: Checkpoint, device: torch.device, settings: Settings, ranks: Ranks) -> MtpCausalLM:
    """Load the student, what is trained in float32 and the rest as it is on disk, whole or sharded over the ranks."""
    execution = settings.execution
    frozen = untrained(checkpoint, settings.recipe)
    if ranks.mesh is None:
        return load(checkpoint.folder, torch.float32, device, frozen)
    return load_sharded(
        checkpoint,
        ranks,
        torch.float32,
        device,
        trains=True,
        reshard_after_forward=execution.reshard_student,
        frozen=frozen,
        offloads=execution.offload != "none",
    )


def load_live_teacher(inputs: OpenInputs, student: MtpCausalLM, settings: Settings, ranks: Ranks) -> Teacher | None:
    """Load the teacher that runs beside the student: whole, sharded over the ranks, or layer by layer; None where none does."""
    checkpoint, execution, device = inputs.teacher, settings.execution, ranks.device_of(student)
    if checkpoint is None:
        return None
    dtype = resolve_dtype(settings.text.dtype, device)
    teaches_mtp = settings.recipe.is_taught_by_mtp and inputs.student.has_mtp
    if goes_layer_by_layer(checkpoint, student, execution, dtype, ranks):
        return StreamedTeacher(
            checkpoint,
            execution,
            teaches_mtp=teaches_mtp,
            rows=settings.most_rows // ranks.size,
            sequence_length=settings.text.sequence_length,
            dtype=dtype,
        )
    offloads = execution.offload == "all"
    if ranks.mesh is None or (ranks.size == 1 and execution.offload == "student"):
        return LiveTeacher(load(checkpoint.folder, dtype, device), teaches_mtp=teaches_mtp)
    reshard = execution.reshard_teacher
    model = load_sharded(
        checkpoint, ranks, dtype, device, trains=False, reshard_after_forward=reshard, offloads=offloads
    )
    return LiveTeacher(model, teaches_mtp=teaches_mtp)
