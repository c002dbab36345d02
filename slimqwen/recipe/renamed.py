"""Keys of recipes as version 0.1 had them: each is accepted for one release, with a warning that has the new spelling."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_json

from slimqwen.core import strict_yaml
from slimqwen.recipe import DistilFile, DistilRecipe, PretrainRecipe, PruningRecipe, Recipe
from slimqwen.recipe.pruning import PAPER

SINCE = "0.2"
DEFAULT_SAVING = "100 steps"  # held beside save_every_tokens and save_every_minutes

Values = dict[str, Any]


def _same(value: Any) -> Any:
    return value


def _in(unit: str) -> Callable[[Any], Any]:
    """Return the conversion of a number into a duration; what is no number stays, for the validation to refuse."""
    return lambda value: f"{value} {unit}" if isinstance(value, (int, float)) else value


def _least(first: Any, second: Any) -> Any:
    """Return the smaller number; what is no number goes first, for the validation to refuse."""
    numbers = [isinstance(value, (int, float)) for value in (first, second)]
    return min(first, second) if all(numbers) else second if numbers[0] else first


def _either(first: Any, second: Any) -> Any:
    return first or second


def _first_beta(value: Any) -> Any:
    return [value, 0.95]


def _second_beta(value: Any) -> Any:
    return [0.9, value]


def _both_betas(first: Any, second: Any) -> Any:
    return [first[0], second[1]]


@dataclass(frozen=True)
class Renamed:
    """A key that has another name, or another place.

    old, new: dotted, as in a `Recipe`. convert: the value of `new` for a value of `old`. join: of two old keys that are one
    now, the value for both; None: they cannot both be given. as_list: `new` is a list, to which each old key adds an item.
    """

    old: str
    new: str
    convert: Callable[[Any], Any] = _same
    join: Callable[[Any, Any], Any] | None = None
    as_list: bool = False


RENAMED: tuple[Renamed, ...] = (
    Renamed("device", "execution.device"),
    Renamed("data.workers", "execution.workers"),
    *(
        Renamed(f"{section}.batch_size", "execution.batch_size", join=_least)
        for section in ("calibration", "evaluation")
    ),
    Renamed("teacher_cache.batch_size", "execution.batch_size", join=_least),
    *(
        renamed
        for section in ("calibration", "teacher_cache")
        for renamed in (
            Renamed(f"{section}.streaming", "execution.streaming", join=_either),
            Renamed(f"{section}.memory_budget_bytes", "execution.memory_budget", join=_least),
        )
    ),
    Renamed("teacher_cache.top_k", "distil.teacher.top_k"),
    Renamed("teacher_cache.exact", "distil.teacher.exact"),
    Renamed("teacher_cache.shard_bytes", "execution.cache_file_bytes"),
    Renamed("distil.activation_checkpointing", "execution.recompute_activations"),
    Renamed("distil.save_every_steps", "execution.save_every", _in("steps"), as_list=True),
    Renamed("distil.save_every_tokens", "execution.save_every", _in("tokens"), as_list=True),
    Renamed("distil.save_every_minutes", "execution.save_every", _in("min"), as_list=True),
    Renamed("distil.evaluate_every_tokens", "execution.evaluate_every", _in("tokens")),
    Renamed("distil.on_bad_step", "execution.bad_steps.action"),
    Renamed("distil.spike_factor", "execution.bad_steps.spike_factor"),
    *(
        Renamed(f"distil.{name}", f"execution.{name}")
        for name in (
            "micro_batch_size",
            "loss_chunk_tokens",
            "keep_states",
            "async_save",
            "evaluate_tokens",
            "loggers",
            "shard_ranks",
            "expert_ranks",
            "reshard_student",
            "reshard_teacher",
        )
    ),
    Renamed("distil.warmup_steps", "distil.warmup", _in("steps")),
    Renamed("distil.warmup_tokens", "distil.warmup", _in("tokens")),
    Renamed("distil.optimizer_state", "distil.optimizer.at_cut"),
    Renamed("distil.adam_beta1", "distil.optimizer.betas", _first_beta, join=_both_betas),
    Renamed("distil.adam_beta2", "distil.optimizer.betas", _second_beta, join=_both_betas),
    *(
        Renamed(f"distil.{name}", f"distil.optimizer.{name}")
        for name in ("weight_decay", "weight_decay_exempt", "learning_rate_scale", "max_grad_norm")
    ),
    Renamed("distil.temperature", "distil.divergence.temperature"),
    Renamed("distil.jsd_beta", "distil.divergence.beta"),
    *(
        Renamed(f"evaluation.acceptance_{name}", f"evaluation.acceptance.{name}")
        for name in ("prompts", "prompt_tokens", "new_tokens", "depth")
    ),
    Renamed("pruning.repair", "pruning.refit_readers"),
    Renamed("pruning.experts.refit", "pruning.refit_outputs"),
    Renamed("pruning.healing", "healing"),
)

LEFT_EMPTY = ("teacher_cache",)  # sections that are no more

# How keys of a `Recipe` begin in other files: prefix -> prefix. A key that begins with none of them is not in the file.
PREFIXES: Mapping[type[BaseModel], Mapping[str, str]] = {
    Recipe: {"": ""},
    PretrainRecipe: {"distil.": "training.", "data.": "data.", "device": "device", "execution.": "execution."},
    DistilFile: {"distil.": "", "execution.": "execution."},
    DistilRecipe: {"distil.": ""},
    PruningRecipe: {"pruning.": ""},
}


def rows_for(model: type[BaseModel]) -> list[Renamed]:
    """Return the table with the keys as they are in files of `model`; of keys that are elsewhere now, `new` is empty."""
    rows = []
    for row in RENAMED:
        old, new = _local(row.old, model), _local(row.new, model)
        if old is not None:
            rows.append(Renamed(old, new or "", row.convert, row.join, row.as_list))
    return rows


def _local(key: str, model: type[BaseModel]) -> str | None:
    for prefix, own in PREFIXES.get(model, {}).items():
        if key.startswith(prefix):
            return own + key.removeprefix(prefix)
    return None


def make_room(values: Values, key: str, model: type[BaseModel]) -> None:
    """Remove from `values` what an override of `key` replaces under the key's other spellings."""
    rows = [row for row in rows_for(model) if row.new]
    for row in rows:
        if key == row.old:
            _pop(values, row.new)
            others = (other.old for other in rows if other.new == row.new and other.old != key)
            for other in others if row.join is None and not row.as_list else ():
                _pop(values, other)
        elif key == row.new:
            _pop(values, row.old)


