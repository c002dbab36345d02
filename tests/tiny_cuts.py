"""Tiny teachers that were cut, and how far what is left is from them."""

import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.data.store import training_stream
from slimqwen.families.axes import Axis, axes_of
from slimqwen.families.count import count
from slimqwen.families.family import Block
from slimqwen.model.model import load
from slimqwen.planning.choose import Scores
from slimqwen.planning.experts import ExpertGroup
from slimqwen.planning.plan import Plan
from slimqwen.pruning.prune import prune
from slimqwen.recipe import PruningRecipe, Target
from slimqwen.shapes.target import completed

SEQUENCE_LENGTH = 16
SAMPLES = 24
KEPT_EXPERTS = 4
NEURONS = ("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size")
OUTPUT_MATRICES = r"\.(down_proj|w2)(\.weight)?$"  # of all networks, in every family and layout


class Texts(NamedTuple):
    tokenizer: Path
    tokens: Path


class Cut(NamedTuple):
    teacher: Path
    student: Path
    plan: Plan


def a_plan(teacher: Path, target: Target, kept_layers: list[int] | None = None, **kept: Any) -> Plan:
    """The first experts stay, and in each layer the last one absorbs the expert that follows it."""
    checkpoint = Checkpoint(teacher)
    family, config = checkpoint.family, checkpoint.config
    target = completed(family, target, config)
    kept_layers = kept_layers or list(range(config["num_hidden_layers"]))
    groups = [ExpertGroup(base=e, members=[e], weights=[1.0]) for e in range(target.num_experts or 0)]
    if len(groups) < config["num_experts"]:
        last = len(groups) - 1
        groups[last] = ExpertGroup(base=last, members=[last, last + 1], weights=[0.5, 0.5])
    blocks = [block.name for block in family.moe_blocks(config) if block.layer is None or block.layer in kept_layers]
    return Plan(
        checkpoint=checkpoint.fingerprint(),
        statistics_data="none",
        target=target,
        pruning=PruningRecipe(),
        kept_layers=kept_layers,
        kept=kept,
        expert_groups=dict.fromkeys(blocks, groups),
        before=count(family, config),
        after=count(family, config),
        scores=Scores(layer_similarity=[], layer_block_influence=[], hidden=[], experts={}),
    )


def without_some_experts(teacher: Path, folder: Path) -> Cut:
    plan = a_plan(teacher, Target(num_experts=KEPT_EXPERTS))
    return Cut(teacher, prune(teacher, folder / "student", plan=plan), plan)


def with_half_the_neurons(teacher: Path, folder: Path) -> Cut:
    """Of routed experts, shared ones and dense layers: the first ones stay."""
    checkpoint = Checkpoint(teacher)
    family, config = checkpoint.family, checkpoint.config
    fields = [field for field in NEURONS if family.fields.get(field, (None,))[-1] in family.axes_in_use(config)]
    target = Target(**{field: config[field] // 2 for field in fields})
    kept: dict[str, dict[str, Any]] = {}
    for field in fields:
        (axis,) = family.fields[field]
        first = list(range(config[field] // 2))
        of_a_block = [first] * config["num_experts"] if axis.scope == "expert" else first
        kept[axis.name] = {block.name: of_a_block for block in family.blocks(config) if axis in axes_of_block(block)}
    plan = a_plan(teacher, target, **kept)
    return Cut(teacher, prune(teacher, folder / "student", plan=plan), plan)


def axes_of_block(block: Block) -> set[Axis]:
    tables = [*block.tables.values(), *([block.experts.per_expert] if block.experts else [])]
    return set().union(*(axes_of(term) for table in tables for dims in table.values() for term in dims))


def with_noise(checkpoint: Path, out: Path, only: str, size: float) -> Path:
    """A copy in which the tensors whose names match `only` are damaged."""
    shutil.copytree(checkpoint, out)
    generator = torch.Generator().manual_seed(5)
    tensors = load_file(out / "model.safetensors")
    for name in tensors:
        if re.search(only, name):
            tensors[name] = tensors[name] + size * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, out / "model.safetensors")
    return out


@torch.no_grad()
def distance(student: Path, teacher: Path, texts: Texts, channels: list[int] | None = None) -> float:
    """|student's - teacher's stream|^2 / |teacher's|^2 after the last layer, on the text that the refit used."""
    rows = training_stream(texts.tokens, SEQUENCE_LENGTH, 0).batch(0, SAMPLES).tokens
    ours, theirs = (before_the_norm(folder, rows) for folder in (student, teacher))
    theirs = theirs if channels is None else theirs[..., channels]
    return float((ours - theirs).square().sum() / theirs.square().sum())


def before_the_norm(folder: Path, rows: Tensor) -> Tensor:
    model = load(folder)
    model.backbone.get_decoder().norm = nn.Identity()
    return model(rows, with_mtp=False).main


@torch.no_grad()
def predictions(folder: Path, rows: Tensor) -> Tensor:
    """Log probabilities [rows, seq, vocab]."""
    model = load(folder)
    return (model(rows, with_mtp=False).main @ model.head.T).log_softmax(dim=-1)
