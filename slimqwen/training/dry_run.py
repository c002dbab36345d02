"""A dry run of one step, at the training's largest shapes: too little memory shows within seconds, not after hours."""

import torch

from slimqwen.core.bytesize import bytes_in_words
from slimqwen.core.errors import StageFailed
from slimqwen.core.progress import say
from slimqwen.data.stream import Batch
from slimqwen.losses.loss import LossWeights, count_targets
from slimqwen.model.live_bytes import measured_peak
from slimqwen.shapes.training_memory import TrainingMemory, TrainingSettings, training_memory
from slimqwen.training.optimizer import untrained_parts
from slimqwen.training.streamed_teacher import StreamedTeacher
from slimqwen.training.teacher import LiveTeacher
from slimqwen.training.trainer import Trainer

SMALLEST_CHUNK_TOKENS = 128  # of the loss: below it the products are too small to be fast


def dry_run(trainer: Trainer) -> None:
    """Run the forward and backward passes of a step at the training's largest shapes, and print the memory they took.

    The optimiser's state is allocated already (`build_optimizer`). Nothing is changed: parameters, optimiser state, random
    state and the position in the data stay as they are, and gradients are dropped. All ranks must call it.

    Raises StageFailed, whose message names settings that need less memory, where the memory does not suffice.
    """
    model, predicted = trainer.student.model, predict_memory(trainer)
    settings, was_training = predicted.settings, model.training
    held, gpus = held_bytes(trainer), [trainer.device] if trainer.device.type == "cuda" else []
    model.train()
    try:
        with torch.random.fork_rng(gpus), measured_peak(trainer.device) as peak:
            _run_passes(trainer, settings)
    except torch.OutOfMemoryError as error:
        reached = (
            f"failed at {bytes_in_words(held + peak.extra_bytes)}, {bytes_in_words(predicted.peak_bytes)} predicted"
        )
        raise StageFailed(
            f"a step of {step_in_words(settings)} does not fit {trainer.device}: {reached}; {remedies(trainer, settings)}."
        ) from error
    finally:
        trainer.optimizer.zero_grad(set_to_none=True)
        model.train(was_training)
    if trainer.ranks.is_first:
        say(
            f"dry run: a step of {step_in_words(settings)} takes {bytes_in_words(held + peak.extra_bytes)} of "
            f"{trainer.device} at its peak ({bytes_in_words(predicted.peak_bytes)} predicted)"
        )


def _run_passes(trainer: Trainer, settings: TrainingSettings) -> None:
    """Run what `Trainer.step` does before the optimiser's update, on at most two micro-batches."""
    recipe, rows = trainer.recipe, settings.micro_batch_size * min(settings.micro_batches, 2)
    found = trainer.stream.batch(0, rows).to(trainer.device)
    batch = Batch(found.tokens, None, found.places)  # without a mask: a batch without padding needs the most memory
    if trainer.teacher is not None:
        trainer.teacher.prepare(batch)
    main_targets, mtp_targets = count_targets(batch.tokens)
    weights = LossWeights.from_terms(recipe.terms, 0.5, 1.0).per_token(main_targets, mtp_targets)
    micro_batches = batch.split(settings.micro_batch_size)
    counts = trainer.count_ahead(micro_batches)
    for micro_batch in micro_batches:
        trainer.backward(micro_batch, weights, counts, main_targets)


