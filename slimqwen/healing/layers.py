"""One layer of the student trained alone: its own stream in, the teacher's stream out."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from slimqwen.calibration.step import Step
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
    """Trains every weight of a layer (`LayerChange`) by AdamW on the relative error of its output, mean over tokens of
    |y - t|^2 / |t|^2, y the student's stream after the layer and t the teacher's.

    Relative, because the stream grows by orders of magnitude over the layers, and at the first tokens of a text by more. A
    layer whose error on the rows left out did not fall stays as it was.

    left_out: rows that no layer is trained on, bool [rows].
    """

    def __init__(self, student: Stream, recipe: HealingRecipe, seed: int, left_out: Tensor, rows_per_pass: int) -> None:
        self._student, self._recipe, self._seed = student, recipe, seed
        self._rows_per_pass = rows_per_pass
        self._validation = left_out.nonzero()[:, 0]
        self._training = (~left_out).nonzero()[:, 0]
        self._steps = recipe.epochs * math.ceil(len(self._training) / recipe.batch_size)

    def passes(self, _course: Course) -> int:
        """A forward pass counts one, forward and backward three."""
        return 1 + 3 * self._recipe.epochs

    def __call__(self, course: Course, hidden: Tensor, target: Target, folder: Path, progress: LayerProgress) -> None:
        step = course.student
        with trainable_weights(self._student, step) as weights, self._batched_experts(step):
            start = {name: tensor.detach().clone() for name, tensor in weights.items()}
            before = self._error(step, hidden, target)
            self._train(course, weights, hidden, target, progress)
            rounded_as_stored(self._student.checkpoint, step, weights)
            after = self._error(step, hidden, target)
            if not after < before:
                for name, tensor in weights.items():
                    tensor.data.copy_(start[name])
            changed = {name: tensor for name, tensor in weights.items() if not torch.equal(tensor, start[name])}
            for rows in self._chunks(torch.arange(len(hidden))):
                hidden[rows] = self._through(step, hidden, rows).float().cpu()
                progress.advance(hidden[rows, :, 0].numel())
            save_file(stored(self._student.checkpoint, step, changed), folder / CHANGED)
        said = f"{before:.3f} to {after:.3f}" if after < before else f"{before:.3f}, left as it is"
        progress.advance(0, error=said)

    def _train(
        self, course: Course, weights: dict[str, Tensor], hidden: Tensor, target: Target, progress: LayerProgress
    ) -> None:
        recipe = self._recipe
        seq = hidden.shape[1]
        progress.advance(3 * recipe.epochs * len(self._validation) * seq)  # which are not trained on
        optimizer = torch.optim.AdamW(weights.values(), lr=0.0, betas=BETAS, weight_decay=0.0)
        for number, rows in enumerate(self._batches(course)):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * self._course_of_rate(number)
            for some in self._chunks(rows):
                with torch.enable_grad():
                    errors = self._squared_errors(course.student, hidden, target, some)
                    (errors.sum() / (len(rows) * seq)).backward()
                progress.advance(3 * errors.numel())
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

    def _course_of_rate(self, step: int) -> float:
        """The learning rate's share of its peak."""
        warmup = max(1, round(WARMUP * self._steps))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / max(1, self._steps - warmup)))

    def _error(self, step: Step, hidden: Tensor, target: Target) -> float:
        """The root of the mean relative squared error on the rows left out."""
        parts = [self._squared_errors(step, hidden, target, rows).double() for rows in self._chunks(self._validation)]
        return math.sqrt(torch.cat(parts).mean().item())

    def _squared_errors(self, step: Step, hidden: Tensor, target: Target, rows: Tensor) -> Tensor:
        """|y - t|^2 / |t|^2 of each token, float32 [rows, seq]."""
        wanted = target[rows].to(self._student.device)
        missing = (self._through(step, hidden, rows).float() - wanted).square().sum(dim=-1)
        return missing / wanted.square().sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)

    def _through(self, step: Step, hidden: Tensor, rows: Tensor) -> Tensor:
        """The layer's output for some rows, [rows, seq, hidden]."""
        device = self._student.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            result: Tensor = step.run(hidden[rows].to(device), self._student.tokens[rows])
        return result

    def _chunks(self, rows: Tensor) -> Sequence[Tensor]:
        return tuple(rows.split(self._rows_per_pass))

    @contextmanager
    def _batched_experts(self, step: Step) -> Iterator[None]:
        block = moe_block(step)
        with nullcontext() if block is None else computed_by(BATCHED_EXPERTS, self._student.experts_of(block)):
            yield
