"""Search for a training's learning rate: short forks of it at several rates, from its own start, measured on held-out text.

A fork is the training in miniature: a few of its steps, evenly spaced, each with the rows, the weights of the loss terms and
the place on the learning-rate curve that it has in the training, so that warm-up and decay happen within the fork. Afterwards
the start's weights are restored.
"""

import signal
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import inf, isfinite, log
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from slimqwen.artifacts import write_json
from slimqwen.core.errors import Preempted, StageFailed, UserError
from slimqwen.core.progress import Progress, say
from slimqwen.data.store import load_manifest
from slimqwen.data.stream import Batch, RowStream
from slimqwen.evaluation.fidelity import heldout_rows
from slimqwen.parallel.ranks import Ranks, reshard
from slimqwen.recipe import AUTO_REFERENCE, BadSteps, DistilRecipe, DocumentBoundaries, Execution
from slimqwen.training.cached_teacher import CachedTeacher
from slimqwen.training.course import Course
from slimqwen.training.heldout import evaluation_mode, measure_losses
from slimqwen.training.interrupt import Interrupts, StepInterrupted, defer_interrupts
from slimqwen.training.rate_search import FACTOR, lowest_point, next_exponent
from slimqwen.training.teacher import Teacher
from slimqwen.training.trainer import Span, Trainer

FILE = "learning_rate.json"
SHARE = 0.03  # of the training's tokens: the most that all forks together train on
MOST_FORKS = 6  # that share these tokens
FEWEST_STEPS = 4  # of a fork, however short the training
MEASURED_TOKENS = 8_192, 65_536  # the least and the most after each fork; in between as many as it trained on
AS_A_FORK = {"ema_decay": None}  # an average over few steps would still be the start
LONGER = 1.25  # times the rate that is best in a fork is best in the training: measured, docs/learning-rate.md

Measured = Literal["kd", "lm", "mtp_kd", "mtp_lm"]
IN_WORDS: dict[Measured, str] = {
    "kd": "KL to the teacher",
    "lm": "loss",
    "mtp_kd": "KL of the MTP head to the teacher",
    "mtp_lm": "loss of the MTP head",
}


class Fork(BaseModel):
    """A trained fork. value: the measured term after it; None where the training diverged."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rate: float
    value: float | None


class RateChoice(BaseModel):
    """Content of learning_rate.json: the forks of one training, and the rate chosen by them.

    steps, tokens: of each fork. training_steps, training_tokens: of the training.
    measured: the term that decides, nats per token, on `measured_tokens` tokens. before: its value before any step.
    text: "held-out", or "training": rows of the training text that no fork trains on.
    best: the best rate of a fork. chosen: the training's rate, LONGER times the best.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["slimqwen.learning_rate/1"] = "slimqwen.learning_rate/1"
    steps: int
    tokens: int
    training_steps: int
    training_tokens: int
    measured: Measured
    measured_tokens: int
    text: Literal["held-out", "training"]
    before: float | None = None
    forks: list[Fork] = []
    best: float | None = None
    chosen: float | None = None

    @property
    def share(self) -> float:
        """Share of the training's tokens that the forks trained on in all."""
        return len(self.forks) * self.tokens / self.training_tokens

    @property
    def rate(self) -> float:
        """The chosen rate, once there is one."""
        assert self.chosen is not None
        return self.chosen

    @classmethod
    def load(cls, file: Path) -> "RateChoice":
        """Read `file`. Raises UserError where it is not what slimqwen writes."""
        try:
            return cls.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            raise UserError(f"{file} is not what slimqwen writes: remove it, and the rate is chosen again.") from error


@dataclass(frozen=True)
class Start:
    """Start of a training, for forks of it.

    build: makes a trainer of a recipe, with the moments that the training begins with; one at a time is in memory.
    execution: of the training; forks stop at a bad step.
    refill: loads the start's weights into the model.
    tokens: the folder of tokens, with the held-out text.
    file: the choice so far, written after each fork.
    title: shown with the progress.
    """

    build: Callable[[DistilRecipe, Execution], Trainer]
    execution: Execution
    refill: Callable[[], None]
    teacher: Teacher | None
    stream: RowStream
    course: Course
    span: Span
    ranks: Ranks
    tokens: Path
    documents: DocumentBoundaries
    file: Path
    title: str


