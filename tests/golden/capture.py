"""Makes everything that golden.json describes, by the command line alone: modules may move and be renamed, commands stay.

Of each family in `models.MODELS`: a run in two stages, the paper's cut beside it, both cuts with experts stacked, a cut that is
healed, a run from random weights, a teacher cache and a training from it, the moments of that training cut by another plan. And
what no model is needed for: the recipe with its defaults and descriptions, and the help of every command.
"""

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import typer
import yaml
from rounding import FORWARD, GRADIENT, SUM, TRAINED
from safetensors import safe_open
from tiny import VOCAB_SIZE, fused, tiny_text, write_tiny_text
from torch import Tensor

from golden.models import MODELS, write_checkpoint
from golden.revisions import REVISIONS, revision_lines
from golden.summary import Artefact, Vector, split_json
from slimqwen.cli import app, main
from slimqwen.data.tokenizer import train_tokenizer

SEQUENCE_LENGTH = 16
STEPS = 20
LEARNING_RATE = 1e-3

# What the machine, the clock or the place of a folder decides; and greedy text, which one near tie changes to its end.
LEFT_OUT = ("checkpoint", "tokens_per_second", "seconds", "memory_bytes", "completion")


def capture(folder: Path) -> dict[str, Artefact]:
    """Make everything in `folder`, which must be empty; artefact -> what golden.json holds of it."""
    artefacts = {f"help/{name or 'slimqwen'}": Artefact(lines) for name, lines in help_texts()}
    artefacts["recipe"] = Artefact(slimqwen(folder, "recipe").splitlines())
    artefacts["recipe --pretrain"] = Artefact(slimqwen(folder, "recipe", "--pretrain").splitlines())
    write_text(folder)
    for family, native in MODELS.items():
        write_checkpoint(folder / family / "teacher", native, folder / "tokenizer")
        for name, artefact in of_family(folder / family, native).items():
            artefacts[f"{family}/{name}"] = artefact
    artefacts["tokens"] = Artefact(files_of(folder / "qwen3_next" / "run" / "tokens"))
    artefacts[REVISIONS] = Artefact(revision_lines())
    return artefacts


# --- commands ---------------------------------------------------------------------------------------------------------


def slimqwen(folder: Path, *arguments: object) -> str:
    """What the console script prints, run in this process in `folder`. Raises RuntimeError with its words where it fails."""
    out, err = io.StringIO(), io.StringIO()
    words = ["slimqwen", *map(str, arguments)]
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with patch.object(sys, "argv", words):
                main()
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"{' '.join(words)}: exit code {end.code}\n{err.getvalue()}") from None
    return out.getvalue()


def help_texts() -> Iterator[tuple[str, list[str]]]:
    """The help of the program and of every command, without Rich's frames, which change with its version."""
    group: Any = typer.main.get_command(app)
    for name, command in {"": group, **group.commands}.items():
        context = command.make_context(f"slimqwen {name}".strip(), [], resilient_parsing=True)
        context.max_content_width = context.terminal_width = 100
        with patch.object(command, "rich_markup_mode", None):
            lines = command.get_help(context).splitlines()
        panels = [(option.opts[0], getattr(option, "rich_help_panel", None)) for option in command.params]
        yield name, [*lines, *(f"{option} is in the panel {panel}" for option, panel in panels if panel)]


# --- what is made -----------------------------------------------------------------------------------------------------


def write_text(folder: Path) -> None:
    """`text`, `heldout_text` and the tokenizer of all the models."""
    write_tiny_text(folder / "text")
    (folder / "heldout_text").mkdir()
    for i in range(3):
        (folder / "heldout_text" / f"heldout_{i}.py").write_text(tiny_text(100 + i), encoding="utf-8")
    texts = (file.read_text(encoding="utf-8") for file in sorted((folder / "text").iterdir()))
    train_tokenizer(texts, VOCAB_SIZE, folder / "tokenizer")


