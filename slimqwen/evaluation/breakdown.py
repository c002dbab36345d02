"""Where a model is wrong: its loss by how far into the text and by how rare a token is, and whether it knows its odds."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slimqwen.core.progress import Progress
from slimqwen.data.packed import PackedTokens
from slimqwen.evaluation.fidelity import Recording

CHUNK_TOKENS = 1024  # rows whose logits exist at one time
CONFIDENCE_BINS = 15
COUNTED_TOKENS = 1 << 24  # of the text, evenly spaced pieces: ranks of tokens change little with more
PIECES = 64


@dataclass(frozen=True)
class Breakdown:
    """loss_by_position: tokens read before the predicted one, by powers of two -> mean loss, nats.
    loss_by_frequency: the predicted token's rank in the training text, by powers of ten -> mean loss, nats.
    calibration_error: the mean gap, over predictions, between the probability of the most likely token and how often
    that token is right, in 15 equal bins of that probability (expected calibration error; Guo et al., 1706.04599).
    """

    loss_by_position: dict[str, float]
    loss_by_frequency: dict[str, float]
    calibration_error: float


@torch.inference_mode()
def breakdown(
    recording: Recording, sequence_length: int, ranks: Tensor, *, title: str = "where the loss is"
) -> Breakdown:
    """Of everything that was recorded, in a few [chunk, vocab] tensors.

    ranks: [vocab] int64, the rank of each token, from 1; 0 for one that the text does not have (`token_ranks`).
    title: shown with the progress.
    """
    device = recording.head.device
    positions, frequencies = Means(), Means()
    bins = torch.zeros(3, CONFIDENCE_BINS, dtype=torch.float64, device=device)  # predictions, right ones, confidence
    ranks = ranks.to(device)
    total = sum(int(said.main_mask.sum()) for said in recording.predictions)
    with Progress(title, total=total, unit="tokens") as progress:
        for hidden, labels, place in _chunks(recording, sequence_length):
            log_probs = torch.log_softmax((hidden @ recording.head.T).float(), dim=-1)
            loss = -log_probs.gather(1, labels[:, None]).squeeze(1).double()
            positions.add(place.double().add(1).log2().floor().long(), loss)
            rank = ranks[labels]
            decade = torch.where(rank > 0, rank.clamp(min=1).double().log10().sub(1e-9).ceil().long(), -1)
            frequencies.add(decade + 1, loss)
            confidence, favourite = log_probs.max(dim=-1)
            confidence = confidence.exp().double()
            index = (confidence * CONFIDENCE_BINS).long().clamp(max=CONFIDENCE_BINS - 1)
            right = (favourite == labels).double()
            bins.index_add_(1, index, torch.stack([torch.ones_like(right), right, confidence]))
            progress.advance(len(labels))
    predictions, right, confidence = bins
    gaps = (right - confidence).abs()  # each times the bin's share of the predictions, which cancels its mean's divisor
    return Breakdown(
        loss_by_position={_powers_of_two(bucket): value for bucket, value in positions.items()},
        loss_by_frequency={_decade(bucket): value for bucket, value in frequencies.items()},
        calibration_error=float(gaps.sum() / predictions.sum()),
    )


class Means:
    """Mean loss by bucket; a bucket that got nothing is left out."""

    def __init__(self) -> None:
        self.sums: dict[int, tuple[float, int]] = {}

    def add(self, buckets: Tensor, loss: Tensor) -> None:
        """buckets: [n] int64. loss: [n] float64."""
        for bucket in buckets.unique().tolist():
            total, count = self.sums.get(bucket, (0.0, 0))
            here = loss[buckets == bucket]
            self.sums[bucket] = (total + float(here.sum()), count + here.numel())

    def items(self) -> Iterator[tuple[int, float]]:
        return ((bucket, total / count) for bucket, (total, count) in sorted(self.sums.items()))


def token_ranks(prefix: Path, vocab_size: int) -> Tensor:
    """[vocab] int64: 1 for the most frequent token of packed text, 0 for one that it does not have.

    Of long text evenly spaced pieces are counted. On a tie the lower token id is first.
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
    """(hidden, labels, tokens read before the label's predecessor) of the predictions that count, a few at a time."""
    for predictions in recording.predictions:
        for rows in predictions.main_mask.nonzero().squeeze(1).split(CHUNK_TOKENS):
            yield predictions.hidden[rows], predictions.labels[rows], rows % sequence_length


def _powers_of_two(bucket: int) -> str:
    """ "1", "2-3", "4-7", ..: how many tokens the model had read."""
    first, last = 2**bucket, 2 ** (bucket + 1) - 1
    return str(first) if first == last else f"{first}-{last}"


def _decade(bucket: int) -> str:
    """ "unseen", "1", "2-10", "11-100", ..: ranks of tokens in the text."""
    if bucket == 0:
        return "unseen"
    return "1" if bucket == 1 else f"{10 ** (bucket - 2) + 1}-{10 ** (bucket - 1)}"