def choose_learning_rate(start: Start, recipe: DistilRecipe) -> RateChoice:
    """Train forks at rates a factor of 2 apart until the best has a worse one on each side, at most MOST_FORKS of them.

    The result of a fork is kept in `start.file`: after an interruption only the other forks are trained, and the same rate is
    chosen. All ranks must call it. The model is left with the start's weights.

    Args:
        recipe: with `learning_rate: auto`.

    Raises StageFailed where every fork diverged; Preempted and KeyboardInterrupt as `train` does.
    """
    choice = load_choice(start)
    if choice is not None and choice.chosen is not None:
        return choice
    steps = fork_steps(start.span)
    rows, teacher, where = choose_rows(start, steps)
    if choice is None:
        choice = RateChoice(
            steps=len(steps),
            tokens=sum(start.course.rows(step) for step in steps) * start.stream.sequence_length,
            training_steps=start.span.end_step - start.span.first_step,
            training_tokens=start.course.tokens(start.span.end_step) - start.course.tokens(start.span.first_step),
            measured=measured_term(recipe, start.teacher),
            measured_tokens=rows.tokens[:, 1:].numel(),
            text=where,
        )
        announce(start, cost_in_words(choice))

    measured = choice.measured

    def measure_at(rate: float, steps: Sequence[int], title: str) -> float:
        return train_fork(start, recipe.at_learning_rate(rate), steps, rows, teacher, title)[measured]

    if choice.before is None:
        before = measure_at(AUTO_REFERENCE, [], "")
        if not isfinite(before):
            raise StageFailed(
                f"the {IN_WORDS[measured]} is not finite before any training: check the student's weights."
            )
        choice = save_choice(start, choice, before=before)
        announce(start, f"before training: {IN_WORDS[measured]} {before:.4f}")
    while choice.chosen is None:
        values = {exponent_of(fork.rate): inf if fork.value is None else fork.value for fork in choice.forks}
        exponent = next_exponent(values, MOST_FORKS)
        if exponent is None:
            best = AUTO_REFERENCE * FACTOR ** best_exponent(values)
            choice = save_choice(start, choice, best=best, chosen=round_rate(LONGER * best))
        else:
            rate = AUTO_REFERENCE * FACTOR**exponent
            value = measure_at(rate, steps, f"{start.title}: learning rate {rate:g}")
            fork = Fork(rate=rate, value=value if isfinite(value) else None)
            choice = save_choice(start, choice, forks=[*choice.forks, fork])
            announce(start, f"learning rate {rate:g}: {IN_WORDS[measured]} {value:.4f} after {choice.steps:,} steps")
    announce(start, in_words(choice))
    return choice


