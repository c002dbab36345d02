"""Recipes on disk: read with every problem reported at once, written with every field filled in.

Everything here works on any pydantic model: a `Recipe`, a lone `Target`, the recipe of a pretraining run.
"""

import difflib
import inspect
import re
import textwrap
import types
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, overload

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined, to_json

from slimqwen.artifacts import TEXT_MARK, write_text
from slimqwen.core import strict_yaml
from slimqwen.core.errors import UserError, did_you_mean
from slimqwen.core.warning import warn
from slimqwen.recipe import Duration, Recipe
from slimqwen.recipe.renamed import make_room, translate
from slimqwen.recipe.section import Tagged

Model = TypeVar("Model", bound=BaseModel)

LARGEST_BYTES = 1_000_000
DEEPEST_KEY = 32
VERY_ALIKE = 0.8  # names, by difflib: a key elsewhere is meant rather than one beside it that is less alike

METHOD = "Method, on which the result depends:"
EXECUTION = "Execution, on which it does not, beyond rounding:"
DUMP_HEADER = f"{TEXT_MARK}: every field of the recipe, defaults included.\n"

WORDS_FOR_TYPES = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true | false",
    Path: "path",
    Duration: "duration",
}
WORDS_FOR_PROBLEMS = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text (quote it)",
    "path_type": "must be a path (quote it)",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "model_type": "must be a section (key: value pairs)",
}


@overload
def load_recipe(path: Path | str, overrides: Sequence[str] = (), *, quiet: bool = ...) -> Recipe: ...
@overload
def load_recipe(path: Path | str, overrides: Sequence[str] = (), *, model: type[Model], quiet: bool = ...) -> Model: ...
def load_recipe(
    path: Path | str, overrides: Sequence[str] = (), *, model: type[BaseModel] = Recipe, quiet: bool = False
) -> BaseModel:
    """Return the recipe in a YAML file, with `overrides` applied, as an instance of `model`.

    An override is `key=value` with a dotted key and a YAML value: `distil.learning_rate=1e-4`,
    `distil.terms=[lm,mtp_lm]`, `stages.0.token_fraction=0.2`.

    Relative paths in a recipe (run_dir, the teacher, sources) are relative to the current working directory, as
    they would be on the command line; they are not resolved here.

    Keys that had another name before are accepted (`renamed`), with a warning for each unless `quiet`.

    Types are strict: `"5"` or `true` is not a number. Raises `UserError` with one line per problem.
    """
    path = Path(path)
    values = _read_mapping(path)
    problems = []
    _write_out(values, model)
    for override in overrides:
        try:
            make_room(values, override.partition("=")[0], model)
            _apply_override(values, override)
            _write_out(values, model)
        except ValueError as problem:
            problems.append(f"--set {textwrap.shorten(override, 80, placeholder='...')}: {problem}")
    renamed, misplaced = translate(values, model)
    problems += misplaced
    _complete_sections(values, model)
    try:
        # By way of JSON, because there a strict Path may come from a string; in Python values it may not.
        recipe = model.model_validate_json(_to_json(values), strict=True)
    except ValidationError as error:
        problems += [_explain(problem, model) for problem in error.errors()]
    given = {override.partition("=")[0] for override in overrides}
    for line in () if quiet else renamed:  # before the problems too, which are in today's words
        warn(f"{'--set' if line.partition(':')[0] in given else path.name}: {line}")
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{path} has {count}:", *problems)
    return recipe


def dump_recipe(recipe: BaseModel, path: Path) -> None:
    """Write `recipe` with every field, so that `load_recipe(path, model=type(recipe))` gives an equal one."""
    write_text(path, DUMP_HEADER + strict_yaml.dump(recipe.model_dump(mode="json")))


