"""What `slimqwen plan --gpu-memory` shows: the settings with which a training fits the GPUs that there are."""

from pathlib import Path
from typing import TYPE_CHECKING

from slimqwen.cli.options import config_path, size_of
from slimqwen.core.errors import UserError
from slimqwen.core.terminal import show_result
from slimqwen.recipe import Target

if TYPE_CHECKING:
    from slimqwen.shapes.hardware import Hardware
    from slimqwen.shapes.placement import Work

RECIPES = (".yaml", ".yml")
LEAST_MEMORY = 10**9  # a smaller one is a number whose unit was left out
ROWS = 1024  # of an optimiser step where no recipe has a batch size: the paper's


def hardware_of(gpus: int, gpus_per_node: int, gpu_memory: str, host_memory: str | None, gpu: str) -> "Hardware":
    """Return the machines that the options describe. Raises UserError that names an option."""
    from slimqwen.shapes.hardware import Hardware, gpu_of

    gpu = gpu.lower().replace(" ", "")
    gpu_of(gpu)
    memory = _memory_of("--gpu-memory", gpu_memory)
    if gpus > gpus_per_node and gpus % gpus_per_node:
        raise UserError(f"--gpus {gpus} are not whole nodes of {gpus_per_node} GPUs (--gpus-per-node).")
    return Hardware(
        gpus=gpus,
        gpus_per_node=gpus_per_node,
        gpu_memory=memory,
        host_memory=None if host_memory is None else _memory_of("--host-memory", host_memory),
        gpu=gpu,
    )


def _memory_of(option: str, text: str) -> int:
    """Read a memory of at least 1 GB, which `80` is not. Raises UserError that names the option."""
    size = size_of(option, text)
    if size < LEAST_MEMORY:
        raise UserError(f"{option}: '{text}' is {size:,} bytes, less than 1 GB: write it with its unit, as 80GB.")
    return size


def refuse_without_memory(name: str, overrides: list[str] | None, host_memory: str | None) -> None:
    """Raise UserError for what only --gpu-memory takes: a recipe, --set, and --host-memory."""
    if Path(name).suffix in RECIPES or overrides:
        raise UserError("a recipe, and --set, are for what fits: give --gpus and --gpu-memory too, such as 80GB.")
    if host_memory is not None:
        raise UserError("--host-memory is for what fits: give --gpus and --gpu-memory too, such as 80GB.")


def show_placements(
    name: str, target: Path | None, overrides: list[str], hardware: "Hardware", sequence_length: int, as_json: bool
) -> None:
    """Print the settings with which a model, or the students of a recipe, can be trained on the machines."""
    from slimqwen.shapes.placement import place
    from slimqwen.shapes.placement_table import placements_text

    if Path(name).suffix in RECIPES:
        if target is not None:
            raise UserError("--target: a recipe has its own: --set target.num_hidden_layers=36.")
        work = _work_of_recipe(name, overrides, hardware.gpus)
    else:
        if overrides:
            raise UserError("--set overrides a recipe's fields: give a recipe, RECIPE.yaml.")
        work = _work_of_model(name, target, hardware.gpus, sequence_length)
    show_result(place(work, hardware), placements_text, as_json)


def _work_of_recipe(name: str, overrides: list[str], gpus: int) -> "Work":
    from slimqwen.checkpoint.config import read_config
    from slimqwen.recipe.file import load_recipe
    from slimqwen.runs.placing import work_of
    from slimqwen.training.inputs import check_batch

    recipe = load_recipe(Path(name), overrides)
    check_batch(recipe.distil, gpus)
    teacher = config_path(recipe.teacher)
    if not teacher.exists():
        raise UserError(f"{name}: teacher {recipe.teacher} does not exist: give its config.json, --set teacher=FILE.")
    return work_of(recipe, *read_config(teacher))


def _work_of_model(name: str, target: Path | None, gpus: int, sequence_length: int) -> "Work":
    from slimqwen.checkpoint.config import read_config
    from slimqwen.recipe.file import load_recipe
    from slimqwen.shapes.placement import MICRO_BATCH_SIZES, Student, Work
    from slimqwen.shapes.target import completed, target_config

    family, config = read_config(config_path(name))
    wanted = Target() if target is None else load_recipe(target, model=Target)
    student = target_config(family, config, completed(family, wanted, config))
    each = max(ROWS // gpus, 1)
    rows = gpus * (each - each % MICRO_BATCH_SIZES[-1] or each)  # so that every micro-batch divides it
    return Work(family, config, (Student(student),), rows, sequence_length)
