"""The stages before training: tokens, calibrate, plan, prune, repair, heal."""

from pathlib import Path
from typing import Annotated

import typer

from slimqwen.cli.options import (
    CheckpointName,
    Device,
    DtypeOption,
    Seed,
    SequenceLength,
    dtype_of,
    layout_of,
    rate_of,
    size_of,
    source_texts,
    text_format_of,
    token_folders,
    weights_of,
)
from slimqwen.cli.planning import plan
from slimqwen.core.errors import UserError
from slimqwen.core.terminal import show

commands = typer.Typer()


@commands.command()
def tokens(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]SOURCE...",
            help="Files or folders of text, 'python-stdlib', 'python-packages', or the prefix of Megatron's .bin and .idx.",
        ),
    ],
    tokenizer: Annotated[str, typer.Option(help="Checkpoint folder with the tokenizer, or 'builtin'.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    text_field: Annotated[
        str,
        typer.Option(
            help="Column of a table that holds the text. Without one called 'text', conversations in 'messages' or 'conversations' "
            "are rendered by the chat template."
        ),
    ] = "text",
    text_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Read the sources as 'text', 'json', 'jsonl', 'csv', 'tsv' or 'parquet'. Default: as their names say.",
            show_default=False,
        ),
    ] = None,
    heldout: Annotated[
        list[str] | None, typer.Option(metavar="SOURCE", help="Text for evaluation only. Repeatable.")
    ] = None,
    heldout_fraction: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Share of documents held out where no --heldout is given; of too few documents, the end of the text.",
        ),
    ] = 0.05,
    separator: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            help="Token that ends each document, such as '<|endoftext|>': text that is one token. Default: the tokenizer's eos, or where this "
            "only ends a turn of its chat template the token that ends a text.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weight",
            metavar="NAME=WEIGHT",
            help="Share of the training tokens to draw from a source, called NAME or as its folder or file; give one for each. "
            "Default: each text once per epoch.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, max=1024, help="Processes; 1 is this one. Default: one per usable core.", show_default=False
        ),
    ] = None,
) -> None:
    """Turn text into packed tokens: train and held-out splits in Megatron's .bin/.idx format.

    Sources with weights lie in a folder each, which `calibrate` takes for a source too.
    """
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.data.sources import named_sources, source_named
    from slimqwen.data.tokenize import tokenize
    from slimqwen.recipe import Execution

    read_as = text_format_of(text_format)
    manifest = tokenize(
        named_sources(source_texts(sources), text_field, weights_of("--weight", weights or []), read_as),
        checkpoint_folder(tokenizer),
        out,
        heldout_sources=[source_named(name, text_field, read_as) for name in source_texts(heldout or [])],
        heldout_fraction=heldout_fraction,
        separator=separator,
        execution=Execution(workers=workers),
    )
    show(f"{out}: {manifest.train.tokens:,} training and {manifest.heldout.tokens:,} held-out tokens")


@commands.command()
def calibrate(
    checkpoint: CheckpointName,
    tokens: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]DIR",
            help="Folder written by `slimqwen tokens`. Repeatable: each is a source of its own, called NAME or as the folder.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Statistics file to write.")] = Path("statistics.safetensors"),
    samples: Annotated[
        int, typer.Option(min=1, help="Sequences to measure on (the paper: 1,024), spread evenly over the sources.")
    ] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 8,
    sequence_length: SequenceLength = 256,
    streaming: Annotated[
        bool | None,
        typer.Option(
            "--streaming/--no-streaming",
            help="Measure layer by layer, the other weights left on disk; interrupted, the same command continues. "
            "Default: where the model does not fit into memory.",
            show_default=False,
        ),
    ] = None,
    memory_budget: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory for activations when measuring layer by layer.")
    ] = "2GB",
    second_moments: Annotated[
        bool,
        typer.Option(
            "--second-moments/--no-second-moments",
            help="Measure what a plan with pruning.width rotation needs too: a matrix per norm, hidden size x hidden size.",
        ),
    ] = True,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Measure the importance of every layer, channel, expert, head and neuron in one forward pass over text."""
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.calibration.calibrate import calibrate as run_stage
    from slimqwen.recipe import CalibrationRecipe, Execution

    run_stage(
        checkpoint_folder(checkpoint),
        out,
        recipe=CalibrationRecipe(
            sources=token_folders(tokens),
            samples=samples,
        ),
        sequence_length=sequence_length,
        seed=seed,
        execution=Execution(
            device=device,
            batch_size=batch_size,
            streaming=streaming,
            memory_budget=size_of("--memory-budget", memory_budget),
        ),
        dtype=dtype_of(dtype),
        second_moments=second_moments,
    )
    show(str(out))


@commands.command()
def measure_depth(
    checkpoint: CheckpointName,
    target: Annotated[Path, typer.Option(metavar="TARGET.yaml", help="The shape to reach: its num_hidden_layers.")],
    statistics: Annotated[Path, typer.Option(metavar="FILE", help="Written by `slimqwen calibrate`.")],
    tokens: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]DIR",
            help="Folder written by `slimqwen tokens`. Repeatable: each is a source of its own, called NAME or as the folder.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("depth.json"),
    samples: Annotated[int, typer.Option(min=1, help="Sequences to measure on, spread evenly over the sources.")] = 32,
    shortlist: Annotated[
        int, typer.Option(min=1, help="Layers to try in each round: those with the least block influence.")
    ] = 8,
    refit: Annotated[
        bool,
        typer.Option(
            "--refit/--no-refit", help="Refit what the best sets leave, as `slimqwen repair` will, and choose by that."
        ),
    ] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 8,
    sequence_length: SequenceLength = 256,
    memory_budget: Annotated[str, typer.Option(metavar="SIZE", help="Memory for activations.")] = "2GB",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Find the layers to drop by dropping them: the KL to the whole model without each, one more in every round.

    What it writes is what `plan --depth` reads for `depth: measured`. Interrupted, the same command continues with the
    round under way.
    """
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.depth.measure import measure_depth as run_stage
    from slimqwen.recipe import Execution, Target
    from slimqwen.recipe.file import load_recipe

    layers = load_recipe(target, model=Target).num_hidden_layers
    if layers is None:
        raise UserError(f"{target} names no num_hidden_layers, and this measures which layers go: give it one.")
    run_stage(
        checkpoint_folder(checkpoint),
        out,
        statistics=statistics,
        tokens=token_folders(tokens),
        num_hidden_layers=layers,
        samples=samples,
        shortlist=shortlist,
        refit=refit,
        sequence_length=sequence_length,
        seed=seed,
        execution=Execution(
            device=device, batch_size=batch_size, memory_budget=size_of("--memory-budget", memory_budget)
        ),
        dtype=dtype_of(dtype),
    )
    show(str(out))


