"""Split the dense MLPs of a Llama into the routed experts of a Mixtral: clusters of neurons, and a router for them.

Neurons that are strong on the same tokens form one expert (Zhang et al. 2022, "MoEfication"; here by balanced k-means over
co-activation). With every expert chosen and equal gates, the split model computes the same as the dense one.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

STRONG_FRACTION = 0.1  # of the neurons, per token: those with the largest outputs count as active
ROUNDS = 8  # of k-means; after five the assignment hardly changes
LARGEST_TARGET = 1.0  # of the router's regression: an expert with e times the output norm of the others
RIDGE = 1e-3  # of the router's regression, relative to the mean square of its inputs


@contextmanager
def hooked(layers: Sequence[nn.Module], observe: Callable[[int, Tensor], None], part: str = "") -> Iterator[None]:
    """Call `observe(layer, x)` with the input of each layer's MLP, or of its `part`: x is [tokens, features]."""

    def hook(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: observe(layer, inputs[0].flatten(0, -2))

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
    """Count the tokens on which two neurons are both among the strongest, float32 [neurons, neurons].

    hidden: the down projection's input, [tokens, neurons]; its weight `down`, [hidden, neurons]. A neuron's strength is the
    norm of its output, |hidden| * ||down[:, neuron]||.
    """
    strength = hidden.abs() * down.norm(dim=0)
    strongest = strength.topk(max(1, round(STRONG_FRACTION * strength.shape[1])), dim=1).indices
    active = torch.zeros_like(strength).scatter_(1, strongest, 1.0)
    return active.T @ active


def balanced_clusters(together: Tensor, clusters: int, seed: int = 0) -> Tensor:
    """Return the neurons of each cluster in ascending order, int64 [clusters, neurons / clusters].

    together: [neurons, neurons] from `coactivation`. k-means by cosine to a cluster's mean, each assignment the optimal one
    into clusters of equal size (Jonker-Volgenant). The first means are neurons far from each other, the very first by `seed`.
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
    """Ridge regression of one layer's router: from the MLP's input to the norm of each expert's output.

    The target is the logarithm of that norm minus its mean over the experts, to which a softmax is invariant, clamped to
    LARGEST_TARGET: the massive outputs at first tokens would dominate otherwise. All tokens stay in memory.
    """

    def __init__(self, experts: Tensor, down: Tensor) -> None:
        """Take the neurons of each expert, [experts, neurons], and the down projection, [hidden, neurons of all]."""
        self._experts = experts
        self._down = down.T[experts]  # [experts, neurons, hidden]
        self._inputs: list[Tensor] = []
        self._norms: list[Tensor] = []

    def add(self, inputs: Tensor, hidden: Tensor) -> None:
        """Add tokens: the router's inputs, [tokens, hidden], and the down projection's, `hidden` [tokens, neurons]."""
        written = torch.bmm(hidden.T[self._experts].transpose(1, 2), self._down)  # [experts, tokens, hidden]
        self._inputs.append(inputs.clone())
        self._norms.append(written.norm(dim=2).T)

    def solve(self, experts_per_token: int, deviation: float) -> tuple[Tensor, Tensor]:
        """Return the router's weight, [experts, hidden], and the factor for each expert's outputs, [experts].

        deviation: the standard deviation of the logits over tokens and experts. The factors compensate the gates on average,
        in least squares over the tokens routed to the expert: sum(g y^2) / sum(g^2 y^2), y the norm of its output.
        """
        inputs, norms = torch.cat(self._inputs), torch.cat(self._norms)
        target = norms.clamp(min=1e-6).log()
        target = (target - target.mean(dim=1, keepdim=True)).clamp(-LARGEST_TARGET, LARGEST_TARGET)
        gram = inputs.T @ inputs
        gram.diagonal().add_(RIDGE * gram.diagonal().mean())
        weight = torch.linalg.solve(gram, inputs.T @ target)
        weight = (weight * (deviation / (inputs @ weight).std())).T.contiguous()
        chosen = (inputs @ weight.T).topk(experts_per_token)
        gates = torch.zeros_like(norms).scatter(1, chosen.indices, chosen.values.softmax(dim=1))
        weighted = gates * norms.square()
        factors = weighted.sum(dim=0) / (gates * weighted).sum(dim=0)
        return weight, factors.nan_to_num(nan=float(experts_per_token))  # for an expert without tokens


def split(
    dense: Mapping[str, Tensor], experts: Sequence[Tensor], routers: Sequence[Tensor], factors: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Build the tensors of a Mixtral from those of a Llama with an untied lm_head.

    By layer: the neurons of each expert, [experts, neurons]; the router, [experts, hidden]; and the factor for each expert's
    down projection, [experts]. Mixtral divides the gates of the chosen experts by their sum, so that they are about
    1 / experts_per_token each.
    """
    tensors = {name: tensor for name, tensor in dense.items() if ".mlp." not in name}
    for layer, (neurons_of, router, factor) in enumerate(zip(experts, routers, factors, strict=True)):
        mlp, moe = f"model.layers.{layer}.mlp.", f"model.layers.{layer}.block_sparse_moe."
        tensors[moe + "gate.weight"] = router
        for number, neurons in enumerate(neurons_of):
            expert = f"{moe}experts.{number}."
            tensors[expert + "w1.weight"] = dense[mlp + "gate_proj.weight"][neurons]
            tensors[expert + "w3.weight"] = dense[mlp + "up_proj.weight"][neurons]
            tensors[expert + "w2.weight"] = dense[mlp + "down_proj.weight"][:, neurons] * factor[number]
    return tensors
