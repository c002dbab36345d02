"""One layer of the student trained alone: its own stream in, the teacher's stream out."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from slimqwen.artifacts import write_json
from slimqwen.checkpoint.config import read_json
from slimqwen.healing.objective import Objective, PredictionError, StreamError
from slimqwen.healing.weights import round_as_stored, stored_tensors, trainable_weights
from slimqwen.layerwise.courses import Course
from slimqwen.layerwise.side_by_side import CHANGED, LayerProgress, Target
from slimqwen.layerwise.step import Step
from slimqwen.layerwise.stream import Stream, moe_block
from slimqwen.model.internals import computed_by
from slimqwen.model.kernels import BATCHED_EXPERTS
from slimqwen.parallel.job import Job
from slimqwen.recipe import HealingRecipe
from slimqwen.training.rate_search import FACTOR, lowest_point, next_exponent

WARMUP = 0.05  # of a layer's steps
BETAS = (0.9, 0.95)
MAX_GRAD_NORM = 1.0
FIRST_RATE, MOST_TRIALS = 4e-4, 6  # of the search for a rate: where it begins in the first layer, and when it ends
TRIAL, FEWEST_STEPS = 0.1, 4  # of a layer's steps, to try a rate; and at least
UNCHANGED = 1e-3  # of the stream: a layer that is nearer than this to the teacher's, or than `dtype` resolves, stays
LONGER = 1.5  # times the best rate of a trial is a layer trained with: measured, docs/healing.md
# What the result depends on beside the recipe:
ARITHMETIC = (WARMUP, BETAS, MAX_GRAD_NORM, FIRST_RATE, MOST_TRIALS, TRIAL, FEWEST_STEPS, UNCHANGED, LONGER)

RATE = "rate.json"  # in the folder of each layer that is finished: where the search of the next layer begins


class Split(NamedTuple):
    """Rows of the text, bool [rows] both: to measure whether a layer has become better, and those that it is trained on."""

    left_out: Tensor
    in_training: Tensor


class _Training:
    """The training of one layer: its weights and their start, its output for some rows, and the objective to lower."""

    def __init__(self, weights: dict[str, Tensor], layer: Callable[[Tensor], Tensor], objective: Objective) -> None:
        self.weights, self.layer, self.objective = weights, layer, objective
        self._start = {name: tensor.detach().clone() for name, tensor in weights.items()}

    def reset(self) -> None:
        """Set the weights back to where they began."""
        for name, tensor in self.weights.items():
            tensor.data.copy_(self._start[name])

    def changed(self) -> dict[str, Tensor]:
        """Return the weights that are not where they began."""
        return {name: tensor for name, tensor in self.weights.items() if not torch.equal(tensor, self._start[name])}


class Healing:
    """Trains every weight of a layer (`LayerChange`) by AdamW, on the student's stream towards the teacher's (`Objective`).

    A layer whose error on the rows left out did not fall stays as it was, and one that is where the teacher's is, to rounding.

    job: the ranks, each with rows of its own in both streams. Of a batch each computes the rows that it has; gradients and
    errors are those of all. The first writes. rows_per_pass: that go through a layer at once.
    """

    def __init__(
        self,
        student: Stream,
        teacher: Stream,
        recipe: HealingRecipe,
        *,
        seed: int,
        split: Split,
        rows_per_pass: int,
        job: Job,
    ) -> None:
        self._student, self._teacher, self._recipe, self._seed = student, teacher, recipe, seed
        self._job = job
        assert isinstance(student.tokens, Tensor), "rows are taken out of order"
        self._tokens = student.tokens
        self._rows_per_pass = rows_per_pass
        self._rounding = max(UNCHANGED, torch.finfo(student.dtype).eps)
        self._seq: int = student.shape[1]
        self._validation = split.left_out.nonzero()[:, 0]
        self._training = split.in_training.nonzero()[:, 0]
        self._steps = recipe.epochs * math.ceil(len(self._training) / recipe.batch_size)

    def passes(self, _course: Course) -> int:
        """Return how often: a forward pass counts one, forward and backward three; the search for a rate, of unknown length, none."""
        return 1 + 3 * self._recipe.epochs

    def __call__(
        self, course: Course, hidden: Tensor, target: Target, folder: Path, before: Path | None, progress: LayerProgress
    ) -> None:
        step, checkpoint = course.student, self._student.checkpoint
        with (
            trainable_weights(self._student, step) as weights,
            self._batched_experts(step),
            self._objective(course, target) as objective,
        ):
            layer = partial(self._through, step, hidden)
            training = _Training(weights, layer, objective)
            start = error = self._measure(training)
            rate, next_first = None, self._first_rate(before)
            if error > self._rounding**2:
                rate, next_first = self._rate(course, training, next_first, progress)
                progress.advance(0, rate=f"{rate:.2g}")
                self._train(training, list(self._batches(course)), rate, progress)
                round_as_stored(checkpoint, step, weights)
                error = self._measure(training)
            is_better = error < start
            if not is_better:
                training.reset()
            rows_not_trained_on = len(hidden) - (0 if rate is None else len(self._own(self._training)))
            progress.advance(3 * self._recipe.epochs * rows_not_trained_on * self._seq)
            changed = training.changed()
            for rows in self._chunks(torch.arange(len(hidden))):
                hidden[rows] = layer(rows).float().cpu()
                progress.advance(len(rows) * self._seq)
            if self._job.is_first:
                save_file(stored_tensors(checkpoint, step, changed), folder / CHANGED)
        if self._job.is_first:
            write_json(folder / RATE, {"next": rate / LONGER if rate is not None and is_better else next_first})
        begun, ended = objective.in_words(start), objective.in_words(error)
        progress.advance(0, **{objective.name: f"{begun} to {ended}" if is_better else f"{begun}, left as it is"})

    @staticmethod
    def _first_rate(before: Path | None) -> float:
        """Return where the search begins: at the best rate of the last layer that became better."""
        return FIRST_RATE if before is None else float(read_json(before / RATE)["next"])

    def _rate(
        self, course: Course, training: "_Training", first: float, progress: LayerProgress
    ) -> tuple[float, float]:
        """Return the recipe's learning rate; with `auto` LONGER times the one at which a tenth of the steps leave the smallest error.

        And where the next layer's search begins if this one does not become better: at `first` too, for a rate at which nothing
        is gained is no hint at a better one, and the lowest is the best of them. Where every rate breaks the layer it is the lowest.
        """
        if self._recipe.learning_rate != "auto":
            return self._recipe.learning_rate, first
        batches = list(islice(self._batches(course), max(FEWEST_STEPS, round(TRIAL * self._steps))))
        errors: dict[int, float] = {}
        while (exponent := next_exponent(errors, MOST_TRIALS)) is not None:
            progress.advance(0, rate=f"{first * FACTOR**exponent:.2g} tried")
            self._train(training, batches, first * FACTOR**exponent, None)
            error = self._measure(training)
            errors[exponent] = error if math.isfinite(error) else math.inf
            training.reset()
        best = lowest_point(errors)
        if best is None:
            lowest = first * FACTOR ** min(errors)
            return LONGER * lowest, lowest
        return float(LONGER * first * FACTOR**best), first

    @contextmanager
    def _objective(self, course: Course, target: Target) -> Iterator[Objective]:
        """Yield the error to the teacher's stream, or after the last decoder layer that to its predictions."""
        norm = course.student.norm
        if norm is None or course.student.number is None:
            yield StreamError(target, self._student.device)
            return
        teacher, teacher_norm = self._teacher, course.teacher[-1].norm
        assert teacher_norm is not None

        def teacher_hidden(rows: Tensor) -> Tensor:
            hidden: Tensor = teacher_norm(teacher.prepare(target.teacher_stream[rows]))
            return hidden

        with teacher.weights_after(course.teacher[-1]):
            yield PredictionError(norm, self._student.read_head(), teacher_hidden, teacher.read_head())

    def _train(
        self, training: "_Training", batches: Sequence[Tensor], rate: float, progress: LayerProgress | None
    ) -> None:
        """Take one step for each of the batches, at a learning rate that peaks at `rate`."""
        weights, objective = training.weights, training.objective
        optimizer = torch.optim.AdamW(weights.values(), lr=0.0, betas=BETAS, weight_decay=0.0)
        for number, rows in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = rate * share_of_peak(number, len(batches))
            for some in self._chunks(self._own(rows)):
                with torch.enable_grad(), self._mixed_precision():
                    loss = objective.total(training.layer(some), some) / (len(rows) * self._seq)
                loss.backward()
                if progress is not None:
                    progress.advance(3 * len(some) * self._seq)
            self._add_up_gradients(weights)
            torch.nn.utils.clip_grad_norm_(weights.values(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _add_up_gradients(self, weights: Mapping[str, Tensor]) -> None:
        """Add to this rank's gradients those of the other ranks' rows of the batch."""
        for weight in () if self._job.is_alone else weights.values():
            if weight.grad is None:  # no row is this rank's
                weight.grad = torch.zeros_like(weight)
            self._job.total(weight.grad)

    def _batches(self, course: Course) -> Iterator[Tensor]:
        """Yield the rows of each step, by their numbers in the whole text: every epoch has all of them in an order of its own."""
        number = -1 if course.student.number is None else course.student.number
        generator = torch.Generator().manual_seed((1_000_003 * self._seed + number + 1) % 2**63)  # of 64 bits, signed
        for _ in range(self._recipe.epochs):
            order = self._training[torch.randperm(len(self._training), generator=generator)]
            yield from order.split(self._recipe.batch_size)

    def _measure(self, training: "_Training") -> float:
        """Return the objective's mean over the tokens of the rows left out."""
        layer, total = training.layer, training.objective.total
        with self._mixed_precision():
            totals = [float(total(layer(rows), rows)) for rows in self._chunks(self._own(self._validation))]
        everywhere = self._job.total(torch.tensor(math.fsum(totals), dtype=torch.float64))
        return float(everywhere) / (len(self._validation) * self._seq)

    def _through(self, step: Step, hidden: Tensor, rows: Tensor) -> Tensor:
        """Return the layer's output for some rows, [rows, seq, hidden]."""
        with self._mixed_precision():
            result: Tensor = step.run(hidden[rows].to(self._student.device), self._tokens[rows])
        return result

    def _mixed_precision(self) -> AbstractContextManager[Any]:
        """Return autocast to bfloat16 products over float32 weights on a GPU, as in distillation."""
        device = self._student.device.type
        autocast: AbstractContextManager[Any] = torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")
        return autocast

    def _own(self, rows: Tensor) -> Tensor:
        """Return those of some rows of the whole text that this rank has, by their numbers here."""
        place = self._student.place
        return rows[(rows >= place.start) & (rows < place.stop)] - place.start

    def _chunks(self, rows: Tensor) -> Sequence[Tensor]:
        return tuple(rows.split(self._rows_per_pass)) if len(rows) else ()

    @contextmanager
    def _batched_experts(self, step: Step) -> Iterator[None]:
        block = moe_block(step)
        with nullcontext() if block is None else computed_by(BATCHED_EXPERTS, self._student.experts_of(block)):
            yield


def share_of_peak(step: int, steps: int) -> float:
    """Return the learning rate over its peak: a warm-up over the first twentieth, then half a cosine to 0 after the last step."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / (steps - warmup + 1)))
