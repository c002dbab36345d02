"""Options that several commands have, and the reading of their values."""

import os
import shlex
import sys
from math import nan
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, overload

import typer

from slimqwen.core.errors import UserError, did_you_mean
from slimqwen.core.terminal import visible
from slimqwen.families.family import Layout
from slimqwen.recipe import Dtype, Execution, PruningRecipe, TextFormat, TextSettings
from slimqwen.recipe.section import LARGEST, SMALLEST

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
CheckpointNames = Annotated[
    list[str], typer.Argument(metavar="CHECKPOINT...", help="Checkpoint folders, or 'builtin'.")
]
ConfigOrCheckpoint = Annotated[
    str, typer.Argument(metavar="CONFIG_OR_CHECKPOINT", help="A config.json, a checkpoint folder, or 'builtin'.")
]
TargetFile = Annotated[
    Path | None,
    typer.Option(
        "--target",
        metavar="TARGET.yaml",
        help="The shape to reach: num_hidden_layers, hidden_size, num_experts, num_experts_per_tok, ...",
    ),
]
PrunedFrom = Annotated[str, typer.Option("--teacher", help="The checkpoint that was pruned: a folder, or 'builtin'.")]
CheckpointOut = Annotated[Path, typer.Option("--out", help="Checkpoint folder to write.")]
PlanFile = Annotated[Path, typer.Option("--plan", metavar="FILE", help="Written by `slimqwen plan`.")]
PrunedBy = Annotated[Path, typer.Option("--plan", metavar="FILE", help="The plan that the student was pruned by.")]
TokensFolder = Annotated[Path, typer.Option("--tokens", metavar="DIR", help="Folder written by `slimqwen tokens`.")]
TokensFolders = Annotated[
    list[str],
    typer.Option(
        "--tokens",
        metavar="[NAME=]DIR",
        help="Folder written by `slimqwen tokens`. Repeatable: each is a source of its own, called NAME or as the folder.",
    ),
]
SequenceLength = Annotated[int, typer.Option(min=8, help="Tokens in one sequence.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")]
MeasuredTokens = Annotated[int, typer.Option(min=1, help="Held-out tokens to measure on.")]
Isolated = Annotated[
    bool,
    typer.Option(
        "--isolated/--packed", help="Put one document into a sequence, padded, or pack documents back to back."
    ),
]
Streaming = Annotated[
    bool | None,
    typer.Option(
        "--streaming/--no-streaming",
        help="Run the model layer by layer, the other weights left on disk. Default: where it does not fit into memory.",
        show_default=False,
    ),
]
MemoryBudget = Annotated[
    str, typer.Option(metavar="SIZE", help="Memory for activations where a model runs layer by layer.")
]
ShardSize = Annotated[
    str,
    typer.Option(
        metavar="SIZE", help="Size of a file; an interruption loses at most one, layer by layer half an hour's files."
    ),
]
HiddenStatesSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for hidden states, layer by layer: the checkpoint is read once for as many tokens as fit. Default: half "
        "of what is free.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1'.")]
