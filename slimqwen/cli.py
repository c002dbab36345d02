"""The command line: parse, call the stage, say where the artefact is. `--help` on every command."""

import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperGroup

from slimqwen.errors import EXIT_FAILED, Interrupted, UserError, did_you_mean
from slimqwen.progress import say
from slimqwen.recipe import Dtype


class Commands(TyperGroup):
    """Turns Ctrl-C into a sentence and its exit code, which click would swallow ("Aborted!")."""

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
        typer.Argument(metavar="SOURCE...", help="Files or folders of text, or 'python-stdlib', 'python-packages'."),
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
) -> None:
    """Turn text into packed tokens: train and held-out splits in Megatron's .bin/.idx format."""
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.data.sources import source_named
    from slimqwen.data.tokenize import tokenize

    manifest = tokenize(
        [source_named(name, text_field) for name in sources],
        checkpoint_folder(tokenizer),
        out,
        heldout_sources=[source_named(name, text_field) for name in heldout or []],
        heldout_fraction=heldout_fraction,
    )
    typer.echo(f"{out}: {manifest.train.tokens:,} training and {manifest.heldout.tokens:,} held-out tokens")


@app.command()
def calibrate(
    checkpoint: CheckpointName,
    tokens: TokensFolder,
    out: Annotated[Path, typer.Option(help="Statistics file to write.")] = Path("statistics.safetensors"),
    samples: Annotated[int, typer.Option(min=1, help="Sequences to measure on (the paper: 1,024).")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 8,
    sequence_length: SequenceLength = 256,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Measure the importance of every layer, channel and expert in one forward pass over text."""
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.calibration.calibrate import calibrate as run_stage
    from slimqwen.recipe import CalibrationRecipe

    run_stage(
        checkpoint_folder(checkpoint),
        out,
        tokens=tokens,
        recipe=CalibrationRecipe(samples=samples, batch_size=batch_size),
        sequence_length=sequence_length,
        seed=seed,
        device=device,
        dtype=_dtype(dtype),
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
            help="The shape to reach: num_hidden_layers, hidden_size, num_experts, num_experts_per_tok.",
        ),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Written by `slimqwen calibrate`. With it, a plan is made and written to --out."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Plan to write (needs --statistics).")] = Path("plan.json"),
    pruning: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Criteria: the recipe's `pruning` section.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Count parameters before and after, from the config alone; with statistics, choose what to keep."""
    from slimqwen.planning.counts import before_and_after, counts_table
    from slimqwen.recipe import PruningRecipe, Target
    from slimqwen.recipe_file import load_recipe

    wanted = Target() if target is None else load_recipe(target, model=Target)
    if statistics is None and pruning is not None:
        raise UserError("--pruning chooses what to keep by statistics: give --statistics too.")
    if statistics is None:
        counts = before_and_after(_config_path(checkpoint), wanted)
    else:
        from slimqwen.builtin import checkpoint_folder
        from slimqwen.planning.plan import plan as run_stage

        criteria = PruningRecipe() if pruning is None else load_recipe(pruning, model=PruningRecipe)
        made = run_stage(checkpoint_folder(checkpoint), out, statistics=statistics, target=wanted, pruning=criteria)
        counts = {"before": made.before, "after": made.after}
        say(f"plan written to {out}")
    if as_json:
        typer.echo(json.dumps({name: value.model_dump() for name, value in counts.items()}, indent=2))
    else:
        typer.echo(counts_table(counts))


@app.command()
def prune(
    checkpoint: CheckpointName,
    plan: Annotated[Path, typer.Option(metavar="FILE", help="Written by `slimqwen plan`.")],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
) -> None:
    """Write the checkpoint that a plan leaves, MTP module included."""
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.pruning.prune import prune as run_stage

    typer.echo(str(run_stage(checkpoint_folder(checkpoint), out, plan=plan)))


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
    sequence_length: SequenceLength = 256,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = "auto",
    overrides: Overrides = None,
) -> None:
    """Train a student on text and a teacher's predictions. Continues where it was interrupted."""
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.distillation.distil import distil as run_stage
    from slimqwen.recipe import DistilRecipe
    from slimqwen.recipe_file import load_recipe

    result = run_stage(
        checkpoint_folder(student),
        out,
        tokens=tokens,
        recipe=load_recipe(settings, overrides or [], model=DistilRecipe),
        sequence_length=sequence_length,
        teacher=None if teacher is None else checkpoint_folder(teacher),
        seed=seed,
        device=device,
        dtype=_dtype(dtype),
        run=out.name,
    )
    typer.echo(str(result))


@app.command()
def evaluate(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="CHECKPOINT...", help="Checkpoint folders, or 'builtin'.")
    ],
    tokens: TokensFolder,
    teacher: Annotated[str | None, typer.Option(help="Checkpoint that the others are compared to.")] = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("evaluation.json"),
    measured_tokens: Annotated[int, typer.Option(min=1, help="Held-out tokens to measure on.")] = 65_536,
    sequence_length: SequenceLength = 256,
    device: Device = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Held-out loss, KL to a teacher, agreement and MTP acceptance of one or several checkpoints."""
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.evaluation.evaluate import evaluate as run_stage
    from slimqwen.recipe import EvaluationRecipe
    from slimqwen.reporting.table import print_table

    models = {"teacher": checkpoint_folder(teacher)} if teacher is not None else {}
    if teacher is not None and "teacher" in checkpoints:
        raise UserError("a checkpoint is called 'teacher' like --teacher's row: give it as ./teacher.")
    models |= {name: checkpoint_folder(name) for name in checkpoints}
    result = run_stage(
        models,
        out,
        tokens=tokens,
        recipe=EvaluationRecipe(tokens=measured_tokens),
        sequence_length=sequence_length,
        teacher=None if teacher is None else "teacher",
        device=device,
        dtype=_dtype(dtype),
    )
    print_table(result)
    typer.echo(str(out))


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run.")],
    out: Annotated[Path | None, typer.Option(help="Page to write; RUN_DIR/report.html by default.")] = None,
) -> None:
    """Write the HTML report of a run: one page, no external requests."""
    from slimqwen.reporting.report import report as run_stage

    typer.echo(str(run_stage(run_dir, out)))


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


def _config_path(name: str) -> Path:
    from slimqwen.builtin import TEACHER
    from slimqwen.recipe import BUILTIN_TEACHER

    return TEACHER if name == BUILTIN_TEACHER else Path(name)


def _dtype(name: str) -> str:
    known = get_args(Dtype)
    if name not in known:
        raise UserError(f"--dtype {name}{did_you_mean(name, known)}: must be one of {', '.join(known)}.")
    return name


def _command() -> str:
    return shlex.join(["slimqwen", *sys.argv[1:]])


def main() -> None:
    """The console script: one sentence and an exit code for whatever a user can cause, a traceback for our own bugs."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded at run time
    try:
        app()
    except UserError as error:
        say(str(error) if isinstance(error, Interrupted) else f"error: {error}")
        sys.exit(error.exit_code)
    except OSError as error:  # a path that is a file, not writable, gone: the system's own words and the name
        say(f"error: {error.filename or 'a file'}: {error.strerror or error}. Check the path and its permissions.")
        sys.exit(EXIT_FAILED)
