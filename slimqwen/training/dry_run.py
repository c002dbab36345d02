"""One step before the training, at its largest shapes: too little memory is found in the first seconds."""

import torch

from slimqwen.core.bytesize import bytes_in_words
from slimqwen.core.errors import StageFailed
from slimqwen.core.progress import say
from slimqwen.data.stream import Batch
from slimqwen.losses.loss import LossWeights, count_targets
from slimqwen.model.live_bytes import measured_peak
from slimqwen.shapes.footprint import TrainingMemory, TrainingSettings, training_memory
from slimqwen.training.teacher import LiveTeacher
from slimqwen.training.trainer import Trainer

SMALLEST_CHUNK_TOKENS = 128  # of the loss: below it the products are too small to be fast


def dry_run(trainer: Trainer) -> None:
    """Forward and backward passes of as many tokens at a time as training will see, then say what memory they took.

    The optimiser's state is allocated already (`build_optimizer`). Nothing is changed: no parameter, no optimiser state, no
    random number, no row of the data is used up; gradients are dropped. All ranks must call it.

    Raises StageFailed, which says what to change, where the memory does not suffice.
    """
    model, predicted = trainer.student.model, predicted_memory(trainer)
    settings, was_training = predicted.settings, model.training
    held, gpus = held_bytes(trainer), [trainer.device] if trainer.device.type == "cuda" else []
    model.train()
    try:
        with torch.random.fork_rng(gpus), measured_peak(trainer.device) as peak:
            _passes(trainer, settings)
    except torch.OutOfMemoryError as error:
        reached = (
            f"failed at {bytes_in_words(held + peak.extra_bytes)}, {bytes_in_words(predicted.peak_bytes)} predicted"
        )
        raise StageFailed(
            f"a step of {in_words(settings)} does not fit {trainer.device}: {reached}; {remedies(trainer, settings)}."
        ) from error
    finally:
        trainer.optimizer.zero_grad(set_to_none=True)
        model.train(was_training)
    if trainer.ranks.is_first:
        say(
            f"dry run: a step of {in_words(settings)} takes {bytes_in_words(held + peak.extra_bytes)} of "
            f"{trainer.device} at its peak ({bytes_in_words(predicted.peak_bytes)} predicted)"
        )


def _passes(trainer: Trainer, settings: TrainingSettings) -> None:
    """What `Trainer.step` does before the optimiser moves: two micro-batches, if there are several, stand for them all."""
    recipe, rows = trainer.recipe, settings.micro_batch_size * min(settings.micro_batches, 2)
    found = trainer.stream.batch(0, rows).to(trainer.device)
    batch = Batch(found.tokens, None, found.places)  # padding would leave memory free that another batch needs
    main_targets, mtp_targets = count_targets(batch.tokens)
    weights = LossWeights.from_terms(recipe.terms, 0.5, 1.0).per_token(main_targets, mtp_targets)
    micro_batches = batch.split(settings.micro_batch_size)
    counts = trainer.global_expert_counts(micro_batches) if len(micro_batches) > 1 else None
    for micro_batch in micro_batches:
        trainer.backward(micro_batch, weights, counts, main_targets)


def predicted_memory(trainer: Trainer) -> TrainingMemory:
    """Of this trainer's models, recipe and device, as `slimqwen plan` predicts it."""
    recipe, ranks = trainer.recipe, trainer.ranks
    rows = trainer.course.rows(trainer.span.end_step - 1) // ranks.size  # a batch that grows is largest at the end
    micro_batch_size = min(trainer.micro_batch_size, rows)
    settings = TrainingSettings(
        gpus=recipe.shard_ranks or ranks.size,
        micro_batch_size=micro_batch_size,
        micro_batches=-(-rows // micro_batch_size),  # the last of what is left (`Batch.split`)
        sequence_length=trainer.stream.sequence_length,
        activation_checkpointing=recipe.activation_checkpointing,
        loss_chunk_tokens=recipe.loss_chunk_tokens,
        device="cuda" if trainer.device.type == "cuda" else "cpu",
    )
    return _predict(trainer, settings)


def _predict(trainer: Trainer, settings: TrainingSettings) -> TrainingMemory:
    teacher = trainer.teacher.model.config if isinstance(trainer.teacher, LiveTeacher) else None
    return training_memory(trainer.student.family, trainer.student.config, teacher, settings)


def held_bytes(trainer: Trainer) -> int:
    """Bytes on the device before a step: both models and the optimiser's state, or what a GPU's allocator says."""
    if trainer.device.type == "cuda":
        return torch.cuda.memory_allocated(trainer.device)
    tensors = list(trainer.student.model.tensors().values())
    if isinstance(trainer.teacher, LiveTeacher):
        tensors += trainer.teacher.model.tensors().values()
    states = trainer.optimizer.state.values()
    tensors += [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def remedies(trainer: Trainer, settings: TrainingSettings) -> str:
    """What would take less memory, each with its predicted peak, as one clause; "rent a larger device" where nothing would."""
    changes: dict[str, dict[str, object]] = {}
    if settings.micro_batch_size > 1:
        half = settings.micro_batch_size // 2
        changes[f"distil.micro_batch_size: {half}"] = {
            "micro_batch_size": half,
            "micro_batches": settings.micro_batches * 2,
        }
    if not settings.activation_checkpointing:
        changes["distil.activation_checkpointing: true"] = {"activation_checkpointing": True}
    if settings.loss_chunk_tokens > SMALLEST_CHUNK_TOKENS:
        chunk = max(settings.loss_chunk_tokens // 4, SMALLEST_CHUNK_TOKENS)
        changes[f"distil.loss_chunk_tokens: {chunk}"] = {"loss_chunk_tokens": chunk}
    if settings.device == "cuda":
        changes[f"{2 * settings.gpus} GPUs"] = {"gpus": 2 * settings.gpus}
    now = _predict(trainer, settings).peak_bytes
    peaks = {
        words: _predict(trainer, settings.model_copy(update=change)).peak_bytes for words, change in changes.items()
    }
    helping = [f"{words} ({bytes_in_words(peak)} predicted)" for words, peak in peaks.items() if peak < now]
    return f"try {', '.join(helping)}, or several of them" if helping else "it needs a device with more memory"


def in_words(settings: TrainingSettings) -> str:
    return f"{settings.micro_batch_size} x {settings.sequence_length:,} tokens"
