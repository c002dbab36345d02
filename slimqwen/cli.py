"""The command line: parse, call the stage, say where the artefact is. `--help` on every command."""

import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from typer.core import TyperGroup

from slimqwen.errors import EXIT_FAILED, Interrupted, UserError, did_you_mean
from slimqwen.families.family import Layout
from slimqwen.progress import say
from slimqwen.recipe import Dtype


class Commands(TyperGroup):
    """Turns Ctrl-C into a sentence and its exit code, which click would swallow ("Aborted!").

    Many processes, as torchrun starts them, can only do `distil` together.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name != "distil" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                f"'{name}' is work for one process, and torchrun has started {os.environ['WORLD_SIZE']}: run it without "
                "torchrun, and only `slimqwen distil` with it."
            )
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted(
                "interrupted: nothing is lost but the steps since the last saved state; the same command continues."
            ) from None


app = typer.Typer(
    name="slimqwen",
    cls=Commands,
    help="Compress a pretrained Mixture-of-Experts language model: prune depth, width and experts, then distil.\n\n"
    "Start with `slimqwen demo`; then write a recipe (`slimqwen recipe` lists every field) and `slimqwen run` it. "
    "The other commands are the single stages: each reads and writes artefacts on disk and can be run alone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a recipe field, e.g. `--set distil.learning_rate=1e-4`. Repeatable.",
    ),
]
RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe; `slimqwen recipe` lists its fields.")
]
CheckpointName = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder, or 'builtin'.")]
TokensFolder = Annotated[Path, typer.Option("--tokens", metavar="DIR", help="Folder written by `slimqwen tokens`.")]
SequenceLength = Annotated[int, typer.Option(min=8, help="Tokens in one sequence.")]
Isolated = Annotated[
    bool, typer.Option("--isolated/--packed", help="One document to a sequence, padded, or documents back to back.")
]
Device = Annotated[str, typer.Option(help="'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1'.")]
DtypeOption = Annotated[str, typer.Option(help="'auto' (bfloat16 on a GPU, float32 on a CPU), 'float32', 'bfloat16'.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the data order.")]


@app.command()
def run(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Run a whole recipe: tokens, calibrate, plan, prune, distil (stage after stage), evaluate, report.

    Steps whose inputs have not changed are skipped, and an interrupted run continues: give the same command again.
    """
    from slimqwen.recipe_file import load_recipe

    _run(load_recipe(recipe, overrides or []))


@app.command()
def demo(
    run_dir: Annotated[Path, typer.Option(help="Folder of every artefact of the run.")] = Path("runs/demo"),
    overrides: Overrides = None,
) -> None:
    """Compress the built-in teacher to a third of its parameters, beside a random-init baseline, in minutes on a CPU.

    The same as `slimqwen run` with the built-in recipe, on the standard library of the Python that runs it; nothing is
    downloaded.
    """
    from slimqwen.builtin import DEMO_RECIPE
    from slimqwen.recipe_file import load_recipe

    _run(load_recipe(DEMO_RECIPE, [f"run_dir={json.dumps(str(run_dir))}", *(overrides or [])]))


def _run(recipe) -> None:  # type: ignore[no-untyped-def]
    from slimqwen.evaluation.result import Evaluation
    from slimqwen.pipeline import run as run_recipe
    from slimqwen.pipeline import summary
    from slimqwen.reporting.table import print_table

    started = time.monotonic()
    folder = run_recipe(recipe, _command())
    print_table(Evaluation.load(folder / "evaluation.json"))
    typer.echo(summary(folder, time.monotonic() - started))


@app.command()
def recipe(
    pretraining: Annotated[
        bool, typer.Option("--pretrain", help="The fields of a `slimqwen pretrain` recipe instead.")
    ] = False,
) -> None:
    """List every field of a recipe with its type, default and meaning."""
    from slimqwen.recipe import PretrainRecipe, Recipe
    from slimqwen.recipe_file import describe

    typer.echo(describe(PretrainRecipe if pretraining else Recipe))


@app.command()
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
        named_sources(sources, text_field, _weights("--weight", weights or [])),
        checkpoint_folder(tokenizer),
        out,
        heldout_sources=[source_named(name, text_field) for name in heldout or []],
        heldout_fraction=heldout_fraction,
        workers=workers,
    )
    typer.echo(f"{out}: {manifest.train.tokens:,} training and {manifest.heldout.tokens:,} held-out tokens")


@app.command()
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
            sources=_sources(tokens),
            samples=samples,
            batch_size=batch_size,
            streaming=streaming,
            memory_budget_bytes=bytes_of(memory_budget),
        ),
        sequence_length=sequence_length,
        seed=seed,
        device=device,
        dtype=_dtype(dtype),
        second_moments=second_moments,
    )
    typer.echo(str(out))


