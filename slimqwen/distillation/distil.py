"""The stage `distil`: a student checkpoint and tokens (and a teacher) in, a trained checkpoint out."""

import shutil
from pathlib import Path

import torch

from slimqwen.artifacts import atomic_folder, check_replaceable, fingerprint_value, write_json
from slimqwen.checkpoint.config import read_json
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.checkpoint.writer import copy_companions
from slimqwen.data.store import announce, check_vocabulary, load_manifest, training_stream
from slimqwen.distillation.loop import train
from slimqwen.distillation.metrics import MetricsLog
from slimqwen.distillation.parallel import Ranks, join_ranks
from slimqwen.distillation.sharded import export, load_sharded
from slimqwen.distillation.teacher import LiveTeacher
from slimqwen.distillation.trainer import Span, Student, Trainer
from slimqwen.errors import UserError
from slimqwen.modeling.device import reproducible, resolve_device, resolve_dtype
from slimqwen.modeling.model import MtpCausalLM, load
from slimqwen.progress import say
from slimqwen.recipe import DistilRecipe, DocumentBoundaries

# What changes speed, memory or bookkeeping, and the result by no more than rounding: a run resumes after changing them.
SETTINGS_WITHOUT_EFFECT = {
    "save_every_steps",
    "save_every_minutes",
    "keep_states",
    "on_bad_step",  # what happens at a step that would otherwise have stopped the run
    "micro_batch_size",
    "loss_chunk_tokens",
    "activation_checkpointing",
    "shard_ranks",
    "reshard_student",
    "reshard_teacher",
}


def total_steps(recipe: DistilRecipe, sequence_length: int) -> int:
    """Optimiser steps that the recipe's tokens pay for. Raises UserError if they do not fill one."""
    steps = recipe.tokens // (recipe.batch_size * sequence_length)
    if steps == 0:
        raise UserError(
            f"distil.tokens = {recipe.tokens:,} is less than one step of {recipe.batch_size} sequences of {sequence_length}: "
            "raise tokens or lower batch_size or sequence_length."
        )
    return steps


def distil(
    student: Path,
    out: Path,
    *,
    tokens: Path,
    recipe: DistilRecipe,
    sequence_length: int,
    documents: DocumentBoundaries = "packed",
    teacher: Path | None = None,
    span: Span | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    metrics: Path | None = None,
    run: str = "slimqwen",
    stage: int = 1,
    title: str = "distil",
    keep_state: bool = False,
) -> Path:
    """Train `student` and write the trained checkpoint to `out`; resumes its own interrupted work.

    Called by every process that torchrun started, it trains one student on all of them (parallel.py), and resumes on
    another number of them; all need to see the same files.

    Args:
        student: checkpoint folder; its layout and dtypes are kept. Trained in float32.
        tokens: folder written by `tokenize`, made with the student's tokenizer.
        sequence_length: tokens of a training sequence.
        documents: whether a sequence may hold several documents, which then see each other.
        teacher: checkpoint folder; needed by the terms kd and mtp_kd, ignored without them.
        span: the steps of the whole run that this call trains; all of them by default.
        seed: of the data order.
        metrics: the metrics.jsonl to append to; `out`'s sibling by default. `run` and `stage` label its lines.
        title: shown with the progress.
        keep_state: leave the training state in place, for a caller that removes it (`remove_state`) only after it has
            noted that `out` is done: a kill in between then costs nothing.

    Returns:
        `out`.
    """
    check_replaceable(out, student, tokens, *([teacher] if teacher is not None else []))
    checkpoint = Checkpoint(student)
    manifest = load_manifest(tokens)
    check_vocabulary(manifest, tokens, student, checkpoint.config["vocab_size"])
    teaches = {"kd", "mtp_kd"} & set(recipe.terms)
    teacher_checkpoint = Checkpoint(teacher) if teaches and teacher is not None else None
    check_terms(recipe, checkpoint, teacher_checkpoint)
    if span is None:
        steps = total_steps(recipe, sequence_length)
        span = Span(0, steps, steps)

    torch_device = resolve_device(device)
    with join_ranks(torch_device, recipe.shard_ranks) as ranks:
        check_batch(recipe, ranks)
        stream = training_stream(tokens, sequence_length, seed, documents)
        if ranks.is_first:
            claim_state_folder(
                out,
                student=checkpoint.fingerprint(),
                teacher=None if teacher_checkpoint is None else teacher_checkpoint.fingerprint(),
                tokens=manifest.model_dump(mode="json"),
                recipe=recipe.model_dump(mode="json", exclude=SETTINGS_WITHOUT_EFFECT),
                dtype=dtype,
                sequence_length=sequence_length,
                documents=documents,
                span=[span.first_step, span.end_step, span.total_steps],
                seed=seed,
            )
            announce(stream, (span.end_step - span.first_step) * recipe.batch_size, torch_device.type)
        ranks.wait()
        model = load_student(checkpoint, torch_device, recipe, ranks)
        live_teacher = None
        if teacher_checkpoint is not None:
            teaches_mtp = recipe.mtp_target == "mtp" and "mtp_kd" in recipe.terms and checkpoint.has_mtp
            teacher_model = load_teacher(teacher_checkpoint, dtype, torch_device, recipe, ranks)
            live_teacher = LiveTeacher(teacher_model, teaches_mtp=teaches_mtp)
        trained = Student(model, checkpoint.family, checkpoint.config)
        trainer = Trainer(trained, live_teacher, stream, recipe, span, ranks)
        log = MetricsLog(metrics or out.parent / "metrics.jsonl", run, stage)
        with reproducible(torch_device):
            train(trainer, state_folder_of(out), log, title)

        if ranks.is_first:
            with atomic_folder(out) as folder:
                export(model, folder, checkpoint)
                copy_companions(student, folder)
            if not keep_state:
                remove_state(out)
        else:
            export(model, None, checkpoint)
        ranks.wait()
    return out


