"""References made from the code: Markdown of every recipe key, every command with its options, every public name."""

import ast
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

import slimqwen
from slimqwen.cli import app
from slimqwen.recipe import PretrainRecipe, Recipe
from slimqwen.recipe.file import describe

PACKAGE = Path(slimqwen.__file__).parent
DOCUMENTS = Path(__file__).parents[1]


# --- recipes ----------------------------------------------------------------------------------------------------------


def recipe() -> str:
    """Return a heading and a description for every key of a recipe."""
    return keys_of(Recipe)


def pretrain_recipe() -> str:
    """Return the same of `slimqwen pretrain`'s recipe, whose keys have a prefix in their anchors."""
    return keys_of(PretrainRecipe, prefix="pretrain.", level=3)


def keys_of(model: type[BaseModel], prefix: str = "", level: int = 2) -> str:
    """Return what `describe` prints as Markdown: keys that stand alone first, then section by section."""
    entries = [found for passage in re.split(r"\n(?=\S)", describe(model)) if (found := entry_of(passage))]
    sections = {key.split(".")[0] for key, _, _ in entries if "." in key}
    alone = [entry for entry in entries if entry[0] not in sections and "." not in entry[0]]
    parts = [f"{'#' * level} At the top {{ #{prefix}top }}"] if alone else []
    for key, kind, description in sorted(entries, key=lambda entry: entry not in alone):
        is_section = key in sections
        title = f"The section `{key}`" if is_section else f"`{key}`"
        parts += [f"{'#' * (level if is_section else level + 1)} {title} {{ #{prefix}{key} }}", kind, description]
    return "\n\n".join(filter(None, parts))


def entry_of(passage: str) -> tuple[str, str, str] | None:
    """Return the key, the type with its default, and the description of one field as `describe` writes it.

    None for what is no field, such as a heading between them.
    """
    first, *below = passage.splitlines()
    field = re.fullmatch(r"([\w.]+): (.+)", first)
    if field is None:
        return None
    kind, has_default, default = field[2].partition(", default ")
    declared = f"*{escaped(kind)}*" + (f", default `{default}`" if has_default else "")
    return field[1], declared, escaped(" ".join(line.strip() for line in below))


# --- commands ---------------------------------------------------------------------------------------------------------


def commands() -> str:
    """Return every command with its help, arguments and options."""
    group: Any = typer.main.get_command(app)
    return "\n\n".join(
        [
            escaped(group.help),
            *(of_command(name, command) for name, command in group.commands.items()),
            escaped(group.epilog),
        ]
    )


def of_command(name: str, command: Any) -> str:
    """Return a command's section: its usage, its help, a table of its arguments and options, panel by panel."""
    context = command.make_context(name, [], resilient_parsing=True)
    parts = [
        f"## {name}",
        f"```sh\n{' '.join([f'slimqwen {name}', *command.collect_usage_pieces(context)])}\n```",
        escaped(inspect.cleandoc(command.help)),
    ]
    panels: dict[str, list[str]] = {}
    for parameter in command.params:
        if (record := parameter.get_help_record(context)) is not None:  # None: hidden
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or "", []).append(row_of(*record))
    for panel, rows in panels.items():
        parts += [f"**{panel}**"] if panel else []
        parts.append("\n".join(["| | meaning |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def row_of(names: str, meaning: str) -> str:
    """Return the row of an argument or option; what its help ends with, such as its default, in italics."""
    meaning = re.sub(r"\[((?:default|required)\b[^\]]*)\]$", r"*\1*", escaped(meaning).strip())
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in (f"`{names}`", meaning)) + " |"


# --- the library ------------------------------------------------------------------------------------------------------


def functions() -> str:
    """Return every public name of the library: functions with signature and docstring, then the values that they take."""
    names: dict[str, Any] = {name: getattr(slimqwen, name) for name in slimqwen.__all__}
    classes: dict[str, Any] = {name: found for name, found in names.items() if inspect.isclass(found)}
    parts = [of_function(name, found) for name, found in names.items() if name not in classes]
    return "\n\n".join([*parts, *(of_section(name, found) for name, found in classes.items())])


def of_function(name: str, function: Any) -> str:
    """Return a function's section."""
    signature = inspect.signature(function)
    one_a_line = ",\n".join(f"    {parameter_of(parameter)}" for parameter in separated(signature))
    returns = f" -> {type_of(signature.return_annotation)}"
    code = f"```python\nslimqwen.{name}(\n{one_a_line},\n){returns}\n```"
    return f"## {name}\n\n{code}\n\n{in_markdown(inspect.getdoc(function) or '')}"


def separated(signature: inspect.Signature) -> list[inspect.Parameter | str]:
    """Return the parameters, with the star before those that are given by name."""
    listed: list[inspect.Parameter | str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in listed:
            listed.append("*")
        listed.append(parameter)
    return listed


def parameter_of(parameter: inspect.Parameter | str) -> str:
    """Return a parameter as it is declared; a default that is a section by its class."""
    if isinstance(parameter, str):
        return parameter
    default = parameter.default
    if default is parameter.empty:
        shown = ""
    elif isinstance(default, BaseModel):
        shown = f" = {type(default).__name__}()"
    else:
        shown = f" = {type_of(default) if inspect.isclass(default) else repr(default)}"
    return f"{parameter.name}: {type_of(parameter.annotation)}{shown}"


def type_of(annotation: Any) -> str:
    """Return an annotation without the modules that its names are from."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=\w)", "", text)


def of_section(name: str, section: type) -> str:
    """Return a section of a recipe, or a dataclass: its docstring and its fields."""
    fields = ", ".join(f"`{field}`" for field in inspect.signature(section).parameters)
    return f"## {name}\n\n{in_markdown(inspect.getdoc(section) or '')}\n\nFields: {fields}."


def in_markdown(docstring: str) -> str:
    """Return a docstring as Markdown: `Args:`, `Returns:` and `Raises:` as lists, the rest as it stands."""
    parts = []
    for block in re.split(r"\n\n+", docstring):
        head, _, below = block.partition("\n")
        if head in ("Args:", "Returns:", "Raises:") and below:
            items = re.split(r"\n(?! )", textwrap.dedent(below))
            listed = [re.sub(r"^(\w+): ", r"`\1`: ", " ".join(item.split())) for item in items]
            parts.append("\n".join([f"**{head[:-1]}**", "", *(f"- {item}" for item in listed)]))
        else:
            parts.append(block if block.startswith("    ") else escaped(block))
    return "\n\n".join(parts)


def rooms() -> str:
    """Return the rooms of the package with the sentence that each opens with."""
    rows = []
    for file in sorted(PACKAGE.glob("*/__init__.py")):
        opening = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
        rows.append(f"| `slimqwen/{file.parent.name}/` | {' '.join(opening.split())} |")
    return "\n".join(["| room | what is in it |", "|---|---|", *rows])


def escaped(text: str) -> str:
    """Return help as Markdown: what looks like a tag is text, and a document that is named is linked to, as from docs/reference/."""

    def of(found: re.Match[str]) -> str:
        if found[0] == "<":
            return "&lt;"
        return f"[{found[0]}](../{found[1]})" if found[1] and (DOCUMENTS / found[1]).is_file() else found[0]

    return re.sub(r"`[^`]*`|<|\b(?:docs/)?([\w/-]+\.md)\b", of, text)
