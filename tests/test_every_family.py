"""Each family's table, proved on a tiny random model: against Transformers' own modules, by invariance under
permutations, by parity with a model masked by hand, and by the whole pipeline.

A new family needs one tiny config.json in tiny_families.py; nothing here names a family but where its architecture has a
restriction that no other has.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from math import isfinite, prod
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rounding import FORWARD, error
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import canonical, fused, tiny_tokens, transformers_mtp_hidden, write_tiny_checkpoint, write_tiny_tokens
from tiny_families import FAMILIES_NATIVE
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.families import FAMILIES, Config, family_of
from slimqwen.families.axes import Axis, axes_of
from slimqwen.families.count import count
from slimqwen.families.family import Block, Layout
from slimqwen.model.model import MtpCausalLM, load, save
from slimqwen.planning.experts import ExpertGroup
from slimqwen.planning.plan import Plan
from slimqwen.pruning.cut import Cut
from slimqwen.recipe import Recipe
from slimqwen.runs.recipe_run import run
from slimqwen.shapes.target import UNITS_OF_NO_AXIS

pytestmark = pytest.mark.rounding

TOKENS = tiny_tokens(rows=2, columns=13)
# Never cut: what they count is no unit of the method.
FIXED = {"vocab", "head_dim", "key_dim", "value_dim", "conv_kernel"}
# A norm averages over what is cut: less of it changes what stays (method.md 3), so that no mask has the same effect.
AVERAGED = {"hidden": set(FAMILIES), "kv_head": {"olmoe"}, "query_head": {"olmoe"}}

Logits = tuple[Tensor, Tensor | None]


def axes_to_cut(model_type: str) -> dict[str, Axis]:
    family, config = FAMILIES[model_type], canonical(FAMILIES_NATIVE[model_type])
    return {axis.name: axis for axis in sorted(family.axes_in_use(config), key=str) if axis.name not in FIXED}


PRUNABLE = [(model_type, axis) for model_type in FAMILIES for axis in axes_to_cut(model_type)]
MASKABLE = [(model_type, axis) for model_type, axis in PRUNABLE if model_type not in AVERAGED.get(axis, ())]
WITH_MTP = [name for name, native in FAMILIES_NATIVE.items() if canonical(native)["num_nextn_predict_layers"]]


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one family, one tensor per expert."""
    folder = tmp_path_factory.mktemp("families") / request.param
    return write_tiny_checkpoint(folder, native=FAMILIES_NATIVE[request.param])


@pytest.fixture(scope="module")
def whole(source: Path) -> MtpCausalLM:
    """The model of `source`, which no test may change."""
    return load(source)


@pytest.fixture(scope="module")
def before(whole: MtpCausalLM) -> Logits:
    return logits(whole)


@torch.no_grad()
def logits(model: MtpCausalLM) -> Logits:
    """Of the backbone and, where there is one, of the MTP module; [batch, seq, vocab]."""
    hidden = model(TOKENS)
    return hidden.main @ model.head.T, None if hidden.mtp is None else hidden.mtp @ model.head.T


def difference(one: Logits, other: Logits) -> float:
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    assert len(pairs) == sum(head is not None for head in one)
    return max(error(a, b) for a, b in pairs)


def cut(source: Path, out: Path, layers: list[int] | None = None, layout: Layout | None = None, **kept: Any) -> Path:
    """The checkpoint that keeps these units; `expert` by block too, without merging."""
    checkpoint = Checkpoint(source)
    experts = {block: [alone(expert) for expert in chosen] for block, chosen in kept.pop("expert", {}).items()}
    out.mkdir()
    layers = list(range(checkpoint.config["num_hidden_layers"])) if layers is None else layers
    Cut(checkpoint, layers, kept, experts, layout=layout).write(out, "test")
    return out


def alone(expert: int) -> ExpertGroup:
    return ExpertGroup(base=expert, members=[expert], weights=[1.0])


# --- names, shapes and counts -----------------------------------------------------------------------------------------


def test_every_family_has_its_tiny_model() -> None:
    assert FAMILIES_NATIVE.keys() == FAMILIES.keys()


