"""The commands that measure before a cut: tokens, calibrate, measure-depth."""

from pathlib import Path
from typing import Annotated

import typer

from slimqwen.cli.options import (
    BatchSize,
    CheckpointName,
    Device,
    DtypeOption,
    MemoryBudget,
    Seed,
    SequenceLength,
    Streaming,
    TokensFolders,
    execution_of,
    source_texts,
    text_format_of,
    text_settings,
    token_folders,
    weights_of,
)
from slimqwen.core.errors import UserError
from slimqwen.core.terminal import show

commands = typer.Typer()

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="[NAME=]SOURCE...",
        help="Files or folders of text, 'python-stdlib', 'python-packages', or the prefix of Megatron's .bin and .idx.",
    ),
]
TextField = Annotated[
    str,
    typer.Option(
        help="Column of a table that holds the text. Without one called 'text', conversations in 'messages' or 'conversations' "
        "are rendered by the chat template."
    ),
]
TextFormatName = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="Read the sources as 'text', 'json', 'jsonl', 'csv', 'tsv' or 'parquet'. Default: by their suffixes.",
        show_default=False,
    ),
]
HeldoutSources = Annotated[
    list[str] | None, typer.Option(metavar="SOURCE", help="Text for evaluation only. Repeatable.")
]
HeldoutFraction = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Share of the documents to hold out where no --heldout is given; with too few documents, the end of the text is held out.",
    ),
]
Separator = Annotated[
    str | None,
    typer.Option(
        metavar="TOKEN",
        help="Token that ends each document, such as '<|endoftext|>'. Default: the tokenizer's eos, or, where that only ends a turn of its "
        "chat template, the token that ends a text.",
        show_default=False,
    ),
]
SourceWeights = Annotated[
    list[str] | None,
    typer.Option(
        "--weight",
        metavar="NAME=WEIGHT",
        help="Share of the training tokens to draw from a source, called NAME or as its folder or file; give one for each. "
        "Default: each text once per epoch.",
    ),
]


@commands.command()
def tokens(
    sources: Sources,
    tokenizer: Annotated[str, typer.Option(help="Checkpoint folder with the tokenizer, or 'builtin'.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    text_field: TextField = "text",
    text_format: TextFormatName = None,
    heldout: HeldoutSources = None,
    heldout_fraction: HeldoutFraction = 0.05,
    separator: Separator = None,
    weights: SourceWeights = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Number of processes. Default: one per usable core.", show_default=False),
    ] = None,
) -> None:
    """Turn text into packed tokens: training and held-out splits in Megatron's .bin/.idx format.

    Each source that has a weight gets a folder of its own, which `calibrate --tokens` accepts too.
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
    tokens: TokensFolders,
    out: Annotated[Path, typer.Option(help="Statistics file to write.")] = Path("statistics.safetensors"),
    samples: Annotated[
        int, typer.Option(min=1, help="Sequences to measure on (the paper: 1,024), spread evenly over the sources.")
    ] = 1024,
    batch_size: BatchSize = 8,
    sequence_length: SequenceLength = 256,
    streaming: Streaming = None,
    memory_budget: MemoryBudget = "2GB",
    second_moments: Annotated[
        bool,
        typer.Option(
            "--second-moments/--no-second-moments",
            help="Also measure what `pruning.width: rotation` needs: a matrix per norm, hidden size x hidden size.",
        ),
    ] = True,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Measure the importance of every layer, channel, expert, head and neuron in one forward pass over text.

    Where it goes layer by layer (--streaming), the same command continues after an interruption.
    """
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.calibration.calibrate import calibrate as run_stage
    from slimqwen.recipe import CalibrationRecipe

    run_stage(
        checkpoint_folder(checkpoint),
        out,
        recipe=CalibrationRecipe(sources=token_folders(tokens), samples=samples),
        text=text_settings(sequence_length, seed=seed, dtype=dtype),
        execution=execution_of(device=device, batch_size=batch_size, streaming=streaming, memory_budget=memory_budget),
        second_moments=second_moments,
    )
    show(str(out))


@commands.command()
def measure_depth(
    checkpoint: CheckpointName,
    target: Annotated[Path, typer.Option(metavar="TARGET.yaml", help="The shape to reach: its num_hidden_layers.")],
    statistics: Annotated[Path, typer.Option(metavar="FILE", help="Written by `slimqwen calibrate`.")],
    tokens: TokensFolders,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("depth.json"),
    samples: Annotated[int, typer.Option(min=1, help="Sequences to measure on, spread evenly over the sources.")] = 32,
    shortlist: Annotated[
        int, typer.Option(min=1, help="Layers to try in each round: those with the least block influence.")
    ] = 8,
    refit: Annotated[
        bool,
        typer.Option(
            "--refit/--no-refit",
            help="Refit the cut of each of the best sets as `slimqwen refit` does, and choose by that.",
        ),
    ] = True,
    batch_size: BatchSize = 8,
    sequence_length: SequenceLength = 256,
    memory_budget: MemoryBudget = "2GB",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Find the layers to drop by dropping them: the KL to the whole model without each, one more in every round.

    `plan --depth` reads the result, for `depth: measured`. Interrupted, the same command continues with the round under way.
    """
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.depth.measure import DepthEffort
    from slimqwen.depth.measure import measure_depth as run_stage
    from slimqwen.recipe import Target
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
        effort=DepthEffort(samples=samples, shortlist=shortlist, refit=refit),
        text=text_settings(sequence_length, seed=seed, dtype=dtype),
        execution=execution_of(device=device, batch_size=batch_size, memory_budget=memory_budget),
    )
    show(str(out))
