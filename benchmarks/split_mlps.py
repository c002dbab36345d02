"""Split the dense MLPs of a Llama into the routed experts of a Mixtral: which neurons go together, and a router for them.

Neurons that are strong on the same tokens become one expert (Zhang et al. 2022, "MoEfication"; here by balanced k-means over
co-activation). With every expert chosen, and gates that are all equal, the split model is the dense one.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

STRONG_FRACTION = 0.1  # of the neurons, per token: those that write most count as active
ROUNDS = 8  # of k-means; the assignment hardly changes after five
RIDGE = 1e-3  # of the router's regression, relative to the mean square of its inputs


@contextmanager
def hooked(layers: Sequence[nn.Module], see: Callable[[int, Tensor], None], part: str = "") -> Iterator[None]:
    """While open, `see(layer, x)` is told the input of each layer's MLP, or of its `part`, flat: [tokens, features]."""

    def hook(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: see(layer, inputs[0].flatten(0, -2))

    names = [f"mlp.{part}".rstrip(".")] * len(layers)
    handles = [
        module.get_submodule(name).register_forward_pre_hook(hook(i))
        for i, (module, name) in enumerate(zip(layers, names, strict=True))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def coactivation(hidden: Tensor, down: Tensor) -> Tensor:
    """How often two neurons are both among the strongest of a token, float32 [neurons, neurons], summed over tokens.

    hidden: the down projection's input, [tokens, neurons]; its weight `down`, [hidden, neurons]. A neuron's strength is the
    norm of what it writes, |hidden| * ||down[:, neuron]||.
    """
    strength = hidden.abs() * down.norm(dim=0)
    strongest = strength.topk(max(1, round(STRONG_FRACTION * strength.shape[1])), dim=1).indices
    active = torch.zeros_like(strength).scatter_(1, strongest, 1.0)
    return active.T @ active


def balanced_clusters(together: Tensor, clusters: int, seed: int = 0) -> Tensor:
    """The neurons of each cluster in ascending order, int64 [clusters, neurons / clusters].

    together: [neurons, neurons] from `coactivation`. k-means by cosine to a cluster's mean, each assignment the best one of
    clusters of equal size (Jonker-Volgenant). The first means are neurons far from each other, the very first by `seed`.
    """
    neurons = len(together)
    assert neurons % clusters == 0, f"{neurons} neurons do not make {clusters} equal clusters"
    norms = together.diagonal().clamp(min=1.0).sqrt()
    similarity = together / norms[:, None] / norms
    chosen = [int(torch.randint(neurons, (1,), generator=torch.Generator().manual_seed(seed)))]
    while len(chosen) < clusters:
        nearest = similarity[chosen].amax(dim=0).index_fill(0, torch.tensor(chosen), math.inf)
        chosen.append(int(nearest.argmin()))
    affinity = similarity[:, chosen]
    size = neurons // clusters
    assigned = torch.full((neurons,), -1)
    for _ in range(ROUNDS):
        before = assigned
        _, columns = linear_sum_assignment(np.repeat(affinity.numpy(), size, axis=1), maximize=True)
        assigned = torch.from_numpy(columns) // size
        if torch.equal(assigned, before):
            break
        members = F.one_hot(assigned, clusters).to(similarity.dtype)
        means = members.T @ similarity @ members  # of two clusters: the sum over their pairs
        affinity = (similarity @ members) / means.diagonal().sqrt()
    return torch.stack([(assigned == cluster).nonzero()[:, 0] for cluster in range(clusters)])


class RouterFit:
    """The router of one layer by ridge regression: from the MLP's input, how much each expert writes.

    The target is the logarithm of the norm of an expert's output, less its mean over the experts, to which a softmax is blind.
    """

    def __init__(self, experts: Tensor, down: Tensor) -> None:
        """experts: the neurons of each, [experts, neurons]. down: [hidden, neurons of all]."""
        hidden, count = down.shape[0], len(experts)
        self._experts = experts
        self._down = down.T[experts]  # [experts, neurons, hidden]
        self._inputs = torch.zeros(hidden, hidden)
        self._targets = torch.zeros(hidden, count)
        self.tokens = 0

    def add(self, inputs: Tensor, hidden: Tensor) -> None:
        """inputs: what the router reads, [tokens, hidden]; hidden: the down projection's input, [tokens, neurons]."""
        written = torch.bmm(hidden.T[self._experts].transpose(1, 2), self._down).norm(dim=2).T  # [tokens, experts]
        target = written.clamp(min=1e-6).log()
        self._inputs += inputs.T @ inputs
        self._targets += inputs.T @ (target - target.mean(dim=1, keepdim=True))
        self.tokens += len(inputs)

    def weight(self, deviation: float) -> Tensor:
        """The router's weight, [experts, hidden], whose logits have this standard deviation over tokens and experts."""
        gram = self._inputs / self.tokens
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
        weight = torch.linalg.solve(gram + ridge, self._targets / self.tokens)
        mean_square = torch.einsum("he,hk,ke->", weight, gram, weight) / weight.shape[1]
        return (weight * (deviation / mean_square.sqrt())).T.contiguous()


def split(
    dense: Mapping[str, Tensor], experts: Sequence[Tensor], routers: Sequence[Tensor], experts_per_token: int
) -> dict[str, Tensor]:
    """The tensors of a Mixtral out of those of a Llama whose lm_head is its own.

    experts: by layer, the neurons of each expert, [experts, neurons]. Mixtral divides the gates of the chosen experts by their
    sum, so that each is about 1 / experts_per_token: the down projections are multiplied by it.
    """
    tensors = {name: tensor for name, tensor in dense.items() if ".mlp." not in name}
    for layer, (neurons_of, router) in enumerate(zip(experts, routers, strict=True)):
        mlp, moe = f"model.layers.{layer}.mlp.", f"model.layers.{layer}.block_sparse_moe."
        tensors[moe + "gate.weight"] = router
        for number, neurons in enumerate(neurons_of):
            expert = f"{moe}experts.{number}."
            tensors[expert + "w1.weight"] = dense[mlp + "gate_proj.weight"][neurons]
            tensors[expert + "w3.weight"] = dense[mlp + "up_proj.weight"][neurons]
            tensors[expert + "w2.weight"] = dense[mlp + "down_proj.weight"][:, neurons] * experts_per_token
    return tensors
