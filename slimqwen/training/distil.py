"""The stage `distil`: trains a student checkpoint on tokens, and on a teacher's distributions where there is one."""

from pathlib import Path

import torch

from slimqwen.artifacts import (
    atomic_folder,
    claim_folder,
    fingerprint,
    fingerprint_value,
    makes_folder,
    remove_ours,
    tidy,
    write_json,
)
from slimqwen.checkpoint.readable import check_companions
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.checkpoint.writer import copy_companions
from slimqwen.core.errors import UserError
from slimqwen.core.progress import say
from slimqwen.data.announcement import announce, notes_of_length, notes_of_overlap
from slimqwen.data.store import check_vocabulary, load_manifest, training_stream
from slimqwen.model.arithmetic import keep_arithmetic
from slimqwen.model.device import reproducible, resolve_device, resolve_dtype
from slimqwen.model.kernels import announce_slow
from slimqwen.model.model import MtpCausalLM, load
from slimqwen.model.native import announce_noise
from slimqwen.parallel.expert_parallel import check_expert_ranks
from slimqwen.parallel.ranks import Ranks, join_ranks
from slimqwen.parallel.sharded_checkpoint import export, fill_own, load_sharded
from slimqwen.recipe import DistilRecipe, DocumentBoundaries, Execution
from slimqwen.training.cached_teacher import CachedTeacher, open_teacher_cache
from slimqwen.training.course import compute_course
from slimqwen.training.dry_run import dry_run
from slimqwen.training.heldout import HeldOut
from slimqwen.training.learning_rate import FILE as LEARNING_RATE_FILE
from slimqwen.training.learning_rate import RateChoice, Start, choose_learning_rate
from slimqwen.training.loggers import Logger, check_loggers, open_loggers
from slimqwen.training.loop import train
from slimqwen.training.metrics import MetricsLog
from slimqwen.training.moments import check_moments, load_moments
from slimqwen.training.optimizer import check_optimizer
from slimqwen.training.state import saved_states
from slimqwen.training.teacher import LiveTeacher, Teacher
from slimqwen.training.trainer import Span, Student, Trainer


def total_steps(recipe: DistilRecipe, sequence_length: int) -> int:
    """Return how many optimiser steps the recipe's tokens are enough for. Raises UserError where they do not fill one."""
    course = compute_course(recipe, sequence_length)
    if course.total_steps == 0:
        raise UserError(
            f"distil.tokens = {recipe.tokens:,} is less than one step of {course.rows(0)} sequences of {sequence_length}: "
            "raise tokens or lower batch_size or sequence_length."
        )
    return course.total_steps


def parse_span(steps: str, total: int) -> Span:
    """Parse `FIRST:END` as a span of a run of `total` steps. Raises UserError where it is none."""
    first, colon, end = steps.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal() and int(first) < int(end) <= total):
        raise UserError(
            f"--steps {steps}: write it as FIRST:END, two numbers from 0 to {total:,}, the steps that the recipe's tokens are enough for; "
            "END itself belongs to the next stage."
        )
    return Span(int(first), int(end), total)


