"""A weighted mixture of several streams of rows."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from math import inf, lcm

from slimqwen.core.errors import UserError
from slimqwen.data.packed import TokenIds
from slimqwen.data.stream import Place, RowStream, StoredRows

SMALLEST_SHARE = 1e-9  # of a mixture: a smaller one gives no row in any training


class MixedStream(RowStream):
    """Rows of several sources; of the first n rows, for every n, each source gives its share of the tokens.

    Which source row n comes from, and which of its rows it is, are functions of n and the weights (`drawn_from`); within
    a source the rows come in its own shuffled order, epoch after epoch, however often the weights repeat it.
    So the number of rows seen is the whole cursor, as for one source.

    weights: shares of the predicted tokens, of any sum. A source with more padding gives proportionally more rows.
    Raises UserError for invalid weights (`check_weights`).
    """

    def __init__(self, streams: Mapping[str, StoredRows], weights: Mapping[str, float]) -> None:
        assert streams.keys() == weights.keys(), "every source has its weight"
        check_weights(weights)
        self.streams = dict(streams)
        self.sequence_length = next(iter(self.streams.values())).sequence_length
        rows = {
            name: Fraction(weights[name]) * stream.rows_per_epoch / stream.targets_per_epoch
            for name, stream in self.streams.items()
        }
        self.row_shares = {name: float(share / sum(rows.values())) for name, share in rows.items()}
        total = sum(map(Fraction, weights.values()))
        self.token_shares = {name: float(Fraction(weights[name]) / total) for name in self.streams}
        self.rows_per_epoch = int(min(s.rows_per_epoch / self.row_shares[name] for name, s in self.streams.items()))
        self.padding_fraction = sum(self.row_shares[name] * s.padding_fraction for name, s in self.streams.items())
        whole = lcm(*(share.denominator for share in rows.values()))
        self._ends = list(accumulate(int(share * whole) for share in rows.values()))
        self._names = list(self.streams)

    def rows_of_sources(self, rows: int) -> dict[str, int]:
        """Return how many of the first `rows` rows each source gives."""
        return dict(zip(self._names, shares_of(rows, self._ends), strict=True))

    def place(self, index: int) -> Place:
        number, position = drawn_from(index, self._ends)
        source = self._names[number]
        return Place(self.streams[source].place(position).row, source)

    def stored(self, place: Place) -> TokenIds:
        assert place.source is not None, "a row of a mixture belongs to one of its sources"
        return self.streams[place.source].stored(place)

    def length(self, place: Place) -> int:
        assert place.source is not None, "a row of a mixture belongs to one of its sources"
        return self.streams[place.source].length(place)


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise UserError for a weight that is not a positive number, or too small beside the others to give any row."""
    for name, weight in weights.items():
        if not 0.0 < weight < inf:
            raise UserError(f"the data.sources.weight of '{name}' must be positive, not {weight:g}.")
    total = sum(map(Fraction, weights.values()))
    for name, weight in weights.items():
        if Fraction(weight) / total < SMALLEST_SHARE:
            raise UserError(
                f"the data.sources.weight of '{name}', {weight:g}, is less than a billionth of all weights together: raise it, or leave "
                "the source out."
            )


def drawn_from(row: int, ends: Sequence[int]) -> tuple[int, int]:
    """Return (source, index among its rows) of row `row` of a mixture, without a table or a loop over earlier rows.

    The sources are halved recursively. Of the first n rows, round(n x share) belong to the left half, so row n does
    if that number grows from n to n + 1, and the number is its index there; the rest belong to the right half, and so on.
    After any number of rows a source has given its share of them to within half a row per halving: 1/2 for two
    sources, 3/2 for eight. The arithmetic is in integers, so exact for any length of training.

    Example, weights 3 and 1 (ends 3, 4): of the first 0, 1, 2, 3, 4, ... rows 0, 1, 2, 2, 3, 4, ... belong to source 0, so

        row             0  1  2  3  4  5  6  7
        source          0  0  1  0  0  0  1  0
        which of its    0  1  0  2  3  4  1  5

    Args:
        ends: cumulative sums of the weights as integers.
    """
    first, stop = 0, len(ends)
    while stop - first > 1:
        middle = (first + stop + 1) // 2
        before = ends[first - 1] if first else 0
        left, both = ends[middle - 1] - before, ends[stop - 1] - before
        in_left, in_left_then = _rounded(row * left, both), _rounded((row + 1) * left, both)
        if in_left_then > in_left:
            row, stop = in_left, middle
        else:
            row, first = row - in_left, middle
    return first, row


def shares_of(rows: int, ends: Sequence[int]) -> list[int]:
    """Return how many of the first `rows` rows `drawn_from` gives to each source: of 6 with weights 3 and 1, 5 and 1."""
    counts = [rows] * len(ends)

    def halve(first: int, stop: int) -> None:
        if stop - first == 1:
            return
        middle = (first + stop + 1) // 2
        before = ends[first - 1] if first else 0
        in_left = _rounded(counts[first] * (ends[middle - 1] - before), ends[stop - 1] - before)
        in_right = counts[first] - in_left
        counts[first:middle] = [in_left] * (middle - first)
        counts[middle:stop] = [in_right] * (stop - middle)
        halve(first, middle)
        halve(middle, stop)

    halve(0, len(ends))
    return counts


def _rounded(numerator: int, denominator: int) -> int:
    """Return the nearest integer to a fraction, halves up."""
    return (2 * numerator + denominator) // (2 * denominator)