def recipe_of(native: Mapping[str, Any]) -> dict[str, Any]:
    """A run of two stages to fewer layers, channels and experts; every length is given, so that defaults may change."""
    layers = native["num_hidden_layers"] - (2 if native["model_type"] == "qwen3_next" else 1)
    has_mtp = bool(native.get("num_nextn_predict_layers"))
    return {
        "name": "golden",
        "run_dir": "run",
        "teacher": "teacher",
        "execution": {"device": "cpu", "workers": 1},
        "target": {"num_hidden_layers": layers, "hidden_size": 24, "num_experts": 4},
        "schedule": "depth_first",
        "first_stage_token_fraction": 0.3,
        "data": {
            "sources": [{"path": "../text"}],
            "heldout_sources": [{"path": "../heldout_text"}],
            "sequence_length": SEQUENCE_LENGTH,
        },
        "calibration": {"samples": 8},
        "distil": {
            "tokens": SEQUENCE_LENGTH * 2 * STEPS,
            "batch_size": 2,
            "warmup": "2 steps",
            "learning_rate": LEARNING_RATE,
            "final_learning_rate": LEARNING_RATE / 10,
            "terms": ["lm", "kd", *(["mtp_lm", "mtp_kd"] if has_mtp else [])],
        },
        "baselines": ["pruned", "paper_pruned"],
        "evaluation": {
            "tokens": 64,
            "acceptance": {"prompts": 2, "prompt_tokens": 8, "new_tokens": 8, "depth": 3},
        },
    }


