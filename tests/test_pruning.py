"""Cutting a checkpoint: permutations change nothing, keeping everything is the identity, and what is cut is what a
plain indexing of the tensors gives."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import FORWARD, error
from safetensors.torch import load_file
from settings import paper
from tiny import VOCAB_SIZE, fused, tiny_tokens, transformers_mtp_hidden, write_tiny_checkpoint
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from slimqwen.artifacts import MARKER
from slimqwen.calibration.observe import observe
from slimqwen.calibration.statistics import Part, Statistics
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.families.family import Layout
from slimqwen.model.model import MtpCausalLM, load
from slimqwen.planning.experts import ExpertGroup
from slimqwen.planning.plan import Plan, plan
from slimqwen.pruning.cut import Cut
from slimqwen.pruning.prune import prune
from slimqwen.recipe import ExpertRecipe, Target

pytestmark = pytest.mark.rounding

TOKENS = tiny_tokens(rows=3, columns=21)
MOE_BLOCKS = [f"model.layers.{layer}" for layer in range(4)] + ["mtp.layers.0"]
LINEAR_BLOCKS, ATTENTION_BLOCKS = MOE_BLOCKS[:3], MOE_BLOCKS[3:]

Kept = dict[str, Any]
Groups = dict[str, list[ExpertGroup]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("pruning") / "per_expert", num_key_value_heads=2)


@torch.no_grad()
def logits(model: MtpCausalLM, tokens: Tensor = TOKENS) -> tuple[Tensor, Tensor]:
    """(backbone, MTP), both [batch, seq, vocab]."""
    hidden = model(tokens)
    assert hidden.mtp is not None
    return hidden.main @ model.head.T, hidden.mtp @ model.head.T


def difference(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    return max(error(*pair) for pair in zip(one, other, strict=True))


def stacked(folder: Path) -> dict[str, Tensor]:
    """The tensors of a single-file checkpoint as Transformers' modules hold them: experts stacked."""
    tensors = load_file(folder / "model.safetensors")
    is_stacked = any(name.endswith("gate_up_proj") for name in tensors)
    return tensors if is_stacked else fused(tensors, json.loads((folder / "config.json").read_text()))


# --- permutations -----------------------------------------------------------------------------------------------------


class Shuffle:
    """Permutations that leave nothing in its place, the same in every run."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, size: int) -> list[int]:
        while True:
            order: list[int] = torch.randperm(size, generator=self.generator).tolist()
            if all(i != unit for i, unit in enumerate(order)):
                return order

    def each(self, units: int, size: int) -> list[list[int]]:
        """One permutation per enclosing unit; with three or more to choose from, not all the same."""
        return [self(size) for _ in range(units)]


def alone(expert: int) -> ExpertGroup:
    return ExpertGroup(base=expert, members=[expert], weights=[1.0])


def permutations() -> dict[str, tuple[Kept, Groups]]:
    """Every axis whose order the model cannot know, each block with an order of its own."""
    shuffle = Shuffle()
    kept: dict[str, Kept] = {
        "hidden": {"hidden": shuffle(32)},
        "kv_head": {"kv_head": {block: [1, 0] for block in ATTENTION_BLOCKS}},
        "query_head": {"query_head": {ATTENTION_BLOCKS[0]: [1, 0], ATTENTION_BLOCKS[1]: [[0, 1], [1, 0]]}},
        "key_head": {"key_head": {block: [1, 0] for block in LINEAR_BLOCKS}},
        "value_head": {
            "value_head": {
                LINEAR_BLOCKS[0]: [[1, 0], [0, 1]],
                LINEAR_BLOCKS[1]: [[0, 1], [1, 0]],
                LINEAR_BLOCKS[2]: [1, 0],
            }
        },
        "key_dim": {"key_dim": {block: shuffle(8) for block in LINEAR_BLOCKS}},
        "value_dim": {"value_dim": {block: shuffle(12) for block in LINEAR_BLOCKS}},
        "expert_neuron": {"expert_neuron": {block: shuffle.each(8, 16) for block in MOE_BLOCKS}},
        "shared_neuron": {"shared_neuron": {block: shuffle(20) for block in MOE_BLOCKS}},
    }
    experts = {block: [alone(expert) for expert in shuffle(8)] for block in MOE_BLOCKS}
    cases: dict[str, tuple[Kept, Groups]] = {name: (axes, {}) for name, axes in kept.items()}
    cases["expert"] = ({}, experts)
    everything = {axis: indices for axes in kept.values() for axis, indices in axes.items()}
    cases["all at once"] = (everything, experts)
    return cases


PERMUTATIONS = permutations()


def cut_to(out: Path, source: Path, kept: Kept, groups: Groups) -> Path:
    checkpoint = Checkpoint(source)
    out.mkdir()
    Cut(checkpoint, list(range(checkpoint.config["num_hidden_layers"])), kept, groups).write(out, "test")
    return out


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("axis", PERMUTATIONS)
def test_a_permutation_changes_nothing(tmp_path: Path, axis: str, layout: Layout) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", layout=layout)
    permuted = cut_to(tmp_path / "permuted", source, *PERMUTATIONS[axis])
    assert json.loads((permuted / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    before, after = load(source), load(permuted)
    assert difference(logits(before), logits(after)) < FORWARD
    if "hidden" not in PERMUTATIONS[axis][0]:
        with torch.no_grad():
            hidden = before(TOKENS), after(TOKENS)
            assert error(hidden[0].main, hidden[1].main) < FORWARD and error(hidden[0].mtp, hidden[1].mtp) < FORWARD


@pytest.mark.parametrize("axis", [axis for axis in PERMUTATIONS if axis != "all at once"])
def test_a_permutation_that_forgot_one_tensor_would_be_seen(tmp_path: Path, folder: Path, axis: str) -> None:
    """The sensitivity of the test above: each permuted tensor in turn is put back into the source's order."""
    originals = stacked(folder)
    model = load(cut_to(tmp_path / "permuted", folder, *PERMUTATIONS[axis]))
    expected = logits(load(folder))
    touched = 0
    for name, held in model.tensors().items():
        original = originals[name]
        permuted = held.detach().clone()
        if torch.equal(original, permuted):
            continue
        touched += 1
        with torch.no_grad():
            held.copy_(original)
            assert difference(expected, logits(model)) > 1e-2, f"{name} in the old order was not noticed"
            held.copy_(permuted)
    assert touched >= 4


