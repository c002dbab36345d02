"""Which ranks share a copy of the models and the experts of a layer, where the recipe leaves it open."""

from collections.abc import Callable

import pytest

from slimqwen.parallel.shares import choose_shares, in_words
from slimqwen.recipe import Execution


def anything(ranks: int) -> bool:
    return True


def at_least(least: int) -> Callable[[int], bool]:
    return lambda ranks: ranks >= least


@pytest.mark.parametrize(
    ("ranks", "node", "experts", "fits", "expected"),
    [
        (8, 8, [512, 256], anything, (8, 8)),  # one node
        (64, 8, [512, 256], anything, (8, 8)),  # a copy per node
        (64, 8, [512, 256], at_least(9), (16, 8)),  # ... which does not fit: two nodes
        (24, 8, [512, 256], at_least(9), (24, 8)),  # of three nodes two do not divide them
        (64, 8, [512, 256], at_least(65), (64, 8)),  # nothing fits
        (12, 6, [512, 256], anything, (6, 2)),  # what divides 6 GPUs, 512 and 256 experts
        (8, 4, [60], anything, (4, 4)),
        (4, 4, [6], anything, (4, 2)),
        (5, 5, [512], anything, (5, 1)),
        (8, 4, [], anything, (4, 1)),  # no mixture of experts
    ],
)
def test_a_copy_takes_the_fewest_nodes_and_experts_stay_within_one(
    ranks: int, node: int, experts: list[int], fits: Callable[[int], bool], expected: tuple[int, int]
) -> None:
    assert choose_shares(ranks, node, experts, Execution(), fits) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"shard_ranks": 4, "expert_ranks": 2}, (4, 2)),
        ({"shard_ranks": "all"}, (64, 8)),
        ({"shard_ranks": "all", "expert_ranks": 1}, (64, 1)),
        ({"shard_ranks": 2}, (2, 2)),  # a copy's experts lie within it
        ({"shard_ranks": 12}, (12, 4)),
        ({"expert_ranks": 16}, (16, 16)),  # which share a copy
        ({"expert_ranks": 1}, (8, 1)),
        ({"shard_ranks": None, "expert_ranks": None}, (8, 8)),
    ],
)
def test_what_the_recipe_sets_stays(settings: dict[str, int | str | None], expected: tuple[int, int]) -> None:
    assert choose_shares(64, 8, [512, 256], Execution.model_validate(settings), anything) == expected


def test_the_choice_is_described() -> None:
    for sizes, words in (
        ((64, 8), "all 64 ranks share one copy"),
        ((8, 8), "the 8 ranks of each node share a copy of the models, and only gradients cross between the 8 nodes"),
        ((16, 1), "16 ranks share a copy of the models, and only gradients cross between the 4 copies"),
        ((1, 1), "each of the 64 ranks has a copy of the models, and only gradients cross between them"),
    ):
        described = in_words(choose_shares(64, 8, [sizes[1]], Execution(shard_ranks=sizes[0]), anything), 64, 8)
        assert described.startswith(words)
        assert ("8 ranks share each layer's experts" in described) == (sizes[1] == 8)