def describe(model: type[BaseModel]) -> str:
    """Every field of `model` by its dotted key, as `--set` takes it, with type, default and description."""
    lines = [METHOD] if "execution" in model.model_fields else []
    for key, field, default in _walk(model):
        if key == "execution":
            lines += ["", EXECUTION]
        required = "required" if default is PydanticUndefined else ""
        fallback = "" if required or isinstance(default, BaseModel) else f"default {_in_words(default)}"
        lines.append(f"{key}: " + ", ".join(filter(None, [_type_in_words(field.annotation), required, fallback])))
        if field.description:
            lines.append(textwrap.fill(field.description, width=110, initial_indent="    ", subsequent_indent="    "))
    return "\n".join(lines)


# Reading YAML


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:  # a pipe too: `slimqwen run <(...)`
            content = stream.read(LARGEST_BYTES + 1)
        text = content.decode("utf-8")
    except FileNotFoundError:
        neighbours = [file.name for file in path.parent.glob("*.y*ml")]
        raise UserError(f"there is no file {path}{did_you_mean(path.name, neighbours)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8 (byte {error.start} is not)") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > LARGEST_BYTES:
        raise UserError(f"{path} is too large to be a recipe: over {LARGEST_BYTES:,} bytes")
    try:
        values = strict_yaml.load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {strict_yaml.problem_of(error)}") from None
    if values is None:
        raise UserError(f"{path} is empty: a recipe is a list of key: value pairs")
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold key: value pairs at its top level, not {_in_words(values)}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `key=value` inside `values`. Raises `ValueError` where the key leads nowhere."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError("write it as key=value")
    try:
        value = strict_yaml.load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"the value is not valid YAML: {strict_yaml.problem_of(error)}") from None
    names = key.split(".")
    if len(names) > DEEPEST_KEY:
        raise ValueError(f"a key has at most {DEEPEST_KEY} parts")
    _assign(values, names, value)


def _assign(place: Any, names: list[str], value: Any, here: str = "the recipe") -> None:
    """`place[names[0]][names[1]]... = value`, making the sections on the way that the file leaves out."""
    name, *below = names
    slot: int | str = name
    if isinstance(place, list):
        if not name.isdecimal() or int(name) >= len(place):
            raise ValueError(f"{here} has {len(place)} items, counted from 0, and no item '{name}'")
        slot = int(name)
    elif not isinstance(place, dict):
        raise ValueError(f"{here} is {_in_words(place)} and has nothing below it")
    elif below and place.get(name) is None:
        if below[0].isdecimal():
            raise ValueError(f"the file has no list '{name}' to change an item of: set the whole list")
        place[name] = {}
    if below:
        _assign(place[slot], below, value, here=name)
    else:
        place[slot] = value


def _write_out(values: dict[str, Any], model: type[BaseModel]) -> None:
    """Make a section of `Tagged` sections that are given as one word, so that there is something to set below them."""
    for name, field in model.model_fields.items():
        below = _section_in(field.annotation)
        if below is None or below[0]:
            continue
        if issubclass(below[1], Tagged) and isinstance(values.get(name), str):
            values[name] = {below[1].tag: values[name]}
        if isinstance(values.get(name), dict):
            _write_out(values[name], below[1])


def _complete_sections(values: dict[str, Any], model: type[BaseModel]) -> None:
    """Give a section that is written in part (`kd_weight: {end: 0.5}`) its declared default for what its class has none for.

    Such as `Ramp`, whose fields are required. What a class has defaults for, it fills in itself.
    """
    for name, field in model.model_fields.items():
        given = values.get(name)
        if isinstance(given, dict) and (below := _section_in(field.annotation)):
            if isinstance(field.default, BaseModel):
                declared = field.default.model_dump(mode="json").items()
                needed = {key: value for key, value in declared if below[1].model_fields[key].is_required()}
                values[name] = given = needed | given
            _complete_sections(given, below[1])


# Explaining problems


