"""The stage `distil`: trains a student checkpoint on tokens, and on a teacher's distributions where there is one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from slimqwen.artifacts import (
    atomic_folder,
    claim_folder,
    fingerprint_value,
    makes_folder,
    remove_ours,
    tidy,
    write_json,
)
from slimqwen.checkpoint.writer import copy_companions
from slimqwen.core.progress import say
from slimqwen.data.announcement import announce, notes_of_length, notes_of_overlap
from slimqwen.data.store import training_stream
from slimqwen.data.stream import RowStream
from slimqwen.model.arithmetic import keep_arithmetic
from slimqwen.model.device import reproducible, resolve_device
from slimqwen.model.kernels import announce_slow, announce_zeroed_gradients, check_gradients
from slimqwen.model.model import MtpCausalLM
from slimqwen.model.native import announce_noise
from slimqwen.parallel.job import join_job
from slimqwen.parallel.ranks import Ranks, join_ranks
from slimqwen.parallel.sharded_checkpoint import export, fill_own
from slimqwen.recipe import DistilRecipe, Execution, TextSettings
from slimqwen.training.cached_teacher import CachedTeacher, open_teacher_cache
from slimqwen.training.dry_run import dry_run
from slimqwen.training.heldout import HeldOut
from slimqwen.training.inputs import OpenInputs, TrainingInputs, check_ranks
from slimqwen.training.learning_rate import FILE as LEARNING_RATE_FILE
from slimqwen.training.learning_rate import RateChoice, Start, choose_learning_rate
from slimqwen.training.loading import load_live_teacher, load_student
from slimqwen.training.loggers import check_loggers, open_loggers
from slimqwen.training.loop import train
from slimqwen.training.metrics import MetricsLog, StepLog
from slimqwen.training.moments import load_moments
from slimqwen.training.settings import Settings
from slimqwen.training.shares import agree_on_shares
from slimqwen.training.span import whole_run
from slimqwen.training.state import saved_states
from slimqwen.training.teacher import Teacher
from slimqwen.training.trainer import Span, Student, Trainer

REVISION = 1  # raised when the same inputs and settings give another result; a training of another one is not continued


@makes_folder("inputs", kind="checkpoint")
def distil(
    inputs: TrainingInputs,
    out: Path,
    *,
    recipe: DistilRecipe,
    text: TextSettings,
    span: Span | None = None,
    execution: Execution = Execution(),  # noqa: B008 - immutable
    log: StepLog = StepLog(),  # noqa: B008 - immutable
    title: str = "distil",
    keep_state: bool = False,
) -> Path:
    """Train `inputs.student`, write the checkpoint to `out` and return that, or resume where an earlier call was interrupted.

    All processes that torchrun started must call it and see the same files: they train one student together
    (parallel/ranks.py). It may resume with another number of them.

    Args:
        inputs: the student, the tokens, and where there is one its teacher.
        text: its dtype is that of the teacher; the student trains in float32.
        span: the steps of the whole run that this call trains; all of them by default.
        execution: how the work is done; a training may resume with other settings of it.
        log: where the numbers of the steps go; by default into metrics.jsonl beside `out`.
        title: shown with the progress.
        keep_state: leave the training state in place: for `carry`, or for a caller that removes it (`remove_state`) only after
            it has noted that `out` is done, so that a kill in between costs nothing.
    """
    opened = OpenInputs.open(inputs, recipe)
    check_loggers(execution.loggers)
    heldout = HeldOut.load(execution, inputs.tokens, text.sequence_length, text.documents)
    settings = Settings(recipe, text, span or whole_run(recipe, text.sequence_length), execution)
    device = resolve_device(execution.device)
    check_gradients(opened.student.family, opened.student.config, device)
    with join_sharing(device, opened, settings) as ranks:
        check_ranks(opened, recipe, ranks, offloads=execution.offload != "none")
        stream = training_stream(inputs.tokens, text.sequence_length, text.seed, text.documents)
        cached_teacher = open_cached_teacher(opened, stream, settings)
        if ranks.is_first:
            claim_state_folder(out, opened, cached_teacher, settings, device)
            announce_training(opened, stream, settings, device)
        ranks.wait()

        student = load_student(opened.student, device, settings, ranks)
        teacher = cached_teacher or load_live_teacher(opened, student, settings, ranks)
        loaded = Loaded(opened, student, teacher, stream, settings.span, ranks)
        choice = choose_rate(loaded, settings, out, title) if recipe.learning_rate == "auto" else None
        trainer = begin_trainer(loaded, settings, out, choice)
        with reproducible(device):
            train(trainer, state_folder_of(out), open_metrics(log, out, trainer), title, heldout)
        if trainer.average is not None:
            trainer.average.copy_to_weights()

        write_result(out, loaded, choice)
        if ranks.is_first and not keep_state:
            remove_state(out)
        ranks.wait()
    return out


@dataclass(frozen=True)
class Loaded:
    """The loaded models and the text of a training, for trainers one after another.

    teacher: live or cached; None for a loss without one.
    """

    inputs: OpenInputs
    student: MtpCausalLM
    teacher: Teacher | None
    stream: RowStream
    span: Span
    ranks: Ranks

    def build(self, recipe: DistilRecipe, execution: Execution, *, anew: bool = True) -> Trainer:
        """Build a trainer. anew: with the moments that the training begins with, and not for a saved state."""
        checkpoint, moments = self.inputs.student, self.inputs.paths.moments
        student = Student(self.student, checkpoint.family, checkpoint.config)
        trainer = Trainer(student, self.teacher, self.stream, recipe, self.span, self.ranks, execution)
        if moments is not None and anew:
            load_moments(moments, trainer.parameters, trainer.optimizer)
        return trainer

    def refill(self) -> None:
        """Load the student's weights again from its checkpoint."""
        fill_own(self.student.held(), self.inputs.student)


