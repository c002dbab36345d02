"""Changes of a module that are undone: what stands in front of a parameter, a method, a child, and what is there afterwards."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

from slimqwen.model.patching import has_parameter, overridden, override, with_children

PACKAGE = Path(__file__).parent.parent / "slimqwen"


def test_a_module_computes_with_a_tensor_in_its_parameters_place_until_it_is_left() -> None:
    linear, ones, twos = nn.Linear(2, 1, bias=False), torch.ones(1, 2), torch.full((1, 2), 2.0, requires_grad=True)
    weight, inputs = linear.weight, torch.tensor([3.0, 4.0])
    with overridden(linear, weight=ones):
        assert linear(inputs).tolist() == [7.0]
        with overridden(linear, weight=twos):
            linear(inputs).backward()
        assert linear(inputs).tolist() == [7.0]
        assert dict(linear.named_parameters()).keys() == {"weight"} and linear.weight is ones
    assert linear.weight is weight and weight.grad is None
    assert twos.grad is not None and twos.grad.tolist() == [[3.0, 4.0]]


def test_an_exception_ends_an_override_too() -> None:
    linear = nn.Linear(2, 2)
    before = dict(vars(linear))
    with pytest.raises(RuntimeError, match="half way"), overridden(linear, forward=torch.zeros_like, note=1):
        assert not linear(torch.ones(2)).any()
        raise RuntimeError("half way")
    assert vars(linear) == before and not hasattr(linear, "note")
    assert linear(torch.ones(2)).any()


def test_hooks_see_what_an_overridden_forward_returns() -> None:
    linear, seen = nn.Linear(2, 2), []
    linear.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with overridden(linear, forward=lambda inputs: inputs + 1):
        linear(torch.ones(2))
    assert seen[0].tolist() == [2.0, 2.0]


def test_a_parameter_is_one_although_it_is_overridden() -> None:
    norm = nn.BatchNorm1d(2)
    with overridden(norm, weight=torch.ones(2)):
        assert has_parameter(norm, "weight")
    assert not has_parameter(norm, "running_mean") and not has_parameter(norm, "nothing")


def test_what_is_overridden_within_an_override_is_undone_with_it() -> None:
    linear = nn.Linear(1, 1)
    weight = linear.weight
    with overridden(linear, weight=torch.zeros(1, 1)):
        override(linear, weight=torch.ones(1, 1))
        assert linear.weight.item() == 1.0
    assert linear.weight is weight


def test_other_children_leave_the_module_as_it_is() -> None:
    whole = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    linear = whole[0]
    other = with_children(whole, **{"1": nn.Identity()})
    inputs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert torch.equal(other(inputs), linear(inputs)) and other[0] is linear
    assert torch.equal(whole(inputs), linear(inputs).relu())


def test_modules_are_changed_in_one_file() -> None:
    """Elsewhere nothing assigns a `forward`, reads a module's dictionaries or takes an attribute away."""
    for file in PACKAGE.rglob("*.py"):
        if file == PACKAGE / "model" / "patching.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                is_private = node.attr in ("_parameters", "_modules", "_buffers")
                assert not is_private and not (node.attr == "forward" and isinstance(node.ctx, ast.Store)), file
            assert not (isinstance(node, ast.Name) and node.id == "delattr"), file