@app.command()
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
        return _fit(_config_path(checkpoint), budgets, align, pick, out, as_json)
    if statistics is None:
        if out is not None:
            raise UserError("--out takes the plan of --statistics or the target of --fit: give one of these too.")
        family, config = read_config(_config_path(checkpoint))
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
            criteria = criteria.model_copy(update={"source_weights": _weights("--source-weight", source_weights)})
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


@app.command()
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

    run_stage(checkpoint_folder(checkpoint), out, plan=plan, layout=_layout(layout), shard_bytes=bytes_of(shard_size))
    typer.echo(str(out))


@app.command()
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
        dtype=_dtype(dtype),
    )
    typer.echo(str(out))


@app.command()
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
    from slimqwen.bytesize import bytes_of
    from slimqwen.recipe import TeacherCacheRecipe
    from slimqwen.teacher_cache.write import write_teacher_cache

    write_teacher_cache(
        checkpoint_folder(checkpoint),
        out,
        tokens=tokens,
        recipe=TeacherCacheRecipe(
            top_k=top_k,
            exact=exact,
            batch_size=batch_size,
            shard_bytes=bytes_of(shard_size),
            streaming=streaming,
            memory_budget_bytes=bytes_of(memory_budget),
        ),
        sequence_length=sequence_length,
        documents="isolated" if isolated else "packed",
        with_mtp=mtp,
        sequences=sequences,
        seed=seed,
        device=device,
        dtype=_dtype(dtype),
    )
    typer.echo(str(out))


@app.command()
def distil(
    student: CheckpointName,
    tokens: TokensFolder,
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    settings: Annotated[
        Path, typer.Option("--recipe", metavar="FILE.yaml", help="The recipe's `distil` section, as a file.")
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
    sequence_length: SequenceLength = 256,
    isolated: Isolated = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = "auto",
    overrides: Overrides = None,
) -> None:
    """Train a student on text and a teacher's predictions. Continues where it was interrupted.

    On many devices: `torchrun --nproc-per-node 8 -m slimqwen distil ...` (docs/multi-device.md). Exit code 75 after
    SIGTERM: the training state is saved, the same command continues.
    """
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.distillation.distil import distil as run_stage
    from slimqwen.recipe import DistilRecipe
    from slimqwen.recipe_file import load_recipe

    recipe = load_recipe(settings, overrides or [], model=DistilRecipe)
    result = run_stage(
        checkpoint_folder(student),
        out,
        tokens=tokens,
        recipe=recipe if teacher_cache is None else recipe.model_copy(update={"teacher": "cache"}),
        sequence_length=sequence_length,
        documents="isolated" if isolated else "packed",
        teacher=None if teacher is None else checkpoint_folder(teacher),
        teacher_cache=teacher_cache,
        seed=seed,
        device=device,
        dtype=_dtype(dtype),
        run=out.name,
        keep_state=keep_state,
        moments=moments,
    )
    if _rank() == 0:
        typer.echo(str(result))


@app.command()
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
    `optimizer_state: carry`.
    """
    from slimqwen.distillation.carry import carry as run_stage

    typer.echo(str(run_stage(states, trained, out, plan=plan)))


@app.command()
def evaluate(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="CHECKPOINT...", help="Checkpoint folders, or 'builtin'.")
    ],
    tokens: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder written by `slimqwen tokens`; may be left out with --tasks or --suite."
        ),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Checkpoint that the others are compared to.")] = None,
    out: Annotated[Path, typer.Option(help="File to write; benchmarks.json goes beside it.")] = Path("evaluation.json"),
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME...", help="Benchmarks of lm-evaluation-harness, or of --tasks-dir; evalplus."),
    ] = None,
    suite: Annotated[str | None, typer.Option(help="Benchmarks by preset: 'slimqwen' are the paper's eight.")] = None,
    tasks_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="More tasks in the harness's YAML. They may run Python from DIR: trust it."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Documents of each task, the first ones. Default: all.", show_default=False),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(
            min=0, help="Solved examples before each question. Default: as the task says.", show_default=False
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time in benchmarks.")] = 8,
    measured_tokens: Annotated[int, typer.Option(min=1, help="Held-out tokens to measure on.")] = 65_536,
    sequence_length: SequenceLength = 256,
    isolated: Isolated = False,
    device: Device = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Held-out loss, KL to a teacher, agreement and MTP acceptance of checkpoints (--tokens); benchmarks (--tasks, --suite)."""
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.evaluation.evaluate import evaluate as run_stage
    from slimqwen.recipe import EvaluationRecipe
    from slimqwen.reporting.table import print_table

    if tokens is None and tasks is None and suite is None:
        raise UserError(
            "there is nothing to measure: give --tokens DIR for held-out text, --tasks or --suite for benchmarks, or both."
        )
    models = {"teacher": checkpoint_folder(teacher)} if teacher is not None else {}
    if teacher is not None and "teacher" in checkpoints:
        raise UserError("a checkpoint is called 'teacher' like --teacher's row: give it as ./teacher.")
    models |= {name: checkpoint_folder(name) for name in checkpoints}
    compared_with = None if teacher is None else "teacher"
    if tokens is not None:
        result = run_stage(
            models,
            out,
            tokens=tokens,
            recipe=EvaluationRecipe(tokens=measured_tokens),
            sequence_length=sequence_length,
            documents="isolated" if isolated else "packed",
            teacher=compared_with,
            device=device,
            dtype=_dtype(dtype),
        )
        print_table(result)
        typer.echo(str(out))
    if tasks is not None or suite is not None:
        from slimqwen.evaluation.benchmarks import benchmark, print_benchmarks, suite_tasks

        benchmarks_out = out.with_name("benchmarks.json")
        names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
        benchmarks = benchmark(
            models,
            benchmarks_out,
            tasks=list(dict.fromkeys([*(suite_tasks(suite) if suite is not None else []), *names])),
            tasks_dir=tasks_dir,
            limit=limit,
            shots=shots,
            batch_size=batch_size,
            teacher=compared_with,
            device=device,
            dtype=_dtype(dtype),
        )
        print_benchmarks(benchmarks)
        typer.echo(str(benchmarks_out))


@app.command()
def generate(
    checkpoint: CheckpointName,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    draft: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Tokens that the MTP module drafts before each verification; 0 is plain decoding. Default: 3 with an MTP module.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the most likely token; more is more random.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens that together have this probability."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random numbers of sampling.")] = 0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Decode plainly too, in turns, and say how much faster drafting is.")
    ] = False,
    device: Device = "auto",
    dtype: DtypeOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print text and numbers as JSON.")] = False,
) -> None:
    """Continue a prompt, the checkpoint's own MTP module drafting: the backbone's text in fewer passes of the backbone.

    The text goes to stdout as it comes; acceptance by depth and tokens/s go to stderr (docs/generation.md).
    """
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.generation.generate import describe
    from slimqwen.generation.generate import generate as run_stage
    from slimqwen.generation.sampling import Sampling

    result = run_stage(
        checkpoint_folder(checkpoint),
        prompt,
        draft=draft,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_p),
        seed=seed,
        device=device,
        dtype=_dtype(dtype),
        compare=compare,
        write=None if as_json else lambda piece: typer.echo(piece, nl=False),
    )
    if as_json:
        typer.echo(result.model_dump_json(indent=2))
    else:
        typer.echo()
        say(describe(result))


