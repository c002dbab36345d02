"""The student on held-out text while it trains: loss, KL to a live teacher, MTP acceptance."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from slimqwen.core.errors import UserError
from slimqwen.data.store import load_manifest
from slimqwen.data.stream import Batch
from slimqwen.evaluation.acceptance import accepted_drafts, continue_greedily, heldout_prompts
from slimqwen.evaluation.fidelity import ONLY_MEASURED, heldout_rows
from slimqwen.losses.loss import LossSums, chunked_loss
from slimqwen.model.model import MtpCausalLM
from slimqwen.parallel.ranks import Ranks, fully_sharded
from slimqwen.recipe import DocumentBoundaries, Duration, Execution
from slimqwen.training.streamed_teacher import StreamedTeacher
from slimqwen.training.teacher import LiveTeacher, Teacher
from slimqwen.training.trainer import Trainer

PROMPTS, PROMPT_TOKENS, NEW_TOKENS, DEPTH = 8, 32, 32, 2  # MTP acceptance over 240 drafts: enough for a trend


@dataclass(frozen=True)
class HeldOut:
    """Held-out text that the student is measured on during its training.

    every: the interval, in steps or tokens. rows: the text, the same at every measurement. prompts: int64 [PROMPTS, PROMPT_TOKENS].
    """

    every: Duration
    rows: Batch
    prompts: Tensor

    @classmethod
    def load(
        cls, execution: Execution, tokens: Path, sequence_length: int, documents: DocumentBoundaries
    ) -> "HeldOut | None":
        """Load the text; None where `execution.evaluate_every` is not set. Raises UserError where there is too little of it."""
        if execution.evaluate_every is None:
            return None
        if load_manifest(tokens).heldout.documents == 0:
            raise UserError(f"{tokens} holds no held-out text, which execution.evaluate_every needs: leave that out.")
        rows = heldout_rows(tokens, sequence_length, execution.evaluate_tokens, documents)
        return cls(execution.evaluate_every, rows, heldout_prompts(tokens, PROMPTS, PROMPT_TOKENS))

    def measure(self, trainer: Trainer) -> dict[str, float]:
        """Return means over all rows: heldout_lm, heldout_kd ..., named as the step's own terms are; and acc_0, acc_1.

        The training is not affected: its modes, random state, gradients and sharding stay as they are.
        """
        with evaluation_mode(trainer):
            teacher = trainer.teacher if isinstance(trainer.teacher, LiveTeacher | StreamedTeacher) else None
            losses = measure_losses(trainer, self.rows, teacher)
            values = {f"heldout_{name}": value for name, value in losses.items()}
            if trainer.with_mtp:
                values |= self._measure_acceptance(trainer)
        return values

    def _measure_acceptance(self, trainer: Trainer) -> dict[str, float]:
        """Return the share of accepted drafts by depth, on every rank from all prompts.

        Dividing the prompts among ranks would gain nothing: the time goes into gathering sharded layers, together.
        """
        model = trainer.student.model
        with trainer.mixed_precision():
            sequences = continue_greedily(model.backbone, self.prompts.to(trainer.device), NEW_TOKENS)
            accepted = accepted_drafts(model, sequences, PROMPT_TOKENS, DEPTH)
        return {f"acc_{k}": value for k, value in enumerate(accepted.double().mean(dim=(0, 1)).tolist())}


def measure_losses(trainer: Trainer, rows: Batch, teacher: Teacher | None) -> dict[str, float]:
    """Return means over all rows, nats per token, by the names of `LossSums`: lm, mtp_lm; with a teacher kd, mtp_kd too.

    The student must be in `evaluation_mode`. Every rank must pass the same `rows`, and measures its share of them.
    """
    sums: LossSums | None = None
    own = _rows_of_rank(rows, trainer.ranks).to(trainer.device)
    if teacher is not None:
        teacher.prepare(own)
    for batch in own.split(trainer.micro_batch_size):
        predictions, _ = trainer.forward(batch)
        signal = None if teacher is None else teacher.signal(batch)
        with trainer.mixed_precision():
            _, measured = chunked_loss(
                predictions,
                trainer.student.model.head,
                ONLY_MEASURED,
                teacher=signal,
                chunk_tokens=trainer.execution.loss_chunk_tokens,
            )
        sums = measured if sums is None else sums + measured
    assert sums is not None
    return trainer.total_sums(sums).means()


def _rows_of_rank(rows: Batch, ranks: Ranks) -> Batch:
    """Return a rank's rows, equally many on each, since sharded models run on all at once; what is added is all padding."""
    missing = -len(rows.tokens) % ranks.size
    mask = torch.ones_like(rows.tokens, dtype=torch.bool) if rows.mask is None else rows.mask
    tokens = torch.cat([rows.tokens, rows.tokens[:1].expand(missing, -1)])
    mask = torch.cat([mask, torch.zeros_like(mask[:1]).expand(missing, -1)])
    places = rows.places + rows.places[:1] * missing
    mine = slice(ranks.rank, None, ranks.size)
    return Batch(tokens[mine], mask[mine] if rows.mask is not None or missing else None, places[mine])


@contextmanager
def evaluation_mode(trainer: Trainer) -> Iterator[None]:
    """Keep the student in evaluation mode, with the parameters outside its layers gathered for `generate`."""
    model: MtpCausalLM = trainer.student.model
    model.eval()
    if trainer.ranks.mesh is not None:
        fully_sharded(model).unshard()
    try:
        with torch.no_grad():
            yield
    finally:
        if trainer.ranks.mesh is not None:
            fully_sharded(model).reshard()
        model.train()