def translate(values: Values, model: type[BaseModel]) -> tuple[list[str], list[str]]:
    """Give every old key in `values` its new name, in place. Return warnings and problems, a line each.

    None stands for "not set" in a recipe that was written with every field, and is dropped.
    """
    warnings: list[str] = []
    problems: list[str] = []
    _write_out_method(values, model, warnings, problems)
    moved: Values = {}
    for row in rows_for(model):
        found = _pop(values, row.old)
        if found is None or found[0] is None:
            continue
        problem = _problem_of(row, values, moved)
        if problem is not None:
            problems.append(problem)
            continue
        new = row.convert(found[0])
        warnings.append(f"{row.old}: {_inline(found[0])} is written {row.new}: {_inline(new)} since {SINCE}")
        moved[row.new] = _joined(row, moved, new)
    for key, value in moved.items():
        if key.endswith("save_every") and not any(str(item).endswith("steps") for item in value):
            value = [DEFAULT_SAVING, *value]
        _put(values, key, value)
    for section in LEFT_EMPTY:
        if values.get(section) == {}:
            del values[section]
    return warnings, problems


def _problem_of(row: Renamed, values: Values, moved: Values) -> str | None:
    """Return why the old key of a row cannot be given its new name; None where it can."""
    if not row.new:
        return f"{row.old}: is a key of the whole recipe since {SINCE}, not of this section: leave it out here"
    if _find(values, row.new) is not None:
        return f"{row.old}: is written {row.new} since {SINCE}, which is given too: leave out {row.old}"
    if row.new in moved and row.join is None and not row.as_list:
        return (
            f"{row.old}: is written {row.new} since {SINCE}, and so is another key that is given: leave out one of them"
        )
    return None


def _joined(row: Renamed, moved: Values, new: Any) -> Any:
    """Return the value of the new key, together with that of another old key that is the same now."""
    if row.as_list:
        return [*moved.get(row.new, []), new]
    return row.join(moved[row.new], new) if row.join is not None and row.new in moved else new


def _write_out_method(values: Values, model: type[BaseModel], warnings: list[str], problems: list[str]) -> None:
    """Replace `pruning.method` by the keys that it stood for, where they are not given."""
    key = _local("pruning.method", model)
    found = None if key is None else _pop(values, key)
    if key is None or found is None or found[0] is None:
        return
    if found[0] == "slimqwen":
        warnings.append(f"{key}: slimqwen is what a recipe does without it since {SINCE}")
    elif found[0] == "slimqwen-paper":
        warnings.append(f"{key}: slimqwen-paper is written as the criteria of slimqwen/recipe/paper.yaml since {SINCE}")
        criteria = strict_yaml.load(PAPER.read_text(encoding="utf-8"))
        section = values if key == "method" else values["pruning"]
        for row in rows_for(model):  # or both spellings would be there
            if row.new and row.old.startswith(key.removesuffix("method")) and (given := _pop(values, row.old)):
                _put(values, row.new, row.convert(given[0]))
        given = section.get("experts")
        section.update({**criteria, **section})
        if isinstance(given, dict):
            section["experts"] = {**criteria["experts"], **given}
    else:
        problems.append(
            f"{key}: is gone since {SINCE}, and was slimqwen or slimqwen-paper: write the criteria themselves"
        )


def _pop(values: Values, key: str) -> tuple[Any] | None:
    """Remove a dotted key; its value in a tuple, or None where it is not there."""
    *sections, last = key.split(".")
    place: Any = values
    for section in sections:
        place = place.get(section) if isinstance(place, dict) else None
    return (place.pop(last),) if isinstance(place, dict) and last in place else None


def _find(values: Values, key: str) -> tuple[Any] | None:
    place: Any = values
    for name in key.split("."):
        if not isinstance(place, dict) or name not in place:
            return None
        place = place[name]
    return (place,)


def _put(values: Values, key: str, value: Any) -> None:
    *sections, last = key.split(".")
    place = values
    for section in sections:
        if not isinstance(place.get(section), dict):
            if place.get(section) is not None:
                return  # no section at all: reported as that
            place[section] = {}
        place = place[section]
    place[last] = value


def _inline(value: Any) -> str:
    """Write a value as YAML has it in a line."""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_inline, value))}]"
    return to_json(value, inf_nan_mode="constants", bytes_mode="base64", fallback=str).decode()
