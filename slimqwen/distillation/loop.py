"""The loop around the optimiser steps: where it starts, what is logged, when its state is saved, how it stops."""

import signal
import time
from contextlib import nullcontext
from pathlib import Path

from slimqwen.distillation.interrupt import deferred_interrupts
from slimqwen.distillation.metrics import MetricsLog
from slimqwen.distillation.state import load_state, save_state
from slimqwen.distillation.trainer import Trainer
from slimqwen.errors import Preempted
from slimqwen.progress import Progress

SHOWN = ("lm", "kd", "mtp_lm", "mtp_kd")


def train(trainer: Trainer, state_folder: Path, metrics: MetricsLog, title: str) -> None:
    """Train to the end of the trainer's span, from the saved state if there is one.

    Ctrl-C and SIGTERM, to whichever rank, are answered between two steps: the state is saved, then all of them raise
    KeyboardInterrupt or Preempted.
    """
    recipe, span, ranks = trainer.recipe, trainer.span, trainer.ranks
    saved = (trainer.parameters, trainer.optimizer, ranks)
    step = load_state(state_folder, *saved) or span.first_step
    if ranks.is_first:
        metrics.rewind(step)
    step_tokens = recipe.batch_size * trainer.stream.sequence_length
    total, done = (span.end_step - span.first_step) * step_tokens, (step - span.first_step) * step_tokens
    trainer.student.model.train()
    saved_at = time.monotonic()
    progress = Progress(title, total=total, unit="tokens", start=done) if ranks.is_first else None
    with deferred_interrupts(ranks) as interrupted, progress or nullcontext():
        while step < span.end_step:
            started = time.perf_counter()
            values = trainer.step(step)
            step += 1
            seconds = time.perf_counter() - started
            values |= {"tokens": step * step_tokens, "tokens_per_second": step_tokens / seconds}
            if progress is not None:
                metrics.append(step - 1, values)
                progress.advance(step_tokens, **{name: values[name] for name in SHOWN if name in values})
            stop, is_due = ranks.largest(interrupted()), ranks.largest(_is_due(recipe.save_every_minutes, saved_at))
            if stop or is_due or step % recipe.save_every_steps == 0 or step == span.end_step:
                save_state(state_folder, step, *saved, recipe.keep_states)
                saved_at = time.monotonic()
            if stop == signal.SIGTERM:
                raise Preempted(f"stopped by SIGTERM after step {step}, state saved: the same command continues.")
            if stop:
                raise KeyboardInterrupt
    trainer.student.model.eval()


def _is_due(minutes: float | None, saved_at: float) -> bool:
    """Whether it is time to save, by this process's clock."""
    return minutes is not None and time.monotonic() - saved_at >= 60 * minutes
