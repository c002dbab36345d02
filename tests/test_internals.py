"""What is used of Transformers and torch without their promise: where it stands, and that it does what we take it for."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_tiny_checkpoint
from tiny_families import FAMILIES_NATIVE
from torch import Tensor
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from slimqwen.model.internals import apply_gate, computed_by, grouped_linear, initialise, mark_as_initialised
from slimqwen.model.model import MtpCausalLM, load

PACKAGE = Path(__file__).parent.parent / "slimqwen"
TRANSFORMERS = {"_apply_gate", "_experts_implementation", "_grouped_linear", "_init_weights", "_is_hf_initialized"}
TORCH = {  # module -> the one file that imports from it
    "torch.distributed._functional_collectives": "parallel/expert_parallel.py",
    "torch.distributed.tensor._utils": "parallel/sharded_checkpoint.py",
}
SHARED = {"torch.utils._python_dispatch", "torch.utils._pytree"}  # what torch's own guide to dispatch modes imports


def private_imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the module and the name of each import from torch or Transformers with an underscore in front of either."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("torch", "transformers"):
            for alias in node.names:
                if any(part.startswith("_") for part in (*str(node.module).split("."), alias.name)):
                    yield str(node.module), alias.name


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MtpCausalLM:
    folder = tmp_path_factory.mktemp("internals") / "model"
    return load(write_tiny_checkpoint(folder, native=FAMILIES_NATIVE["mixtral"]))


@pytest.fixture
def experts(model: MtpCausalLM) -> Any:
    return model.get_submodule("backbone.model.layers.0.mlp.experts")


def test_private_names_stand_in_one_file_each() -> None:
    for file in PACKAGE.rglob("*.py"):
        where = file.relative_to(PACKAGE).as_posix()
        tree = ast.parse(file.read_text())
        for module, name in private_imports(tree):
            assert module in SHARED or where == TORCH.get(module, "model/internals.py"), f"{where}: {module}.{name}"
        accessed = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert where == "model/internals.py" or not accessed & TRANSFORMERS, where


def test_the_gate_is_the_activation_of_the_upper_half_times_the_lower(experts: Any) -> None:
    gate, up = torch.randn(2, 5, experts.intermediate_dim)
    torch.testing.assert_close(apply_gate(experts, torch.cat([gate, up], dim=-1)), F.silu(gate) * up)


def test_a_grouped_product_is_one_product_after_another() -> None:
    """Tokens 0 and 1 are the first expert's, none the second's, 2 to 4 the third's."""
    weight = torch.randn(3, 16, 8)
    tokens = torch.randn(5, 8)
    expected = torch.cat([tokens[:2] @ weight[0].T, tokens[2:] @ weight[2].T])
    found = grouped_linear(tokens, weight, torch.tensor([2, 2, 5], dtype=torch.int32))
    torch.testing.assert_close(found, expected)


def test_an_experts_module_computes_by_the_function_that_is_set(experts: Any) -> None:
    def nothing(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)

    ALL_EXPERTS_FUNCTIONS.register("nothing", nothing)
    hidden, chosen, gates = torch.randn(4, 32), torch.tensor([[0, 1]] * 4), torch.full((4, 2), 0.5)
    before = experts(hidden, chosen, gates)
    with computed_by("nothing", experts):
        assert not experts(hidden, chosen, gates).any()
    assert before.any() and torch.equal(experts(hidden, chosen, gates), before)


def test_a_module_is_drawn_as_the_backbone_draws_it(model: MtpCausalLM) -> None:
    linear = torch.nn.Linear(64, 64, bias=True)
    torch.nn.init.ones_(linear.bias)
    initialise(model.backbone, linear)
    deviation = model.backbone.config.initializer_range
    assert linear.weight.std().item() == pytest.approx(deviation, rel=0.1)
    assert not linear.bias.any()


def test_what_is_marked_is_not_drawn_anew(model: MtpCausalLM) -> None:
    marked, unmarked = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    mark_as_initialised(marked.weight)
    before = [linear.weight.clone() for linear in (marked, unmarked)]
    for linear in (marked, unmarked):
        initialise(model.backbone, linear)
    assert torch.equal(marked.weight, before[0])
    assert not torch.equal(unmarked.weight, before[1])