def _explain(problem: ErrorDetails, model: type[BaseModel]) -> str:
    """One line: the dotted key, what is wrong with it, the value found."""
    where = ".".join(str(part) for part in problem["loc"] if part != "[key]")
    fields = {key: field for key, field, _ in _walk(model)}
    declared = ".".join("N" if isinstance(part, int) else part for part in problem["loc"])
    found = f", is {_in_words(problem['input'])}"
    context = problem.get("ctx", {})
    match problem["type"]:
        case "missing":
            text = f"missing ({(fields[declared].description or 'it has no default').rstrip('.')})"
        case "extra_forbidden":
            text = f"unknown key{_nearest_key(declared, list(fields))}"
        case "value_error":  # from a validator of the model: its own sentence
            text = str(context["error"])
        case "literal_error" | "enum":
            text = problem["msg"].replace("Input should", "must") + found
            text += did_you_mean(str(problem["input"]), re.findall(r"'([^']+)'", context["expected"]))
        case "too_short" | "too_long" as kind:
            bound, number = ("least", context["min_length"]) if kind == "too_short" else ("most", context["max_length"])
            text = f"must have at {bound} {number} item{'' if number == 1 else 's'}" + found
        case kind:
            text = WORDS_FOR_PROBLEMS.get(kind) or problem["msg"].replace("Input should", "must")
            text = (
                text.replace("greater than or equal to", "at least").replace("less than or equal to", "at most") + found
            )
    return f"{where}: {text}" if where else text


def _nearest_key(unknown: str, known: list[str]) -> str:
    """Suggest a key of the same section with a similar name, or else one elsewhere with the same name or a similar one.

    Of several elsewhere the least nested.
    """
    section, _, name = unknown.rpartition(".")
    siblings = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == section]
    alike = difflib.get_close_matches(name, siblings, n=1, cutoff=VERY_ALIKE)
    near = difflib.get_close_matches(name, {key.rpartition(".")[2] for key in known}, n=1, cutoff=VERY_ALIKE)
    elsewhere = sorted((key for key in known if key.rpartition(".")[2] in near), key=lambda key: key.count("."))
    found = [*alike, *elsewhere][:1]
    return f" (did you mean '{found[0]}'?)" if found else did_you_mean(name, siblings)


def _in_words(value: Any) -> str:
    text = _to_json(value).decode()
    return text if len(text) <= 80 else text[:77] + "..."


def _to_json(value: Any) -> bytes:
    """JSON of whatever safe YAML can hold: also dates, bytes and infinity."""
    return to_json(value, inf_nan_mode="constants", bytes_mode="base64", fallback=str)


# Walking the declarations


def _walk(
    model: type[BaseModel], defaults: BaseModel | None = None, prefix: str = ""
) -> Iterator[tuple[str, FieldInfo, Any]]:
    """Every field below `model`, depth first: its dotted key (N for a list index), its declaration, its default.

    The default of a field in a section comes from the section's own default where it has one
    (`distil.kd_weight.start` is 1.0); `PydanticUndefined` means that the field must be given.
    """
    for name, field in model.model_fields.items():
        default = getattr(defaults, name) if defaults else field.get_default(call_default_factory=True)
        yield prefix + name, field, default
        if below := _section_in(field.annotation):
            index, section = below
            section_default = default if isinstance(default, section) else None
            yield from _walk(section, section_default, f"{prefix}{name}{index}.")


def _section_in(annotation: Any, index: str = "") -> tuple[str, type[BaseModel]] | None:
    """Find the model inside an annotation such as `list[Stage] | None`, with ".N" if it is the item of a list."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return index, annotation
    if get_origin(annotation) is list:
        index = ".N"
    return next((found for inner in get_args(annotation) if (found := _section_in(inner, index))), None)


def _type_in_words(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(str(choice) for choice in get_args(annotation))
    if inspect.isclass(annotation) and issubclass(annotation, StrEnum):
        return " | ".join(annotation)
    if get_origin(annotation) is dict:
        return "key: value pairs"
    if get_origin(annotation) is list:
        return f"list of {_type_in_words(get_args(annotation)[0])}"
    if get_origin(annotation) in (Union, types.UnionType):
        return " | ".join(_type_in_words(inner) for inner in get_args(annotation) if inner is not types.NoneType)
    if inspect.isclass(annotation) and issubclass(annotation, Tagged):
        return f"{_type_in_words(annotation.model_fields[annotation.tag].annotation)} | section"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "section"
    return WORDS_FOR_TYPES.get(annotation) or _type_in_words(get_args(annotation)[0])
