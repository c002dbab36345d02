"""The training of a recipe as `shapes/placement.py` takes it: its students, one per stage, their tokens, and whether they fit."""

from collections.abc import Callable
from typing import get_args

import torch

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core import torchrun
from slimqwen.core.bytesize import bytes_in_words
from slimqwen.core.progress import say
from slimqwen.core.warning import warn
from slimqwen.depth.measure import layers_at_once
from slimqwen.families import Config, Family
from slimqwen.families.count import count
from slimqwen.model.device import resolve_device
from slimqwen.parallel.shares import choose_shares
from slimqwen.planning.progressive import stage_targets
from slimqwen.recipe import DepthCriterion, Recipe, Target, TrainedPart
from slimqwen.shapes.hardware import Hardware
from slimqwen.shapes.placement import IMBALANCE, Placement, Student, Work, placement_of
from slimqwen.shapes.target import completed, shape_of, size_of, target_config
from slimqwen.shapes.training_memory import TrainingSettings


def work_of(recipe: Recipe, family: Family, config: Config) -> Work:
    """Return the training that a recipe describes. config: of its teacher. Raises UserError for what cannot be cut."""
    targets, fractions = stage_shapes(recipe, family, config)
    students = [target_config(family, config, target) for target in targets]
    distil = recipe.distil
    trained, parts = distil.trained_parts, count(family, config).parts
    return Work(
        family=family,
        teacher=config,
        students=tuple(Student(*pair) for pair in zip(students, fractions, strict=True)),
        rows=distil.batch_size,
        sequence_length=recipe.data.sequence_length,
        tokens=distil.tokens,
        is_taught=distil.is_taught,
        teacher_kind=distil.teacher.kind,
        optimizer=distil.optimizer.kind,
        frozen=tuple(part for part in get_args(TrainedPart) if part in parts and part not in trained),
        execution=recipe.execution,
        group_rows=distil.batch_size
        if distil.load_balancing_counts.kind == "exact"
        else distil.load_balancing_counts.rows,
    )


def stage_shapes(recipe: Recipe, family: Family, config: Config) -> tuple[list[Target], list[float]]:
    """Return the shape that each stage of a recipe's schedule ends with, and its share of the tokens."""
    if recipe.stages is not None:
        targets: list[Target] = []
        for stage in recipe.stages:  # a field left out keeps what the stage before it left
            before = target_config(family, config, targets[-1]) if targets else config
            targets.append(completed(family, stage.target, before))
        return targets, [stage.token_fraction for stage in recipe.stages]
    assert recipe.target is not None
    final = completed(family, recipe.target, config)
    shape = shape_of(family, config)
    at_once = 1
    if recipe.pruning.depth == DepthCriterion.MEASURED:
        at_once = layers_at_once(config, size_of(shape.num_hidden_layers) - size_of(final.num_hidden_layers))
    targets = (
        [final] if recipe.init == "random" else stage_targets(recipe.schedule, shape, final, layers_at_once=at_once)
    )
    first = recipe.first_stage_token_fraction
    return targets, [1.0] if len(targets) == 1 else [first, 1.0 - first]


def announce_memory(recipe: Recipe, source: Checkpoint, ranks: int) -> None:
    """Print, on a GPU, what the training is predicted to take of it; where it does not fit, as a warning that names the remedy."""
    device = resolve_device(recipe.execution.device)
    if device.type != "cuda":
        return
    memory = torch.cuda.get_device_properties(device).total_memory
    hardware = Hardware(gpus=ranks, gpus_per_node=torchrun.local_world_size(), gpu_memory=memory)
    note, fits = memory_note(recipe, source.family, source.config, hardware)
    (say if fits else warn)(note)


def memory_note(recipe: Recipe, family: Family, config: Config, hardware: Hardware) -> tuple[str, bool]:
    """Return a sentence on the memory that the recipe's training needs with its own settings, and whether these GPUs have it."""
    needed, memory = as_set(recipe, family, config, hardware).needed_bytes, hardware.gpu_memory
    sentence = f"training is predicted to take {bytes_in_words(needed)} of a GPU's {bytes_in_words(memory)}"
    if needed <= memory:
        return sentence, True
    plan = f"slimqwen plan RECIPE.yaml --gpus {hardware.gpus} --gpu-memory {memory // 10**9}GB"
    return f"{sentence}, which is too much: `{plan}` lists the settings that fit", False


def as_set(recipe: Recipe, family: Family, config: Config, hardware: Hardware) -> Placement:
    """Predict and estimate the training with the settings that the recipe has, and the shares that are chosen where it leaves them open."""
    work, execution = work_of(recipe, family, config), recipe.execution
    rows = max(work.rows // hardware.gpus, 1)
    micro_batch_size = min(execution.micro_batch_size or work.rows, rows)
    settings = TrainingSettings(
        gpus=hardware.gpus,
        micro_batch_size=micro_batch_size,
        micro_batches=-(-rows // micro_batch_size),
        sequence_length=work.sequence_length,
        recompute_activations=execution.recompute_activations,
        reshard_student=execution.reshard_student,
        reshard_teacher=execution.reshard_teacher,
        loss_chunk_tokens=execution.loss_chunk_tokens,
        optimizer=work.optimizer,
        frozen=work.frozen,
        offload=execution.offload,
        teacher="layer_by_layer" if execution.streaming_teacher and work.teacher_kind == "live" else work.teacher_kind,
        memory_budget=execution.memory_budget,
    )
    models = [config, *(student.config for student in work.students)]
    experts = [model["num_experts"] for model in models if family.moe_blocks(model)]

    def shared(shard_ranks: int, expert_ranks: int) -> Placement:
        imbalance = IMBALANCE if expert_ranks > 1 else 1.0
        shares = {"shard_ranks": shard_ranks, "expert_ranks": expert_ranks, "expert_imbalance": imbalance}
        return placement_of(work, hardware, settings.model_copy(update=shares))

    def chosen(fits: Callable[[int], bool]) -> Placement:
        return shared(*choose_shares(hardware.gpus, hardware.node_gpus, experts, execution, fits))

    def copy_fits(shard_ranks: int) -> bool:
        return chosen(lambda ranks: ranks == shard_ranks).needed_bytes <= hardware.gpu_memory

    placed = shared(1, 1) if hardware.gpus == 1 else chosen(copy_fits)
    memory = placed.memory
    held = memory.student_bytes + memory.gradient_bytes + memory.teacher_bytes
    if (
        execution.streaming_teacher is None
        and work.is_taught
        and settings.teacher == "live"
        and held > hardware.gpu_memory
    ):
        by_layer = placed.settings.model_copy(update={"teacher": "layer_by_layer"})  # as goes_layer_by_layer decides
        return placement_of(work, hardware, by_layer)
    return placed
