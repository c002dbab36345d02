"""The optimiser step: pretraining, distillation and the LM-only baseline are one step with different loss terms."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from slimqwen.core.errors import StageFailed
from slimqwen.core.warning import warn
from slimqwen.data.stream import Batch, RowStream
from slimqwen.families import Config, Family
from slimqwen.losses.balance import load_balancing_loss
from slimqwen.losses.divergence import Divergence
from slimqwen.losses.loss import (
    LossSums,
    LossWeights,
    Predictions,
    align,
    chunked_loss,
    means_of,
)
from slimqwen.model.kernels import BATCHED_EXPERTS
from slimqwen.model.model import MtpCausalLM
from slimqwen.model.routing import Routing, observe_routing
from slimqwen.parallel.ranks import ALONE, Ranks, add_up_gradients, clip_grad_norm, fully_sharded
from slimqwen.recipe import DistilRecipe, Execution
from slimqwen.training import schedules
from slimqwen.training.average import Average
from slimqwen.training.balancing import StepCounts
from slimqwen.training.batches import Batches, StepRows
from slimqwen.training.course import compute_course
from slimqwen.training.guard import Guard
from slimqwen.training.interrupt import Interrupts
from slimqwen.training.optimizer import build_optimizer, freeze_untrained, parts_of, set_learning_rate
from slimqwen.training.teacher import Teacher

MAX_SKIPPED_IN_A_ROW = 10  # beyond that the model is at fault, and not a batch
MAX_ROLLBACKS = 10  # in one training


class BadStep(Exception):
    """Bad step, described by the message, after which training goes back to the last saved state."""


@dataclass(frozen=True)
class Span:
    """Optimiser steps of the whole run that one stage trains: from `first_step` up to, not including, `end_step`.

    Learning rate, lambda, beta and the data order are functions of the step within the whole run, so that a stage
    continues where the one before it ended.
    """

    first_step: int
    end_step: int
    total_steps: int


@dataclass(frozen=True)
class Student:
    """Model in training, with its family and config."""

    model: MtpCausalLM
    family: Family
    config: Config


class Trainer:
    """Trainer of one student over one span of steps.

    teacher: None trains on the data alone (pretraining, the LM-only baseline).
    ranks: the processes that train the student together, each on its own rows; student and teacher are sharded over them.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        stream: RowStream,
        recipe: DistilRecipe,
        span: Span,
        ranks: Ranks = ALONE,
        execution: Execution = Execution(),  # noqa: B008 - immutable
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.stream = stream
        self.recipe = recipe
        self.execution = execution
        self.span = span
        self.course = compute_course(recipe, stream.sequence_length, span.total_steps)
        self.ranks = ranks
        self.guard = Guard(execution.bad_steps.spike_factor)
        self.interrupts = Interrupts()  # of the loop that makes the steps; none by default
        self.micro_batch_size = execution.micro_batch_size or recipe.batch_size
        self.divergence = Divergence(recipe.divergence.kind, recipe.divergence.temperature, recipe.divergence.beta)
        self.with_mtp = student.model.mtp is not None and bool({"mtp_lm", "mtp_kd"} & set(recipe.terms))
        # Without an MTP term the MTP module gets no gradient: it does not change, and has no optimiser state.
        parts = parts_of(student.family, student.config)
        self.parameters = freeze_untrained(student.model, parts, recipe.trained_parts, with_mtp=self.with_mtp)
        self.device = ranks.device_of(student.model)
        self.batches = Batches(stream, ranks, self.device)
        self.optimizer = build_optimizer(self.parameters, parts, recipe.optimizer)
        self.average: Average | None = None
        if recipe.ema_decay is not None:
            self.average = Average(self.parameters.values(), self.optimizer, recipe.ema_decay)
        self.blocks = [b for b in student.family.moe_blocks(student.config) if self.with_mtp or not b.is_mtp]
        student.model.set_experts_implementation(BATCHED_EXPERTS)
        if execution.recompute_activations:
            student.model.backbone.gradient_checkpointing_enable({"use_reentrant": False})

    def step(self, step: int) -> dict[str, float]:
        """Make one optimiser step over its rows (`Course`); return the means of its loss terms and its settings.

        A bad step (`Guard`) makes no update: it is left out, or StageFailed or BadStep is raised, as
        `execution.bad_steps` says. Raises StepInterrupted between two micro-batches where a rank got a signal.

        The host waits for the device once, at the end (`read`): before the optimiser moves, the guard needs the step's loss and
        norm. Experts that ranks share (`expert_ranks`) wait once more per block and pass, for the sizes that they exchange.
        """
        recipe = self.recipe
        progress = self.course.progress(step)
        kd_weight = schedules.kd_weight(progress, recipe.kd_weight)
        mtp_weight = schedules.mtp_weight(progress, recipe.mtp_weight)
        learning_rate = schedules.learning_rate(
            step, self.course, recipe.peak_learning_rate, recipe.final_learning_rate
        )
        set_learning_rate(self.optimizer, learning_rate)

        following = self.rows_of(step + 1) if step + 1 < self.span.end_step else None
        taken = self.batches.take(self.rows_of(step), following)
        main_targets, _ = taken.targets
        weights = LossWeights.from_terms(recipe.terms, kd_weight, mtp_weight).per_token(*taken.targets)
        batch = taken.batch.to(self.device)
        if self.teacher is not None:
            self.teacher.prepare(batch, self.interrupts.end_alone)
        micro_batches = batch.split(self.micro_batch_size)
        counts = self.count_ahead(micro_batches)

        self.optimizer.zero_grad(set_to_none=True)
        sums: LossSums | None = None
        losses = torch.zeros(2, device=self.device)  # the loss and, before its coefficient, its load-balancing part
        for micro_batch in self.interrupts.between(micro_batches):
            if self.ranks.mesh is not None:  # between copies of the model (`shard_ranks`) gradients cross once a step
                fully_sharded(self.student.model).set_requires_all_reduce(micro_batch is micro_batches[-1])
            loss, micro_sums, balance = self.backward(micro_batch, weights, counts, main_targets)
            losses += torch.stack([loss, balance])
            sums = micro_sums if sums is None else sums + micro_sums
        assert sums is not None

        add_up_gradients(self.parameters.values(), self.ranks)
        norm = clip_grad_norm(self.parameters.values(), recipe.optimizer.max_grad_norm)
        (loss_value, balance_value), means, grad_norm = self.read(losses, sums, norm)
        values = {
            "loss": loss_value,
            **means,
            "load_balancing": balance_value,
            "lambda": kd_weight,
            "beta": mtp_weight,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
        }
        problem = self.guard.problem(loss_value, grad_norm)
        if problem is None:
            self.optimizer.step()
            if self.average is not None:
                self.average.update(step - self.span.first_step)
            self.guard.accept(loss_value)
            return values
        self.leave_out(step, problem)
        return {name: value for name, value in values.items() if math.isfinite(value)} | {"skipped": 1}

    def rows_of(self, step: int) -> StepRows:
        """Return a step's rows in the order of training, later by those that rollbacks have left out."""
        return StepRows(self.course.first_row(step) + self.guard.rows_left_out(step), self.course.rows(step))

    def read(
        self, losses: torch.Tensor, sums: LossSums, grad_norm: torch.Tensor
    ) -> tuple[list[float], dict[str, float], float]:
        """Return the losses and the means of the terms over all ranks, and the norm; waits for the device, once.

        losses: [n], this rank's part of each. grad_norm: of all ranks; of offloaded weights on the CPU.
        """
        measured = sums.measured()
        totals = self.ranks.total(torch.stack([*losses.double().unbind(), *measured.values()]))
        *values, norm = torch.cat([totals, grad_norm.double().reshape(1).to(totals.device)]).tolist()
        number = len(losses)
        return values[:number], means_of(dict(zip(measured, values[number:], strict=True))), norm

    def leave_out(self, step: int, problem: str) -> None:
        """Leave out a bad step, with a warning.

        Raises StageFailed where the recipe stops at a bad step or there were too many of them, and BadStep where training
        goes back.
        """
        action = self.execution.bad_steps.action
        too_many = len(self.guard.rollbacks) == MAX_ROLLBACKS or self.guard.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW
        if action == "stop" or too_many:
            raise StageFailed(
                f"training stopped before optimiser step {step}: {problem}. "
                "The last saved state is intact; lower distil.learning_rate or check the data of this step."
            )
        if action == "roll_back":
            raise BadStep(problem)
        self.guard.skipped_in_a_row += 1
        if self.ranks.is_first:
            warn(f"optimiser step {step} is left out: {problem}")

    def backward(
        self, batch: Batch, weights: LossWeights, counts: StepCounts, step_tokens: int
    ) -> tuple[torch.Tensor, LossSums, torch.Tensor]:
        """Run forward and backward of one micro-batch; return (loss, sums, load balancing), all detached.

        counts: those of the step, which this micro-batch's rows are the next to meet.
        step_tokens: unmasked predictions of the whole step; padding is routed too, but its routing is not counted.
        """
        signal = None if self.teacher is None else self.teacher.signal(batch)
        predictions, routing = self.forward(batch)
        with self.mixed_precision():
            loss, sums = chunked_loss(
                predictions,
                self.student.model.head,
                weights,
                teacher=signal,
                divergence=self.divergence,
                chunk_tokens=self.execution.loss_chunk_tokens,
                unscaled=True,
            )
        logits, mask = [seen.logits for seen in routing], None if batch.mask is None else predictions.main_mask
        met = counts.meet(routing, predictions.main_mask, len(batch.tokens))
        balance = load_balancing_loss(logits, mask, met, step_tokens, self.student.family.router_scores)
        (loss + self.recipe.load_balancing_coefficient * balance).backward()
        return loss.detach(), sums, balance.detach()

    def forward(self, batch: Batch) -> tuple[Predictions, list[Routing]]:
        """Return the student's predictions, and its routing per MoE block."""
        model = self.student.model
        with observe_routing(model, self.blocks) as seen, self.mixed_precision():
            hidden = model(batch.tokens, with_mtp=self.with_mtp)
        predictions = align(batch.tokens, hidden.main, hidden.mtp, batch.mask, targets=batch.targets)
        return predictions, [seen[block.name] for block in self.blocks]

    def count_ahead(self, micro_batches: list[Batch]) -> StepCounts:
        """Return the expert counts of a step, of which these are this rank's rows.

        Where a row meets the counts of a later micro-batch (`StepCounts`), they are known before the first backward pass: at the cost of one
        more forward pass of the student, without gradient.
        """
        counts = self.begin_counts(sum(len(batch.tokens) for batch in micro_batches) * self.ranks.size)
        if self.recipe.load_balancing_coefficient > 0.0 and counts.needs_counting_ahead(len(micro_batches[0].tokens)):
            self.count_experts(counts, micro_batches)
        return counts

    def begin_counts(self, step_rows: int) -> StepCounts:
        """Return the expert counts of a step of so many rows on all ranks, none of which is counted yet."""
        return StepCounts(self.ranks, self.recipe.load_balancing_counts, step_rows)

    @torch.no_grad()
    def count_experts(self, counts: StepCounts, micro_batches: list[Batch]) -> None:
        """Count the experts that the student chooses on a step's rows, in a forward pass of their own."""
        for batch in self.interrupts.between(micro_batches):
            predictions, routing = self.forward(batch)
            counts.count_ahead(routing, predictions.main_mask, len(batch.tokens))

    def total_sums(self, sums: LossSums) -> LossSums:
        """Sum the loss terms over all ranks' predictions. All ranks measure the same terms."""
        measured = sums.measured()
        totals = self.ranks.total(torch.stack(list(measured.values())))
        return replace(sums, **dict(zip(measured, totals.unbind(), strict=True)))

    @contextmanager
    def mixed_precision(self) -> Iterator[None]:
        """Compute matrix products in bfloat16 over float32 weights on a GPU; in float32 on a CPU, where bfloat16 is slower.

        Sharded parameters are gathered in bfloat16 already (`parallel/ranks.py: shard`).
        """
        on_gpu = self.device.type == "cuda"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on_gpu and self.ranks.mesh is None):
            yield
