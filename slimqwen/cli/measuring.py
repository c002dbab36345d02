"""The commands that measure a checkpoint: evaluate, generate, check, bench."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from slimqwen.artifacts import check_file_replaceable
from slimqwen.cli.options import (
    AsJson,
    CheckpointName,
    CheckpointNames,
    Device,
    DtypeOption,
    Isolated,
    MeasuredTokens,
    SequenceLength,
    dtype_of,
    one_of,
    text_settings,
)
from slimqwen.core.errors import EXIT_FAILED, UserError
from slimqwen.core.progress import quiet, say
from slimqwen.core.terminal import show, show_generated, show_json, show_result
from slimqwen.core.torchrun import rank

if TYPE_CHECKING:  # it takes torch, which no command's --help should wait for
    from slimqwen.evaluation.benchmarks import Tasks

commands = typer.Typer()

TEACHER = "teacher"  # its name in the tables
HeldoutTokens = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder written by `slimqwen tokens`; may be left out with --tasks or --suite."),
]
Suite = Annotated[str | None, typer.Option(help="Benchmarks by preset: 'slimqwen' are the paper's eight.")]
TaskNames = Annotated[
    str | None,
    typer.Option(metavar="NAME,NAME...", help="Benchmarks of lm-evaluation-harness, or of --tasks-dir; evalplus."),
]
TasksFolder = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="More tasks in the harness's YAML. They may run Python from DIR: trust it."),
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Documents of each task, the first ones. Default: all.", show_default=False),
]
Shots = Annotated[
    int | None,
    typer.Option(min=0, help="Solved examples before each question. Default: as the task sets it.", show_default=False),
]


@commands.command()
def evaluate(
    checkpoints: CheckpointNames,
    tokens: HeldoutTokens = None,
    teacher: Annotated[str | None, typer.Option(help="Checkpoint that the others are compared to.")] = None,
    out: Annotated[Path, typer.Option(help="File to write; benchmarks.json goes beside it.")] = Path("evaluation.json"),
    tasks: TaskNames = None,
    suite: Suite = None,
    tasks_dir: TasksFolder = None,
    limit: Limit = None,
    shots: Shots = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time in benchmarks.")] = 8,
    measured_tokens: MeasuredTokens = 65_536,
    sequence_length: SequenceLength = 256,
    isolated: Isolated = False,
    device: Device = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Measure held-out loss, KL to a teacher, agreement and MTP acceptance of checkpoints (--tokens); benchmarks (--tasks, --suite).

    acc_k: share of positions at which the first k + 1 drafts of the MTP module are all accepted. tokens/pass: tokens
    per forward pass in real speculative decoding, as `slimqwen generate` does it, on four held-out prompts; 1 without drafting.

    Each model's numbers, and the teacher's hidden states on the text, are kept beside --out in a hidden folder: interrupted, or
    given with one more model, the same command measures only what is missing.
    """
    from slimqwen.recipe import EvaluationRecipe, Execution

    has_benchmarks = tasks is not None or suite is not None
    if tokens is None and not has_benchmarks:
        raise UserError(
            "there is nothing to measure: give --tokens DIR for held-out text, --tasks or --suite for benchmarks, or both."
        )
    models, compared_with = _models(checkpoints, teacher)
    if has_benchmarks:
        check_file_replaceable(out.with_name("benchmarks.json"), *models.values())
    if tokens is not None:
        _evaluate_text(
            models,
            out,
            tokens=tokens,
            recipe=EvaluationRecipe(tokens=measured_tokens),
            text=text_settings(sequence_length, isolated=isolated, dtype=dtype),
            teacher=compared_with,
            execution=Execution(device=device),
        )
    if has_benchmarks:
        with quiet(rank() > 0):
            chosen = _tasks(tasks, suite, tasks_dir, limit, shots)
        _benchmark(
            models,
            out.with_name("benchmarks.json"),
            chosen,
            teacher=compared_with,
            execution=Execution(device=device, batch_size=batch_size),
            dtype=dtype_of(dtype),
        )


def _models(checkpoints: list[str], teacher: str | None) -> tuple[dict[str, Path], str | None]:
    """Return the folders by their names in the tables, the teacher's first; and the name of the teacher's row, if any."""
    from slimqwen.builtin import checkpoint_folder

    if teacher is not None and TEACHER in checkpoints:
        raise UserError("a checkpoint is called 'teacher' like --teacher's row: give it as ./teacher.")
    models = {name: checkpoint_folder(name) for name in checkpoints}
    return (models, None) if teacher is None else ({TEACHER: checkpoint_folder(teacher), **models}, TEACHER)