def predict_memory(trainer: Trainer) -> TrainingMemory:
    """Predict the memory of this trainer's models, recipe and device, as `slimqwen plan` does."""
    execution, ranks = trainer.execution, trainer.ranks
    rows = (
        trainer.course.rows(trainer.span.end_step - 1) // ranks.size
    )  # with a batch size ramp, the last batch is the largest
    micro_batch_size = min(trainer.micro_batch_size, rows)
    settings = TrainingSettings(
        gpus=ranks.size,
        shard_ranks=None if ranks.mesh is None else ranks.mesh["shard"].size(),
        expert_ranks=1 if ranks.experts_mesh is None else ranks.experts_mesh["expert"].size(),
        micro_batch_size=micro_batch_size,
        micro_batches=-(-rows // micro_batch_size),  # the last of what is left (`Batch.split`)
        sequence_length=trainer.stream.sequence_length,
        recompute_activations=execution.recompute_activations,
        reshard_student=execution.reshard_student,
        reshard_teacher=execution.reshard_teacher,
        loss_chunk_tokens=execution.loss_chunk_tokens,
        device="cuda" if trainer.device.type == "cuda" else "cpu",
        optimizer=trainer.recipe.optimizer.kind,
        frozen=untrained_parts(trainer.student.family, trainer.student.config, trainer.recipe),
        offload=execution.offload,
        teacher="layer_by_layer" if isinstance(trainer.teacher, StreamedTeacher) else "live",
        memory_budget=execution.memory_budget,
    )
    return _predict(trainer, settings)


def _predict(trainer: Trainer, settings: TrainingSettings) -> TrainingMemory:
    """Predict the memory of this trainer's models with `settings`."""
    teacher = None
    if isinstance(trainer.teacher, LiveTeacher):
        teacher = trainer.teacher.model.config
    elif isinstance(trainer.teacher, StreamedTeacher):
        teacher = trainer.teacher.checkpoint.config
    return training_memory(trainer.student.family, trainer.student.config, teacher, settings)


def held_bytes(trainer: Trainer) -> int:
    """Return the bytes held on the device before a step: on a GPU the allocator's count, else models and optimiser state."""
    if trainer.device.type == "cuda":
        return torch.cuda.memory_allocated(trainer.device)
    tensors = list(trainer.student.model.tensors().values())
    if isinstance(trainer.teacher, LiveTeacher):
        tensors += trainer.teacher.model.tensors().values()
    states = trainer.optimizer.state.values()
    tensors += [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def remedies(trainer: Trainer, settings: TrainingSettings) -> str:
    """Return, as one clause, the settings that would need less memory, each with its predicted peak.

    Where none would, the clause is that a larger device is needed.
    """
    changes: dict[str, dict[str, object]] = {}
    if settings.micro_batch_size > 1:
        half = settings.micro_batch_size // 2
        changes[f"execution.micro_batch_size: {half}"] = {
            "micro_batch_size": half,
            "micro_batches": settings.micro_batches * 2,
        }
    if not settings.recompute_activations:
        changes["execution.recompute_activations: true"] = {"recompute_activations": True}
    if settings.loss_chunk_tokens > SMALLEST_CHUNK_TOKENS:
        chunk = max(settings.loss_chunk_tokens // 4, SMALLEST_CHUNK_TOKENS)
        changes[f"execution.loss_chunk_tokens: {chunk}"] = {"loss_chunk_tokens": chunk}
    if isinstance(trainer.teacher, LiveTeacher):
        changes["execution.streaming_teacher: true"] = {"teacher": "layer_by_layer"}
    if settings.device == "cuda" and settings.offload == "none" and settings.optimizer != "muon":
        changes["execution.offload: student"] = {"offload": "student"}
    if settings.device == "cuda":
        changes[f"{2 * settings.gpus} GPUs"] = {"gpus": 2 * settings.gpus}
    now = _predict(trainer, settings).peak_bytes
    peaks = {
        words: _predict(trainer, settings.model_copy(update=change)).peak_bytes for words, change in changes.items()
    }
    lower = [f"{words} ({bytes_in_words(peak)} predicted)" for words, peak in peaks.items() if peak < now]
    return f"try {', '.join(lower)}, or several of them" if lower else "it needs a device with more memory"


def step_in_words(settings: TrainingSettings) -> str:
    """Describe the size of one forward pass, as `2 x 4,096 tokens`."""
    return f"{settings.micro_batch_size} x {settings.sequence_length:,} tokens"
