"""Fidelity of a model on held-out text: its loss, its divergence from the teacher, and its use of experts."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from slimqwen.core.progress import Progress
from slimqwen.data.store import heldout_stream
from slimqwen.data.stream import Batch
from slimqwen.evaluation.shares import total_counts, total_losses
from slimqwen.families import Config, Family
from slimqwen.losses.balance import expert_counts
from slimqwen.losses.loss import LossWeights, Predictions, align, chunked_loss
from slimqwen.losses.signal import LiveSignal
from slimqwen.model.model import MtpCausalLM
from slimqwen.model.routing import observe_routing
from slimqwen.parallel.job import Job
from slimqwen.recipe import DocumentBoundaries

CHUNK_TOKENS = 1024  # tokens whose logits exist at one time: 0.6 GiB in float32 for a vocabulary of 152k
ALONE = Job()
ONLY_MEASURED = LossWeights(lm=0.0, kd=0.0, mtp_lm=0.0, mtp_kd=0.0)


@dataclass(frozen=True)
class Recording:
    """A model's outputs on the measured rows, or on a rank's share of them: all that a comparison needs, so that the model can be freed.

    predictions: one per batch, on the model's device. Their hidden states are tokens x hidden_size numbers, twice that
    with an MTP module: 0.5 GiB for 65,536 tokens of a bfloat16 model of hidden_size 2048.
    head: lm_head's weight, [vocab, hidden].
    utilisation: per MoE block (MTP's too), the share of the token-to-expert assignments that each expert received, on all ranks.
    """

    predictions: list[Predictions]
    head: Tensor
    utilisation: dict[str, list[float]]


def heldout_rows(
    tokens: Path, sequence_length: int, wanted_tokens: int, documents: DocumentBoundaries = "packed"
) -> Batch:
    """Read rows of held-out text for about `wanted_tokens` predictions, at least one row, at most all.

    Of 10 rows, 4 are rows 0, 2, 5, 7: evenly spaced, so that each kind of document is represented.
    """
    stream = heldout_stream(tokens, sequence_length, documents)
    wanted_rows = wanted_tokens * stream.rows_per_epoch // stream.targets_per_epoch
    rows = min(max(wanted_rows, 1), stream.rows_per_epoch)
    return stream.in_order([i * stream.rows_per_epoch // rows for i in range(rows)])


@torch.no_grad()
def record(
    model: MtpCausalLM,
    family: Family,
    config: Config,
    rows: Batch,
    *,
    batch_size: int,
    title: str,
    job: Job = ALONE,
) -> Recording:
    """Run `model` on `rows` in batches of `batch_size`, and record its outputs.

    job: whose ranks call it together, each with as many rows of its own (`Share.rows`), with a model that may be sharded over them.
    (So not in inference mode: what FSDP allocates there it could not use elsewhere.)
    """
    blocks = family.moe_blocks(config)
    num_experts = family.sizes(config)[family.expert]
    device = model.head.device
    counts = {block.name: torch.zeros(num_experts, dtype=torch.int64, device=device) for block in blocks}
    predictions = []
    with (
        observe_routing(model, blocks) as seen,
        Progress(title, total=rows.tokens[:, 1:].numel(), unit="tokens") as progress,
    ):
        for batch in rows.to(device).split(batch_size):
            hidden = model(batch.tokens)
            predictions.append(align(batch.tokens, hidden.main, hidden.mtp, batch.mask))
            for name in counts:
                counts[name] += expert_counts(seen[name].experts, predictions[-1].main_mask, num_experts)
            progress.advance(batch.tokens[:, 1:].numel())
    # After the forward passes a sharded model's lm_head is gathered.
    return Recording(predictions, model.head.detach(), shares_of(counts, job))


def shares_of(counts: Mapping[str, Tensor], job: Job = ALONE) -> dict[str, list[float]]:
    """Return the share of each expert, by block, of the assignments counted on all ranks."""
    return {name: (count.double() / count.sum()).tolist() for name, count in total_counts(counts, job).items()}


@torch.inference_mode()
def compare(
    model: Recording, teacher: Recording | None, *, title: str = "compare", job: Job = ALONE
) -> dict[str, float]:
    """Compute means over the predictions of all ranks, in nats, by the names of `LossSums`.

    They are lm, and mtp_lm with an MTP module; with a teacher also kd, top1_agreement and mtp_kd.
    Both recordings must be of the same rows in the same batches. The MTP head is compared with the teacher's main
    distribution for the same token (`mtp_target: main`), for the teacher itself too: `compare(teacher, teacher)` has
    kd 0 and top1_agreement 1 exactly, while its mtp_kd is the divergence of its own drafts from its predictions.

    title: shown with the progress.
    """
    signals = (
        [None] * len(model.predictions)
        if teacher is None
        else [LiveSignal(predictions.hidden, teacher.head) for predictions in teacher.predictions]
    )
    sums = []
    total = sum(len(predictions.labels) for predictions in model.predictions)
    with Progress(title, total=total, unit="tokens") as progress:
        for predictions, signal in zip(model.predictions, signals, strict=True):
            sums.append(
                chunked_loss(predictions, model.head, ONLY_MEASURED, teacher=signal, chunk_tokens=CHUNK_TOKENS)[1]
            )
            progress.advance(len(predictions.labels))
    return total_losses(reduce(operator.add, sums), job).means()