@contextmanager
def join_sharing(device: torch.device, inputs: OpenInputs, settings: Settings) -> Iterator[Ranks]:
    """Join the ranks (`join_ranks`), which share models and experts as the recipe says, or as suits these models."""
    length = settings.text.sequence_length
    with join_job(device) as job:
        shares = agree_on_shares(job, inputs, settings.recipe, settings.execution, settings.most_rows, length)
        with join_ranks(device, *shares, offloads=settings.execution.offload != "none") as ranks:
            yield ranks


def open_cached_teacher(inputs: OpenInputs, stream: RowStream, settings: Settings) -> CachedTeacher | None:
    """Open the teacher cache; None where the teacher is live, or the loss has none."""
    recipe = settings.recipe
    if not recipe.is_taught or recipe.teacher.kind == "live":
        return None
    return open_teacher_cache(
        inputs.paths.teacher_cache,
        stream,
        rows=settings.course.first_row(settings.span.end_step),
        recipe=recipe,
        documents=settings.text.documents,
        on_bad_step=settings.execution.bad_steps.action,
        student=inputs.student,
        teacher=inputs.paths.teacher,
    )


def claim_state_folder(
    out: Path, inputs: OpenInputs, cached_teacher: CachedTeacher | None, settings: Settings, device: torch.device
) -> None:
    """Make the folder for `out`'s training state, or empty it where it was made from other inputs or settings."""
    span = settings.span
    made_from = inputs.identity() | {
        "revision": REVISION,
        "teacher_cache": None if cached_teacher is None else cached_teacher.identity,
        "recipe": settings.recipe.model_dump(mode="json"),
        "text": settings.text.model_dump(mode="json"),
        "span": [span.first_step, span.end_step, span.total_steps],
    }
    claim_folder(state_folder_of(out), fingerprint_value(made_from))
    if device.type == "cpu":
        keep_arithmetic(state_folder_of(out) / "arithmetic.json", f"the training of {out}")


def announce_training(inputs: OpenInputs, stream: RowStream, settings: Settings, device: torch.device) -> None:
    """Print what a person should know of the text, and of the student on this device, before it trains."""
    student, span, first_row = inputs.student, settings.span, settings.course.first_row
    for note in (
        *notes_of_length(student.config, settings.text.sequence_length),
        *notes_of_overlap(inputs.manifest),
    ):
        say(note)
    announce(stream, first_row(span.end_step) - first_row(span.first_step), device.type)
    announce_slow(student.family, student.config, device)
    announce_zeroed_gradients(student.family, student.config, device)
    announce_noise(student.config)


def choose_rate(loaded: Loaded, settings: Settings, out: Path, title: str) -> RateChoice:
    """Choose the learning rate by forks of the training; the student has its first weights again afterwards."""
    device = loaded.ranks.device_of(loaded.student)
    if device.type == "cuda":
        dry_run(loaded.build(settings.recipe, settings.execution))
    start = Start(
        build=loaded.build,
        execution=settings.execution,
        refill=loaded.refill,
        teacher=loaded.teacher,
        stream=loaded.stream,
        course=settings.course,
        span=settings.span,
        ranks=loaded.ranks,
        tokens=loaded.inputs.paths.tokens,
        documents=settings.text.documents,
        file=state_folder_of(out) / LEARNING_RATE_FILE,
        title=title,
    )
    with reproducible(device):
        return choose_learning_rate(start, settings.recipe)


def begin_trainer(loaded: Loaded, settings: Settings, out: Path, choice: RateChoice | None) -> Trainer:
    """Build the trainer of the training itself, at the chosen learning rate if one was chosen.

    On a GPU its memory is checked with a dry run, unless that was done for the choice. A CPU does not refuse memory: it swaps,
    or the system kills.
    """
    recipe = settings.recipe if choice is None else settings.recipe.at_learning_rate(choice.rate)
    has_begun = loaded.ranks.largest(int(any(saved_states(state_folder_of(out)))))
    trainer = loaded.build(recipe, settings.execution, anew=not has_begun)
    if trainer.device.type == "cuda" and choice is None:
        dry_run(trainer)
    return trainer


def open_metrics(log: StepLog, out: Path, trainer: Trainer) -> MetricsLog:
    """Open the metrics.jsonl of a training, and on the first rank the loggers of its execution."""
    path = log.metrics or out.parent / "metrics.jsonl"
    if not trainer.ranks.is_first:
        return MetricsLog(path, log.run, log.stage)
    tidy(path)  # killed while it was rewritten, it may not be rewritten again
    execution = trainer.execution
    shown = {**trainer.recipe.model_dump(mode="json"), "execution": execution.model_dump(mode="json")}
    name = f"{log.run}-stage-{log.stage}"
    loggers = open_loggers(execution.loggers, path.parent, state_folder_of(out), name, shown)
    return MetricsLog(path, log.run, log.stage, loggers)


def write_result(out: Path, loaded: Loaded, choice: RateChoice | None) -> None:
    """Write the trained checkpoint, with what lies beside the student's weights and the choice of its learning rate."""
    student = loaded.inputs.student
    if not loaded.ranks.is_first:
        export(loaded.student, None, student)
        return
    with atomic_folder(out) as folder:
        export(loaded.student, folder, student)
        copy_companions(student.folder, folder)
        if choice is not None:
            write_json(folder / LEARNING_RATE_FILE, choice.model_dump(mode="json"))


def state_folder_of(out: Path) -> Path:
    """Return the hidden folder beside `out` that holds its training state."""
    return out.parent / f".{out.name}.state"


def remove_state(out: Path) -> None:
    """Remove the training state of `out`."""
    remove_ours(state_folder_of(out))
