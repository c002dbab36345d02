"""The k most likely tokens of a distribution, as they are stored.

Of each predicted token and head, with k tokens out of V:

    name       dtype    per token     what
    ids_low    uint16   k             the ids' low 16 bits, most likely token first
    ids_high   uint8    ceil(k b/8)   their b = bits(V - 1) - 16 higher bits, token after token, lowest bit first; none where
                                      V <= 65,536
    log_probs  uint16   k             -log p in steps of 1/2048 nat, at most 65,535 of them (p = 1.3e-14)
               float32  k             in an exact cache: log p
    log_tail   float32  1             log of the probability of all other tokens together

With k = 64 and V = 151,936 these are 128 + 16 + 128 + 4 = 276 bytes a token, and as much again for an MTP head.

A step of 1/2048 nat moves a log-probability by at most 1/4096 and so a probability by at most 0.024 % of itself. What is
read is divided by its sum, so that it is a distribution; KL(teacher || what is read) is then below 3e-8 nat, half the
variance of such errors, and 2e-8 on average where they are spread evenly.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from slimqwen.losses.signal import TopTokens

Arrays = Mapping[str, npt.NDArray[np.generic]]

STEPS_PER_NAT = 2048
MOST_STEPS = np.iinfo(np.uint16).max


def bytes_per_token(k: int, vocab_size: int, exact: bool) -> int:
    """Return the bytes of one head."""
    return 2 * k + _high_bytes(k, vocab_size) + (4 if exact else 2) * k + 4


def pack(top: TopTokens, vocab_size: int, exact: bool) -> dict[str, npt.NDArray[np.generic]]:
    """Pack into the arrays above, [tokens, per token]."""
    ids = top.ids.cpu().numpy()
    log_probs = top.log_probs.float().cpu().numpy()
    if not exact:
        log_probs = np.minimum(np.rint(-STEPS_PER_NAT * log_probs), MOST_STEPS).astype(np.uint16)
    bits = np.arange(_high_bits(vocab_size))
    high = (ids[:, :, None] >> (16 + bits) & 1).astype(np.uint8).reshape(len(ids), ids.shape[1] * len(bits))
    return {
        "ids_low": (ids & 0xFFFF).astype(np.uint16),
        "ids_high": np.packbits(high, axis=1, bitorder="little"),
        "log_probs": log_probs,
        "log_tail": top.log_tail.float().cpu().numpy(),
    }


def unpack(arrays: Arrays, vocab_size: int) -> TopTokens:
    """Unpack what `pack` has packed, log-probabilities in float32."""
    low, steps = arrays["ids_low"].astype(np.int64), arrays["log_probs"]
    tokens, k = low.shape
    bits = np.arange(_high_bits(vocab_size))
    high = np.unpackbits(arrays["ids_high"].astype(np.uint8), axis=1, count=k * len(bits), bitorder="little")
    ids = torch.from_numpy(low + (high.reshape(tokens, k, len(bits)) @ (1 << (16 + bits))))
    log_tail = torch.from_numpy(arrays["log_tail"].astype(np.float32))
    if steps.dtype == np.float32:
        return TopTokens(ids, torch.from_numpy(steps), log_tail)
    log_probs = torch.from_numpy(steps.astype(np.float32)) / -STEPS_PER_NAT
    log_sum = torch.cat([log_probs, log_tail[:, None]], dim=1).logsumexp(1, keepdim=True)
    return TopTokens(ids, log_probs - log_sum, log_tail - log_sum.squeeze(1))


def _high_bits(vocab_size: int) -> int:
    return max((vocab_size - 1).bit_length() - 16, 0)


def _high_bytes(k: int, vocab_size: int) -> int:
    return -(-k * _high_bits(vocab_size) // 8)
