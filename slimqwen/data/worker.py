"""A process that encodes texts: `python -m slimqwen.data.worker`, with pipes for input and output.

Input: lines of JSON, first [the tokenizer's tokenizer.json, ids before each text, ids after it], then any number of lists
of texts. Output, for each list, little-endian: the number of texts, int64; the number of ids of each, int64; all ids, uint32.
The process exits at the end of its input, so also when its parent was killed.
"""

import json
import sys
from collections.abc import Sequence
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

Ids = npt.NDArray[np.uint32]


class Frame(NamedTuple):
    """The ids before and after each document; the last one is the separator."""

    before: list[int]
    after: list[int]

    def around(self, ids: Sequence[int]) -> list[int]:
        """Frame a document's ids; a document that begins with `before` already, as a chat template's may, keeps it once."""
        before = [] if list(ids[: len(self.before)]) == self.before else self.before
        return [*before, *ids, *self.after]


def encode(tokenizer: Tokenizer, frame: Frame, texts: Sequence[str]) -> list[Ids]:
    """Encode each text and frame its ids; special tokens spelled out in a text are recognised."""
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(frame.around(encoding.ids), dtype=np.uint32) for encoding in encodings]


def write_line(stream: IO[bytes], value: object) -> None:
    stream.write(json.dumps(value).encode() + b"\n")
    stream.flush()


def write_ids(stream: IO[bytes], ids: Sequence[Ids]) -> None:
    lengths = [len(text_ids) for text_ids in ids]
    stream.write(np.array([len(ids), *lengths], dtype="<i8").tobytes())
    stream.write(b"".join(text_ids.astype("<u4", copy=False).tobytes() for text_ids in ids))
    stream.flush()


def read_ids(stream: IO[bytes]) -> list[Ids]:
    """Read what `write_ids` wrote. Raises EOFError where the stream ends early."""
    (texts,) = np.frombuffer(_read(stream, 8), dtype="<i8")
    lengths = np.frombuffer(_read(stream, 8 * int(texts)), dtype="<i8")
    ids = np.frombuffer(_read(stream, 4 * int(lengths.sum())), dtype="<u4")
    return np.split(ids, np.cumsum(lengths)[:-1]) if texts else []


def _read(stream: IO[bytes], size_bytes: int) -> bytes:
    content = stream.read(size_bytes)
    if len(content) < size_bytes:
        raise EOFError
    return content


def main() -> None:
    lines = sys.stdin.buffer
    tokenizer_json, before, after = json.loads(lines.readline())
    tokenizer, frame = Tokenizer.from_str(tokenizer_json), Frame(before, after)
    for line in lines:
        write_ids(sys.stdout.buffer, encode(tokenizer, frame, json.loads(line)))


if __name__ == "__main__":
    main()
