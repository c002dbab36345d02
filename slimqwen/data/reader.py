"""The text of a tokens stage in batches: every source's documents, divided into training and held-out ones."""

from collections.abc import Iterator, Sequence
from itertools import chain

from slimqwen.data.chat import ChatTemplate
from slimqwen.data.division import divide
from slimqwen.data.documents import Document, LeftOut
from slimqwen.data.encode import Text, TextBatch
from slimqwen.data.overlap import Overlap
from slimqwen.data.sources import describe, documents
from slimqwen.recipe import Source

BATCH_CHARACTERS = 1_000_000  # encoded at one time; the encoder needs about 100 bytes of memory per token
HELDOUT = "heldout"


class TextReader:
    """A reader of all sources of text, with statistics of what it has read so far.

    left_out: documents without text; left_out_of: the same by prefix. overlap: held-out text that is also trained on.
    prefixes: of the files that each of `sources` is written to.
    """

    def __init__(
        self,
        prefixes: Sequence[str],
        sources: Sequence[Source],
        heldout_sources: Sequence[Source],
        heldout_fraction: float,
        chat: ChatTemplate,
    ) -> None:
        self.left_out = LeftOut()
        self.left_out_of = {prefix: LeftOut() for prefix in (*prefixes, HELDOUT)}
        self.overlap = Overlap()
        self._read_bytes = 0
        self._sources: dict[str, list[Source]] = {prefix: [] for prefix in prefixes}
        for prefix, source in zip(prefixes, sources, strict=True):
            if source.megatron is None:
                self._sources[prefix].append(source)
        self._heldout_sources = heldout_sources
        self._heldout_fraction = heldout_fraction
        self._chat = chat

    def batches(self) -> Iterator[TextBatch]:
        """Yield all documents in batches of at least BATCH_CHARACTERS, except the last."""
        texts: list[Text] = []
        characters = 0
        for text in self._texts():
            texts.append(text)
            characters += len(text.text)
            if characters >= BATCH_CHARACTERS:
                yield TextBatch(texts, self._read_bytes)
                texts, characters = [], 0
        yield TextBatch(texts, self._read_bytes)

    def _texts(self) -> Iterator[Text]:
        for prefix, sources in self._sources.items():
            found = chain.from_iterable(self._documents(source, prefix) for source in sources)
            if self._heldout_sources:
                for document in found:
                    yield self._text(document, prefix)
            else:
                whose = ", ".join(map(describe, sources))
                for document, heldout in divide(found, self._heldout_fraction, whose):
                    yield self._text(document, HELDOUT if heldout else prefix)
        for source in self._heldout_sources:
            for document in self._documents(source, HELDOUT):
                yield self._text(document, HELDOUT)

    def _documents(self, source: Source, prefix: str) -> Iterator[Document]:
        def skip(name: str, reason: str) -> None:
            self.left_out.add(name, reason)
            self.left_out_of[prefix].add(name, reason)

        return documents(source, skip, self._read, chat=self._chat, heldout=prefix == HELDOUT)

    def _text(self, document: Document, prefix: str) -> Text:
        self.overlap.add(document.text, heldout=prefix == HELDOUT)
        return Text(prefix, document.text)

    def _read(self, size_bytes: int) -> None:
        self._read_bytes += size_bytes
