"""The commands that make a smaller checkpoint without training it: prune, refit, heal."""

from typing import Annotated

import typer

from slimqwen.cli.options import (
    BatchSize,
    CheckpointName,
    CheckpointOut,
    Device,
    DtypeOption,
    MemoryBudget,
    PlanFile,
    PrunedBy,
    PrunedFrom,
    Seed,
    SequenceLength,
    TokensFolders,
    execution_of,
    layout_of,
    rate_of,
    size_of,
    text_settings,
    token_folders,
)
from slimqwen.core.terminal import show

commands = typer.Typer()


@commands.command()
def prune(
    checkpoint: CheckpointName,
    plan: PlanFile,
    out: CheckpointOut,
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest file: 5GB, 500MB, 2GiB.")] = "5GB",
    layout: Annotated[
        str | None,
        typer.Option(help="How experts lie in the result: 'per_expert' or 'fused'. Default: as in the checkpoint."),
    ] = None,
) -> None:
    """Write the checkpoint that a plan leaves, MTP module included, in the memory of a few tensors.

    Interrupted, even by a power cut, the same command continues with the first file that is not complete.
    """
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.pruning.prune import prune as run_stage

    run_stage(
        checkpoint_folder(checkpoint),
        out,
        plan=plan,
        layout=layout_of(layout),
        shard_bytes=size_of("--shard-size", shard_size),
    )
    show(str(out))


@commands.command()
def refit(
    student: CheckpointName,
    teacher: PrunedFrom,
    tokens: TokensFolders,
    plan: PrunedBy,
    out: CheckpointOut,
    samples: Annotated[int, typer.Option(min=1, help="Sequences to fit on.")] = 512,
    batch_size: BatchSize = 8,
    sequence_length: SequenceLength = 256,
    memory_budget: MemoryBudget = "2GB",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Refit the experts and MLPs of a freshly pruned checkpoint so that each layer ends where the teacher's does. No training.

    Ridge regression of their output matrices, layer by layer on the student's own stream; docs/refit.md says what
    it gains. Interrupted, the same command continues with the layer under way.
    """
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.refit.refit import refit as run_stage

    run_stage(
        checkpoint_folder(student),
        out,
        teacher=checkpoint_folder(teacher),
        plan=plan,
        tokens=token_folders(tokens),
        samples=samples,
        text=text_settings(sequence_length, seed=seed, dtype=dtype),
        execution=execution_of(device=device, batch_size=batch_size, memory_budget=memory_budget),
    )
    show(str(out))


@commands.command()
def heal(
    student: CheckpointName,
    teacher: PrunedFrom,
    tokens: TokensFolders,
    plan: PrunedBy,
    out: CheckpointOut,
    samples: Annotated[
        int, typer.Option(min=2, help="Sequences to train on, spread evenly over the sources; a sixteenth is left out.")
    ] = 512,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over them, for each layer.")] = 2,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per optimiser step.")] = 8,
    learning_rate: Annotated[
        str, typer.Option(metavar="RATE", help="AdamW's, at its peak; 'auto': chosen for each layer by short trials.")
    ] = "auto",
    sequence_length: SequenceLength = 256,
    memory_budget: MemoryBudget = "2GB",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Train each layer of a pruned (or refitted) checkpoint alone, so that it ends where the teacher's does.

    All weights of the layer, by gradient, on the student's own stream: one layer and its optimiser in memory.
    docs/healing.md says what it gains. Interrupted, the same command continues with the layer under way.
    """
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.healing.heal import heal as run_stage
    from slimqwen.recipe import HealingRecipe

    run_stage(
        checkpoint_folder(student),
        out,
        teacher=checkpoint_folder(teacher),
        plan=plan,
        tokens=token_folders(tokens),
        recipe=HealingRecipe(
            samples=samples,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=rate_of("--learning-rate", learning_rate),
        ),
        text=text_settings(sequence_length, seed=seed, dtype=dtype),
        execution=execution_of(device=device, memory_budget=memory_budget),
    )
    show(str(out))