@makes_folder("student", "tokens", "teacher", "teacher_cache", "moments", kind="checkpoint")
def distil(
    student: Path,
    out: Path,
    *,
    tokens: Path,
    recipe: DistilRecipe,
    sequence_length: int,
    documents: DocumentBoundaries = "packed",
    teacher: Path | None = None,
    teacher_cache: Path | None = None,
    span: Span | None = None,
    seed: int = 0,
    execution: Execution = Execution(),  # noqa: B008 - immutable
    dtype: str = "auto",
    metrics: Path | None = None,
    run: str = "slimqwen",
    stage: int = 1,
    title: str = "distil",
    keep_state: bool = False,
    moments: Path | None = None,
) -> Path:
    """Train `student` and write the trained checkpoint to `out`, or resume where an earlier call was interrupted.

    All processes that torchrun started must call it and see the same files: they train one student together
    (parallel/ranks.py). It may resume with another number of them.

    Args:
        student: checkpoint folder; its layout and dtypes are kept. Trained in float32.
        tokens: folder written by `tokenize`, made with the student's tokenizer.
        sequence_length: tokens of a training sequence.
        documents: whether a sequence may hold several documents, which then see each other.
        teacher: checkpoint folder; needed by the terms kd and mtp_kd, ignored without them. Of `teacher: cache` it is only
            compared with the one that the cache is of.
        teacher_cache: folder written by `write_teacher_cache`, for `teacher: cache`.
        span: the steps of the whole run that this call trains; all of them by default.
        seed: of the data order.
        execution: how the work is done; a training may resume with other settings of it.
        metrics: the metrics.jsonl to append to; `out`'s sibling by default. `run` and `stage` label its lines.
        title: shown with the progress.
        keep_state: leave the training state in place: for `carry`, or for a caller that removes it (`remove_state`) only after
            it has noted that `out` is done, so that a kill in between costs nothing.
        moments: folder written by `carry`, with which AdamW begins; zeros by default.

    Returns:
        `out`.
    """
    checkpoint = Checkpoint(student)
    manifest = load_manifest(tokens)
    check_vocabulary(manifest, tokens, student, checkpoint.config["vocab_size"])
    is_live = recipe.is_taught and recipe.teacher.kind == "live"
    teacher_checkpoint = Checkpoint(teacher) if is_live and teacher is not None else None
    check_companions(student)
    check_terms(recipe, checkpoint, teacher_checkpoint)
    check_loggers(execution.loggers)
    if moments is not None:
        check_moments(moments, checkpoint, recipe.optimizer)
    heldout = HeldOut.load(execution, tokens, sequence_length, documents)
    if span is None:
        steps = total_steps(recipe, sequence_length)
        span = Span(0, steps, steps)

    torch_device = resolve_device(execution.device)
    with join_ranks(torch_device, execution.shard_ranks, execution.expert_ranks) as ranks:
        check_batch(recipe, ranks)
        check_optimizer(recipe.optimizer, checkpoint, ranks.size)
        for read in (checkpoint, teacher_checkpoint):
            if read is not None and ranks.experts_mesh is not None:
                check_expert_ranks(read, ranks.experts_mesh["expert"].size())
        stream = training_stream(tokens, sequence_length, seed, documents)
        course = compute_course(recipe, sequence_length, span.total_steps)
        cached_teacher: CachedTeacher | None = None
        if recipe.is_taught and not is_live:
            cached_teacher = open_teacher_cache(
                teacher_cache,
                stream,
                rows=course.first_row(span.end_step),
                recipe=recipe,
                documents=documents,
                on_bad_step=execution.bad_steps.action,
                student=checkpoint,
                teacher=teacher,
            )
        if ranks.is_first:
            claim_state_folder(
                out,
                student=checkpoint.fingerprint(),
                teacher=None if teacher_checkpoint is None else teacher_checkpoint.fingerprint(),
                teacher_cache=None if cached_teacher is None else cached_teacher.identity,
                tokens=manifest.model_dump(mode="json"),
                recipe=recipe.model_dump(mode="json"),
                dtype=dtype,
                sequence_length=sequence_length,
                documents=documents,
                span=[span.first_step, span.end_step, span.total_steps],
                seed=seed,
                moments=None if moments is None else fingerprint(moments),
            )
            if torch_device.type == "cpu":
                keep_arithmetic(state_folder_of(out) / "arithmetic.json", f"the training of {out}")
            for note in (*notes_of_length(checkpoint.config, sequence_length), *notes_of_overlap(manifest)):
                say(note)
            announce(stream, course.first_row(span.end_step) - course.first_row(span.first_step), torch_device.type)
            announce_slow(checkpoint.family, checkpoint.config, torch_device)
            announce_noise(checkpoint.config)
        ranks.wait()
        model = load_student(checkpoint, torch_device, execution, ranks)
        taught_by: Teacher | None = cached_teacher
        if teacher_checkpoint is not None:
            teaches_mtp = recipe.is_taught_by_mtp and checkpoint.has_mtp
            teacher_model = load_teacher(teacher_checkpoint, dtype, torch_device, execution, ranks)
            taught_by = LiveTeacher(teacher_model, teaches_mtp=teaches_mtp)
        trained = Student(model, checkpoint.family, checkpoint.config)

        def build(recipe: DistilRecipe, execution: Execution, *, anew: bool = True) -> Trainer:
            trainer = Trainer(trained, taught_by, stream, recipe, span, ranks, execution)
            if moments is not None and anew:
                load_moments(moments, trainer.parameters, trainer.optimizer)
            return trainer

        choice: RateChoice | None = None
        if recipe.learning_rate == "auto":
            if torch_device.type == "cuda":
                dry_run(build(recipe, execution))
            start = Start(
                build=build,
                execution=execution,
                refill=lambda: fill_own(model.held(), checkpoint),
                teacher=taught_by,
                stream=stream,
                course=course,
                span=span,
                ranks=ranks,
                tokens=tokens,
                documents=documents,
                file=state_folder_of(out) / LEARNING_RATE_FILE,
                title=title,
            )
            with reproducible(torch_device):
                choice = choose_learning_rate(start, recipe)
            recipe = recipe.at_learning_rate(choice.rate)
        begun = ranks.largest(int(any(saved_states(state_folder_of(out)))))
        trainer = build(recipe, execution, anew=not begun)
        path = metrics or out.parent / "metrics.jsonl"
        loggers: list[Logger] = []
        if ranks.is_first:
            tidy(path)  # killed while it was rewritten, it may not be rewritten again
            settings = {**recipe.model_dump(mode="json"), "execution": execution.model_dump(mode="json")}
            loggers = open_loggers(
                execution.loggers, path.parent, state_folder_of(out), f"{run}-stage-{stage}", settings
            )
        if (
            torch_device.type == "cuda" and choice is None
        ):  # a CPU does not refuse memory: it swaps, or the system kills
            dry_run(trainer)
        with reproducible(torch_device):
            train(trainer, state_folder_of(out), MetricsLog(path, run, stage, loggers), title, heldout)
        if trainer.average is not None:
            trainer.average.copy_to_weights()

        if ranks.is_first:
            with atomic_folder(out) as folder:
                export(model, folder, checkpoint)
                copy_companions(student, folder)
                if choice is not None:
                    write_json(folder / LEARNING_RATE_FILE, choice.model_dump(mode="json"))
            if not keep_state:
                remove_state(out)
        else:
            export(model, None, checkpoint)
        ranks.wait()
    return out