def load_student(checkpoint: Checkpoint, device: torch.device, recipe: DistilRecipe, ranks: Ranks) -> MtpCausalLM:
    """In float32, whole or sharded."""
    if ranks.mesh is None:
        return load(checkpoint.folder, torch.float32, device)
    reshard = recipe.reshard_student
    return load_sharded(checkpoint, ranks, torch.float32, device, trains=True, reshard_after_forward=reshard)


def load_teacher(
    checkpoint: Checkpoint, dtype: str, device: torch.device, recipe: DistilRecipe, ranks: Ranks
) -> MtpCausalLM:
    """Whole or sharded."""
    compute_dtype = resolve_dtype(dtype, device)
    if ranks.mesh is None:
        return load(checkpoint.folder, compute_dtype, device)
    reshard = recipe.reshard_teacher
    return load_sharded(checkpoint, ranks, compute_dtype, device, trains=False, reshard_after_forward=reshard)


def state_folder_of(out: Path) -> Path:
    """The hidden folder beside `out` that holds its training state."""
    return out.parent / f".{out.name}.state"


def remove_state(out: Path) -> None:
    shutil.rmtree(state_folder_of(out), ignore_errors=True)


def claim_state_folder(out: Path, **inputs: object) -> None:
    """Make the folder for `out`'s training state, or empty it if what lies there came from other inputs."""
    folder = state_folder_of(out)
    identity = {"inputs": fingerprint_value(inputs)}
    marker = folder / "inputs.json"
    if folder.exists() and not (marker.exists() and read_json(marker) == identity):
        say(f"{folder}: training state of other inputs or settings, removed")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(marker, identity)


def check_batch(recipe: DistilRecipe, ranks: Ranks) -> None:
    """Raise UserError where the ranks cannot share a batch evenly."""
    if recipe.batch_size % ranks.size:
        raise UserError(
            f"distil.batch_size {recipe.batch_size} cannot be shared by {ranks.size} ranks: make it a multiple of {ranks.size}."
        )


def check_terms(recipe: DistilRecipe, student: Checkpoint, teacher: Checkpoint | None) -> None:
    """Raise UserError where the terms of the loss ask for what student or teacher does not have."""
    terms = set(recipe.terms)
    if not student.has_mtp and not terms & {"lm", "kd"}:
        raise UserError(
            f"{student.folder} has no MTP module, and distil.terms has nothing else to train: add lm or kd."
        )
    if not terms & {"kd", "mtp_kd"}:
        return
    if teacher is None:
        raise UserError(
            "the loss has the terms kd or mtp_kd, which need a teacher: give one, or set distil.terms to [lm, mtp_lm]."
        )
    if student.config["vocab_size"] != teacher.config["vocab_size"]:
        raise UserError(
            f"teacher {teacher.folder} has {teacher.config['vocab_size']:,} tokens in its vocabulary and student "
            f"{student.folder} {student.config['vocab_size']:,}: distillation compares whole distributions and needs the "
            "same vocabulary."
        )
    if recipe.mtp_target == "mtp" and "mtp_kd" in terms and not teacher.has_mtp:
        raise UserError(
            f"distil.mtp_target is 'mtp', but teacher {teacher.folder} has no MTP module: use mtp_target: main."
        )
