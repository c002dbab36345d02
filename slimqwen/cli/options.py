"""Options that several commands have, and what their words mean."""

import os
import shlex
import sys
from math import nan
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

import typer

from slimqwen.core.errors import UserError, did_you_mean
from slimqwen.core.terminal import visible
from slimqwen.families.family import Layout
from slimqwen.recipe import Dtype, TextFormat
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
TokensFolder = Annotated[Path, typer.Option("--tokens", metavar="DIR", help="Folder written by `slimqwen tokens`.")]
SequenceLength = Annotated[int, typer.Option(min=8, help="Tokens in one sequence.")]
Isolated = Annotated[
    bool, typer.Option("--isolated/--packed", help="One document to a sequence, padded, or documents back to back.")
]
Device = Annotated[str, typer.Option(help="'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1'.")]
DtypeOption = Annotated[str, typer.Option(help="'auto' (bfloat16 on a GPU, float32 on a CPU), 'float32', 'bfloat16'.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the data order.")]


def token_folders(folders: list[str]) -> dict[str, Path]:
    """Token folders by the name of the source: `wiki=DIR`, or the folder's own name."""
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


def rate_of(option: str, given: str) -> float | Literal["auto"]:
    """A learning rate as a number, or 'auto'."""
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
    from slimqwen.builtin import TEACHER
    from slimqwen.checkpoint.folder import snapshot_of
    from slimqwen.recipe import BUILTIN_TEACHER

    return TEACHER if name == BUILTIN_TEACHER else snapshot_of(Path(os.path.expanduser(name)))


def source_texts(given: list[str]) -> list[str]:
    """`[NAME=]SOURCE` with the home folder for a leading ~, also after the name, where the shell leaves it."""
    parts = [text.rpartition("=~") for text in given]
    return [
        f"{name}={os.path.expanduser('~' + path)}" if found else os.path.expanduser(path) for name, found, path in parts
    ]


def size_of(option: str, text: str) -> int:
    """The bytes that an option says: 5GB, 512MiB."""
    from slimqwen.core.bytesize import bytes_of

    try:
        return bytes_of(text)
    except UserError as error:
        raise UserError(f"{option}: {error.args[0]}") from None


def layout_of(name: str | None) -> Layout | None:
    known = get_args(Layout)
    if name is not None and name not in known:
        raise UserError(f"--layout {name}{did_you_mean(name, known)}: must be one of {', '.join(known)}.")
    return cast(Layout | None, name)


def dtype_of(name: str) -> str:
    known = get_args(Dtype)
    if name not in known:
        raise UserError(f"--dtype {name}{did_you_mean(name, known)}: must be one of {', '.join(known)}.")
    return name


def text_format_of(name: str | None) -> TextFormat | None:
    known = get_args(TextFormat)
    if name is not None and name not in known:
        raise UserError(f"--format {name}{did_you_mean(name, known)}: must be one of {', '.join(known)}.")
    return cast(TextFormat | None, name)


def command_line() -> str:
    """What was given, to be read and to be given again."""
    return visible(shlex.join(["slimqwen", *sys.argv[1:]]))