def load_student(checkpoint: Checkpoint, device: torch.device, execution: Execution, ranks: Ranks) -> MtpCausalLM:
    """Load the student in float32, whole or sharded over the ranks."""
    if ranks.mesh is None:
        return load(checkpoint.folder, torch.float32, device)
    reshard = execution.reshard_student
    return load_sharded(checkpoint, ranks, torch.float32, device, trains=True, reshard_after_forward=reshard)


def load_teacher(
    checkpoint: Checkpoint, dtype: str, device: torch.device, execution: Execution, ranks: Ranks
) -> MtpCausalLM:
    """Load the teacher in `dtype`, whole or sharded over the ranks."""
    compute_dtype = resolve_dtype(dtype, device)
    if ranks.mesh is None:
        return load(checkpoint.folder, compute_dtype, device)
    reshard = execution.reshard_teacher
    return load_sharded(checkpoint, ranks, compute_dtype, device, trains=False, reshard_after_forward=reshard)


def state_folder_of(out: Path) -> Path:
    """Return the hidden folder beside `out` that holds its training state."""
    return out.parent / f".{out.name}.state"


def remove_state(out: Path) -> None:
    """Remove the training state of `out`."""
    remove_ours(state_folder_of(out))


def claim_state_folder(out: Path, **inputs: object) -> None:
    """Make the folder for `out`'s training state, or empty it where it was made from other inputs."""
    claim_folder(state_folder_of(out), fingerprint_value(inputs))


def check_batch(recipe: DistilRecipe, ranks: Ranks) -> None:
    """Raise UserError where a batch cannot be divided evenly among the ranks."""
    name, rows = "batch_size", recipe.batch_size
    if recipe.batch_size_ramp is not None:  # whose batches are multiples of the first
        name, rows = "batch_size_ramp.start", recipe.batch_size_ramp.start
    if rows % ranks.size:
        raise UserError(
            f"distil.{name} {rows} cannot be shared by {ranks.size} ranks: make it a multiple of {ranks.size}."
        )


def check_terms(recipe: DistilRecipe, student: Checkpoint, teacher: Checkpoint | None) -> None:
    """Raise UserError where the terms of the loss need something that the student or the live teacher lacks."""
    terms = set(recipe.terms)
    if not student.has_mtp and not terms & {"lm", "kd"}:
        raise UserError(
            f"{student.folder} has no MTP module, and distil.terms has nothing else to train: add lm or kd."
        )
    if not recipe.is_taught or recipe.teacher.kind == "cache":  # which `open_teacher_cache` checks
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
    if recipe.is_taught_by_mtp and not teacher.has_mtp:
        raise UserError(
            f"distil.mtp_target is 'mtp', but teacher {teacher.folder} has no MTP module: use mtp_target: main."
        )