def random_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A run of the same shape from random weights, as short as one can be: of it the weights at its beginning count."""
    kept = {key: value for key, value in recipe.items() if key != "first_stage_token_fraction"}
    return kept | {
        "run_dir": "random",
        "init": "random",
        "schedule": "one_shot",
        "distil": recipe["distil"] | {"tokens": SEQUENCE_LENGTH * 2 * 3, "terms": ["lm"]},
        "baselines": [],
        "evaluation": {"tokens": SEQUENCE_LENGTH},
    }


def of_family(folder: Path, native: Mapping[str, Any]) -> dict[str, Artefact]:
    """Make everything of one family; `teacher` is there already."""
    recipe = recipe_of(native)
    text = ["--sequence-length", SEQUENCE_LENGTH, "--device", "cpu"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "random.yaml").write_text(yaml.safe_dump(random_recipe(recipe)))
    (folder / "distil.yaml").write_text(yaml.safe_dump(recipe["distil"]))
    (folder / "fewer.yaml").write_text("{num_experts: 3, hidden_size: 24}")
    (folder / "channels.yaml").write_text("{width: norm_activation}")  # moments cannot follow a rotation
    slimqwen(folder, "run", "recipe.yaml")
    for cut in ("one_shot", "paper/one_shot"):
        stacked = ["--layout", "fused", "--shard-size", "100KB", "--out", f"fused/{cut}"]
        slimqwen(folder, "prune", "teacher", "--plan", f"run/{cut}/plan.json", *stacked)
    # A rate of its own: among several the best is a choice, which rounding could make another.
    healing = ["--samples", 8, "--epochs", 1, "--batch-size", 2, "--learning-rate", LEARNING_RATE, "--out", "healed"]
    made_by = ["--teacher", "teacher", "--plan", "run/one_shot/plan.json", "--tokens", "run/tokens"]
    slimqwen(folder, "heal", "run/one_shot/refitted", *made_by, *healing, *text)
    slimqwen(folder, "run", "random.yaml")
    slimqwen(folder, "teacher-cache", "teacher", "--tokens", "run/tokens", "--top-k", 16, "--out", "cache", *text)
    (folder / "cached").mkdir()
    training = ["--teacher-cache", "cache", "--recipe", "distil.yaml", "--keep-state", "--out", "cached/trained"]
    slimqwen(folder, "distil", "run/stage-1/pruned", "--tokens", "run/tokens", *training, *text)
    measured = ["--tokens", "run/tokens", "--samples", 4, "--out", "cached/statistics.safetensors"]
    slimqwen(folder, "calibrate", "cached/trained", *measured, *text)
    planned = ["--target", "fewer.yaml", "--pruning", "channels.yaml", "--statistics", "cached/statistics.safetensors"]
    slimqwen(folder, "plan", "cached/trained", *planned, "--out", "cached/plan.json")
    moments = ["--plan", "cached/plan.json", "--out", "cached/moments"]
    slimqwen(folder, "carry", "cached/.trained.state", "cached/trained", *moments)
    return artefacts_of(folder)


# --- what golden.json holds of it -------------------------------------------------------------------------------------


def artefacts_of(folder: Path) -> dict[str, Artefact]:
    """Of all that `of_family` made: what is said of each, and how close its numbers must come."""
    run, cached = folder / "run", folder / "cached"
    found = {
        "recipe.resolved.yaml": Artefact((run / "recipe.resolved.yaml").read_text().splitlines()),
        "stage-1/depth.json": depth_of(run / "stage-1" / "depth.json"),
        "healed/added": added_by(folder / "healed", run / "one_shot" / "refitted"),
        "stage-1/statistics": statistics_of(run / "stage-1" / "statistics.safetensors"),
        "teacher_cache": cache_of(folder / "cache" / "shard-000000.safetensors"),
        "metrics": metrics_of(run / "metrics.jsonl"),
        "cached/metrics": metrics_of(cached / "metrics.jsonl"),
        "evaluation": evaluation_of(run / "evaluation.json"),
        "final/config.json": Artefact((run / "final" / "config.json").read_text().splitlines()),
    }
    for plan, tolerance in PLANS.items():
        found[plan] = plan_of(folder / plan, tolerance)
    for checkpoint, tolerance in CHECKPOINTS.items():
        together = r"\d+" if checkpoint in OF_ALL_LAYERS else r"(?<=experts\.)\d+"
        exact = WITHOUT_ARITHMETIC.get(checkpoint, NONE)
        found[checkpoint] = checkpoint_of(folder / checkpoint, tolerance, exact, together)
    for cut in ("one_shot", "paper/one_shot"):
        found[f"fused/{cut}"] = stacked_of(folder / "fused" / cut, run / cut / "pruned")
    return found


# What a float32 pass was measured for, and what training made of it. Trained weights are compared as shares of their own
# norm, of which twenty steps move a twentieth: so by less than a gradient, which is a difference of large numbers.
PLANS = {
    "run/one_shot/plan.json": FORWARD,
    "run/paper/one_shot/plan.json": FORWARD,
    "run/stage-2/plan.json": GRADIENT,
    "cached/plan.json": GRADIENT,
}
CHECKPOINTS = {
    "run/stage-1/pruned": SUM,
    "run/stage-1/refitted": FORWARD,
    "run/one_shot/pruned": FORWARD,
    "run/one_shot/refitted": FORWARD,
    "run/paper/one_shot/pruned": FORWARD,
    "run/stage-2/pruned": GRADIENT,
    "run/stage-2/distilled": GRADIENT,
    "cached/trained": GRADIENT,
    "cached/moments/exp_avg": TRAINED,
    "cached/moments/exp_avg_sq": TRAINED,
    "healed": FORWARD,
    "random/stage-1/initial": FORWARD,
}
# Tensors that are copied or sliced, which is no arithmetic: the digests of their bytes are compared.
WITHOUT_ARITHMETIC = {"run/stage-1/pruned": r"", "run/paper/one_shot/pruned": r"^((?!\.experts\.).)*$"}
# Of which all layers are one vector: what they follow from is compared layer by layer.
OF_ALL_LAYERS = {"run/stage-2/pruned", "cached/moments/exp_avg", "cached/moments/exp_avg_sq"}
NONE = r"(?!)"


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name, ascending."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return dict(sorted(found.items()))


def description(name: str, tensor: Tensor) -> str:
    return f"{name}: {tensor.dtype} {list(tensor.shape)}".replace("torch.", "")


def joined(tensors: Mapping[str, Tensor], pattern: str) -> dict[str, Vector]:
    """The tensors as vectors; those whose names are the same but for what `pattern` finds are one, in the order of names."""
    groups: dict[str, list[Vector]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(re.sub(pattern, "*", name), []).append(tensor.double().flatten().numpy())
    return {name: np.concatenate(vectors) for name, vectors in groups.items()}


def checkpoint_of(folder: Path, tolerance: float, exact: str, together: str) -> Artefact:
    """config.json, the index, every name, dtype and shape, and the tensors: the bytes of those whose names match `exact`,
    the numbers of the others, joined as `joined` does by `together`.
    """
    lines, numbers = configuration(folder), {}
    for name, tensor in tensors_in(folder).items():
        if re.search(exact, name):
            lines.append(f"{description(name, tensor)} {sha256(tensor.numpy().tobytes()).hexdigest()}")
        else:
            lines.append(description(name, tensor))
            numbers[name] = tensor
    return Artefact(lines, joined(numbers, together), tolerance)


def configuration(folder: Path) -> list[str]:
    files = [folder / "config.json", *folder.glob("*.index.json")]
    return [line for file in files for line in file.read_text().splitlines()]


def stacked_of(folder: Path, apart: Path) -> Artefact:
    """The same cut with experts stacked: config.json, the index, names, dtypes and shapes.

    Raises AssertionError where its weights are not those of `apart`, one tensor per expert, bit for bit.
    """
    tensors, config = tensors_in(folder), json.loads((folder / "config.json").read_text())
    experts = next(config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config)
    expected = fused(tensors_in(apart), {"num_experts": experts})
    assert expected.keys() == tensors.keys(), expected.keys() ^ tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), f"{name} is another in {folder} and in {apart}"
    return Artefact([*configuration(folder), *(description(name, tensor) for name, tensor in tensors.items())])


def statistics_of(file: Path) -> Artefact:
    """Sums over float32 passes; those of all layers and both halves of the text are one vector."""
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in sorted(opened.keys())}
    lines = [description(name, tensor) for name, tensor in tensors.items()]
    return Artefact(lines, joined(tensors, r"\d+|/even/|/odd/"), FORWARD)


def cache_of(file: Path) -> Artefact:
    """Log-probabilities; not which tokens they are of, for the order of nearly equal ones is rounding's."""
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in sorted(opened.keys())}
    lines = [description(name, tensor) for name, tensor in tensors.items()]
    lines += [f"{name}: {tensors[name].tolist()}" for name in ("sequences", "ends")]
    return Artefact(lines, joined({name: tensor for name, tensor in tensors.items() if "log_" in name}, NONE), FORWARD)