@app.command()
def check(
    checkpoint: CheckpointName,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Also compare names, shapes and config.json with what this engine's loader takes: transformers, vllm, "
            "sglang, llama.cpp or all. Repeatable. Exit code 1 where one cannot load it.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Tell whether a checkpoint is whole and loads in Transformers, vLLM and SGLang; reads headers and a sample."""
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.checkpoint.check import check_checkpoint, describe

    result = check_checkpoint(checkpoint_folder(checkpoint), engines=engine or ())
    typer.echo(result.model_dump_json(indent=2) if as_json else describe(result))
    if result.refusing():
        raise typer.Exit(EXIT_FAILED)


@app.command()
def bench(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="CHECKPOINT...", help="Checkpoint folders, or 'builtin'.")
    ],
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated after each prompt.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs.")] = 10,
    warmups: Annotated[int, typer.Option(min=0, help="Runs before them.")] = 3,
    engine: Annotated[str, typer.Option(help="'transformers', or 'vllm' where it is installed.")] = "transformers",
    device: Device = "auto",
    dtype: DtypeOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print every run as JSON.")] = False,
) -> None:
    """Speed of reading and generating, and peak memory, of several checkpoints; each in a process of its own.

    The defaults are the paper's protocol (Table 11).
    """
    from dataclasses import asdict

    from slimqwen.builtin import checkpoint_folder
    from slimqwen.evaluation.speed import Engine, Protocol, print_speeds
    from slimqwen.evaluation.speed import bench as run_stage

    known = get_args(Engine)
    if engine not in known:
        raise UserError(f"--engine {engine}{did_you_mean(engine, known)}: must be one of {', '.join(known)}.")
    protocol = Protocol(
        prompt_tokens, new_tokens, batch_size, runs, warmups, cast(Engine, engine), device, _dtype(dtype)
    )
    speeds = run_stage([checkpoint_folder(name) for name in checkpoints], protocol)
    if as_json:
        typer.echo(json.dumps({"protocol": asdict(protocol), "speeds": [asdict(speed) for speed in speeds]}, indent=2))
    else:
        print_speeds(speeds, protocol)


