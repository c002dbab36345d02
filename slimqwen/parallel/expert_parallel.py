"""Expert parallelism: ranks share the experts of every MoE block, and send each token to where its experts are."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single, wait_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional as F

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.model.model import MtpCausalLM
from slimqwen.model.patching import overridden, override

ExpertsForward = Callable[[Tensor, Tensor, Tensor], Tensor]


def check_expert_ranks(checkpoint: Checkpoint, expert_ranks: int) -> None:
    """Raise UserError where a model's experts cannot be shared evenly by `expert_ranks` ranks."""
    num_experts = checkpoint.config["num_experts"]
    if num_experts % expert_ranks:
        raise UserError(
            f"execution.expert_ranks {expert_ranks} does not divide the {num_experts} experts of {checkpoint.folder}: "
            "choose a divisor."
        )


def share_experts(model: MtpCausalLM, mesh: DeviceMesh) -> list[nn.Module]:
    """Leave each rank of a mesh its part of every MoE block's experts, MTP's included; return the experts modules.

    The first of n ranks has the first num_experts / n experts, and so on. The parameters, on the meta device, become
    DTensors, so that saving, loading and exporting know of which experts they are. Routers stay as they are.
    """
    modules = []
    for block in model.family.moe_blocks(model.config):
        assert block.experts is not None
        experts: Any = model.module_of(block.prefix + next(iter(block.experts.fused)))
        for name, parameter in list(experts.named_parameters(recurse=False)):
            own = distribute_tensor(parameter.data, mesh, [Shard(0)], src_data_rank=None)
            setattr(experts, name, nn.Parameter(own, parameter.requires_grad))
        experts.num_experts //= mesh.size()
        override(experts, forward=partial(exchanged_forward, experts, experts.forward, mesh.get_group()))
        modules.append(experts)
    return modules


def exchanged_forward(
    experts: Any,
    own_forward: ExpertsForward,
    group: dist.ProcessGroup,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Compute what an experts module returns, where each rank of `group` has `experts.num_experts` of its experts.

    Each (token, chosen expert) pair travels to the rank that has the expert, and the expert's output back, by two
    all-to-alls. All ranks take part in both, forward and backward, also one that sends or gets no pair.

    Two ranks with two experts each, k = 1. The first rank's tokens a, b, c chose the experts 3, 0, 2: sorted by expert
    they are b, c, a; b stays, c and a go to the second rank, which computes them as its experts 0 and 1.

    Args:
        own_forward: this rank's experts on rows of its own choice, in whichever implementation is set.
        hidden_states: [tokens, hidden]; top_k_index: [tokens, k] int64, of all experts; top_k_weights: [tokens, k].

    Returns:
        [tokens, hidden], in the dtype of `hidden_states`.
    """
    chosen = top_k_index.flatten()
    order = chosen.argsort(stable=True)
    sent = torch.zeros(group.size() * experts.num_experts, dtype=torch.int64, device=chosen.device)
    sent = sent.scatter_add_(0, chosen, torch.ones_like(chosen)).view(group.size(), -1)
    received = torch.empty_like(sent)  # pairs by the rank that they come from and by this rank's expert
    dist.all_to_all_single(received, sent, group=group)
    sent_rows, received_rows = read_row_counts(sent, received, len(chosen))

    # What an all-to-all returns is on its way still: a kernel that does not know of that needs it waited for.
    rows = hidden_states[order // top_k_index.shape[1]]
    rows = wait_tensor(all_to_all_single(rows, received_rows, sent_rows, group))
    experts.received_pairs = getattr(experts, "received_pairs", 0) + len(rows)  # for the log of each rank
    own_experts = torch.arange(experts.num_experts, device=rows.device).repeat(group.size())
    own_experts = own_experts.repeat_interleave(received.flatten(), output_size=len(rows))
    # Without a pair the experts get one row of zeros: products of no rows fail on some kernels, and the backward pass
    # must come by here, for this rank's part in the collectives.
    gets_none = len(rows) == 0
    if gets_none:
        rows, own_experts = F.pad(rows, (0, 0, 0, 1)), own_experts.new_zeros(1)
    with overridden(experts, **_local_parameters(experts)):
        outputs = own_forward(rows, own_experts[:, None], rows.new_ones(len(rows), 1))
    if gets_none:
        outputs = outputs[:0]

    returned = wait_tensor(all_to_all_single(outputs, sent_rows, received_rows, group))
    per_choice = torch.empty_like(returned)
    per_choice[order] = returned
    weighted = per_choice.view(*top_k_index.shape, -1) * top_k_weights[..., None]
    return weighted.sum(dim=1).to(hidden_states.dtype)


def read_row_counts(sent: Tensor, received: Tensor, rows: int) -> tuple[list[int], list[int]]:
    """Return how many of this rank's `rows` go to each rank, and how many come from each. The one place that waits for the device.

    sent, received: [ranks, experts of a rank].
    """
    sent_rows, received_rows = torch.stack([sent.sum(dim=1), received.sum(dim=1)]).tolist()
    return sent_rows, received_rows


def _local_parameters(experts: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of this rank's experts, which kernels take, of the parameters that are DTensors."""
    parameters = experts.named_parameters(recurse=False)
    return {name: parameter.to_local() for name, parameter in parameters if isinstance(parameter, DTensor)}
