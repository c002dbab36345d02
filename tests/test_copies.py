"""The copies of a model that several groups of ranks train are compared bit by bit before a state is saved."""

import pytest
import torch
from ranks import Ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from slimqwen.parallel import ranks as slimqwen_ranks
from slimqwen.training.copies import check_copies


def compare(damaged: str, rank: int) -> None:
    """Two copies of a small model, each on two ranks, and a tensor that is whole on all, in which one rank has another bit."""
    with slimqwen_ranks.join_ranks(torch.device("cpu"), shard_ranks=2) as joined:
        torch.manual_seed(0)
        model = nn.Linear(3, 4)
        fully_shard(model, mesh=joined.mesh)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        tensors = dict(model.named_parameters())
        tensors |= {f"exp_avg.{name}": optimizer.state[tensor]["exp_avg"] for name, tensor in model.named_parameters()}
        tensors["router"] = torch.ones(3)
        check_copies(tensors, joined, 6)
        if joined.rank == rank:
            tensor = tensors[damaged].detach()
            own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            own.view(torch.int32).flatten()[1] ^= 1
        check_copies(tensors, joined, 7)


@pytest.mark.parametrize(("damaged", "having"), [("exp_avg.bias", "[0, 2]"), ("router", "[0, 1, 2, 3]")])
def test_another_bit_on_one_rank_is_found(damaged: str, having: str) -> None:
    codes, said = Ranks(4, compare, damaged, 2).end()
    assert codes == [1] * 4, said
    assert said.count(f"the copies of the model differ after step 7: {damaged}, of which the ranks {having} ") == 4, (
        said
    )
