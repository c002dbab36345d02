"""Training a student, and what training needs beside it."""

from pathlib import Path
from typing import Annotated

import typer

from slimqwen.cli.options import (
    CheckpointName,
    Device,
    DtypeOption,
    Isolated,
    Overrides,
    Seed,
    SequenceLength,
    TokensFolder,
    dtype_of,
    size_of,
)
from slimqwen.core.terminal import show
from slimqwen.core.torchrun import rank

commands = typer.Typer()


@commands.command()
def teacher_cache(
    checkpoint: CheckpointName,
    tokens: TokensFolder,
    out: Annotated[Path, typer.Option(help="Folder to write; of a mixture, a folder for each source.")],
    top_k: Annotated[int, typer.Option(min=1, help="Most likely tokens to keep, beside the sum of the others.")] = 64,
    mtp: Annotated[
        bool, typer.Option("--mtp", help="Keep what the MTP head says too, for distil.mtp_target: mtp.")
    ] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Log-probabilities as float32 instead of 16 bits.")] = False,
    sequences: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Only the first so many of the training order of --seed. Default: the whole text, for any seed.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 8,
    sequence_length: SequenceLength = 256,
    isolated: Isolated = False,
    shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Size of a file, which is what an interruption costs.")
    ] = "256MB",
    streaming: Annotated[
        bool | None,
        typer.Option(
            "--streaming/--no-streaming",
            help="Run the teacher layer by layer, the other weights left on disk, once for each file. "
            "Default: where it does not fit into memory.",
            show_default=False,
        ),
    ] = None,
    memory_budget: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory for activations when running layer by layer.")
    ] = "2GB",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Run a teacher once and keep its most likely tokens, so that `distil` needs it no more.

    Interrupted, the same command continues with the first file that is not complete.
    """
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.recipe import Execution, TeacherRecipe
    from slimqwen.teacher_cache.write import write_teacher_cache

    write_teacher_cache(
        checkpoint_folder(checkpoint),
        out,
        tokens=tokens,
        recipe=TeacherRecipe(kind="cache", top_k=top_k, exact=exact),
        sequence_length=sequence_length,
        documents="isolated" if isolated else "packed",
        with_mtp=mtp,
        sequences=sequences,
        seed=seed,
        execution=Execution(
            device=device,
            batch_size=batch_size,
            streaming=streaming,
            memory_budget=size_of("--memory-budget", memory_budget),
            cache_file_bytes=size_of("--shard-size", shard_size),
        ),
        dtype=dtype_of(dtype),
    )
    show(str(out))


@commands.command()
def distil(
    student: CheckpointName,
    tokens: TokensFolder,
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    settings: Annotated[
        Path,
        typer.Option(
            "--recipe",
            metavar="FILE.yaml",
            help="The recipe's `distil` section as a file; in it its section `execution`.",
        ),
    ],
    teacher: Annotated[
        str | None, typer.Option(help="Checkpoint folder, or 'builtin'. Not needed without kd terms.")
    ] = None,
    teacher_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Written by `slimqwen teacher-cache`; no teacher is loaded, and --teacher only compared with it.",
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="FIRST:END",
            help="Train only these optimiser steps, 0:16 say, of the run that the recipe's tokens pay for: a stage of it. Schedules and "
            "data order go on where the stage before ended. Default: all of them.",
        ),
    ] = None,
    moments: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="AdamW's moments to begin with, written by `slimqwen carry`. Default: zeros."
        ),
    ] = None,
    keep_state: Annotated[
        bool,
        typer.Option(
            "--keep-state", help="Leave the training state beside the result, in `.NAME.state`, for `slimqwen carry`."
        ),
    ] = False,
    learning_rate: Annotated[
        str | None,
        typer.Option(
            metavar="auto|NUMBER",
            help="Instead of the recipe's learning_rate; auto: found by short forks (docs/learning-rate.md).",
            show_default=False,
        ),
    ] = None,
    sequence_length: SequenceLength = 256,
    isolated: Isolated = False,
    seed: Seed = 0,
    device: Annotated[
        str | None,
        typer.Option(
            help="'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1'. Default: the recipe's.", show_default=False
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    overrides: Overrides = None,
) -> None:
    """Train a student on text and a teacher's predictions. Continues where it was interrupted.

    On many devices: `torchrun --nproc-per-node 8 -m slimqwen distil ...` (docs/multi-device.md). Exit code 75 after
    SIGTERM: the training state is saved, the same command continues.
    """
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.recipe import DistilFile, TeacherRecipe
    from slimqwen.recipe.file import load_recipe
    from slimqwen.training.distil import distil as run_stage
    from slimqwen.training.distil import parse_span, total_steps

    rate = [] if learning_rate is None else [f"learning_rate={learning_rate}"]
    on = [] if device is None else [f"execution.device={device}"]
    file = load_recipe(settings, [*(overrides or []), *rate, *on], model=DistilFile, quiet=rank() > 0)
    recipe, execution = file.settings(), file.execution
    result = run_stage(
        checkpoint_folder(student),
        out,
        tokens=tokens,
        recipe=recipe if teacher_cache is None else recipe.model_copy(update={"teacher": TeacherRecipe(kind="cache")}),
        sequence_length=sequence_length,
        documents="isolated" if isolated else "packed",
        teacher=None if teacher is None else checkpoint_folder(teacher),
        teacher_cache=teacher_cache,
        span=None if steps is None else parse_span(steps, total_steps(recipe, sequence_length)),
        seed=seed,
        execution=execution,
        dtype=dtype_of(dtype),
        run=out.name,
        keep_state=keep_state,
        moments=moments,
    )
    if rank() == 0:
        show(str(result))


@commands.command()
def carry(
    states: Annotated[
        Path, typer.Argument(metavar="STATES", help="The training's states: `.NAME.state` beside its result NAME.")
    ],
    trained: Annotated[Path, typer.Argument(metavar="TRAINED", help="The checkpoint that the training wrote.")],
    plan: Annotated[Path, typer.Option(metavar="FILE", help="The plan that TRAINED is pruned by.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
) -> None:
    """Cut the optimiser's moments as a plan cuts the weights, for `distil --moments` of the next stage.

    The training must have been one with `distil --keep-state`. In a recipe for `slimqwen run` it is one line:
    `at_cut: carry` of its `optimizer`.
    """
    from slimqwen.training.moments import carry as run_stage

    show(str(run_stage(states, trained, out, plan=plan)))
