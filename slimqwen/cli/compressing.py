"""The stages before training: tokens, calibrate, plan, prune, repair."""

import json
from pathlib import Path
from typing import Annotated

import typer

from slimqwen.cli.options import (
    CheckpointName,
    Device,
    DtypeOption,
    Seed,
    SequenceLength,
    TokensFolder,
    config_path,
    dtype_of,
    layout_of,
    token_folders,
    weights_of,
)
from slimqwen.errors import UserError
from slimqwen.progress import say

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
    text_field: Annotated[str, typer.Option(help="Column that holds the text in .jsonl and .parquet.")] = "text",
    heldout: Annotated[
        list[str] | None, typer.Option(metavar="SOURCE", help="Text for evaluation only. Repeatable.")
    ] = None,
    heldout_fraction: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of documents held out where no --heldout is given.")
    ] = 0.05,
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
        typer.Option(min=1, help="Processes; 1 is this one. Default: one per usable core.", show_default=False),
    ] = None,
) -> None:
    """Turn text into packed tokens: train and held-out splits in Megatron's .bin/.idx format.

    Sources with weights lie in a folder each, which `calibrate` takes for a source too.
    """
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.data.sources import named_sources, source_named
    from slimqwen.data.tokenize import tokenize

    manifest = tokenize(
        named_sources(sources, text_field, weights_of("--weight", weights or [])),
        checkpoint_folder(tokenizer),
        out,
        heldout_sources=[source_named(name, text_field) for name in heldout or []],
        heldout_fraction=heldout_fraction,
        workers=workers,
    )
    typer.echo(f"{out}: {manifest.train.tokens:,} training and {manifest.heldout.tokens:,} held-out tokens")


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
            "--second-moments",
            help="Also measure what a plan with pruning.width rotation needs: a matrix per norm, hidden size x hidden size.",
        ),
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Measure the importance of every layer, channel, expert, head and neuron in one forward pass over text."""
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.bytesize import bytes_of
    from slimqwen.calibration.calibrate import calibrate as run_stage
    from slimqwen.recipe import CalibrationRecipe

    run_stage(
        checkpoint_folder(checkpoint),
        out,
        recipe=CalibrationRecipe(
            sources=token_folders(tokens),
            samples=samples,
            batch_size=batch_size,
            streaming=streaming,
            memory_budget_bytes=bytes_of(memory_budget),
        ),
        sequence_length=sequence_length,
        seed=seed,
        device=device,
        dtype=dtype_of(dtype),
        second_moments=second_moments,
    )
    typer.echo(str(out))


@commands.command()
def plan(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CONFIG_OR_CHECKPOINT", help="A config.json, a checkpoint folder, or 'builtin'.")
    ],
    target: Annotated[
        Path | None,
        typer.Option(
            metavar="TARGET.yaml",
            help="The shape to reach: num_hidden_layers, hidden_size, num_experts, num_experts_per_tok, ...",
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            "--fit",
            metavar="BUDGETS",
            help="List the best shapes for budgets: `total=23B,active=2B` or `checkpoint=40GB`; sizes can be pinned: "
            "`total=23B,num_hidden_layers=36`. With --out one of them is written as a target.",
        ),
    ] = None,
    align: Annotated[int, typer.Option(min=1, help="With --fit: hidden and expert size are multiples of this.")] = 128,
    pick: Annotated[int, typer.Option(min=1, help="With --fit: number of the shape that --out gets.")] = 1,
    context_length: Annotated[int, typer.Option(min=1, help="Tokens of a sequence, for cache and FLOPs.")] = 32_768,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that the predicted training is sharded over.")] = 8,
    micro_batch_size: Annotated[
        int, typer.Option(min=1, help="Sequences per forward pass and GPU of the predicted training.")
    ] = 1,
    sequence_length: Annotated[int, typer.Option(min=8, help="Tokens in a sequence of the predicted training.")] = 4096,
    statistics: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Written by `slimqwen calibrate`. With it, a plan is made and written to --out."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="With --statistics the plan to write (plan.json), with --fit the target (none)."),
    ] = None,
    pruning: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Criteria: the recipe's `pruning` section.")
    ] = None,
    source_weights: Annotated[
        list[str] | None,
        typer.Option(
            "--source-weight",
            metavar="NAME=WEIGHT",
            help="What a source of the statistics counts for; give one for each. Default: as much as it has tokens.",
        ),
    ] = None,
    stability: Annotated[
        bool,
        typer.Option(help="Say how far plans from two halves of the calibration text, and from each source, agree."),
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(help="Also write a page with sliders for the sizes, which computes all of this in the browser."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Parameters and costs before and after, from the config alone; with statistics, choose what to keep.

    Costs: bytes on disk, KV cache and DeltaNet state, FLOPs, training memory. With --fit, search the shape itself.
    """
    from slimqwen.checkpoint.config import read_config
    from slimqwen.planning.counts import compare, comparison_table
    from slimqwen.planning.footprint import TrainingSettings
    from slimqwen.recipe import PruningRecipe, Target
    from slimqwen.recipe_file import load_recipe

    wanted = Target() if target is None else load_recipe(target, model=Target)
    training = TrainingSettings(gpus=gpus, micro_batch_size=micro_batch_size, sequence_length=sequence_length)
    if html is not None and (statistics is not None or budgets is not None):
        raise UserError("--html is a page for choosing a target: give it without --statistics and --fit.")
    if statistics is None and (pruning is not None or source_weights or stability):
        raise UserError("--pruning, --source-weight and --stability choose by statistics: give --statistics too.")
    if budgets is not None:
        if target is not None or statistics is not None:
            raise UserError("--fit searches a target from the config alone: give it without --target and --statistics.")
        return _fit(config_path(checkpoint), budgets, align, pick, out, as_json)
    if statistics is None:
        if out is not None:
            raise UserError("--out takes the plan of --statistics or the target of --fit: give one of these too.")
        family, config = read_config(config_path(checkpoint))
        comparison = compare(family, config, wanted, context_length=context_length, training=training)
        if html is not None:
            from slimqwen.planning.page import write_planner_page

            write_planner_page(family, config, wanted, html)
            say(f"planner page written to {html}")
    else:
        from slimqwen.builtin import checkpoint_folder
        from slimqwen.checkpoint.reader import Checkpoint
        from slimqwen.planning.plan import plan as run_stage
        from slimqwen.planning.stability import stability_text

        out = out or Path("plan.json")
        criteria = PruningRecipe() if pruning is None else load_recipe(pruning, model=PruningRecipe)
        if source_weights:
            criteria = criteria.model_copy(update={"source_weights": weights_of("--source-weight", source_weights)})
        made = run_stage(
            checkpoint_folder(checkpoint),
            out,
            statistics=statistics,
            target=wanted,
            pruning=criteria,
            stability=stability,
        )
        source = Checkpoint(checkpoint_folder(checkpoint))
        comparison = compare(
            source.family,
            source.config,
            made.target,
            made.kept_layers,
            context_length=context_length,
            training=training,
        )
        if made.stability is not None and not as_json:
            typer.echo(stability_text(made.stability))
        say(f"plan written to {out}")
    typer.echo(comparison.model_dump_json(indent=2) if as_json else comparison_table(comparison))


