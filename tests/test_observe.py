"""What is seen in one pass: experts against Transformers' own and against each one by hand, in every family."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rounding import SUM, error
from tiny import canonical, tiny_tokens, write_tiny_checkpoint
from tiny_families import FAMILIES_NATIVE
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import grouped_mm_experts_forward

from slimqwen.calibration.observe import observe
from slimqwen.calibration.statistics import Part, Statistics
from slimqwen.families import FAMILIES
from slimqwen.model.experts import (
    ExpertsObserver,
    Pairs,
    Stopwatch,
    grouped,
    observed_experts_forward,
    one_by_one,
    streamed_experts_forward,
)
from slimqwen.model.model import MtpCausalLM, initialise, load

pytestmark = pytest.mark.rounding

PART = Part("text", 0)
TOKENS, CHOSEN = 13, 2


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> MtpCausalLM:
    """A tiny model of each family, its experts with outputs of all sizes."""
    made = initialise(canonical(FAMILIES_NATIVE[request.param]), seed=0)
    for tensor in made.tensors().values():
        if tensor.dim() == 3:
            nn.init.normal_(tensor, generator=torch.Generator().manual_seed(1))
    return made.eval()


def experts_of(model: MtpCausalLM) -> Any:
    block = model.family.moe_blocks(model.config)[0]
    assert block.experts is not None
    return model.module_of(block.prefix + next(iter(block.experts.fused)))


def routed(model: MtpCausalLM) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, chosen experts and gates of a batch in which no token chooses the last expert."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(TOKENS, model.config["hidden_size"], generator=generator)
    logits = torch.randn(TOKENS, model.config["num_experts"] - 1, generator=generator)
    gates, experts = logits.sigmoid().topk(CHOSEN)
    return hidden, experts, gates


class RecordedSums(dict[str, Tensor]):
    """The sums that an observer receives, by name."""

    def observer(self) -> ExpertsObserver:
        return ExpertsObserver(self.__setitem__, Stopwatch())


@pytest.mark.parametrize("forward", [one_by_one, grouped])
@torch.no_grad()
def test_the_experts_function_computes_what_transformers_does(model: MtpCausalLM, forward: Any) -> None:
    """And the sums of each expert are those of running it by hand on its tokens."""
    module, (hidden, experts, gates) = experts_of(model), routed(model)
    sums = RecordedSums()
    pairs = Pairs.of(experts, gates, module.num_experts)
    found = forward(module, hidden, pairs, sums.observer())
    assert error(found, grouped_mm_experts_forward(module, hidden, experts, gates)) < SUM

    shares = gates / gates.sum(-1, keepdim=True)
    for expert in range(module.num_experts):
        x = hidden[(experts == expert).any(-1)]
        gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
        neurons = F.silu(gate) * up
        outputs = neurons @ module.down_proj[expert].T
        assert error(sums["neuron_abs_sums"][expert], neurons.abs().sum(0)) < SUM
        assert error(sums["output_sums"][expert], outputs.sum(0)) < SUM
        gated = (shares[experts == expert] * outputs.norm(dim=-1)).sum()
        assert error(sums["gated_norm_sums"][expert], gated) < SUM
    assert sums["output_sums"][-1].eq(0).all() and sums["output_sums"][:-1].ne(0).any(-1).all()


@torch.no_grad()
def test_the_streamed_function_asks_for_one_expert_at_a_time(model: MtpCausalLM) -> None:
    """Of stacks that can only be indexed, and not of an expert that no token chose."""
    module, (hidden, experts, gates) = experts_of(model), routed(model)
    read: list[int] = []

    class Stack:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

        def __getitem__(self, expert: int) -> Tensor:
            read.append(expert)
            return self.tensor[expert]

    lent = SimpleNamespace(
        num_experts=module.num_experts,
        gate_up_proj=Stack(module.gate_up_proj),
        down_proj=Stack(module.down_proj),
        _apply_gate=module._apply_gate,
    )
    found = streamed_experts_forward(lent, hidden, experts, gates)  # type: ignore[arg-type]
    assert error(found, grouped_mm_experts_forward(module, hidden, experts, gates)) < SUM
    assert read == [expert for expert in range(module.num_experts - 1) for _ in range(2)]


@torch.no_grad()
def test_assignments_and_gates(model: MtpCausalLM) -> None:
    module, (hidden, experts, gates) = experts_of(model), routed(model)
    sums = RecordedSums()
    module.slimqwen_observer = sums.observer()
    observed_experts_forward(module, hidden, experts, gates)
    del module.slimqwen_observer
    shares = gates / gates.sum(-1, keepdim=True)
    for expert in range(module.num_experts):
        assert sums["assignments"][expert] == (experts == expert).sum()
        torch.testing.assert_close(sums["gate_sums"][expert], shares[experts == expert].sum())


def test_pairs_are_sorted_by_expert() -> None:
    """Tokens 0 and 2 choose expert 1, token 1 chooses 2 and 0."""
    pairs = Pairs.of(torch.tensor([[1, 2], [2, 0], [1, 2]]), torch.tensor([[3.0, 1], [1, 1], [2, 2]]), num_experts=4)
    assert pairs.tokens.tolist() == [1, 0, 2, 0, 1, 2]
    assert pairs.order.tolist() == [3, 0, 4, 1, 2, 5]
    assert pairs.gates.tolist() == [1, 3, 2, 1, 1, 2]
    assert pairs.shares.tolist() == [0.5, 0.75, 0.5, 0.25, 0.5, 0.5]
    assert pairs.counts.tolist() == [1, 2, 3, 0]
    assert list(pairs.by_expert()) == [(0, slice(0, 1)), (1, slice(1, 3)), (2, slice(3, 6))]


def sums_of(model: MtpCausalLM, rows: Tensor) -> Statistics:
    tokens = rows[:, 1:].numel()
    statistics = Statistics("checkpoint", "data", {PART: {"main": tokens, "mtp": tokens}})
    with observe(model, statistics), statistics.part(PART), torch.inference_mode():
        model(rows)
    return statistics


def test_every_family_is_measured_whole(model: MtpCausalLM) -> None:
    """A sum for every norm, writer and block of the table, of its axes' shape, with something in it."""
    family, config = model.family, model.config
    sizes = family.sizes(config)
    expected = {f"norm/{tensor}/abs_sums": (sizes[family.hidden],) for _, tensor in family.residual_norms(config)}
    for _, tensor, axes in family.writers(config):
        units = tuple(sizes[axis] for axis in axes)
        expected[f"input/{tensor}/{'abs_sums' if len(axes) == 1 else 'norm_sums'}"] = units[:-1] or units
    for block in family.moe_blocks(config):
        neurons = next(axis for axis in sizes if axis.scope == "expert")
        experts = sizes[family.expert]
        expected |= {
            f"experts/{block.name}/{name}": (experts,) for name in ("assignments", "gate_sums", "gated_norm_sums")
        }
        expected[f"experts/{block.name}/output_sums"] = (experts, sizes[family.hidden])
        expected[f"experts/{block.name}/neuron_abs_sums"] = (experts, sizes[neurons])
        expected[f"experts/{block.name}/logit_gram"] = (experts, experts)
    layers = config["num_hidden_layers"]
    expected |= {"layers/hidden_sums": (layers + 1, sizes[family.hidden]), "layers/cosine_sums": (layers,)}

    sums = sums_of(model, tiny_tokens(rows=3)).sums
    assert {name.removeprefix(PART.prefix): tuple(value.shape) for name, value in sums.items()} == expected
    assert all(value.dtype == torch.float64 and value.any() for value in sums.values())


@torch.no_grad()
def test_a_head_counts_with_what_it_hands_over(tmp_path: Path) -> None:
    """Twice the values of KV head 1: twice its query heads' sums, the others' as before. Qwen3-Next's layer 3 attends."""
    model = load(write_tiny_checkpoint(tmp_path / "checkpoint"))
    name = f"{PART.prefix}input/model.layers.3.self_attn.o_proj.weight/norm_sums"
    before = sums_of(model, tiny_tokens()).sums[name]
    values: Any = model.module_of("model.layers.3.self_attn.v_proj.weight")
    values.weight[8:] *= 2  # head_dim is 8
    after = sums_of(model, tiny_tokens()).sums[name]
    torch.testing.assert_close(after, before * torch.tensor([[1.0], [2.0]]), rtol=1e-6, atol=0)


def test_a_failure_leaves_no_hooks_behind(model: MtpCausalLM) -> None:
    usual = experts_of(model).config._experts_implementation
    with pytest.raises(ZeroDivisionError), observe(model, Statistics("", "", {})):
        raise ZeroDivisionError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(hasattr(module, "slimqwen_observer") for module in model.modules())
    assert experts_of(model).config._experts_implementation == usual