def fork_steps(span: Span) -> list[int]:
    """Return the steps of the training that a fork makes: evenly spaced, as many as the forks' share of the tokens allows.

    In a short training at least FEWEST_STEPS, or half of its steps.
    """
    length = span.end_step - span.first_step
    count = min(max(int(SHARE * length / MOST_FORKS), FEWEST_STEPS), max(length // 2, 1))
    return [span.first_step + (2 * i + 1) * length // (2 * count) for i in range(count)]


def measured_term(recipe: DistilRecipe, teacher: Teacher | None) -> Measured:
    """Return the term that decides between forks: the main head's, or the MTP head's where only that one is trained."""
    is_main = bool({"lm", "kd"} & set(recipe.terms))
    if teacher is None:
        return "lm" if is_main else "mtp_lm"
    return "kd" if is_main else "mtp_kd"


def choose_rows(start: Start, steps: Collection[int]) -> tuple[Batch, Teacher | None, Literal["held-out", "training"]]:
    """Choose rows to measure forks on, about as many as a fork trains on, and the teacher to compare with on them.

    They are held-out text. Where there is none, or a cached teacher, whose cache holds training text only, they come from
    steps of the training that no fork makes.
    """
    least, most = MEASURED_TOKENS
    wanted = min(max(sum(map(start.course.rows, steps)) * start.stream.sequence_length, least), most)
    has_heldout = load_manifest(start.tokens).heldout.tokens > start.stream.sequence_length
    if has_heldout and not isinstance(start.teacher, CachedTeacher):
        rows = heldout_rows(start.tokens, start.stream.sequence_length, wanted, start.documents)
        return rows, start.teacher, "held-out"
    made = set(steps)
    left = [step for step in range(start.span.first_step, start.span.end_step) if step not in made] or list(steps)
    count = max(wanted // start.stream.sequence_length, 1)
    chosen = [(number, left[number * len(left) // count]) for number in range(count)]
    numbers = (start.course.first_row(step) + number % start.course.rows(step) for number, step in chosen)
    return start.stream.rows_at(list(dict.fromkeys(numbers))), start.teacher, "training"


def train_fork(
    start: Start, recipe: DistilRecipe, steps: Sequence[int], rows: Batch, teacher: Teacher | None, title: str
) -> dict[Measured, float]:
    """Train these steps from the start and measure the result, nats per token; infinite where the training diverged.

    The model has the start's weights before and after.
    """
    execution = start.execution.model_copy(update={"bad_steps": BadSteps()})  # stop: a fork that diverges is over
    fork = start.build(recipe.model_copy(update=AS_A_FORK), execution)
    fork.student.model.train()
    values = dict.fromkeys(IN_WORDS, inf)
    try:
        with defer_interrupts(start.ranks) as interrupted, _progress(start, steps, title) as progress:
            fork.interrupts = Interrupts(start.ranks, interrupted)
            for step in steps:
                loss = fork.step(step)["loss"]
                if progress is not None:
                    progress.advance(start.course.rows(step) * start.stream.sequence_length, loss=loss)
                _raise_if_interrupted(start.ranks.largest(interrupted()))
        with evaluation_mode(fork):
            found = measure_losses(fork, rows, teacher)
        values |= {name: found[name] for name in IN_WORDS if name in found and isfinite(found[name])}
    except StepInterrupted as stopped:
        _raise_if_interrupted(stopped.signal_number)
    except StageFailed:  # a step whose loss or gradient was not finite, the same on all ranks
        pass
    fork.optimizer.zero_grad(set_to_none=True)
    reshard(fork.student.model)
    if steps:
        start.refill()
    return values


def _progress(start: Start, steps: Sequence[int], title: str) -> AbstractContextManager[Progress | None]:
    """Return the progress line of a fork, on the first rank."""
    if not (start.ranks.is_first and steps):
        return nullcontext()
    return Progress(title, total=sum(map(start.course.rows, steps)) * start.stream.sequence_length, unit="tokens")


def _raise_if_interrupted(stop: int) -> None:
    """Raise what `train` raises for the signal `stop`, where it is not 0."""
    if stop == signal.SIGTERM:
        raise Preempted(
            "stopped by SIGTERM while the learning rate is chosen: finished forks are kept, and the same command continues."
        )
    if stop:
        raise KeyboardInterrupt


def best_exponent(values: Mapping[int, float]) -> float:
    """Return the best fork rate, as a power of FACTOR times the first rate. Raises StageFailed where all forks diverged."""
    lowest = lowest_point(values)
    if lowest is None:
        rates = ", ".join(f"{AUTO_REFERENCE * FACTOR**exponent:g}" for exponent in sorted(values))
        raise StageFailed(
            f"distil.learning_rate auto found none: the training diverges at each of {rates}; check the data and the student."
        )
    return lowest


def exponent_of(rate: float) -> int:
    """Return the power of FACTOR that `rate` is times the first rate."""
    return round(log(rate / AUTO_REFERENCE, FACTOR))


def round_rate(rate: float) -> float:
    """Round `rate` to three digits, so that the printed rate is exactly the one that is trained with."""
    return float(f"{rate:.3g}")


def load_choice(start: Start) -> RateChoice | None:
    """Load an earlier, possibly unfinished choice, on all ranks; None where there is none in the current format."""
    text = start.ranks.broadcast(start.file.read_text() if start.ranks.is_first and start.file.is_file() else None)
    try:
        return None if text is None else RateChoice.model_validate_json(text)
    except ValidationError:
        return None


def save_choice(start: Start, choice: RateChoice, **changes: object) -> RateChoice:
    """Write the choice with `changes` to `start.file`, and return it."""
    changed = choice.model_copy(update=changes)
    if start.ranks.is_first:
        write_json(start.file, changed.model_dump(mode="json"))
    return changed


def announce(start: Start, text: str) -> None:
    """Print a line, on the first rank."""
    if start.ranks.is_first:
        say(f"{start.title}: {text}")


def cost_in_words(choice: RateChoice) -> str:
    """Describe in a clause what the forks will cost at most, and why where that is more than their share."""
    most = MOST_FORKS * choice.tokens / choice.training_tokens
    reason = "" if most <= SHARE else f", more than {SHARE:.0%} because the training is short"
    return (
        f"learning rate auto: at most {MOST_FORKS} forks of {choice.steps:,} of the {choice.training_steps:,} steps, {most:.1%} of "
        f"the training's tokens in all{reason}; the {IN_WORDS[choice.measured]} on {choice.measured_tokens:,} tokens of {choice.text} "
        "text decides"
    )


def in_words(choice: RateChoice) -> str:
    """Describe in a clause the chosen rate, the measurements that decided, and their cost."""
    ordered = sorted(choice.forks, key=lambda fork: fork.rate)
    found = ", ".join(f"{fork.rate:g}: {'diverged' if fork.value is None else f'{fork.value:.4f}'}" for fork in ordered)
    return (
        f"learning rate {choice.rate:g} chosen by the {IN_WORDS[choice.measured]} after {len(choice.forks)} forks of "
        f"{choice.steps:,} steps, {choice.share:.1%} of the training's tokens: {found}"
    )
