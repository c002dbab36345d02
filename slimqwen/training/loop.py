"""The training loop around the optimiser steps: resuming, logging, saving the state, stopping."""

import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NoReturn

from slimqwen.core.bytesize import bytes_in_words
from slimqwen.core.errors import Preempted
from slimqwen.core.progress import Progress, say
from slimqwen.core.warning import warn
from slimqwen.training.garbage import collect_between_steps
from slimqwen.training.guard import GuardRecord, Rollback
from slimqwen.training.heldout import HeldOut
from slimqwen.training.interrupt import Interrupts, StepInterrupted, defer_interrupts
from slimqwen.training.metrics import MetricsLog
from slimqwen.training.rank_log import RankLog
from slimqwen.training.speed import Speed
from slimqwen.training.state import States
from slimqwen.training.trainer import BadStep, Trainer

SHOWN = ("lm", "kd", "mtp_lm", "mtp_kd", "heldout_lm", "heldout_kd", "acc_0", "mfu", "busiest_rank")


def train(
    trainer: Trainer, state_folder: Path, metrics: MetricsLog, title: str, heldout: HeldOut | None = None
) -> None:
    """Train to the end of the trainer's span, from the saved state if there is one.

    Ctrl-C and SIGTERM, on any rank, take effect between two micro-batches: a step that is not complete is left out, the state
    after the steps before it is saved, then all ranks raise KeyboardInterrupt or Preempted. A bad step takes the training
    back to its last saved state where the recipe sets that.

    heldout: the text to measure on meanwhile, at the intervals of `execution.evaluate_every`.
    """
    span, ranks, course = trainer.span, trainer.ranks, trainer.course
    speed, rank_log = Speed(trainer), RankLog(trainer, metrics)
    trainer.student.model.train()
    with defer_interrupts(ranks) as interrupted, _open_states(trainer, state_folder) as states, metrics:
        trainer.interrupts = Interrupts(ranks, interrupted)
        step = _begin(trainer, states)
        saving = Saving(trainer, states, interrupted)
        if ranks.is_first:
            metrics.rewind(step)
            _announce_counting(trainer)
        with _open_progress(trainer, title, step) as progress, collect_between_steps() as collect:
            while step < span.end_step:
                started = time.perf_counter()
                rank_log.begin()
                try:
                    values = trainer.step(step)
                except BadStep as bad:
                    bad_step, step = step, _roll_back(trainer, states, step, str(bad))
                    if progress is not None:
                        metrics.rewind(step)
                        progress.go_back(course.tokens(bad_step) - course.tokens(step))
                    continue
                except StepInterrupted as stopped:
                    saving.stop(step, stopped.signal_number)
                tokens = course.tokens(step + 1) - course.tokens(step)
                seconds = time.perf_counter() - started
                values |= speed.log_entry(tokens, seconds) | rank_log.log(step, seconds)
                values["tokens"] = course.tokens(step + 1)
                if heldout is not None and course.is_due(step, heldout.every):
                    values |= heldout.measure(trainer)
                if progress is not None:
                    metrics.append(step, {**values, **trainer.guard.log_entry(step)})
                    shown = {name: values[name] for name in SHOWN if name in values}
                    progress.advance(tokens, **shown, memory=bytes_in_words(values["memory_bytes"]))
                saving.save_where_due(step)
                step += 1
                collect()
    trainer.student.model.eval()


