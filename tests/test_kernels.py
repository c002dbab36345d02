"""Which kernels a device has, what is said where one is missing, and experts that autocast would otherwise pass by."""

import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny import canonical, tiny_config, write_tiny_checkpoint
from tiny_families import QWEN3_MOE

from slimqwen.core import versions
from slimqwen.core.errors import UserError
from slimqwen.families import FAMILIES
from slimqwen.families.qwen3_next import QWEN3_NEXT
from slimqwen.model import kernels
from slimqwen.model.kernels import (
    BATCHED_EXPERTS,
    announce_slow,
    announce_zeroed_gradients,
    batched_experts_forward,
    check_gradients,
    kernels_of,
    leaves_gradients_unset,
)
from slimqwen.model.model import MtpCausalLM, initialise, load

pytestmark = pytest.mark.rounding

GPU = torch.device("cuda")
PACKAGES = ("fla.ops.gated_delta_rule", "causal_conv1d")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU with everything but the packages."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)  # its import fails
    return monkeypatch


def test_a_line_for_each_slow_fallback(hopper: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    announce_slow(QWEN3_NEXT, tiny_config(), GPU)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("SLOW: DeltaNet") for line in lines)
    assert "pip install flash-linear-attention" in lines[0] and "pip install causal-conv1d" in lines[1]


def test_nothing_is_said_where_all_is_there(hopper: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for package in PACKAGES:
        hopper.setitem(sys.modules, package, ModuleType(package))
    announce_slow(QWEN3_NEXT, tiny_config(), GPU)
    assert capsys.readouterr().err == ""
    assert {kernel.part for kernel in kernels_of(QWEN3_NEXT, tiny_config(), GPU)} == {
        "attention",
        "DeltaNet",
        "DeltaNet's convolution",
        "routed experts",
    }


def test_a_model_without_deltanet_needs_no_package_for_it(hopper: pytest.MonkeyPatch) -> None:
    kernels = kernels_of(FAMILIES["qwen3_moe"], canonical(QWEN3_MOE), GPU)
    assert [(kernel.part, kernel.remedy) for kernel in kernels] == [("attention", None), ("routed experts", None)]


def test_an_old_gpu_and_wide_heads(hopper: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    announce_slow(FAMILIES["qwen3_moe"], canonical(QWEN3_MOE | {"head_dim": 512}), GPU)
    assert "head_dim 512" in capsys.readouterr().err
    hopper.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    announce_slow(FAMILIES["qwen3_moe"], canonical(QWEN3_MOE), GPU)
    lines = capsys.readouterr().err.splitlines()
    assert ["attention" in line for line in lines] == [True, False] and "one expert after another" in lines[1]


def test_on_a_cpu_nothing_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    announce_slow(QWEN3_NEXT, tiny_config(), torch.device("cpu"))
    assert capsys.readouterr().err == ""


def gradients(model: MtpCausalLM, implementation: str, tokens: torch.Tensor, autocast: bool) -> dict[str, torch.Tensor]:
    model.set_experts_implementation(implementation)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = model(tokens)
    target = torch.randn(hidden.main.shape, generator=torch.Generator().manual_seed(1))
    ((hidden.main + hidden.mtp).float() * target).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.tensors().items() if parameter.grad is not None}


def test_experts_follow_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their products are in bfloat16 and their gradients in float32, near those of the loop that autocast knows (which takes
    the same routes); without autocast the same bits as Transformers'."""
    model = initialise(tiny_config(num_hidden_layers=1, layer_types=["full_attention"]), seed=0)
    tokens = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(0))
    seen: list[torch.dtype] = []
    product = torch.nn.functional.grouped_mm

    def watched(x: torch.Tensor, weight: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        seen.append(weight.dtype)
        return product(x, weight, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", watched)
    exact, same = (gradients(model, name, tokens, autocast=False) for name in ("grouped_mm", BATCHED_EXPERTS))
    assert set(seen) == {torch.float32} and all(torch.equal(exact[name], same[name]) for name in exact)
    seen.clear()
    rounded = gradients(model, BATCHED_EXPERTS, tokens, autocast=True)
    assert set(seen) == {torch.bfloat16}
    loop = gradients(model, "eager", tokens, autocast=True)
    for name, expected in loop.items():
        assert rounded[name].dtype == torch.float32
        if ".experts." in name:
            assert (rounded[name] - expected).norm() < 0.05 * expected.norm(), name


def test_lent_experts_follow_autocast_too() -> None:
    """Weights that are no parameters, as expert parallelism and streaming lend them to the module."""
    model = initialise(tiny_config(num_hidden_layers=1, layer_types=["full_attention"]), seed=0)
    experts = model.backbone.get_decoder().layers[0].mlp.experts
    hidden = torch.randn(5, model.config["hidden_size"], generator=torch.Generator().manual_seed(0))
    choice, gates = torch.tensor([[0, 1]] * 5), torch.full((5, 2), 0.5)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = batched_experts_forward(experts, hidden, choice, gates)
        for name, parameter in list(experts.named_parameters()):
            vars(experts)[name] = parameter.data.clone()
        found = batched_experts_forward(experts, hidden, choice, gates)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"hidden_size": 42}, "hidden size.*is 42"), ({"moe_intermediate_size": 18}, "intermediate size.*is 18")],
)
def test_a_size_that_the_grouped_product_does_not_take(tmp_path: Path, changes: dict[str, int], words: str) -> None:
    write_tiny_checkpoint(tmp_path / "model", **changes)
    with pytest.raises(UserError, match=words):
        load(tmp_path / "model")
    experts = initialise(tiny_config(hidden_size=36), seed=0).backbone.get_decoder().layers[0].mlp.experts
    hidden, choice = torch.zeros(2, 36), torch.zeros(2, 1, dtype=torch.long)
    batched_experts_forward(experts, hidden, choice, torch.ones(2, 1))  # float32 takes multiples of 4
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match="hidden size is a multiple of 8"):
        batched_experts_forward(experts, hidden, choice, torch.ones(2, 1))


