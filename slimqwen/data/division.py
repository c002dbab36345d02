"""The split into training and held-out documents: by a hash of their names or, where they are too few, at the end."""

from collections.abc import Iterable, Iterator

from slimqwen.core.warning import warn
from slimqwen.data.documents import Document
from slimqwen.data.sources import is_heldout

WAITING_CHARACTERS = 100_000_000  # buffered until both splits have a document; a single longer document is buffered too
BOUNDARIES = ("\n\n", "\n", " ")  # where a document is cut: the first of these that is near enough


def divide(documents: Iterable[Document], fraction: float, whose: str) -> Iterator[tuple[Document, bool]]:
    """Yield each document and whether it is held out, about `fraction` of them.

    It is `is_heldout` of the name, which depends on nothing else. Where that leaves one of the two splits empty, the end
    of the text is held out instead, with a warning: `fraction` of its characters, cut between paragraphs where
    possible, regardless of the names. whose: the text's name in messages.
    """
    waiting: list[tuple[Document, bool]] = []
    characters = 0
    kinds: set[bool] = set()
    documents = iter(documents)
    for document in documents:
        waiting.append((document, is_heldout(document.name, fraction)))
        kinds.add(waiting[-1][1])
        characters += len(document.text)
        if len(kinds) == 2 or (len(waiting) > 1 and characters > WAITING_CHARACTERS):
            yield from waiting
            for later in documents:
                yield later, is_heldout(later.name, fraction)
            return
    yield from _hold_out_end([document for document, _ in waiting], fraction, whose)


def _hold_out_end(documents: list[Document], fraction: float, whose: str) -> list[tuple[Document, bool]]:
    """Hold out the end of documents of which the names would hold out none, or all."""
    total = sum(len(document.text) for document in documents)
    aim = round(fraction * total)
    if not 0 < aim < total:  # one split would be empty: the caller raises
        return [(document, aim > 0) for document in documents]
    divided = []
    left = total - aim
    for document in documents:
        if 0 < left < len(document.text):
            place = _find_cut(document.text, left, slack=aim // 2)
            divided.append((Document(document.name, document.text[:place]), False))
            divided.append((Document(document.name, document.text[place:]), True))
        else:
            divided.append((document, left <= 0))
        left -= len(document.text)
    heldout = sum(len(document.text) for document, is_last in divided if is_last)
    few = "one document" if len(documents) == 1 else f"{len(documents):,} documents"
    warn(
        f"note: {whose} is {few}, too few to hold some of them out: the last {heldout:,} of its {total:,} characters are "
        f"held out instead ({heldout / total:.1%})"
    )
    return divided


def _find_cut(text: str, place: int, *, slack: int) -> int:
    """Return where to cut a text: after the boundary nearest to `place`, at most `slack` characters away, or at `place`."""
    for boundary in BOUNDARIES:
        before = text.rfind(boundary, max(0, place - slack), place)
        after = text.find(boundary, place, min(len(text), place + slack))
        cuts = [at + len(boundary) for at in (before, after) if at >= 0]
        cuts = [cut for cut in cuts if text[:cut].strip() and text[cut:].strip()]
        if cuts:
            return min(cuts, key=lambda cut: abs(cut - place))
    return place
