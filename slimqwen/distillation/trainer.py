"""The training loop: pretraining, distillation and the LM-only baseline are this one loop with other loss terms."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from slimqwen.data.stream import TokenStream
from slimqwen.distillation import schedules
from slimqwen.distillation.balance import expert_counts, load_balancing_loss
from slimqwen.distillation.interrupt import deferred_interrupts
from slimqwen.distillation.loss import (
    LossSums,
    LossWeights,
    Predictions,
    TeacherSignal,
    align,
    chunked_loss,
    count_targets,
)
from slimqwen.distillation.metrics import MetricsLog
from slimqwen.distillation.state import load_state, save_state
from slimqwen.errors import StageFailed
from slimqwen.families import Config, Family
from slimqwen.modeling.model import MtpCausalLM
from slimqwen.modeling.routing import Routing, observe_routing
from slimqwen.progress import Progress
from slimqwen.recipe import DistilRecipe


@dataclass(frozen=True)
class Span:
    """The optimiser steps of the whole run that one stage trains: `first_step` up to, not including, `end_step`.

    Learning rate, lambda, beta and the data order are functions of the step within the whole run, so a stage goes on
    where the one before it stopped.
    """

    first_step: int
    end_step: int
    total_steps: int


@dataclass(frozen=True)
class Student:
    """The model in training with the table and config that describe it."""

    model: MtpCausalLM
    family: Family
    config: Config


class Trainer:
    """Trains one student over one span of steps.

    teacher: None trains on the data alone (pretraining, the LM-only baseline).
    """

    def __init__(
        self, student: Student, teacher: MtpCausalLM | None, stream: TokenStream, recipe: DistilRecipe, span: Span
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.stream = stream
        self.recipe = recipe
        self.span = span
        self.micro_batch_size = recipe.micro_batch_size or recipe.batch_size
        self.with_mtp = student.model.mtp is not None and bool({"mtp_lm", "mtp_kd"} & set(recipe.terms))
        # Without an MTP term the module gets no gradient: it stays as it is, and has no optimiser state.
        self.parameters = student.model.tensors(with_mtp=self.with_mtp)
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = build_optimizer(self.parameters, recipe)
        self.blocks = [b for b in student.family.moe_blocks(student.config) if self.with_mtp or not b.is_mtp]
        if recipe.activation_checkpointing:
            student.model.backbone.gradient_checkpointing_enable({"use_reentrant": False})

    def train(self, state_folder: Path, metrics: MetricsLog, title: str) -> None:
        """Train to the end of the span, from the saved state if there is one.

        Ctrl-C and SIGTERM are answered between two steps: the state is saved, then KeyboardInterrupt is raised.
        """
        model, recipe, span = self.student.model, self.recipe, self.span
        step = load_state(state_folder, self.parameters, self.optimizer) or span.first_step
        metrics.rewind(step)
        step_tokens = recipe.batch_size * self.stream.sequence_length
        total, done = (span.end_step - span.first_step) * step_tokens, (step - span.first_step) * step_tokens
        model.train()
        with deferred_interrupts() as interrupted, Progress(title, total=total, unit="tokens", start=done) as progress:
            while step < span.end_step:
                started = time.perf_counter()
                values = self.step(step)
                step += 1
                seconds = time.perf_counter() - started
                values |= {"tokens": step * step_tokens, "tokens_per_second": step_tokens / seconds}
                metrics.append(step - 1, values)
                shown = {name: values[name] for name in ("lm", "kd", "mtp_lm", "mtp_kd") if name in values}
                progress.advance(step_tokens, **shown)
                if interrupted() or step % recipe.save_every_steps == 0 or step == span.end_step:
                    save_state(state_folder, step, self.parameters, self.optimizer)
                if interrupted():
                    raise KeyboardInterrupt
        model.eval()

    def step(self, step: int) -> dict[str, float]:
        """One optimiser step over `batch_size` rows; returns the means of its loss terms and its settings.

        Raises StageFailed before the optimiser moves if the loss or the gradient is not finite.
        """
        recipe = self.recipe
        progress = step / max(self.span.total_steps - 1, 1)
        kd_weight = schedules.kd_weight(progress, recipe.kd_weight)
        mtp_weight = schedules.mtp_weight(progress, recipe.mtp_weight)
        learning_rate = schedules.learning_rate(
            step, self.span.total_steps, recipe.warmup_steps, recipe.learning_rate, recipe.final_learning_rate
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

        tokens = self.stream.batch(step * recipe.batch_size, recipe.batch_size).to(self.device)
        main_targets, mtp_targets = count_targets(tokens)
        weights = LossWeights.from_terms(recipe.terms, kd_weight, mtp_weight).per_token(main_targets, mtp_targets)
        micro_batches = tokens.split(self.micro_batch_size)
        balances = recipe.load_balancing_coefficient > 0.0 and len(micro_batches) > 1
        counts = self.global_expert_counts(micro_batches) if balances else None

        self.optimizer.zero_grad(set_to_none=True)
        sums: LossSums | None = None
        loss = balance = 0.0
        for micro_batch in micro_batches:
            micro_loss, micro_sums, micro_balance = self.backward(micro_batch, weights, counts, tokens[:, 1:].numel())
            loss, balance = loss + micro_loss, balance + micro_balance
            sums = micro_sums if sums is None else sums + micro_sums
        assert sums is not None

        grad_norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), recipe.max_grad_norm))
        loss, balance = float(loss), float(balance)
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise StageFailed(
                f"training stopped before optimiser step {step}: loss {loss:g}, gradient norm {grad_norm:g}. "
                "The last saved state is intact; lower distil.learning_rate or look at the data of this step."
            )
        self.optimizer.step()
        return {
            "loss": loss,
            **sums.means(),
            "load_balancing": balance,
            "lambda": kd_weight,
            "beta": mtp_weight,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
        }

    def backward(
        self, tokens: torch.Tensor, weights: LossWeights, counts: list[torch.Tensor] | None, step_tokens: int
    ) -> tuple[torch.Tensor, LossSums, torch.Tensor]:
        """Forward and backward of one micro-batch, [rows, seq + 1]: (loss, sums, load balancing), all detached.

        counts: expert assignments of the whole step per block; None where this micro-batch is the whole step.
        """
        signal = self.teacher_signal(tokens)
        predictions, routing = self.forward(tokens)
        loss, sums = chunked_loss(
            predictions, self.student.model.head, weights, teacher=signal, chunk_tokens=self.recipe.loss_chunk_tokens
        )
        logits = [seen.logits for seen in routing]
        mask = torch.ones(logits[0].shape[0], dtype=torch.bool, device=self.device)
        if counts is None:
            counts = [expert_counts(seen.experts, mask, seen.logits.shape[-1]) for seen in routing]
        balance = load_balancing_loss(logits, mask, counts, step_tokens, self.student.family.router_scores)
        (loss + self.recipe.load_balancing_coefficient * balance).backward()
        return loss.detach(), sums, balance.detach()

    def forward(self, tokens: torch.Tensor) -> tuple[Predictions, list[Routing]]:
        """The student's predictions and its routing, per MoE block."""
        model = self.student.model
        with observe_routing(model, self.blocks) as seen, mixed_precision(self.device):
            hidden = model(tokens, with_mtp=self.with_mtp)
        return align(tokens, hidden.main, hidden.mtp), [seen[block.name] for block in self.blocks]

    def teacher_signal(self, tokens: torch.Tensor) -> TeacherSignal | None:
        """The teacher's final hidden states and head; its logits exist only a chunk at a time, inside the loss."""
        if self.teacher is None:
            return None
        teaches_mtp = self.with_mtp and self.recipe.mtp_target == "mtp"
        with torch.no_grad():
            hidden = self.teacher(tokens, with_mtp=teaches_mtp)
            aligned = align(tokens, hidden.main, hidden.mtp)
        return TeacherSignal(aligned.hidden, self.teacher.head, aligned.mtp_hidden)

    @torch.no_grad()
    def global_expert_counts(self, micro_batches: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """Expert assignments of the whole step, per block, by a forward pass without gradient.

        The load-balancing loss multiplies each micro-batch's probabilities with the counts of ALL of them
        (arXiv 2501.11873), so the counts must be known before the first backward pass. It costs one more student
        forward, and only where a step has several micro-batches; it makes any cut of the batch the same step.
        """
        totals: list[torch.Tensor] | None = None
        for tokens in micro_batches:
            _, routing = self.forward(tokens)
            mask = torch.ones(routing[0].logits.shape[0], dtype=torch.bool, device=self.device)
            counts = [expert_counts(seen.experts, mask, seen.logits.shape[-1]) for seen in routing]
            totals = counts if totals is None else [a + b for a, b in zip(totals, counts, strict=True)]
        assert totals is not None
        return totals


def build_optimizer(parameters: dict[str, torch.Tensor], recipe: DistilRecipe) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, not on norms, biases, A_log and dt_bias, which are all vectors."""
    trained = [p for p in parameters.values() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (recipe.adam_beta1, recipe.adam_beta2)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=betas, eps=1e-8, fused=True)


@contextmanager
def mixed_precision(device: torch.device) -> Iterator[None]:
    """bfloat16 matrix products over float32 weights on a GPU; plain float32 on a CPU, where bfloat16 is slower."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        yield
