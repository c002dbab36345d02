# mypy: ignore-errors
"""The loss of a row and its gradient, in two passes over the vocabulary and one program per row. Importing it needs Triton.

The first pass keeps the largest logit so far and sums relative to it, which are rescaled when a larger one comes (arXiv 1805.02867);
the second writes the gradient. Arithmetic is in float32, whatever the logits are. `targets.py` has the formulas. Not run on a GPU.
"""

import triton
import triton.language as tl


@triton.jit
def _store_comparison(out_ptr, kl, agrees):
    tl.store(out_ptr + 1, kl)
    tl.store(out_ptr + 2, kl)
    tl.store(out_ptr + 3, tl.where(agrees, 1.0, 0.0))


@triton.jit
def live_rows(
    logits_ptr,  # [rows, vocab], the student's; overwritten by the gradient
    teacher_ptr,  # [rows, vocab], or anything without a teacher
    labels_ptr,  # [rows] int64
    out_ptr,  # [rows, 4] float32: cross entropy, KL, KL, whether the most likely tokens are the same
    vocab,
    lm_weight,
    kd_weight,
    HAS_TEACHER: tl.constexpr,
    WANTS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocab
    teacher_ptr += row * vocab
    label = tl.load(labels_ptr + row)
    label_logit = tl.load(logits_ptr + label).to(tl.float32)

    largest, total = -3.0e38, 0.0  # before the first logit: minus infinity less itself would be NaN
    teacher_largest, teacher_total, weighted, likely = -3.0e38, 0.0, 0.0, 0
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocab
        x = tl.load(logits_ptr + at, mask=inside, other=-3.0e38).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)
        largest = larger
        if HAS_TEACHER:
            y = tl.load(teacher_ptr + at, mask=inside, other=-3.0e38).to(tl.float32)
            block_largest = tl.max(y, 0)
            likely = tl.where(block_largest > teacher_largest, start + tl.argmax(y, 0), likely)
            larger = tl.maximum(teacher_largest, block_largest)
            p = tl.exp(y - larger)
            scale = tl.exp(teacher_largest - larger)
            teacher_total = teacher_total * scale + tl.sum(p, 0)
            weighted = weighted * scale + tl.sum(tl.where(p > 0.0, p * (y - x), 0.0), 0)
            teacher_largest = larger

    tl.store(out_ptr + row * 4, largest - label_logit + tl.log(total))
    if HAS_TEACHER:
        shift = (teacher_largest - largest) + (tl.log(teacher_total) - tl.log(total))
        kl = weighted / teacher_total - shift
        agrees = tl.load(logits_ptr + likely).to(tl.float32) == largest
        _store_comparison(out_ptr + row * 4, kl, agrees)
    if WANTS_GRADIENT:
        tl.debug_barrier()  # of this row's threads: all have read what is overwritten now
        for start in range(0, vocab, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < vocab
            x = tl.load(logits_ptr + at, mask=inside, other=-3.0e38).to(tl.float32)
            q = tl.exp(x - largest) / total
            gradient = lm_weight * (q - tl.where(at == label, 1.0, 0.0))
            if HAS_TEACHER:
                y = tl.load(teacher_ptr + at, mask=inside, other=-3.0e38).to(tl.float32)
                gradient += kd_weight * (q - tl.exp(y - teacher_largest) / teacher_total)
            tl.store(logits_ptr + at, gradient, mask=inside)


@triton.jit
def stored_rows(
    logits_ptr,  # [rows, vocab], the student's; overwritten
    ids_ptr,  # [rows, k] int64, the teacher's most likely tokens
    log_probs_ptr,  # [rows, k]
    log_tail_ptr,  # [rows]
    labels_ptr,  # [rows] int64
    out_ptr,  # [rows, 4] float32, as of `live_rows`
    vocab,
    k,
    lm_weight,
    kd_weight,
    WANTS_GRADIENT: tl.constexpr,
    K: tl.constexpr,  # a power of two, at least k
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocab
    label = tl.load(labels_ptr + row)
    label_logit = tl.load(logits_ptr + label).to(tl.float32)
    place = tl.arange(0, K)
    there = place < k
    ids = tl.load(ids_ptr + row * k + place, mask=there, other=0)
    log_p = tl.load(log_probs_ptr + row * k + place, mask=there, other=0.0).to(tl.float32)
    log_tail = tl.load(log_tail_ptr + row).to(tl.float32)
    top = tl.load(logits_ptr + ids, mask=there, other=float("-inf")).to(tl.float32)
    tl.debug_barrier()  # of this row's threads: all have read what is overwritten now
    # The passes see the tail alone: what is left of 1 beside the top tokens has no digit where the tail is 1e-7.
    tl.store(logits_ptr + ids, tl.full((K,), float("-inf"), tl.float32), mask=there)
    tl.debug_barrier()

    tail_largest, tail_total = -3.0e38, 0.0
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(tail_largest, tl.max(x, 0))
        tail_total = tail_total * tl.exp(tail_largest - larger) + tl.sum(tl.exp(x - larger), 0)
        tail_largest = larger

    largest = tl.maximum(tail_largest, tl.max(top, 0))
    tail = tail_total * tl.exp(tail_largest - largest)
    total = tail + tl.sum(tl.exp(top - largest), 0)
    stretch = log_tail - tl.log(tl.maximum(tail / total, 1.1754944e-38))  # bounded as in `log_of_the_rest`
    log_q = top - largest - tl.log(total)
    p = tl.where(there, tl.exp(log_p), 0.0)
    kl = tl.sum(tl.where(there, p * (log_p - log_q), 0.0), 0) + tl.exp(log_tail) * stretch
    tl.store(out_ptr + row * 4, largest - label_logit + tl.log(total))
    _store_comparison(out_ptr + row * 4, kl, tl.max(tl.where(place == 0, top, float("-inf")), 0) == largest)
    if WANTS_GRADIENT:
        of_tail = lm_weight + kd_weight - kd_weight * tl.exp(stretch)
        for start in range(0, vocab, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < vocab
            x = tl.load(logits_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
            q = tl.exp(x - largest) / total
            gradient = of_tail * q - tl.where(at == label, lm_weight, 0.0)
            tl.store(logits_ptr + at, gradient, mask=inside)
        tl.debug_barrier()
        q = tl.exp(log_q)
        gradient = kd_weight * (q - p) + lm_weight * (q - tl.where(ids == label, 1.0, 0.0))
        tl.store(logits_ptr + ids, gradient, mask=there)
