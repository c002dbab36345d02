"""One layer of the student trained alone: its own stream in, the teacher's stream out."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from slimqwen.calibration.step import Step
from slimqwen.healing.objective import Objective, PredictionError, StreamError
from slimqwen.healing.weights import rounded_as_stored, stored, trainable_weights
from slimqwen.layerwise.courses import Course
from slimqwen.layerwise.experts import computed_by
from slimqwen.layerwise.side_by_side import CHANGED, LayerProgress, Target
from slimqwen.layerwise.stream import Stream, moe_block
from slimqwen.modeling.kernels import BATCHED_EXPERTS
from slimqwen.recipe import HealingRecipe

WARMUP = 0.05  # of a layer's steps
BETAS = (0.9, 0.95)
MAX_GRAD_NORM = 1.0


class Healing:
    """Trains every weight of a layer (`LayerChange`) by AdamW, on the student's stream towards the teacher's (`Objective`).

    A layer whose error on the rows left out did not fall stays as it was.

    left_out: rows that no layer is trained on, bool [rows]. rows_per_pass: that go through a layer at once.
    """

    def __init__(
        self,
        student: Stream,
        teacher: Stream,
        recipe: HealingRecipe,
        *,
        seed: int,
        left_out: Tensor,
        rows_per_pass: int,
    ) -> None:
        self._student, self._teacher, self._recipe, self._seed = student, teacher, recipe, seed
        self._rows_per_pass = rows_per_pass
        self._seq: int = student.shape[1]
        self._validation = left_out.nonzero()[:, 0]
        self._training = (~left_out).nonzero()[:, 0]
        self._steps = recipe.epochs * math.ceil(len(self._training) / recipe.batch_size)

    def passes(self, _course: Course) -> int:
        """A forward pass counts one, forward and backward three."""
        return 1 + 3 * self._recipe.epochs

    def __call__(self, course: Course, hidden: Tensor, target: Target, folder: Path, progress: LayerProgress) -> None:
        step, checkpoint = course.student, self._student.checkpoint
        with (
            trainable_weights(self._student, step) as weights,
            self._batched_experts(step),
            self._objective(course, target) as objective,
        ):
            layer = partial(self._through, step, hidden)
            start = {name: tensor.detach().clone() for name, tensor in weights.items()}
            before = self._mean(layer, objective)
            self._train(course, weights, layer, objective, progress)
            rounded_as_stored(checkpoint, step, weights)
            after = self._mean(layer, objective)
            if not after < before:
                for name, tensor in weights.items():
                    tensor.data.copy_(start[name])
            changed = {name: tensor for name, tensor in weights.items() if not torch.equal(tensor, start[name])}
            for rows in self._chunks(torch.arange(len(hidden))):
                hidden[rows] = layer(rows).float().cpu()
                progress.advance(len(rows) * self._seq)
            save_file(stored(checkpoint, step, changed), folder / CHANGED)
        start_in_words, end = objective.in_words(before), objective.in_words(after)
        said = f"{start_in_words} to {end}" if after < before else f"{start_in_words}, left as it is"
        progress.advance(0, **{objective.name: said})

    @contextmanager
    def _objective(self, course: Course, target: Target) -> Iterator[Objective]:
        """The stream of the teacher, or after the last decoder layer its predictions."""
        norm = course.student.norm
        if norm is None or course.student.number is None:
            yield StreamError(target, self._student.device)
            return
        teacher, teacher_norm = self._teacher, course.teacher[-1].norm
        assert teacher_norm is not None

        def teacher_hidden(rows: Tensor) -> Tensor:
            return teacher_norm(teacher.ready(target.teacher_stream[rows]))

        with teacher.weights_after(course.teacher[-1]):
            yield PredictionError(norm, self._student.head(), teacher_hidden, teacher.head())

    def _train(
        self,
        course: Course,
        weights: dict[str, Tensor],
        layer: Callable[[Tensor], Tensor],
        objective: Objective,
        progress: LayerProgress,
    ) -> None:
        recipe = self._recipe
        progress.advance(3 * recipe.epochs * len(self._validation) * self._seq)  # which are not trained on
        optimizer = torch.optim.AdamW(weights.values(), lr=0.0, betas=BETAS, weight_decay=0.0)
        for number, rows in enumerate(self._batches(course)):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * self._share_of_rate(number)
            for some in self._chunks(rows):
                with torch.enable_grad(), self._mixed_precision():
                    loss = objective.total(layer(some), some) / (len(rows) * self._seq)
                loss.backward()
                progress.advance(3 * len(some) * self._seq)
            torch.nn.utils.clip_grad_norm_(weights.values(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _batches(self, course: Course) -> Iterator[Tensor]:
        """The rows of each step: every epoch has all of them in an order of its own."""
        number = -1 if course.student.number is None else course.student.number
        generator = torch.Generator().manual_seed(1_000_003 * self._seed + number + 1)
        for _ in range(self._recipe.epochs):
            order = self._training[torch.randperm(len(self._training), generator=generator)]
            yield from order.split(self._recipe.batch_size)

    def _share_of_rate(self, step: int) -> float:
        """The learning rate over its peak: a warm-up, then half a cosine to 0 after the last step."""
        warmup = max(1, round(WARMUP * self._steps))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / max(1, self._steps - warmup)))

    def _mean(self, layer: Callable[[Tensor], Tensor], objective: Objective) -> float:
        """Over the tokens of the rows left out."""
        with self._mixed_precision():
            totals = [float(objective.total(layer(rows), rows)) for rows in self._chunks(self._validation)]
        return math.fsum(totals) / (len(self._validation) * self._seq)

    def _through(self, step: Step, hidden: Tensor, rows: Tensor) -> Tensor:
        """The layer's output for some rows, [rows, seq, hidden]."""
        with self._mixed_precision():
            result: Tensor = step.run(hidden[rows].to(self._student.device), self._student.tokens[rows])
        return result

    def _mixed_precision(self) -> AbstractContextManager[Any]:
        """bfloat16 products over float32 weights on a GPU, as in distillation."""
        device = self._student.device.type
        autocast: AbstractContextManager[Any] = torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")
        return autocast

    def _chunks(self, rows: Tensor) -> Sequence[Tensor]:
        return tuple(rows.split(self._rows_per_pass))

    @contextmanager
    def _batched_experts(self, step: Step) -> Iterator[None]:
        block = moe_block(step)
        with nullcontext() if block is None else computed_by(BATCHED_EXPERTS, self._student.experts_of(block)):
            yield