class Saving:
    """The saving of a training's state between two steps: at the intervals set, at the end, and before it stops.

    interrupted: returns the signal that this process got, 0 without one.
    """

    def __init__(self, trainer: Trainer, states: States, interrupted: Callable[[], int]) -> None:
        self._trainer = trainer
        self._states = states
        self._interrupted = interrupted
        self._saved_at = time.monotonic()

    def save_where_due(self, step: int) -> None:
        """Save the state after `step` if it is time. Raises KeyboardInterrupt or Preempted where a rank got a signal."""
        trainer, states, ranks = self._trainer, self._states, self._trainer.ranks
        states.poll()
        stop = ranks.largest(self._interrupted())
        minutes_due = ranks.largest(self._minutes_are_over())
        is_due = any(trainer.course.is_due(step, every) for every in trainer.execution.save_every)
        is_over = step + 1 == trainer.span.end_step
        if stop:
            self.stop(step + 1, stop)
        if is_over or minutes_due or is_due:
            states.save(step + 1, trainer.guard.record())
            self._saved_at = time.monotonic()
        if is_over:
            states.finish()

    def stop(self, steps: int, signal_number: int) -> NoReturn:
        """Save the state after `steps` steps, unless it is saved, and raise what `signal_number` stands for. All ranks must call it."""
        self._states.finish()
        if self._states.newest() != steps:
            self._states.save(steps, self._trainer.guard.record())
            self._states.finish()
        if signal_number == signal.SIGTERM:
            raise Preempted(f"stopped by SIGTERM after step {steps}, state saved: the same command continues.")
        raise KeyboardInterrupt

    def _minutes_are_over(self) -> bool:
        """Return whether it is time to save, by this process's clock."""
        minutes = [every.amount for every in self._trainer.execution.save_every if every.unit == "min"]
        return bool(minutes) and time.monotonic() - self._saved_at >= 60 * min(minutes)


def _open_states(trainer: Trainer, folder: Path) -> States:
    """Open the saved states of the training, and print what writing them while training goes on costs."""
    execution = trainer.execution
    asynchronous = trainer.device.type == "cuda" if execution.async_save is None else execution.async_save
    states = States(
        folder,
        trainer.parameters,
        trainer.optimizer,
        trainer.ranks,
        keep=execution.keep_states,
        asynchronous=asynchronous,
    )
    if asynchronous and trainer.ranks.is_first:
        say(
            f"states are written while training goes on, from a copy of {bytes_in_words(states.copy_bytes)} in each process's "
            "memory; execution.async_save: false avoids the copy"
        )
    return states


def _open_progress(trainer: Trainer, title: str, step: int) -> AbstractContextManager[Progress | None]:
    """Open the progress line, on the first rank."""
    if not trainer.ranks.is_first:
        return nullcontext()
    tokens = trainer.course.tokens
    first, end = trainer.span.first_step, trainer.span.end_step
    return Progress(title, total=tokens(end) - tokens(first), unit="tokens", start=tokens(step) - tokens(first))


def _announce_counting(trainer: Trainer) -> None:
    """Print a note where the load-balancing counts cost a forward pass of their own."""
    rows = trainer.course.rows(trainer.span.end_step - 1)  # of the largest batch
    note = trainer.begin_counts(rows).note(min(trainer.micro_batch_size, rows // trainer.ranks.size))
    if note is not None and trainer.recipe.load_balancing_coefficient > 0.0:
        say(note)


def _begin(trainer: Trainer, states: States) -> int:
    """Load the newest state, if there is one; return the step to begin with, its or the span's first."""
    saved = states.load()
    if saved is not None:
        step, record = saved
        trainer.guard.restore(record)
        return step
    if trainer.execution.bad_steps.action == "roll_back":  # there must be something to go back to
        states.save(trainer.span.first_step, GuardRecord())
    return trainer.span.first_step


def _roll_back(trainer: Trainer, states: States, bad_step: int, problem: str) -> int:
    """Load the newest state, leave out the rows from there to the bad step, and return the step to go on with.

    Leaving out only the bad step's own rows would not need a rollback, as the steps before it would repeat exactly. But the
    cause may be what those steps did to the model (PaLM, arXiv 2204.02311, section 5.1).
    """
    saved = states.load()
    assert saved is not None, "there is a state before the first step"
    step, record = saved
    rows = trainer.course.first_row(bad_step + 1) - trainer.course.first_row(step)
    rollback = Rollback(step=step, bad_step=bad_step, rows=rows, problem=problem)
    record = record.model_copy(update={"rollbacks": [*record.rollbacks, rollback]})
    trainer.guard.restore(record)
    states.replace_guard(step, record)
    if trainer.ranks.is_first:
        warn(f"optimiser step {bad_step} is bad: {problem}; back to step {step}, leaving out the {rows} rows since")
    return step