commands.command()(plan)


@commands.command()
def prune(
    checkpoint: CheckpointName,
    plan: Annotated[Path, typer.Option(metavar="FILE", help="Written by `slimqwen plan`.")],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
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
def repair(
    student: CheckpointName,
    teacher: Annotated[str, typer.Option(help="The checkpoint that was pruned: a folder, or 'builtin'.")],
    tokens: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]DIR",
            help="Folder written by `slimqwen tokens`. Repeatable: each is a source of its own, called NAME or as the folder.",
        ),
    ],
    plan: Annotated[Path, typer.Option(metavar="FILE", help="The plan that the student was pruned by.")],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    samples: Annotated[int, typer.Option(min=1, help="Sequences to fit on.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 8,
    sequence_length: SequenceLength = 256,
    memory_budget: Annotated[str, typer.Option(metavar="SIZE", help="Memory for activations.")] = "2GB",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Refit the experts and MLPs of a freshly pruned checkpoint so that each layer ends where the teacher's does. No training.

    Ridge regression of their output matrices, layer by layer on the student's own stream; docs/repair.md says what
    it gains. Interrupted, the same command continues with the layer under way.
    """
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.recipe import Execution
    from slimqwen.refit.refit import repair as run_stage

    run_stage(
        checkpoint_folder(student),
        out,
        teacher=checkpoint_folder(teacher),
        plan=plan,
        tokens=token_folders(tokens),
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        execution=Execution(
            device=device, batch_size=batch_size, memory_budget=size_of("--memory-budget", memory_budget)
        ),
        dtype=dtype_of(dtype),
    )
    show(str(out))


@commands.command()
def heal(
    student: CheckpointName,
    teacher: Annotated[str, typer.Option(help="The checkpoint that was pruned: a folder, or 'builtin'.")],
    tokens: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]DIR",
            help="Folder written by `slimqwen tokens`. Repeatable: each is a source of its own, called NAME or as the folder.",
        ),
    ],
    plan: Annotated[Path, typer.Option(metavar="FILE", help="The plan that the student was pruned by.")],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    samples: Annotated[
        int, typer.Option(min=2, help="Sequences to train on, spread evenly over the sources; a sixteenth is left out.")
    ] = 512,
    epochs: Annotated[int, typer.Option(min=1, help="Times that each layer sees them.")] = 2,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per optimiser step.")] = 8,
    learning_rate: Annotated[
        str, typer.Option(metavar="RATE", help="AdamW's, at its peak; 'auto': chosen for each layer by short trials.")
    ] = "auto",
    sequence_length: SequenceLength = 256,
    memory_budget: Annotated[str, typer.Option(metavar="SIZE", help="Memory for activations.")] = "2GB",
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
    from slimqwen.recipe import Execution, HealingRecipe

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
        sequence_length=sequence_length,
        seed=seed,
        execution=Execution(device=device, memory_budget=size_of("--memory-budget", memory_budget)),
        dtype=dtype_of(dtype),
    )
    show(str(out))