def _fit(config: Path, budgets: str, align: int, pick: int, out: Path | None, as_json: bool) -> None:
    from slimqwen.checkpoint.config import read_config
    from slimqwen.planning.fit import candidates_table, fit, write_target

    candidates = fit(*read_config(config), budgets, align=align)
    if pick > len(candidates):
        raise UserError(f"--pick {pick}: the list has {len(candidates)} shapes.")
    if as_json:
        typer.echo(json.dumps([candidate.model_dump() for candidate in candidates], indent=2))
    else:
        typer.echo(candidates_table(candidates))
    if out is not None:
        write_target(candidates[pick - 1], out)
        say(f"target {pick} written to {out}")


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
    from slimqwen.bytesize import bytes_of
    from slimqwen.pruning.prune import prune as run_stage

    run_stage(checkpoint_folder(checkpoint), out, plan=plan, layout=layout_of(layout), shard_bytes=bytes_of(shard_size))
    typer.echo(str(out))


@commands.command()
def repair(
    student: CheckpointName,
    teacher: Annotated[str, typer.Option(help="The checkpoint that was pruned: a folder, or 'builtin'.")],
    tokens: TokensFolder,
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
    """Refit the experts of a freshly pruned checkpoint so that each layer ends where the teacher's does. No training.

    Ridge regression of the experts' output matrices, layer by layer on the student's own stream; docs/repair.md says what
    it gains. Interrupted, the same command continues with the layer under way.
    """
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.bytesize import bytes_of
    from slimqwen.repair.repair import repair as run_stage

    run_stage(
        checkpoint_folder(student),
        out,
        teacher=checkpoint_folder(teacher),
        plan=plan,
        tokens=tokens,
        samples=samples,
        batch_size=batch_size,
        sequence_length=sequence_length,
        memory_budget_bytes=bytes_of(memory_budget),
        seed=seed,
        device=device,
        dtype=dtype_of(dtype),
    )
    typer.echo(str(out))