# --- releases that do not work together -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "triton", "packages", "refused"),
    [
        ((9, 0), "3.6.0", {"fla-core": "0.6.0"}, "Triton 3.6.0 computes wrong gradients.*flash-linear-attention 0.6.0"),
        ((9, 0), "3.7.0", {"flash-linear-attention": "0.3.2"}, "Triton 3.7.0 .*flash-linear-attention 0.3.2"),
        ((9, 0), "3.7.1", {"fla-core": "0.6.0"}, None),  # of PyTorch 2.12.1
        ((9, 0), "3.3.1", {"fla-core": "0.4.0"}, None),
        ((8, 0), "3.6.0", {"fla-core": "0.6.0"}, None),  # an A100
        ((9, 0), "3.6.0", {"fla-core": "0.6.0", "tilelang": "0.1.6"}, None),  # which computes in Triton's place
        ((9, 0), "3.6.0", {"fla-core": "0.5.2", "tilelang": "0.1.6"}, "Triton 3.6.0"),
        ((9, 0), "3.6.0", {}, None),  # the reference code
    ],
)
def test_wrong_gradients_of_deltanet_are_refused(
    hopper: pytest.MonkeyPatch, capability: tuple[int, int], triton: str, packages: dict[str, str], refused: str | None
) -> None:
    installed = packages | {"triton": triton}
    hopper.setattr(versions, "version", lambda name: installed.get(name) or missing(name))
    hopper.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if packages:
        hopper.setitem(sys.modules, PACKAGES[0], ModuleType(PACKAGES[0]))
    check_gradients(FAMILIES["qwen3_moe"], canonical(QWEN3_MOE), GPU)  # has no DeltaNet
    check_gradients(QWEN3_NEXT, tiny_config(), torch.device("cpu"))
    if refused is None:
        check_gradients(QWEN3_NEXT, tiny_config(), GPU)
        return
    with pytest.raises(UserError, match=refused):
        check_gradients(QWEN3_NEXT, tiny_config(), GPU)


def missing(name: str) -> str:
    raise PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("written", "release"), [("2.11.0+cpu", (2, 11, 0)), ("2.13.0rc1", (2, 13, 0)), ("5.17", (5, 17)), ("", ())]
)
def test_releases_are_numbers(monkeypatch: pytest.MonkeyPatch, written: str, release: tuple[int, ...]) -> None:
    monkeypatch.setattr(versions, "version", lambda name: written or missing(name))
    assert versions.release("torch") == release


@pytest.mark.parametrize("autocast", [False, True])
def test_experts_without_a_token_get_no_gradient_where_the_product_leaves_it_unset(
    hopper: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], autocast: bool
) -> None:
    """As on Blackwell: what the product leaves in the memory of their gradients is nan here."""
    model = initialise(tiny_config(num_hidden_layers=1, layer_types=["full_attention"]), seed=0)
    tokens = torch.randint(300, (1, 2), generator=torch.Generator().manual_seed(0))  # a token: most experts have none
    expected = gradients(model, BATCHED_EXPERTS, tokens, autocast)
    product = torch.nn.functional.grouped_mm

    def unset(x: torch.Tensor, weight: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        empty = offs.diff(prepend=offs.new_zeros(1)) == 0
        weight = weight.view_as(weight)
        weight.register_hook(lambda gradient: torch.where(empty[:, None, None], torch.nan, gradient))
        return product(x, weight, offs=offs)

    hopper.setattr(torch.nn.functional, "grouped_mm", unset)
    unmended = gradients(model, BATCHED_EXPERTS, tokens, autocast)
    assert any(gradient.isnan().any() for gradient in unmended.values())
    hopper.setattr(kernels, "leaves_gradients_unset", lambda device: True)
    mended = gradients(model, BATCHED_EXPERTS, tokens, autocast)
    assert mended.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(mended[name], gradient), name

    announce_zeroed_gradients(QWEN3_NEXT, tiny_config(), GPU)
    assert "experts without a token" in capsys.readouterr().err


def test_which_gpus_leave_gradients_unset(hopper: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    announce_zeroed_gradients(QWEN3_NEXT, tiny_config(), GPU)
    assert not leaves_gradients_unset(GPU) and not leaves_gradients_unset(torch.device("cpu"))
    assert capsys.readouterr().err == ""
    hopper.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert leaves_gradients_unset(GPU)