def _evaluate_text(models: dict[str, Path], out: Path, **settings: Any) -> None:
    """Evaluate on held-out text, and print the table."""
    from slimqwen.evaluation.evaluate import evaluate as run_stage
    from slimqwen.reporting.table import print_table

    print_table(run_stage(models, out, **settings))
    show(str(out))


def _benchmark(models: dict[str, Path], out: Path, tasks: "Tasks", **settings: Any) -> None:
    """Run benchmarks, and print the table."""
    from slimqwen.evaluation.benchmarks import benchmark, print_benchmarks

    print_benchmarks(benchmark(models, out, tasks, **settings))
    show(str(out))


def _tasks(
    listed: str | None, suite: str | None, tasks_dir: Path | None, limit: int | None, shots: int | None
) -> "Tasks":
    """Return the benchmarks: those of a preset and those of a list with commas, each once."""
    from slimqwen.evaluation.benchmarks import Tasks, suite_tasks

    names = [name.strip() for name in (listed or "").split(",") if name.strip()]
    every = list(dict.fromkeys([*(suite_tasks(suite) if suite is not None else []), *names]))
    return Tasks(every, tasks_dir, limit, shots)


@commands.command()
def generate(
    checkpoint: CheckpointName,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    draft: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=1000,
            help="Tokens that the MTP module drafts before each verification; 0 is plain decoding. Default: 3 with an MTP module.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the most likely token; higher values are more random.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens that together have this probability."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random numbers of sampling.")] = 0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Decode plainly too, in turns, and show how much faster drafting is.")
    ] = False,
    device: Device = "auto",
    dtype: DtypeOption = "auto",
    as_json: AsJson = False,
) -> None:
    """Continue a prompt with drafts of the checkpoint's own MTP module: the backbone's text in fewer passes of the backbone.

    The text goes to stdout as it comes; acceptance by depth and tokens/s go to stderr (docs/generation.md). Fewer passes
    are not always less time: --compare measures it.
    """
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.generation.generate import Decoding, describe
    from slimqwen.generation.generate import generate as run_stage
    from slimqwen.generation.sampling import Sampling

    result = run_stage(
        checkpoint_folder(checkpoint),
        prompt,
        Decoding(draft, max_new_tokens, Sampling(temperature, top_p), seed),
        device=device,
        dtype=dtype_of(dtype),
        compare=compare,
        write=None if as_json else show_generated,
    )
    if as_json:
        show_json(result.model_dump_json(indent=2))
    else:
        show("")
        say(*describe(result).split("\n"))


@commands.command()
def check(
    checkpoint: CheckpointName,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Also compare names, shapes and config.json with what this engine's loader accepts: transformers, vllm, "
            "sglang, llama.cpp or all. Repeatable. Exit code 1 where one cannot load it.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Look for NaN and infinity in a sample of the tensors only, not in all.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check that a checkpoint is whole, finite and loads in Transformers and, with --engine, elsewhere; reads every tensor."""
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.serving.check import check_checkpoint, describe

    result = check_checkpoint(checkpoint_folder(checkpoint), engines=engine or (), quick=quick)
    show_result(result, describe, as_json)
    if result.refusing():
        raise typer.Exit(EXIT_FAILED)


@commands.command()
def bench(
    checkpoints: CheckpointNames,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated after each prompt.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs.")] = 10,
    warmups: Annotated[int, typer.Option(min=0, help="Untimed runs before those.")] = 3,
    engine: Annotated[str, typer.Option(help="'transformers', or 'vllm' where it is installed.")] = "transformers",
    device: Device = "auto",
    dtype: DtypeOption = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure the speed of reading and generating, and the peak memory, of checkpoints; each in a process of its own.

    The defaults are the paper's protocol (Table 11): some 3,300 tokens per checkpoint and sequence, minutes on a CPU; try
    `--new-tokens 32 --runs 3` first. Prompts are random tokens, nothing is drafted (`slimqwen generate --compare` does that).
    """
    from dataclasses import asdict

    from slimqwen.builtin import checkpoint_folder
    from slimqwen.evaluation.speed import Engine, Protocol, print_speeds
    from slimqwen.evaluation.speed import bench as run_stage

    engine = cast(Engine, one_of("--engine", engine, get_args(Engine)))
    protocol = Protocol(prompt_tokens, new_tokens, batch_size, runs, warmups, engine, device, dtype_of(dtype))
    speeds = run_stage([checkpoint_folder(name) for name in checkpoints], protocol)
    if as_json:
        show_json(json.dumps({"protocol": asdict(protocol), "speeds": [asdict(speed) for speed in speeds]}, indent=2))
    else:
        print_speeds(speeds, protocol)