def plan_of(file: Path, tolerance: float) -> Artefact:
    return Artefact(*split_json(json.loads(file.read_text())), tolerance)


def depth_of(file: Path) -> Artefact:
    return Artefact(*split_json(json.loads(file.read_text())), FORWARD)


def added_by(folder: Path, start: Path) -> Artefact:
    """What healing added to the weights of `start`, of each layer one vector.

    It is a fiftieth of the weights, so that a change of it does not show in them. Of one tensor it can be Adam's steps on a few
    gradients that are nothing but rounding; of a layer's tensors together, 1.3e-4 of it differed between two orders of summing.
    """
    before = tensors_in(start)
    added = {name: tensor.double() - before[name].double() for name, tensor in tensors_in(folder).items()}
    return Artefact([], joined(added, r"(?<=layers\.\d\.).*|(?<=mtp\.).*"), 2 * GRADIENT)


def evaluation_of(file: Path) -> Artefact:
    return Artefact(*split_json(json.loads(file.read_text()), LEFT_OUT), GRADIENT)


def metrics_of(file: Path) -> Artefact:
    """Every step's line: the course of each number over the steps is one vector."""
    steps = [json.loads(line) for line in file.read_text().splitlines()]
    lines, numbers = split_json({"steps": steps}, LEFT_OUT)
    return Artefact(lines, numbers, TRAINED)


def files_of(folder: Path) -> list[str]:
    """The name and the sha256 of every file that holds tokens; what the manifest says."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = sorted([*folder.glob("*.bin"), *folder.glob("*.idx")])
    return [f"{file.name}: {sha256(file.read_bytes()).hexdigest()}" for file in files] + split_json(manifest)[0]