def test_a_permutation_of_the_vocabulary_permutes_the_logits(tmp_path: Path, folder: Path) -> None:
    order = Shuffle()(VOCAB_SIZE)
    model = load(cut_to(tmp_path / "permuted", folder, {"vocab": order}, {}))
    renamed = torch.tensor(order).argsort()[TOKENS]  # row i of the result is the source's order[i]
    expected = logits(load(folder))
    assert difference((expected[0][..., order], expected[1][..., order]), logits(model, renamed)) < FORWARD


# --- keeping everything -----------------------------------------------------------------------------------------------


def measured(folder: Path) -> Statistics:
    """Calibration statistics of a checkpoint on a few random tokens."""
    checkpoint, model = Checkpoint(folder), load(folder)
    rows = tiny_tokens(rows=8, columns=33, seed=1)
    tokens = rows[:, 1:].numel()
    text = Part("text", 0)
    statistics = Statistics(checkpoint.fingerprint(), "tiny", {text: {"main": tokens, "mtp": tokens}})
    with observe(model, statistics), statistics.part(text), torch.inference_mode():
        model(rows)
    return statistics


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize(
    ("compression", "dtype"), [("prune", torch.float32), ("merge", torch.bfloat16), ("partial", torch.bfloat16)]
)
def test_keeping_everything_is_the_identity(
    tmp_path: Path, layout: Layout, compression: Any, dtype: torch.dtype
) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", layout=layout, dtype=dtype)
    (source / "tokenizer.json").write_text("{}")
    whole = plan(
        source,
        tmp_path / "plan.json",
        statistics=measured(source),
        target=Target(),
        pruning=paper(experts=ExpertRecipe(compression=compression)),
    )
    assert whole.before == whole.after
    out = prune(source, tmp_path / "out", plan=tmp_path / "plan.json")
    written = sorted(file for file in out.iterdir() if file.name != MARKER)
    assert [file.name for file in written] == ["config.json", "model.safetensors", "tokenizer.json"]
    for file in written:
        assert file.read_bytes() == (source / file.name).read_bytes(), file.name


# --- cutting ----------------------------------------------------------------------------------------------------------

TARGET = Target(num_hidden_layers=3, hidden_size=24, num_experts=4, num_experts_per_tok=1)


def cut_by_plan(source: Path, out: Path, compression: Any) -> Plan:
    """Layers 4 -> 3, hidden 32 -> 24, experts 8 -> 4, top-k 2 -> 1, by real statistics; `out/pruned` and the plan."""
    chosen = plan(
        source,
        out / "plan.json",
        statistics=measured(source),
        target=TARGET,
        pruning=paper(depth="block_influence", experts=ExpertRecipe(compression=compression)),
    )
    prune(source, out / "pruned", plan=chosen)
    return chosen