DtypeOption = Annotated[str, typer.Option(help="'auto' (bfloat16 on a GPU, float32 on a CPU), 'float32', 'bfloat16'.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the data order.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def token_folders(folders: list[str]) -> dict[str, Path]:
    """Return token folders by the name of the source: that of `wiki=DIR`, or the folder's own name."""
    sources: dict[str, Path] = {}
    for given in folders:
        name, named, folder = given.partition("=")
        path = Path(os.path.expanduser(folder if named else given))
        name = name if named else path.resolve().name
        if name in sources:
            raise UserError(f"two sources are called '{name}': tell them apart, --tokens wiki={path}.")
        sources[name] = path
    return sources


def weights_of(option: str, given: list[str]) -> dict[str, float]:
    """Read weights by name, as in `wiki=0.7`. Raises UserError that names the option."""
    weights: dict[str, float] = {}
    for text in given:
        name, _, weight = text.rpartition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise UserError(f"{option} {text}: write it as NAME=WEIGHT, such as wiki=0.7.") from None
        if weights[name] != 0.0 and not SMALLEST <= weights[name] <= LARGEST:
            raise UserError(f"{option} {text}: a weight is a number from {SMALLEST:g} to {LARGEST:g}.")
    return weights


def criteria_of(file: Path | None, paper: bool, source_weights: list[str] | None) -> PruningRecipe:
    """Return the criteria of a file, the paper's, or the default ones, with the weights of the sources that are given."""
    from slimqwen.recipe.file import load_recipe

    if paper and file is not None:
        raise UserError("--paper is a `pruning` section of its own: give it without --pruning.")
    criteria = PruningRecipe() if file is None else load_recipe(file, model=PruningRecipe)
    if paper:
        criteria = criteria.as_published()
    weights = weights_of("--source-weight", source_weights or [])
    return criteria.model_copy(update={"source_weights": weights}) if weights else criteria


def rate_of(option: str, given: str) -> float | Literal["auto"]:
    """Read a learning rate: a number, or 'auto'. Raises UserError that names the option."""
    if given == "auto":
        return "auto"
    try:
        rate = float(given)
    except ValueError:
        rate = nan
    if not SMALLEST <= rate <= LARGEST:
        raise UserError(f"{option} {given}: a learning rate is auto, or a number from {SMALLEST:g} to {LARGEST:g}.")
    return rate


def config_path(name: str) -> Path:
    """Return the config.json or the checkpoint folder that an argument names; 'builtin' is the built-in teacher."""
    from slimqwen.builtin import TEACHER
    from slimqwen.checkpoint.folder import snapshot_of
    from slimqwen.recipe import BUILTIN_TEACHER

    return TEACHER if name == BUILTIN_TEACHER else snapshot_of(Path(os.path.expanduser(name)))


def source_texts(given: list[str]) -> list[str]:
    """Replace a leading ~ by the home folder in each `[NAME=]SOURCE`; the shell does not replace one after a name."""
    parts = [text.rpartition("=~") for text in given]
    return [
        f"{name}={os.path.expanduser('~' + path)}" if found else os.path.expanduser(path) for name, found, path in parts
    ]


@overload
def size_of(option: str, text: str) -> int: ...
@overload
def size_of(option: str, text: None) -> None: ...
def size_of(option: str, text: str | None) -> int | None:
    """Read the bytes of an option's value, such as 5GB or 512MiB; None stays. Raises UserError that names the option."""
    if text is None:
        return None
    from slimqwen.core.bytesize import bytes_of

    try:
        return bytes_of(text)
    except UserError as error:
        raise UserError(f"{option}: {error.args[0]}") from None


def one_of(option: str, given: str, known: tuple[str, ...]) -> str:
    """Return a value that must be one of some words. Raises UserError that names the option and suggests a word."""
    if given not in known:
        raise UserError(f"{option} {given}{did_you_mean(given, known)}: must be one of {', '.join(known)}.")
    return given


def execution_of(*, memory_budget: str, **settings: Any) -> Execution:
    """Return the section `execution` of a command that has the option `--memory-budget`."""
    return Execution(memory_budget=size_of("--memory-budget", memory_budget), **settings)


def layout_of(name: str | None) -> Layout | None:
    """Read the value of `--layout`."""
    return None if name is None else cast(Layout, one_of("--layout", name, get_args(Layout)))


def dtype_of(name: str) -> str:
    """Read the value of `--dtype`."""
    return one_of("--dtype", name, get_args(Dtype))


def text_settings(sequence_length: int, *, isolated: bool = False, seed: int = 0, dtype: str = "auto") -> TextSettings:
    """Return how a command's stage reads its text, of the options of these names."""
    return TextSettings(
        sequence_length=sequence_length,
        documents="isolated" if isolated else "packed",
        seed=seed,
        dtype=cast(Dtype, dtype_of(dtype)),
    )


def text_format_of(name: str | None) -> TextFormat | None:
    """Read the value of `--format`."""
    return None if name is None else cast(TextFormat, one_of("--format", name, get_args(TextFormat)))


def command_line() -> str:
    """Return the command line of this process as a shell takes it, without control characters."""
    return visible(shlex.join(["slimqwen", *sys.argv[1:]]))
