"""The commands that train a student, or prepare its training: teacher-cache, distil, carry."""

from pathlib import Path
from typing import Annotated

import typer

from slimqwen.cli.options import (
    BatchSize,
    CheckpointName,
    CheckpointOut,
    Device,
    DtypeOption,
    HiddenStatesSize,
    Isolated,
    MemoryBudget,
    Overrides,
    Seed,
    SequenceLength,
    ShardSize,
    Streaming,
    TokensFolder,
    execution_of,
    size_of,
    text_settings,
)
from slimqwen.core.terminal import show
from slimqwen.core.torchrun import rank

commands = typer.Typer()

DistilFileName = Annotated[
    Path,
    typer.Option(
        "--recipe",
        metavar="FILE.yaml",
        help="File with the recipe's `distil` section, and in it a section `execution`.",
    ),
]
Teacher = Annotated[str | None, typer.Option(help="Checkpoint folder, or 'builtin'. Not needed without kd terms.")]
TeacherCache = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Written by `slimqwen teacher-cache`. No teacher is loaded; --teacher is only compared with it.",
    ),
]
Steps = Annotated[
    str | None,
    typer.Option(
        metavar="FIRST:END",
        help="Optimiser steps to train, such as 0:16, of those that the recipe's tokens are enough for: one stage. Schedules and data order "
        "continue from the stage before. Default: all of them.",
    ),
]
Moments = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="AdamW's moments to begin with, written by `slimqwen carry`. Default: zeros."),
]
KeepState = Annotated[
    bool,
    typer.Option(
        "--keep-state", help="Leave the training state beside the result, in `.NAME.state`, for `slimqwen carry`."
    ),
]
LearningRate = Annotated[
    str | None,
    typer.Option(
        metavar="auto|NUMBER",
        help="Replaces the recipe's learning_rate; auto: found by short forks (docs/learning-rate.md).",
        show_default=False,
    ),
]
RecipeDevice = Annotated[
    str | None,
    typer.Option(
        help="'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1'. Default: the recipe's.", show_default=False
    ),
]


@commands.command()
def teacher_cache(
    checkpoint: CheckpointName,
    tokens: TokensFolder,
    out: Annotated[Path, typer.Option(help="Folder to write; of a mixture, a folder for each source.")],
    top_k: Annotated[int, typer.Option(min=1, help="Most likely tokens to keep, beside the sum of the others.")] = 64,
    mtp: Annotated[
        bool, typer.Option("--mtp", help="Keep the MTP head's predictions too, for distil.mtp_target: mtp.")
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Store log-probabilities as float32 instead of 16 bits.")
    ] = False,
    sequences: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of sequences, the first in the training order of --seed. Default: the whole text, for any seed.",
            show_default=False,
        ),
    ] = None,
    batch_size: BatchSize = 8,
    sequence_length: SequenceLength = 256,
    isolated: Isolated = False,
    shard_size: ShardSize = "256MB",
    hidden_states_size: HiddenStatesSize = None,
    streaming: Streaming = None,
    memory_budget: MemoryBudget = "2GB",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Run a teacher once and keep its most likely tokens, so that `distil` need not run it.

    Interrupted, the same command continues with the first file that is not complete. Layer by layer (--streaming) the files of
    a pass over the checkpoint are complete at its end.
    """
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.recipe import TeacherRecipe
    from slimqwen.teacher_cache.write import write_teacher_cache

    write_teacher_cache(
        checkpoint_folder(checkpoint),
        out,
        tokens=tokens,
        recipe=TeacherRecipe(kind="cache", top_k=top_k, exact=exact),
        text=text_settings(sequence_length, isolated=isolated, seed=seed, dtype=dtype),
        with_mtp=mtp,
        sequences=sequences,
        execution=execution_of(
            device=device,
            batch_size=batch_size,
            streaming=streaming,
            memory_budget=memory_budget,
            cache_file_bytes=size_of("--shard-size", shard_size),
            hidden_states_bytes=size_of("--hidden-states-size", hidden_states_size),
        ),
    )
    show(str(out))


@commands.command()
def distil(
    student: CheckpointName,
    tokens: TokensFolder,
    out: CheckpointOut,
    settings: DistilFileName,
    teacher: Teacher = None,
    teacher_cache: TeacherCache = None,
    steps: Steps = None,
    moments: Moments = None,
    keep_state: KeepState = False,
    learning_rate: LearningRate = None,
    sequence_length: SequenceLength = 256,
    isolated: Isolated = False,
    seed: Seed = 0,
    device: RecipeDevice = None,
    dtype: DtypeOption = "auto",
    overrides: Overrides = None,
) -> None:
    """Train a student on text and a teacher's predictions. Continues where it was interrupted.

    On many devices: `torchrun --nproc-per-node 8 -m slimqwen distil ...` (docs/multi-device.md). Exit code 75 after
    SIGTERM: the training state is saved, and the same command continues.
    """
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.recipe import DistilFile, TeacherRecipe
    from slimqwen.recipe.file import load_recipe
    from slimqwen.training.distil import distil as run_stage
    from slimqwen.training.inputs import TrainingInputs
    from slimqwen.training.metrics import StepLog
    from slimqwen.training.span import parse_span, total_steps

    rate = [] if learning_rate is None else [f"learning_rate={learning_rate}"]
    on = [] if device is None else [f"execution.device={device}"]
    file = load_recipe(settings, [*(overrides or []), *rate, *on], model=DistilFile, quiet=rank() > 0)
    recipe, execution = file.settings(), file.execution
    result = run_stage(
        TrainingInputs(
            checkpoint_folder(student),
            tokens,
            teacher=None if teacher is None else checkpoint_folder(teacher),
            teacher_cache=teacher_cache,
            moments=moments,
        ),
        out,
        recipe=recipe if teacher_cache is None else recipe.model_copy(update={"teacher": TeacherRecipe(kind="cache")}),
        text=text_settings(sequence_length, isolated=isolated, seed=seed, dtype=dtype),
        span=None if steps is None else parse_span(steps, total_steps(recipe, sequence_length)),
        execution=execution,
        log=StepLog(run=out.name),
        keep_state=keep_state,
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

    The training must have been run with `distil --keep-state`. A recipe for `slimqwen run` does both by `at_cut: carry` in its
    `optimizer`.
    """
    from slimqwen.training.moments import carry as run_stage

    show(str(run_stage(states, trained, out, plan=plan)))
