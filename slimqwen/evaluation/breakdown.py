"""Breakdown of a model's loss: by position in the text and by token frequency, with its calibration error."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slimqwen.core.progress import Progress
from slimqwen.data.packed import PackedTokens
from slimqwen.evaluation.fidelity import ALONE, Recording
from slimqwen.parallel.job import Job

CHUNK_TOKENS = 1024  # tokens whose logits exist at one time
CONFIDENCE_BINS = 15
COUNTED_TOKENS = 1 << 24  # in evenly spaced pieces of the text: with more, the ranks of tokens change little
PIECES = 64


@dataclass(frozen=True)
class Breakdown:
    """A model's mean loss by groups of tokens, and its calibration error.

    loss_by_position: tokens read before the predicted one, by powers of two -> mean loss, nats.
    loss_by_frequency: the predicted token's rank in the training text, by powers of ten -> mean loss, nats.
    calibration_error: the mean gap, over predictions, between the probability of the most likely token and its accuracy,
    in 15 equal bins of that probability (expected calibration error; Guo et al., 1706.04599).
    """

    loss_by_position: dict[str, float]
    loss_by_frequency: dict[str, float]
    calibration_error: float


@torch.inference_mode()
def breakdown(
    recording: Recording, sequence_length: int, ranks: Tensor, *, title: str = "where the loss is", job: Job = ALONE
) -> Breakdown:
    """Compute the breakdown of all predictions recorded on the ranks of `job`, with a few [chunk, vocab] tensors in memory.

    ranks: [vocab] int64, the rank of each token, from 1; 0 for a token that the text lacks (`token_ranks`).
    title: shown with the progress.
    """
    device = recording.head.device
    positions, frequencies = Means(), Means()
    bins = torch.zeros(3, CONFIDENCE_BINS, dtype=torch.float64, device=device)  # predictions, correct ones, confidence
    ranks = ranks.to(device)
    total = sum(int(predictions.main_mask.sum()) for predictions in recording.predictions)
    with Progress(title, total=total, unit="tokens") as progress:
        for hidden, labels, place in _chunks(recording, sequence_length):
            log_probs = torch.log_softmax((hidden @ recording.head.T).float(), dim=-1)
            loss = -log_probs.gather(1, labels[:, None]).squeeze(1).double()
            positions.add(place.double().add(1).log2().floor().long(), loss)
            rank = ranks[labels]
            decade = torch.where(rank > 0, rank.clamp(min=1).double().log10().sub(1e-9).ceil().long(), -1)
            frequencies.add(decade + 1, loss)
            confidence, top_token = log_probs.max(dim=-1)
            confidence = confidence.exp().double()
            index = (confidence * CONFIDENCE_BINS).long().clamp(max=CONFIDENCE_BINS - 1)
            correct = (top_token == labels).double()
            bins.index_add_(1, index, torch.stack([torch.ones_like(correct), correct, confidence]))
            progress.advance(len(labels))
    positions, frequencies = positions.on_all(job), frequencies.on_all(job)
    number, correct, confidence = job.total(bins.cpu())
    gaps = (correct - confidence).abs()  # the bin's share of the predictions cancels the divisor of its mean
    return Breakdown(
        loss_by_position={_powers_of_two(bucket): value for bucket, value in positions.items()},
        loss_by_frequency={_decade(bucket): value for bucket, value in frequencies.items()},
        calibration_error=float(gaps.sum() / number.sum()),
    )


class Means:
    """Mean losses by bucket; empty buckets are absent."""

    def __init__(self) -> None:
        self.sums: dict[int, tuple[float, int]] = {}

    def add(self, buckets: Tensor, loss: Tensor) -> None:
        """Add losses [n] float64 to their buckets [n] int64."""
        for bucket in buckets.unique().tolist():
            total, count = self.sums.get(bucket, (0.0, 0))
            here = loss[buckets == bucket]
            self.sums[bucket] = (total + float(here.sum()), count + here.numel())

    def on_all(self, job: Job) -> "Means":
        """Return the means over the losses of all ranks of `job`."""
        together = Means()
        for sums in job.gather(list(self.sums.items())):
            for bucket, (total, count) in sums:
                before = together.sums.get(bucket, (0.0, 0))
                together.sums[bucket] = (before[0] + total, before[1] + count)
        return together

    def items(self) -> Iterator[tuple[int, float]]:
        """Iterate over (bucket, mean loss) in order."""
        return ((bucket, total / count) for bucket, (total, count) in sorted(self.sums.items()))


def token_ranks(prefix: Path, vocab_size: int) -> Tensor:
    """Rank tokens by frequency in packed text, [vocab] int64: 1 is the most frequent, 0 does not occur.

    Long text is sampled in evenly spaced pieces. On a tie the lower token id is first.
    """
    text = PackedTokens(prefix)
    counts = np.zeros(vocab_size, dtype=np.int64)
    length = min(text.total_tokens, COUNTED_TOKENS) // PIECES + 1
    for piece in range(PIECES):
        begin = piece * text.total_tokens // PIECES
        end = min(begin + length, (piece + 1) * text.total_tokens // PIECES)
        counts += np.bincount(text.slice(begin, end), minlength=vocab_size)[:vocab_size]
    order = np.argsort(-counts, kind="stable")
    ranks = np.zeros(vocab_size, dtype=np.int64)
    ranks[order] = np.arange(1, vocab_size + 1)
    ranks[counts == 0] = 0
    return torch.from_numpy(ranks)


def _chunks(recording: Recording, sequence_length: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield chunks of (hidden, labels, position of the label's predecessor in its row) of all unmasked predictions."""
    for predictions in recording.predictions:
        for rows in predictions.main_mask.nonzero().squeeze(1).split(CHUNK_TOKENS):
            yield predictions.hidden[rows], predictions.labels[rows], rows % sequence_length


def _powers_of_two(bucket: int) -> str:
    """Name a bucket of positions: "1", "2-3", "4-7", .. tokens read."""
    first, last = 2**bucket, 2 ** (bucket + 1) - 1
    return str(first) if first == last else f"{first}-{last}"


def _decade(bucket: int) -> str:
    """Name a bucket of ranks: "unseen", "1", "2-10", "11-100", .. by frequency in the text."""
    if bucket == 0:
        return "unseen"
    return "1" if bucket == 1 else f"{10 ** (bucket - 2) + 1}-{10 ** (bucket - 1)}"