@app.command()
def report(
    run_dirs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR...", help="Folder of a run; several are compared.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Page to write. Default: report.html in the folder; comparison.html for several."),
    ] = None,
) -> None:
    """Write the HTML report of a run, or one that compares runs: one page, no external requests."""
    from slimqwen.reporting.compare import compare
    from slimqwen.reporting.report import report as run_stage

    if len(run_dirs) == 1:
        typer.echo(str(run_stage(run_dirs[0], out)))
    else:
        typer.echo(str(compare(run_dirs, out or Path("comparison.html"))))


@app.command()
def pretrain(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE.yaml", help="`slimqwen recipe --pretrain` lists its fields.")
    ],
    overrides: Overrides = None,
) -> None:
    """Train a tokenizer and a small model from random weights: how the built-in teacher was made."""
    from slimqwen.distillation.pretrain import pretrain as run_stage
    from slimqwen.recipe import PretrainRecipe
    from slimqwen.recipe_file import load_recipe

    typer.echo(str(run_stage(load_recipe(recipe, overrides or [], model=PretrainRecipe))))


@app.command()
def study(
    name: Annotated[str, typer.Argument(metavar="NAME", help="init, experts, losses, mtp, schedules, depth or width.")],
    scale: Annotated[
        str, typer.Option(metavar="cpu|gpu|RECIPE.yaml", help="The recipe that is varied: built in, or your own.")
    ] = "cpu",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per arm; with one there are no intervals.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="Folder of results.json and index.html; docs/study/NAME-SCALE by default.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Repeat one of the paper's comparisons: every arm on the same tokens, several seeds, verdicts from the numbers.

    Work is shared between studies and continues where it was interrupted; it lies in the recipe's run_dir.
    """
    from slimqwen.study.scales import load_scale
    from slimqwen.study.study import study as run_study

    recipe = load_scale(scale, overrides or [])
    folder = out or Path("docs") / "study" / f"{name}-{recipe.name}"
    result = run_study(name, recipe, folder, seeds=seeds, command=_command())
    for verdict in result.verdicts:
        typer.echo(verdict.sentence)
    typer.echo(str(folder / "index.html"))


def _sources(folders: list[str]) -> dict[str, Path]:
    """Token folders by the name of the source: `wiki=DIR`, or the folder's own name."""
    sources: dict[str, Path] = {}
    for given in folders:
        name, named, folder = given.partition("=")
        path = Path(folder if named else given)
        name = name if named else path.resolve().name
        if name in sources:
            raise UserError(f"two sources are called '{name}': tell them apart, --tokens wiki={path}.")
        sources[name] = path
    return sources


def _weights(option: str, given: list[str]) -> dict[str, float]:
    weights: dict[str, float] = {}
    for text in given:
        name, _, weight = text.rpartition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise UserError(f"{option} {text}: write it as NAME=WEIGHT, such as wiki=0.7.") from None
    return weights


def _config_path(name: str) -> Path:
    from slimqwen.builtin import TEACHER
    from slimqwen.recipe import BUILTIN_TEACHER

    return TEACHER if name == BUILTIN_TEACHER else Path(name)


def _layout(name: str | None) -> Layout | None:
    known = get_args(Layout)
    if name is not None and name not in known:
        raise UserError(f"--layout {name}{did_you_mean(name, known)}: must be one of {', '.join(known)}.")
    return cast(Layout | None, name)


def _dtype(name: str) -> str:
    known = get_args(Dtype)
    if name not in known:
        raise UserError(f"--dtype {name}{did_you_mean(name, known)}: must be one of {', '.join(known)}.")
    return name


def _rank() -> int:
    """This process's number among those that torchrun started."""
    return int(os.environ.get("RANK", "0"))


def _speaker() -> str:
    """What precedes an error where several processes may report one."""
    return f"rank {_rank()}: " if "RANK" in os.environ else ""


def _command() -> str:
    return shlex.join(["slimqwen", *sys.argv[1:]])


def main() -> None:
    """The console script: one sentence and an exit code for whatever a user can cause, a traceback for our own bugs."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded at run time
    try:
        app()
    except Interrupted as error:
        if _rank() == 0:
            say(str(error))
        sys.exit(error.exit_code)
    except UserError as error:
        say(f"{_speaker()}error: {error}")
        sys.exit(error.exit_code)
    except OSError as error:  # a path that is a file, not writable, gone: the system's own words and the name
        problem = f"{error.filename or 'a file'}: {error.strerror or error}"
        say(f"{_speaker()}error: {problem}. Check the path and its permissions.")
        sys.exit(EXIT_FAILED)
