"""What all commands have in common: the range of their numbers, and the words of their errors and interruptions."""

import functools
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from typer.core import TyperCommand
from typer.models import ParameterInfo

from slimqwen.cli.many_ranks import carry_out
from slimqwen.core.errors import Interrupted, UserError
from slimqwen.recipe.section import LARGEST_SEED, MOST

# What stays of a command that is interrupted, by Ctrl-C.
STEPS_STAY = "finished steps stay, and training goes on from its last saved state: the same command continues."
TRAINING_STAYS = "nothing is lost but the steps since the last saved state; the same command continues."
FILES_STAY = "what was finished stays beside the output: the same command continues."
NOTHING_STAYS = "nothing is left half written; the same command starts again."
NOTHING_WRITTEN = "it writes nothing, so nothing is left half written."
LEFT = {
    "run": STEPS_STAY,
    "demo": STEPS_STAY,
    "study": STEPS_STAY,
    "pretrain": STEPS_STAY,
    "distil": TRAINING_STAYS,
    "prune": FILES_STAY,
    "refit": FILES_STAY,
    "heal": FILES_STAY,
    "measure-depth": FILES_STAY,
    "teacher-cache": FILES_STAY,
    "calibrate": "nothing is left half written; the same command continues where it measures layer by layer, and else starts again.",
    "plan search": "nothing is left half written; the same command continues after what --work holds of the search.",
    "evaluate": "the models and the benchmarks that are finished stay measured: the same command continues with the next.",
    "check": NOTHING_WRITTEN,
    "generate": NOTHING_WRITTEN,
    "bench": NOTHING_WRITTEN,
    "recipe": NOTHING_WRITTEN,
}

# Which option of a command sets which field of a recipe: the errors of stages name fields. A field that stands alone in a
# sentence (`heldout_fraction`) is found by the last part of its key, where that has several words.
EVERY_STAGE = {
    "data.sequence_length": "sequence_length",
    "seed": "seed",
    "dtype": "dtype",
    "execution.device": "device",
    "execution.batch_size": "batch_size",
    "execution.streaming": "streaming",
    "execution.memory_budget": "memory_budget",
}
FIT_ON_TEXT = {
    "calibration.sources": "tokens",
    "calibration.samples": "samples",
}
OPTION_OF: dict[str, dict[str, str]] = {
    "tokens": {
        "data.heldout_sources": "heldout",
        "data.heldout_fraction": "heldout_fraction",
        "data.separator": "separator",
        "execution.workers": "workers",
        "data.sources.text_field": "text_field",
        "data.sources.format": "text_format",
        "data.sources.weight": "weights",
    },
    "calibrate": FIT_ON_TEXT,
    "measure-depth": {
        **FIT_ON_TEXT,
        "calibration.depth_samples": "samples",
        "pruning.refit_outputs": "refit",
    },
    "refit": FIT_ON_TEXT,
    "heal": {
        "calibration.sources": "tokens",
        **{f"healing.{name}": name for name in ("samples", "epochs", "batch_size", "learning_rate")},
    },
    "plan": {"pruning.source_weights": "source_weights"},
    "plan search": {
        "pruning.source_weights": "source_weights",
        "calibration.samples": "samples",
        "evaluation.tokens": "measured_tokens",
    },
    "teacher-cache": {
        "distil.teacher.top_k": "top_k",
        "distil.teacher.exact": "exact",
        "execution.cache_file_bytes": "shard_size",
        "execution.hidden_states_bytes": "hidden_states_size",
        "data.documents": "isolated",
    },
    "distil": {"data.documents": "isolated"},
    "evaluate": {"evaluation.tokens": "measured_tokens", "data.documents": "isolated"},
}
# Commands that read one section of a recipe as a file.
SECTION_FILES = {"distil": "distil", "plan": "pruning", "plan search": "pruning"}
FIELD = re.compile(
    r"(?<![\w./-])(?P<key>(?P<sections>(?:(?:data|calibration|evaluation|distil|execution|healing|pruning)\.(?:[a-z_]+\.)*)?)"
    r"(?P<name>[a-z]+(?:_[a-z]+)*))(?![\w/(]|\.\w)(?P<setting>: (?=[\w.\[]))?"
)


class Command(TyperCommand):
    """A command whose numbers are bounded and finite, whose paths know ~, and whose errors name its own options in place of fields."""

    def invoke(self, ctx: Any) -> Any:
        try:
            check_numbers(ctx.params, options_of(self))
            return carry_out(self.name or "", functools.partial(super().invoke, ctx))
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted: {LEFT.get(self.name or '', NOTHING_STAYS)}") from None
        except UserError as error:
            if "overrides" not in ctx.params or self.name in SECTION_FILES:  # else the fields are those of its recipe
                error.args = tuple(in_options(line, self.name or "", options_of(self)) for line in error.args)
            raise


def let_paths_begin_at_home(command: Callable[..., Any]) -> None:
    """Replace a leading ~ by the home folder in every path of a command; in `--out=~/x` the shell does not replace it."""
    for annotation in get_type_hints(command, include_extras=True).values():
        kind, *metadata = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
        for declared in metadata:
            if isinstance(declared, ParameterInfo) and Path in (kind, *get_args(kind)):
                declared.parser = path_of
                declared.metavar = declared.metavar or "PATH"


def path_of(text: str) -> Path:
    """Return a path, with the home folder for a leading ~."""
    return Path(os.path.expanduser(text))


def options_of(command: TyperCommand) -> dict[str, str]:
    """Return the options of a command by the name of what they set: {"sequence_length": "--sequence-length"}."""
    return {param.name: max(param.opts, key=len) for param in command.params if param.name and param.opts[0][0] == "-"}


def check_numbers(values: Mapping[str, Any], options: Mapping[str, str]) -> None:
    """Raise UserError for numbers that options accept and nothing can be computed with: 2^70, nan, inf."""
    for name, value in values.items():
        option = options.get(name, name)
        most = LARGEST_SEED if name == "seed" else MOST
        if isinstance(value, int) and abs(value) > most:
            raise UserError(f"{option} {value} is too large: at most {most:,}.")
        if isinstance(value, float) and not (math.isfinite(value) and abs(value) <= MOST):
            raise UserError(f"{option} {value:g} is no number to compute with: at most {MOST:,}.")


def in_options(sentence: str, command: str, options: Mapping[str, str]) -> str:
    """Replace the recipe's fields in a stage's sentence by the command's options: `data.sequence_length` by `--sequence-length`.

    Where the command reads one section of a recipe as a file, the fields of that section lose its name.
    """
    fields = EVERY_STAGE | OPTION_OF.get(command, {})
    by_last_word = {key.rpartition(".")[2]: name for key, name in fields.items() if "_" in key.rpartition(".")[2]}

    def replacement(found: re.Match[str]) -> str:
        key, sections, setting = found["key"], found["sections"], found["setting"] or ""
        if sections or (setting and key in fields):
            option = options.get(fields.get(key, ""))
        else:
            option = options.get(by_last_word.get(key, key)) if "_" in key else None
        if option is not None:
            return option + (" " if setting else "")
        own = SECTION_FILES.get(command)
        return found[0].removeprefix(f"{own}.") if own is not None and sections.startswith(f"{own}.") else found[0]

    return FIELD.sub(replacement, sentence)
