"""The distillation loss (method.md section 5), in one pass over the vocabulary and a few tokens at a time.

    L = (1 - lambda) L_LM + lambda L_KD + beta * [(1 - lambda) L_MTP-LM + lambda L_MTP-KD]

`align` puts both heads' predictions on the token they predict; `count_targets` counts them, before the
first forward pass; `LossWeights` holds the four coefficients; `chunked_loss` is the loss, its gradients and what is
reported about it. Every reduction here is a sum: dividing by the step's number of predictions happens once, in the
weights (`LossWeights.per_token`), so that micro-batches and ranks add up to the loss of the whole batch.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from slimqwen.losses.blocks import chunk_size, heads_together
from slimqwen.losses.divergence import FORWARD_KL, Divergence, softmax_dtype
from slimqwen.losses.head import Heads, HeadTerm, Logits
from slimqwen.losses.signal import TeacherSignal
from slimqwen.recipe import LossTerm


@dataclass(frozen=True)
class Predictions:
    """A model's predictions of each token of a batch: row n of every tensor is about predicting `labels[n]`.

    N = batch * seq. A row whose mask is False counts nowhere and may hold anything, NaN included.
    """

    labels: Tensor  # [N] int64, the token to predict
    hidden: Tensor  # [N, hidden], the main head's input: the model's final hidden state
    main_mask: Tensor  # [N] bool, where the main head's prediction counts
    mtp_hidden: Tensor | None  # [N, hidden], the MTP head's input, None for a model without MTP
    mtp_mask: Tensor  # [N] bool, where the MTP head's prediction counts; main_mask is True there too
    targets: int | None = None  # how often main_mask is True; None: to be counted, which waits for the device


def align(
    tokens: Tensor,
    hidden: Tensor,
    mtp_hidden: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    targets: int | None = None,
) -> Predictions:
    """Line both heads up on the token that they predict.

    For each row t_0 .. t_seq the model ran on t_0 .. t_{seq-1} and its h_i predicts t_{i+1}. The MTP module saw h_i and
    the embedding of t_{i+1}, and its m_i predicts t_{i+2} (arXiv 2412.19437, equations 21-25): one token later, so m is
    moved by one. A row of five tokens A B C D E (seq = 4):

        n                    0     1     2     3
        labels[n]            B     C     D     E
        hidden[n]            h_0   h_1   h_2   h_3     h_i saw t_0 .. t_i
        mtp_hidden[n]        -     m_0   m_1   m_2     m_i saw t_0 .. t_{i+1}; m_3 predicts beyond the row: dropped
        main_mask[n]         1     1     1     1
        mtp_mask[n]          0     1     1     1
        if E is padding:
        main_mask[n]         1     1     1     0
        mtp_mask[n]          0     1     1     0

    So at any n both heads have seen the same tokens, and the teacher's main distribution there suits both.

    Args:
        tokens: [batch, seq + 1] int64.
        hidden: [batch, seq, hidden], of the model that ran on tokens[:, :-1].
        mtp_hidden: [batch, seq, hidden], or None.
        mask: [batch, seq + 1] bool, True at real tokens; None when there is no padding.
        targets: the main head's predictions that count, where the caller has their number.
    """
    main_mask, mtp_mask = _target_masks(tokens, mask)
    return Predictions(
        labels=tokens[:, 1:].flatten(),
        hidden=hidden.flatten(0, 1),
        main_mask=main_mask.flatten(),
        mtp_hidden=None if mtp_hidden is None else F.pad(mtp_hidden[:, :-1], (0, 0, 1, 0)).flatten(0, 1),
        mtp_mask=mtp_mask.flatten(),
        targets=main_mask.numel() if mask is None else targets,
    )


def count_targets(tokens: Tensor, mask: Tensor | None = None) -> tuple[int, int]:
    """Count the predictions that count, of the main head and of the MTP head: the normalisers of a batch.

    Five tokens without padding: (4, 3). Over micro-batches and ranks the counts add up.

    Args:
        tokens: [batch, seq + 1]; only its shape is used.
        mask: [batch, seq + 1] bool, True at real tokens; None when there is no padding.
    """
    main_mask, mtp_mask = _target_masks(tokens, mask)
    return int(main_mask.sum()), int(mtp_mask.sum())


def _target_masks(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return where the main and the MTP prediction of tokens[:, 1:] count: target and last inputs are real; [batch, seq]."""
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    main_mask = real[:, :-1] & real[:, 1:]
    mtp_mask = torch.zeros_like(main_mask)
    mtp_mask[:, 1:] = main_mask[:, 1:] & real[:, :-2]
    return main_mask, mtp_mask