def shapes_on_disk(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, framework="pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_table_is_what_transformers_saves(tmp_path: Path, model_type: str, layout: Layout, tied: bool) -> None:
    family, config = FAMILIES[model_type], canonical(FAMILIES_NATIVE[model_type] | {"tie_word_embeddings": tied})
    model = getattr(transformers, config["architectures"][0])(AutoConfig.for_model(**family.to_disk(config)))
    model.save_pretrained(tmp_path, save_original_format=layout == "per_expert")
    written = shapes_on_disk(tmp_path / "model.safetensors")

    specs = list(family.tensors(config, dict.fromkeys(family.detect_layouts(config, set()), layout)))
    table = {spec.name: spec.shape for spec in specs if not spec.block.is_mtp}
    if layout == "fused":  # written by the names of the modules, which Mixtral's checkpoints do not have
        table = {name.replace(".block_sparse_moe.", ".mlp."): shape for name, shape in table.items()}
    assert table == written
    assert len({spec.name for spec in specs}) == len(specs)
    assert count(family, config).total_parameters == sum(prod(shape) for shape in written.values())


def test_transformers_loads_fused_experts_by_the_tables_names(tmp_path: Path, source: Path, before: Logits) -> None:
    """To the bit: wherever in a file a weight lies, what is computed with begins where all memory of PyTorch does."""
    native = FAMILIES_NATIVE[source.name]
    stacked = load(write_tiny_checkpoint(tmp_path / "fused", native=native, layout="fused"))
    assert difference(before, logits(stacked)) == 0


@pytest.mark.parametrize("source", WITH_MTP, indirect=True)
@torch.no_grad()
def test_the_mtp_tensors_are_those_of_transformers_own_module(source: Path, whole: MtpCausalLM) -> None:
    """The referee takes exactly the tensors that it has, and its hidden states are ours."""
    stored = fused(load_file(source / "model.safetensors"), whole.config)
    held = {whole.family.module_name(name, whole.config): tensor for name, tensor in stored.items()}
    expected = transformers_mtp_hidden(whole.backbone, held, TOKENS)
    assert error(whole(TOKENS).mtp, expected) < FORWARD


# --- config.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_transformers_reads_the_same_from_what_we_write(model_type: str) -> None:
    family, native = FAMILIES[model_type], FAMILIES_NATIVE[model_type] | {"unknown_key": 1}
    written = family.to_disk(family.normalise(native))
    assert family.to_disk(family.normalise(written)) == written
    assert written["unknown_key"] == 1

    theirs, ours = (AutoConfig.for_model(**config).get_text_config() for config in (native, written))
    for field in dataclasses.fields(theirs):
        if getattr(theirs, field.name) is not None:  # what was derived from other sizes is written out
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


def test_an_unknown_family_is_told_which_are_known() -> None:
    with pytest.raises(UserError) as told:
        family_of({"model_type": "qwen3_mo"}, "config.json")
    assert "'qwen3_mo' is not supported (did you mean 'qwen3_moe'?)" in str(told.value)
    assert all(model_type in str(told.value) for model_type in FAMILIES)
    assert "docs/adding-a-family.md" in str(told.value) and "\n" not in str(told.value)


# --- permutations -----------------------------------------------------------------------------------------------------


class Units:
    """Draws units of one axis: another choice for every block and for every unit around them."""

    def __init__(self, source: Path, axis: str) -> None:
        checkpoint = Checkpoint(source)
        self.family, self.config = checkpoint.family, checkpoint.config
        self.axis = axes_to_cut(self.family.model_type)[axis]
        self.generator = torch.Generator().manual_seed(0)

    def shuffled(self, size: int) -> list[int]:
        """An order that leaves nothing in its place."""
        while True:
            order: list[int] = torch.randperm(size, generator=self.generator).tolist()
            if all(i != unit for i, unit in enumerate(order)):
                return order

    def half(self, size: int) -> list[int]:
        return sorted(torch.randperm(size, generator=self.generator)[: size // 2].tolist())

    def everywhere(self, draw: Callable[[int], list[int]]) -> Any:
        """`draw(size)` once for the model, or by block, or by block for every unit around."""
        sizes = self.family.sizes(self.config)
        size, around = sizes[self.axis], self.around()
        if self.axis.scope == "model":
            return draw(size)
        blocks = [block.name for block in self.family.blocks(self.config) if self.axis in axes_in(block)]
        return {block: [draw(size) for _ in range(sizes[around])] if around else draw(size) for block in blocks}

    def around(self) -> Axis | None:
        """KV heads are around query heads, key heads around value heads, experts around their neurons."""
        if self.axis.scope == "expert":
            return self.family.expert
        outer = [axes[:-1] for axes in self.family.fields.values() if axes[-1] == self.axis]
        return outer[0][-1] if outer and outer[0] else None


def axes_in(block: Block) -> set[Axis]:
    tables = [*block.tables.values(), *([block.experts.per_expert] if block.experts else [])]
    axes = set().union(*(axes_of(term) for table in tables for dims in table.values() for term in dims))
    return axes | ({block.experts.axis} if block.experts else set())


@pytest.mark.parametrize(("source", "axis"), PRUNABLE, indirect=["source"])
@torch.no_grad()
def test_a_permutation_changes_nothing(
    tmp_path: Path, source: Path, whole: MtpCausalLM, before: Logits, axis: str
) -> None:
    units = Units(source, axis)
    out = cut(source, tmp_path / "out", **{axis: units.everywhere(units.shuffled)})
    permuted = load(out)
    assert difference(before, logits(permuted)) < FORWARD
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()

    # It had to follow in every tensor that it changed: with one of them as it was, in all layers, the logits are others.
    originals, held = deepcopy(whole).held(), permuted.held()
    moved = [name for name in held if not torch.equal(held[name], originals[name])]
    assert moved
    for kind in {without_numbers(name) for name in moved}:
        names = [name for name in moved if without_numbers(name) == kind]
        swap(held, originals, names)
        assert difference(before, logits(permuted)) > 1e-3, kind
        swap(held, originals, names)


def without_numbers(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def swap(some: Mapping[str, Tensor], others: Mapping[str, Tensor], names: list[str]) -> None:
    for name in names:
        one = some[name].clone()
        some[name].copy_(others[name])
        others[name].copy_(one)


# --- cutting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_keeping_everything_is_the_identity(tmp_path: Path, model_type: str, layout: Layout) -> None:
    native = FAMILIES_NATIVE[model_type]
    source = write_tiny_checkpoint(tmp_path / "source", native=native, layout=layout, dtype=torch.bfloat16)
    out = cut(source, tmp_path / "out")
    for name in ("config.json", "model.safetensors"):
        assert (out / name).read_bytes() == (source / name).read_bytes(), name


def test_either_layout_and_the_modules_hold_the_same(tmp_path: Path, source: Path, whole: MtpCausalLM) -> None:
    """Stacked by hand: gate above up. Transformers stacks them itself when it loads, we take them apart on saving."""
    apart = load_file(source / "model.safetensors")
    stacked = fused(apart, whole.config)
    to_stacked = cut(source, tmp_path / "stacked", layout="fused")
    back = cut(to_stacked, tmp_path / "apart", layout="per_expert")
    saved = tmp_path / "saved"
    saved.mkdir()
    save(whole, saved, like=Checkpoint(source), config=whole.config)
    for folder, expected in ((to_stacked, stacked), (back, apart), (saved, apart)):
        written = load_file(folder / "model.safetensors")
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in expected.items()), folder.name


@pytest.mark.parametrize("dropped", [0, 1])
def test_dropping_a_layer_is_skipping_it(
    tmp_path: Path, source: Path, whole: MtpCausalLM, before: Logits, dropped: int
) -> None:
    """The first layer is dense in some families, the second is not."""
    skipping = deepcopy(whole)
    kept = [layer for layer in range(skipping.config["num_hidden_layers"]) if layer != dropped]
    skipping.backbone.get_decoder().layers[dropped].register_forward_hook(lambda _, inputs, __: inputs[0])
    shorter = cut(source, tmp_path / "out", layers=kept)
    expected = logits(skipping)
    assert difference(expected, logits(load(shorter))) < FORWARD
    assert difference(expected, before) > 1e-2


@pytest.mark.parametrize(("source", "axis"), MASKABLE, indirect=["source"])
def test_a_cut_is_what_a_mask_does(tmp_path: Path, source: Path, whole: MtpCausalLM, before: Logits, axis: str) -> None:
    units = Units(source, axis)
    kept = units.everywhere(units.half)
    masked = deepcopy(whole)
    for block in masked.family.blocks(masked.config):
        if block.name in kept:
            layers = masked.mtp.layers if block.is_mtp and masked.mtp else masked.backbone.get_decoder().layers
            mask(layers[block.layer or 0], axis, kept[block.name], masked.config)
    expected = logits(masked)
    assert difference(expected, logits(load(cut(source, tmp_path / "out", **{axis: kept})))) < FORWARD
    assert difference(expected, before) > 1e-2


@torch.no_grad()
def mask(layer: nn.Module, axis: str, kept: Any, config: Config) -> None:
    """Switch off what is not kept in Transformers' modules, by hand: zeros where a unit's output is read."""
    hidden = config["hidden_size"]
    match axis:
        case "expert":
            mask_router(layer.mlp.gate, [e for e in range(config["num_experts"]) if e not in kept])
        case "expert_neuron":
            for down, neurons in zip(layer.mlp.experts.down_proj, kept, strict=True):
                down *= ones_at(neurons, down.shape[1])
        case "shared_neuron":
            (shared,) = [
                module for name, module in layer.mlp.named_children() if name in ("shared_expert", "shared_experts")
            ]
            shared.down_proj.weight *= ones_at(kept, shared.down_proj.in_features)
        case "dense_neuron":
            layer.mlp.down_proj.weight *= ones_at(kept, layer.mlp.down_proj.in_features)
        case "kv_head":
            groups = layer.self_attn.o_proj.weight.view(hidden, config["num_key_value_heads"], -1)
            groups *= ones_at(kept, groups.shape[1])[:, None]
        case "query_head":
            group, heads = config["num_key_value_heads"], config["num_attention_heads"]
            columns = layer.self_attn.o_proj.weight.view(hidden, group, heads // group, -1)
            columns *= torch.stack([ones_at(units, heads // group) for units in kept])[..., None]
        case "key_head":
            groups = layer.linear_attn.out_proj.weight.view(hidden, config["linear_num_key_heads"], -1)
            groups *= ones_at(kept, groups.shape[1])[:, None]
        case "value_head":
            group, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
            columns = layer.linear_attn.out_proj.weight.view(hidden, group, heads // group, -1)
            columns *= torch.stack([ones_at(units, heads // group) for units in kept])[..., None]
        case _:
            raise AssertionError(f"no mask is known for {axis}")


def ones_at(kept: list[int], size: int) -> Tensor:
    return torch.zeros(size).index_fill_(0, torch.tensor(kept), 1.0)


def mask_router(router: nn.Module, dropped: list[int]) -> None:
    """Logits of -inf, whatever the router makes of them."""
    indices, unmasked = torch.tensor(dropped), router.forward

    class Masked(TorchFunctionMode):
        def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            return result.index_fill(-1, indices, -torch.inf) if function is nn.functional.linear else result

    def forward(hidden: Tensor) -> Any:
        with Masked():
            return unmasked(hidden)

    router.forward = forward
    for name, bias in router.named_buffers():
        assert name == "e_score_correction_bias"  # added after the sigmoid
        bias[indices] = -torch.inf


# --- the whole of it --------------------------------------------------------------------------------------------------

CUT = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "intermediate_size": 8,
    "num_key_value_heads": 1,
    "linear_num_key_heads": 1,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_tiny_tokens(folder)
    return folder


def recipe(teacher: Path, text: Path, target: dict[str, int]) -> Recipe:
    return Recipe.model_validate(
        {
            "run_dir": teacher.parent / "run",
            "teacher": str(teacher),
            "target": target,
            "schedule": "one_shot",
            "pruning": {"depth": "block_influence"},
            "data": {
                "sources": [{"path": text / "text"}],
                "heldout_sources": [{"path": text / "heldout_text"}],
                "sequence_length": 16,
            },
            "calibration": {"samples": 4},
            "distil": {"tokens": 16 * 2 * 3, "batch_size": 2, "warmup": "1 steps"},
            "evaluation": {
                "tokens": 64,
                "acceptance": {"prompts": 1, "prompt_tokens": 8, "new_tokens": 6, "depth": 2},
            },
        }
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_whole_pipeline(tmp_path: Path, text: Path, model_type: str) -> None:
    """Every axis cut at once, three steps of distillation, and Transformers loads what is left."""
    family, native, axes = FAMILIES[model_type], FAMILIES_NATIVE[model_type], axes_to_cut(model_type)
    teacher = write_tiny_checkpoint(tmp_path / "teacher", native=native, tokenizer=text / "tokenizer")
    fields = {field for field, (*_, axis) in family.fields.items() if axis.name in axes}
    target = {field: size for field, size in CUT.items() if field in fields.union(UNITS_OF_NO_AXIS)}
    run_dir = run(recipe(teacher, text, target))

    final = Checkpoint(run_dir / "final")
    assert {field: final.config[field] for field in target} == target
    assert Plan.load(run_dir / "stage-1" / "plan.json").after == count(family, final.config)
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 3 and all(isfinite(step["loss"]) for step in steps)
    assert ("mtp_kd" in steps[0]) == final.has_mtp == Checkpoint(teacher).has_mtp

    model, info = AutoModelForCausalLM.from_pretrained(run_dir / "final", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["error_msgs"]
    mtp = tuple(block.prefix for block in family.moe_blocks(final.config) if block.is_mtp)
    assert all(
        name.startswith(mtp) for name in info["unexpected_keys"]
    )  # GLM's MTP layer, unless it is number 46 or 92
    generated = model.generate(TOKENS[:1, :5], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 9)
