"""Which ranks share a copy of a model, and which a layer's experts, where `execution` leaves that open (`auto`)."""

from collections.abc import Callable, Sequence
from math import gcd
from typing import NamedTuple

from slimqwen.recipe import Execution


class Shares(NamedTuple):
    """How many ranks share one copy of the models, and how many of these the experts of each layer."""

    shard_ranks: int
    expert_ranks: int


def choose_shares(
    ranks: int, node: int, experts: Sequence[int], execution: Execution, fits: Callable[[int], bool]
) -> Shares:
    """Choose the settings of `execution` that are `auto`, for `ranks` ranks, `node` of them on each node.

    Weights are gathered in every layer and pass, gradients cross once a step: so a copy of the models is shared by the ranks of one
    node where it fits there, else of the fewest nodes in which it does. A layer's experts are larger than the tokens that travel
    to them: they are shared by the most ranks of a node that divide the node, the copy, and both models' experts.

    Example: 64 ranks on nodes of 8, 512 and 256 experts: shard_ranks 8 where a copy fits into 8 ranks, or else 16, 32 or 64;
    expert_ranks 8. Nodes of 6: shard_ranks 6, expert_ranks 2.

    Args:
        experts: the number of experts of each model that has any.
        fits: whether the models fit where so many ranks share a copy.
    """
    asked = execution.expert_ranks
    if execution.shard_ranks == "auto":
        nodes = ranks // node
        sizes = [node * count for count in range(1, nodes + 1) if nodes % count == 0]
        sizes = [size for size in sizes if asked == "auto" or size % asked == 0]
        shard_ranks = next((size for size in sizes if fits(size)), ranks)
    else:
        shard_ranks = ranks if execution.shard_ranks == "all" else execution.shard_ranks
    if asked == "auto":
        asked = gcd(node, shard_ranks, *experts) if experts else 1
    return Shares(shard_ranks, asked)


def in_words(shares: Shares, ranks: int, node: int) -> str:
    """Describe a choice and its reason in one clause."""
    shard, expert = shares.shard_ranks, shares.expert_ranks
    if shard == ranks:
        where = f"all {ranks} ranks share one copy of the models"
    elif shard == 1:
        where = f"each of the {ranks} ranks has a copy of the models, and only gradients cross between them"
    elif shard == node:
        where = f"the {shard} ranks of each node share a copy of the models, and only gradients cross between the {ranks // node} nodes"
    else:
        where = (
            f"{shard} ranks share a copy of the models, and only gradients cross between the {ranks // shard} copies"
        )
    if expert == 1:
        return where
    return f"{where}; {expert} ranks share each layer's experts and exchange tokens"
