"""Held-out documents that are training documents too: counted by hash, within a fixed memory."""

import hashlib
from collections import Counter

MOST_HASHES = 1 << 18  # kept of each split, about 20 MB


class Overlap:
    """Counts the held-out documents whose text, but for white space at its ends, is that of a training document.

    Kept are the hashes of all texts while they are at most MOST_HASHES, of every second one when they are more, of
    every fourth, and so on: which texts these are depends on their hashes alone, so that two that are equal are both
    kept or neither. The count is then an estimate.
    """

    def __init__(self) -> None:
        self._training: set[int] = set()
        self._heldout: Counter[int] = Counter()
        self._every = 1  # hashes that are multiples of it are kept

    def add(self, text: str, *, heldout: bool) -> None:
        """Count a document in."""
        digest = hashlib.blake2b(text.strip().encode("utf-8"), digest_size=8).digest()
        number = int.from_bytes(digest, "big")
        if number % self._every:
            return
        if heldout:
            self._heldout[number] += 1
        else:
            self._training.add(number)
        while max(len(self._training), len(self._heldout)) > MOST_HASHES:
            self._every *= 2
            self._training = {kept for kept in self._training if kept % self._every == 0}
            self._heldout = Counter({kept: n for kept, n in self._heldout.items() if kept % self._every == 0})

    @property
    def documents(self) -> int:
        """How many held-out documents are training documents too."""
        return self._every * sum(n for number, n in self._heldout.items() if number in self._training)