@dataclass(frozen=True)
class LossWeights:
    """The coefficients of the four terms."""

    lm: float
    kd: float
    mtp_lm: float
    mtp_kd: float

    @classmethod
    def from_terms(cls, terms: Collection[LossTerm], kd_weight: float, mtp_weight: float) -> "LossWeights":
        """Split each head between data and teacher by lambda = `kd_weight`, and scale the MTP head by beta = `mtp_weight`.

        Of a head with only one of its two terms, that term has the head's whole weight.
        """
        lm, kd = _split("lm" in terms, "kd" in terms, kd_weight)
        mtp_lm, mtp_kd = _split("mtp_lm" in terms, "mtp_kd" in terms, kd_weight)
        return cls(lm=lm, kd=kd, mtp_lm=mtp_weight * mtp_lm, mtp_kd=mtp_weight * mtp_kd)

    def per_token(self, main_tokens: int, mtp_tokens: int) -> "LossWeights":
        """Divide by the predictions of the whole step (`count_targets`, over all its micro-batches and ranks)."""
        main, mtp = max(main_tokens, 1), max(mtp_tokens, 1)  # of no predictions the sum is 0, whatever it is divided by
        return LossWeights(lm=self.lm / main, kd=self.kd / main, mtp_lm=self.mtp_lm / mtp, mtp_kd=self.mtp_kd / mtp)


def _split(has_lm: bool, has_kd: bool, kd_weight: float) -> tuple[float, float]:
    return (1.0 - kd_weight, kd_weight) if has_lm and has_kd else (float(has_lm), float(has_kd))


