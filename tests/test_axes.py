"""The language of axes: sizes and kept indices against rows numbered by hand."""

import pytest
import torch

from slimqwen.families.axes import Axis, Stack, axes_of, cat, each, size
from slimqwen.families.slicing import kept_indices, select

HIDDEN = Axis("hidden")
EXPERT = Axis("expert", scope="block")
NEURON = Axis("neuron", scope="expert")
KEY_HEAD = Axis("key_head", scope="block")
VALUE_HEAD = Axis("value_head", scope="block")
KEY_DIM = Axis("key_dim")
VALUE_DIM = Axis("value_dim")

SIZES = {HIDDEN: 4, EXPERT: 3, NEURON: 2, KEY_HEAD: 2, VALUE_HEAD: 3, KEY_DIM: 2, VALUE_DIM: 1}

# Two key heads of 10 rows each:  q0 q1 k0 k1 v0 v1 v2 z0 z1 z2
#                        head 0:   0  1  2  3  4  5  6  7  8  9
#                        head 1:  10 11 12 13 14 15 16 17 18 19
VALUES = each(VALUE_HEAD, VALUE_DIM)
QKVZ = each(KEY_HEAD, cat(q=KEY_DIM, k=KEY_DIM, v=VALUES, z=VALUES))


def indices(term, kept, unit=None) -> list[int]:  # type: ignore[no-untyped-def]
    chosen = kept_indices(term, SIZES, {axis: torch.tensor(units) for axis, units in kept.items()}, unit)
    assert chosen is not None and chosen.dtype == torch.int64
    return chosen.tolist()


def test_sizes() -> None:
    assert size(7, SIZES) == 7
    assert size(HIDDEN, SIZES) == 4
    assert size(Stack(EXPERT), SIZES) == 3
    assert size(cat(embedding=HIDDEN, hidden=HIDDEN), SIZES) == 8
    assert size(each(KEY_HEAD, cat(a=KEY_DIM, b=5)), SIZES) == 2 * (2 + 5)
    assert size(QKVZ, SIZES) == 20


def test_the_axes_of_a_term() -> None:
    assert axes_of(QKVZ) == {KEY_HEAD, KEY_DIM, VALUE_HEAD, VALUE_DIM}
    assert axes_of(cat(a=3, b=Stack(EXPERT))) == {EXPERT}


def test_the_docstring_example() -> None:
    three = {KEY_HEAD: 2, KEY_DIM: 3}
    term = cat(q=each(KEY_HEAD, KEY_DIM), k=each(KEY_HEAD, KEY_DIM))
    assert size(term, three) == 12
    chosen = kept_indices(term, three, {KEY_HEAD: torch.tensor([1])})
    assert chosen is not None and chosen.tolist() == [3, 4, 5, 9, 10, 11]


def test_an_axis_keeps_its_units_in_the_order_given() -> None:
    assert indices(HIDDEN, {HIDDEN: [3, 0]}) == [3, 0]
    assert indices(cat(embedding=HIDDEN, hidden=HIDDEN), {HIDDEN: [3, 0]}) == [3, 0, 7, 4]
    assert indices(cat(fixed=2, hidden=HIDDEN), {HIDDEN: [1]}) == [0, 1, 3]


def test_key_heads_take_all_their_rows_along() -> None:
    assert indices(QKVZ, {KEY_HEAD: [1]}) == list(range(10, 20))
    assert indices(QKVZ, {KEY_HEAD: [1, 0]}) == [*range(10, 20), *range(10)]


def test_value_heads_within_each_key_head() -> None:
    assert indices(QKVZ, {VALUE_HEAD: [2, 0]}) == [0, 1, 2, 3, 6, 4, 9, 7, 10, 11, 12, 13, 16, 14, 19, 17]


def test_a_set_of_its_own_in_each_enclosing_unit() -> None:
    # Head 0 keeps value head 2, head 1 keeps value head 0.
    assert indices(QKVZ, {VALUE_HEAD: [[2], [0]]}) == [0, 1, 2, 3, 6, 9, 10, 11, 12, 13, 14, 17]
    # The sets go by the source's unit, also where units change places.
    assert indices(QKVZ, {KEY_HEAD: [1, 0], VALUE_HEAD: [[2], [0]]}) == [10, 11, 12, 13, 14, 17, 0, 1, 2, 3, 6, 9]
    # The expert that owns the tensor is the enclosing unit of its neurons.
    assert indices(NEURON, {NEURON: [[0], [1], [0]]}, unit=1) == [1]


def test_a_set_per_unit_without_a_unit_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="neuron"):
        indices(NEURON, {NEURON: [[0], [1], [0]]})


def test_what_is_not_cut_has_no_indices_and_is_not_copied() -> None:
    assert kept_indices(QKVZ, SIZES, {HIDDEN: torch.tensor([0])}) is None
    assert kept_indices(5, SIZES, {HIDDEN: torch.tensor([0])}) is None
    tensor = torch.zeros(20, 4)
    assert select(tensor, (QKVZ, HIDDEN), SIZES, {EXPERT: torch.tensor([0])}) is tensor


def test_select_cuts_every_dimension() -> None:
    tensor = torch.arange(8).view(2, 4)
    kept = {KEY_HEAD: torch.tensor([1]), HIDDEN: torch.tensor([2, 0])}
    assert select(tensor, (each(KEY_HEAD, 1), HIDDEN), SIZES, kept).tolist() == [[6, 4]]
    assert select(tensor, (KEY_HEAD, HIDDEN), SIZES, {HIDDEN: torch.tensor([3])}).tolist() == [[3], [7]]
