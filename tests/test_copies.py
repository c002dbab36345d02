"""The copies of a model that several groups of ranks train are compared bit by bit before a state is saved."""

import torch
from ranks import Ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from slimqwen.parallel import ranks as slimqwen_ranks
from slimqwen.training.copies import check_copies


def compare(damaged: str, rank: int, element: int) -> None:
    """Two copies of a small model, each on two ranks, of which one rank has another bit in a tensor."""
    with slimqwen_ranks.join_ranks(torch.device("cpu"), shard_ranks=2) as joined:
        torch.manual_seed(0)
        model = nn.Linear(3, 4)
        fully_shard(model, mesh=joined.mesh)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        tensors = dict(model.named_parameters())
        tensors |= {f"exp_avg.{name}": optimizer.state[tensor]["exp_avg"] for name, tensor in model.named_parameters()}
        check_copies(tensors, joined, 6)
        if joined.rank == rank:
            local = tensors[damaged]
            assert isinstance(local, DTensor)
            local.to_local().detach().view(torch.int32).flatten()[element] ^= 1
        check_copies(tensors, joined, 7)


def test_another_bit_on_one_rank_is_found() -> None:
    codes, said = Ranks(4, compare, "exp_avg.bias", 2, 1).end()
    assert codes == [1] * 4, said
    assert said.count("the copies of the model differ after step 7: exp_avg.bias, of which the ranks [0, 2] ") == 4, (
        said
    )