def sliced_by_hand(tensors: dict[str, Tensor], chosen: Plan) -> dict[str, Tensor]:
    """The pruned checkpoint from the source's fused tensors, by plain indexing; no axis table."""
    h = torch.tensor(chosen.kept["hidden"])
    layers = {f"model.layers.{old}": f"model.layers.{new}" for new, old in enumerate(chosen.kept_layers)}
    layers |= {"mtp.layers.0": "mtp.layers.0"}
    result = {}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        result[name] = tensors[name][:, h]
    for name in ("model.norm", "mtp.norm", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden"):
        result[f"{name}.weight"] = tensors[f"{name}.weight"][h]
    fc = tensors["mtp.fc.weight"][h]
    result["mtp.fc.weight"] = torch.cat([fc[:, :32][:, h], fc[:, 32:][:, h]], dim=1)
    for old, new in layers.items():
        groups = chosen.expert_groups[old]
        for name in (name for name in tensors if name.startswith(old + ".")):
            tensor, kind = tensors[name], name.removeprefix(old + ".")
            if (
                kind in ("input_layernorm.weight", "post_attention_layernorm.weight")
                or kind in ("linear_attn.out_proj.weight", "self_attn.o_proj.weight")
                or "expert.down_proj" in kind
            ):
                tensor = tensor[h]
            elif kind == "mlp.gate.weight":
                tensor = tensor[[group.base for group in groups]][:, h]
            elif kind in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
                merged = [
                    sum(weight * tensor[e] for e, weight in zip(group.members, group.weights, strict=True))
                    for group in groups
                ]
                stacked = torch.stack(merged)  # type: ignore[arg-type]
                tensor = stacked[:, :, h] if kind.endswith("gate_up_proj") else stacked[:, h]
            elif "_proj" in kind or kind == "mlp.shared_expert_gate.weight":
                tensor = tensor[:, h]
            else:
                inner = ("conv1d.weight", "A_log", "dt_bias", "linear_attn.norm.weight", "q_norm.weight")
                assert kind.endswith((*inner, "k_norm.weight")), kind
            result[name.replace(old, new, 1)] = tensor
    return result


def by_transformers(tensors: dict[str, Tensor], source_config: dict[str, Any], chosen: Plan) -> PreTrainedModel:
    """A Transformers model of the target shape with these tensors."""
    kinds = [source_config["layer_types"][layer] for layer in chosen.kept_layers]
    shape = {"hidden_size": 24, "num_hidden_layers": 3, "num_experts": 4, "num_experts_per_tok": 1}
    config = AutoConfig.for_model(**(source_config | shape | {"layer_types": kinds}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")})
    return model


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("compression", ["prune", "merge", "partial"])
def test_a_cut_checkpoint_is_the_model_sliced_by_hand(tmp_path: Path, layout: Layout, compression: Any) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", layout=layout)
    chosen = cut_by_plan(source, tmp_path, compression)
    config = json.loads((source / "config.json").read_text())
    expected = sliced_by_hand(stacked(source), chosen)
    pruned = load(tmp_path / "pruned")
    held = pruned.tensors()
    assert held.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(held[name].detach(), tensor, rtol=0, atol=1e-6, msg=name)

    by_hand = by_transformers(expected, config, chosen)
    main, mtp = logits(pruned)
    with torch.no_grad():
        expected_main = by_hand(TOKENS[:, :-1], use_cache=False).logits
        expected_mtp = transformers_mtp_hidden(by_hand, expected, TOKENS) @ by_hand.lm_head.weight.T
    assert error(main, expected_main) < FORWARD and error(mtp, expected_mtp) < FORWARD
    # It is a cut: neither the unpruned model nor one with the first channels would have these logits.
    assert (main - logits(load(source))[0]).abs().max() > 0.1
    assert chosen.kept["hidden"] != list(range(24))


def test_both_layouts_are_cut_alike(tmp_path: Path) -> None:
    cuts = {}
    for layout in ("per_expert", "fused"):
        source = write_tiny_checkpoint(tmp_path / layout / "source", layout=layout)
        cut_by_plan(source, tmp_path / layout, "partial")
        cuts[layout] = Checkpoint(tmp_path / layout / "pruned")
        assert set(cuts[layout].layouts.values()) == {layout}
    one, other = stacked(tmp_path / "per_expert" / "pruned"), stacked(tmp_path / "fused" / "pruned")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert cuts["per_expert"].config == cuts["fused"].config


def test_a_cut_keeps_each_tensors_dtype_and_merges_in_float32(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    chosen = cut_by_plan(source, tmp_path, "merge")
    before, after = Checkpoint(source), Checkpoint(tmp_path / "pruned")
    assert {after.dtype(name) for name in after.specs if not name.endswith("A_log")} == {torch.bfloat16}
    assert {after.dtype(name) for name in after.specs if name.endswith("A_log")} == {torch.float32}

    block = MOE_BLOCKS[chosen.kept_layers[0]]
    number, group = max(enumerate(chosen.expert_groups[block]), key=lambda pair: len(pair[1].members))
    assert len(group.members) > 2  # where rounding after every addition would show
    exact = sum(
        weight * before.read(f"{block}.mlp.experts.{expert}.up_proj.weight").double()
        for expert, weight in zip(group.members, group.weights, strict=True)
    )
    assert isinstance(exact, Tensor)
    merged = after.read(f"model.layers.0.mlp.experts.{number}.up_proj.weight")
    torch.testing.assert_close(merged, exact[:, chosen.kept["hidden"]].float().bfloat16(), rtol=0, atol=1e-3)
    assert (merged != exact[:, chosen.kept["hidden"]].float().bfloat16()).float().mean() < 0.01


@pytest.mark.parametrize("compression", ["prune", "partial"])
def test_transformers_loads_a_cut_checkpoint_and_generates(tmp_path: Path, compression: Any) -> None:
    source = write_tiny_checkpoint(tmp_path / "source")
    cut_by_plan(source, tmp_path, compression)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not info["error_msgs"]
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_experts, config.num_experts_per_tok) == (
        24,
        3,
        4,
        1,
    )
    generated = model.generate(TOKENS[:1, :5], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 9)


def test_a_checkpoint_without_mtp_is_cut_without(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", num_nextn_predict_layers=0)
    checkpoint = Checkpoint(source)
    out = tmp_path / "out"
    out.mkdir()
    groups = {block: [alone(expert) for expert in (6, 1, 2)] for block in MOE_BLOCKS[:4]}
    cut = Cut(checkpoint, [0, 3], {"hidden": list(range(0, 32, 2))}, groups)
    cut.write(out, "test")
    result = Checkpoint(out)
    assert not result.has_mtp and result.config["layer_types"] == ["linear_attention", "full_attention"]
    expert = "mlp.experts.0.up_proj.weight"
    assert torch.equal(
        result.read(f"model.layers.1.{expert}"), checkpoint.read(f"model.layers.3.{expert.replace('0', '6')}")[:, ::2]
    )


def test_other_axes_can_be_cut_too(tmp_path: Path, folder: Path) -> None:
    """Heads and neurons, with a set of their own in each enclosing unit: the config follows and the model runs."""
    kept: Kept = {
        "kv_head": {block: [1] for block in ATTENTION_BLOCKS},
        "query_head": {block: [[0], [1]] for block in ATTENTION_BLOCKS},
        "value_head": {block: [[1], [0]] for block in LINEAR_BLOCKS},
        "expert_neuron": {block: [[e, e + 1, e + 2, e + 3] for e in range(8)] for block in MOE_BLOCKS},
        "shared_neuron": {block: [3, 5, 7, 9] for block in MOE_BLOCKS},
    }
    out = cut_to(tmp_path / "out", folder, kept, {})
    before, after = Checkpoint(folder), Checkpoint(out)
    assert after.config["num_key_value_heads"] == after.config["num_attention_heads"] == 1
    assert after.config["linear_num_value_heads"] == after.config["linear_num_key_heads"] == 2
    assert after.config["moe_intermediate_size"] == after.config["shared_expert_intermediate_size"] == 4
    # KV head 1 keeps its query head 1: the last of the four heads, with query and gate of 8 rows each.
    assert torch.equal(
        after.read("mtp.layers.0.self_attn.q_proj.weight"), before.read("mtp.layers.0.self_attn.q_proj.weight")[48:]
    )
    # Key head 0 keeps its value head 1, key head 1 its value head 0: heads 1 and 2 of four.
    assert torch.equal(
        after.read("model.layers.0.linear_attn.A_log"), before.read("model.layers.0.linear_attn.A_log")[1:3]
    )
    expert = "model.layers.2.mlp.experts.5.down_proj.weight"
    assert torch.equal(after.read(expert), before.read(expert)[:, 5:9])
    assert logits(load(out))[1].isfinite().all()


def test_an_interrupted_cut_leaves_nothing_that_looks_finished(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = plan(folder, tmp_path / "plan.json", statistics=measured(folder), target=Target())

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slimqwen.pruning.prune.copy_companions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune(folder, tmp_path / "out", plan=whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "plan.json"]


def test_a_plan_for_another_checkpoint_is_refused(tmp_path: Path, folder: Path) -> None:
    statistics = measured(folder)
    plan(folder, tmp_path / "plan.json", statistics=statistics, target=Target())
    other = write_tiny_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="was not made for"):
        prune(other, tmp_path / "out", plan=tmp_path / "plan.json")
    with pytest.raises(UserError, match="not measured on"):
        plan(other, tmp_path / "other.json", statistics=statistics, target=Target())
    with pytest.raises(UserError, match="more than the source"):
        plan(folder, tmp_path / "other.json", statistics=statistics, target=Target(hidden_size=33))
    assert not (tmp_path / "out").exists() and not (tmp_path / "other.json").exists()
