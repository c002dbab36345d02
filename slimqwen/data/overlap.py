"""Overlap of held-out and training documents, counted by hash in bounded memory."""

import hashlib
from collections import Counter

MOST_HASHES = 1 << 18  # kept of each split, about 20 MB


class Overlap:
    """A counter of held-out documents whose text, apart from leading and trailing white space, is also a training document.

    The hashes of all texts are kept while they are at most MOST_HASHES, then those of every second, every fourth, and so
    on. Which ones are kept depends only on the hash, so two equal texts are both kept or both dropped. The count is
    then an estimate.
    """

    def __init__(self) -> None:
        self._training: set[int] = set()
        self._heldout: Counter[int] = Counter()
        self._every = 1  # hashes that are multiples of it are kept

    def add(self, text: str, *, heldout: bool) -> None:
        """Add a document."""
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
        """Return how many held-out documents are also training documents."""
        return self._every * sum(n for number, n in self._heldout.items() if number in self._training)