@dataclass(frozen=True)
class LossSums:
    """Unweighted sums over predictions, for reporting: detached float64 scalars on the model's device, nats.

    None is what was not measured: kd, mtp_kd and top1_agreement without a teacher, mtp_* without an MTP head.
    """

    lm: Tensor  # cross entropy with the data
    # KL(teacher || student): 0 means equal to the teacher. Of a teacher's most likely tokens (`StoredSignal`) it is the
    # part that they and their tail show, which is never more.
    kd: Tensor | None
    mtp_lm: Tensor | None
    mtp_kd: Tensor | None
    top1_agreement: Tensor | None  # predictions whose most likely token is the teacher's, main head
    main_tokens: Tensor  # predictions that lm, kd and top1_agreement are sums over
    mtp_tokens: Tensor | None  # predictions that mtp_lm and mtp_kd are sums over

    def __add__(self, other: "LossSums") -> "LossSums":
        pairs: list[tuple[Any, Any]] = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        sums: list[Any] = [None if a is None or b is None else a + b for a, b in pairs]
        return LossSums(*sums)

    def measured(self) -> dict[str, Tensor]:
        """Return the fields that were measured, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def means(self) -> dict[str, float]:
        """Return the mean per prediction of each field that was measured on at least one prediction; waits for the device."""
        measured = self.measured()
        return means_of(dict(zip(measured, torch.stack(list(measured.values())).tolist(), strict=True)))


def means_of(sums: Mapping[str, float]) -> dict[str, float]:
    """Return the mean per prediction of each sum, named as in `LossSums`, that is over at least one prediction."""
    tokens = {name: sums["main_tokens"] for name in ("lm", "kd", "top1_agreement")}
    tokens |= {name: sums.get("mtp_tokens", 0.0) for name in ("mtp_lm", "mtp_kd")}
    return {name: sums[name] / number for name, number in tokens.items() if name in sums and number > 0}


def chunked_loss(
    predictions: Predictions,
    head: Tensor,
    weights: LossWeights,
    *,
    teacher: TeacherSignal | None = None,
    divergence: Divergence = FORWARD_KL,
    chunk_tokens: int,
    unscaled: bool = False,
) -> tuple[Tensor, LossSums]:
    """Compute the weighted sum of the four terms over the predictions that count, and the unweighted sums.

        loss = lm * sum CE(labels, student) + kd * sum divergence(teacher, student) + the same two of the MTP head

    1. Cast the heads to autocast's dtype, where that is on; all that follows is outside autograd.
    2. Take the next of the predictions that count, of which logits are in memory (`chunk_size`). Compute the teacher's logits (or look its
       most likely tokens up), which serve both heads unless the teacher's own MTP head is the target.
    3. For the main head and the MTP head, on a GPU both together and on a CPU one after the other (`heads_together`):
       a. logits of the chunk, from its hidden states: one product of each head.
       b. cross entropy and divergence of each row, and in place of the logits their gradient: by a kernel (kernel.py), or block by
          block of the chunk (targets.py). With the forward KL the gradient is, per row,
          lm (softmax(student) - onehot(label)) + kd (softmax(student) - softmax(teacher)).
       c. gradients of the chunk's hidden states and of the head, from that of the logits: two products.
    4. After the last chunk: sum up the loss.
    5. Hand loss and gradients to autograd, whose backward pass scales them (`_WithGradients`).

    So at most `chunk_tokens` rows of logits of each model exist at one time, on average of the two, and no [N, vocab] tensor is ever
    made. Matrix products are in the weights' dtype, or in autocast's where that is on; softmax and the accumulated gradient of the head are in float32 (float64 where the head is float64), sums in float64.

    Args:
        predictions: the student's, from `align`.
        head: [vocab, hidden], the student's lm_head, which the MTP head shares.
        weights: coefficients of sums, hence already divided: `LossWeights.per_token`. kd terms need a teacher.
        teacher: over the same vocabulary as `head`, live or stored; None trains on the data alone.
        divergence: what the kd terms minimise; what is reported as kd is KL(teacher || student) whatever is minimised.
        chunk_tokens: changes memory and speed, not the result (beyond rounding).
        unscaled: the loss is differentiated as it is, or as a term of a sum, as in training. Its gradients are then not multiplied by
            autograd's, which is 1: a product would be a second tensor of the head's size, and whether it is 1 only the device has.

    Returns:
        The loss, a scalar, differentiable once in predictions.hidden, predictions.mtp_hidden and head; and the sums.
        Under `torch.no_grad()` no gradient work is done.
    """
    assert teacher is not None or weights.kd == weights.mtp_kd == 0.0, "a KD term needs a teacher"

    inputs = (predictions.hidden, predictions.mtp_hidden, head)
    needs_gradient = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    device = head.device.type
    with torch.no_grad():
        if torch.is_autocast_enabled(device):
            head = head.to(torch.get_autocast_dtype(device))
            teacher = None if teacher is None else teacher.cast(head.dtype)
        with torch.autocast(device, enabled=False):
            loss, sums, gradients = _sum_chunks(
                predictions, head, weights, teacher, divergence, chunk_tokens, needs_gradient
            )
    if any(needs_gradient):
        loss = _WithGradients.apply(unscaled, loss, *gradients, *inputs)  # type: ignore[no-untyped-call]
    return loss, sums


class _WithGradients(torch.autograd.Function):
    """The loss, with gradients that are known already: the backward pass only scales them, or does not (`unscaled`)."""

    @staticmethod
    def forward(ctx: Any, unscaled: bool, loss: Tensor, *gradients_and_inputs: Tensor | None) -> Tensor:
        ctx.unscaled = unscaled
        ctx.save_for_backward(*gradients_and_inputs[:3])
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        if not ctx.unscaled:
            gradients = [None if gradient is None else gradient * upstream for gradient in gradients]
        # Autograd casts each gradient to its input's dtype.
        return None, None, None, None, None, *gradients


def _sum_chunks(
    predictions: Predictions,
    head: Tensor,
    weights: LossWeights,
    teacher: TeacherSignal | None,
    divergence: Divergence,
    chunk_tokens: int,
    needs_gradient: list[bool],
) -> tuple[Tensor, LossSums, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Compute loss, sums, and the gradients of hidden, mtp_hidden and head (None where not needed): steps 2 to 4."""
    main_needs, mtp_needs, head_needs = needs_gradient
    counted = _places(predictions.main_mask, predictions.targets)
    with_mtp = predictions.mtp_hidden is not None
    together = heads_together(head.device.type)
    taught_rows = 0 if teacher is None else teacher.rows_per_token(with_mtp)
    student_rows = 2 if with_mtp and together else 1
    chunk_tokens = chunk_size(chunk_tokens, 1 + (taught_rows > 0), student_rows + taught_rows)
    chunk_tokens = max(min(chunk_tokens, counted.numel()), 1)
    taught = None if teacher is None else teacher.chunks(head, chunk_tokens, with_mtp)

    def term(hidden: Tensor, counts: Tensor, lm: float, kd: float, needs: bool, measures_top1: bool) -> HeadTerm:
        return HeadTerm(hidden, counts, lm, kd, measures_top1, torch.zeros_like(hidden) if needs else None)

    terms = [term(predictions.hidden, predictions.main_mask, weights.lm, weights.kd, main_needs, measures_top1=True)]
    if predictions.mtp_hidden is not None:
        weighed = (weights.mtp_lm, weights.mtp_kd)
        terms.append(term(predictions.mtp_hidden, predictions.mtp_mask, *weighed, mtp_needs, measures_top1=False))
    grad_head = torch.zeros_like(head, dtype=softmax_dtype(head)) if head_needs else None
    student = Logits(head, chunk_tokens * student_rows)
    groups = [
        Heads(some, student, divergence, grad_head) for some in ([terms] if together else [[each] for each in terms])
    ]

    totals = torch.zeros(len(terms), 4, dtype=torch.float64, device=head.device)
    for rows in counted.split(chunk_tokens):
        mtp_counts = predictions.mtp_mask[rows] if with_mtp else None
        targets = [None] * len(terms) if taught is None else taught.targets(rows, mtp_counts)
        theirs = [targets] if together else [[each] for each in targets]
        labels = predictions.labels[rows]
        totals += torch.cat([heads.add(rows, labels, some) for heads, some in zip(groups, theirs, strict=True)])

    has_teacher = teacher is not None
    lm, kd, _, top1_agreement = totals[0]
    mtp_lm, mtp_kd, _, _ = totals[1] if with_mtp else (None,) * 4
    sums = LossSums(
        lm=lm,
        kd=kd if has_teacher else None,
        mtp_lm=mtp_lm,
        mtp_kd=mtp_kd if has_teacher else None,
        top1_agreement=top1_agreement if has_teacher else None,
        main_tokens=predictions.main_mask.sum(dtype=torch.float64),
        mtp_tokens=None if not with_mtp else predictions.mtp_mask.sum(dtype=torch.float64),
    )
    loss = torch.stack([each.loss(its_sums) for each, its_sums in zip(terms, totals, strict=True)]).sum()
    gradients = (terms[0].grad_hidden, terms[1].grad_hidden if with_mtp else None, grad_head)
    return loss.to(softmax_dtype(head)), sums, gradients


def _places(mask: Tensor, number: int | None) -> Tensor:
    """Return where `mask` [N] is True, in order; without waiting for the device if `number` says how often that is."""
    if number is None:
        return mask.nonzero().squeeze(1)
    if number == len(mask):
        return torch.arange(number, device=mask.device)
    return mask.logical_not().to(torch.uint8).argsort(stable=True)[:number]
