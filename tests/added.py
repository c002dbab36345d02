"""What test_adding.py runs in a process of its own, on a copy of the package with something added. Writes found.json.

python added.py FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from synthetic_run import write_recipe
from tiny import write_tiny_checkpoint, write_tiny_tokens
from tiny_families import QWEN3_MOE
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import slimqwen
from slimqwen.calibration.calibrate import calibrate
from slimqwen.core.errors import UserError
from slimqwen.losses.divergence import Distribution, Divergence
from slimqwen.losses.loss import LossWeights, align, chunked_loss
from slimqwen.losses.signal import LiveSignal
from slimqwen.model.model import load
from slimqwen.planning.chosen import choice_text
from slimqwen.planning.plan import plan
from slimqwen.pruning.prune import prune
from slimqwen.recipe import CalibrationRecipe, DivergenceName, PruningRecipe, Recipe, Target, TextSettings
from slimqwen.recipe.file import describe, load_recipe
from slimqwen.reporting.report import report

CRITERIA = """
depth: first
width: loudest
experts: {importance: mean_output, compression: merge, similarity: any, keep_outliers: false}
"""


class OtherMoeConfig(Qwen3MoeConfig):
    """An architecture that Transformers gets from elsewhere: Qwen3-MoE's modules under another name."""

    model_type = "other_moe"


class OtherMoeForCausalLM(Qwen3MoeForCausalLM):
    """Its modules."""

    config_class = OtherMoeConfig


def criteria(folder: Path) -> dict[str, Any]:
    """Plan by the new criteria, and make the report of a run with that plan."""
    tokenizer, tokens = write_tiny_tokens(folder / "texts")
    checkpoint = write_tiny_checkpoint(folder / "model", tokenizer=tokenizer)
    statistics = calibrate(
        checkpoint,
        folder / "statistics.safetensors",
        tokens=tokens,
        recipe=CalibrationRecipe(samples=4),
        text=TextSettings(sequence_length=32),
    )
    (folder / "pruning.yaml").write_text(CRITERIA)
    target = Target(num_hidden_layers=2, hidden_size=20, num_experts=4)
    pruning = load_recipe(folder / "pruning.yaml", model=PruningRecipe)
    made = plan(checkpoint, folder / "run/stage-1/plan.json", statistics=statistics, target=target, pruning=pruning)
    try:
        load_recipe(folder / "pruning.yaml", ["experts.importance=mean_outputs"], model=PruningRecipe)
        misspelt = ""
    except UserError as error:
        misspelt = "\n".join([str(error), *map(str, error.args)])
    sums = statistics.weighted(None)
    norms = [
        sums[name] / sums.tokens["main"]
        for name in sums.sums
        if name.startswith("norm/model.") and name.endswith("/abs_sums")
    ]
    block, groups = next(iter(made.expert_groups.items()))
    outputs, assignments = (sums[f"experts/{block}/{name}"] for name in ("output_sums", "assignments"))
    write_recipe(folder / "run")
    return {
        "pruning": json.loads((folder / "run/stage-1/plan.json").read_text())["pruning"],
        "kept_layers": made.kept_layers,
        "channels": made.kept["hidden"],
        "expected_channels": highest(torch.stack(norms).max(dim=0).values, 20),
        "bases": [group.base for group in groups],
        "expected_bases": highest(outputs.norm(dim=1) / assignments.clamp_min(1), 4),
        "absorbers": sum(len(group.members) > 1 for group in groups),
        "plan_text": choice_text(made),
        "report": report(folder / "run").read_text(encoding="utf-8"),
        "help": " ".join(describe(Recipe).split()),
        "misspelt": misspelt,
    }


def highest(scores: Tensor, keep: int) -> list[int]:
    """Return the indices of the highest scores, in ascending order."""
    return sorted(scores.topk(keep).indices.tolist())


def divergence() -> dict[str, Any]:
    """Take the new divergence of two distributions, and its gradient through the loss."""
    torch.manual_seed(0)
    hidden, teacher = torch.randn(2, 1, 5, 3, dtype=torch.float64)
    head, teacher_head = torch.randn(2, 7, 3, dtype=torch.float64)
    tokens = torch.randint(7, (1, 6))
    name = DivergenceName("hellinger")

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        said = align(tokens, teacher)
        return chunked_loss(
            align(tokens, hidden),
            head,
            LossWeights(lm=0.0, kd=1.0, mtp_lm=0.0, mtp_kd=0.0),
            teacher=LiveSignal(said.hidden, teacher_head),
            divergence=Divergence(name),
            chunk_tokens=2,
        )[0]

    p, q = (Distribution.of(torch.randn(3, 7, dtype=torch.float64)) for _ in range(2))
    value, _ = Divergence(name).value_and_gradient(p, q)
    itself, _ = Divergence(name).value_and_gradient(p, p)
    leaves = (hidden.requires_grad_(), head.requires_grad_())
    return {
        "divergence": value.tolist(),
        "expected_divergence": (0.5 * (p.probs.sqrt() - q.probs.sqrt()).pow(2).sum(1)).tolist(),
        "divergence_to_itself": itself.tolist(),
        "gradcheck": torch.autograd.gradcheck(loss, leaves),
    }


def family(folder: Path) -> dict[str, Any]:
    """Cut a model of the new family and load what is left."""
    AutoConfig.register("other_moe", OtherMoeConfig)
    AutoModelForCausalLM.register(OtherMoeConfig, OtherMoeForCausalLM)
    native = QWEN3_MOE | {
        "model_type": "other_moe",
        "architectures": ["OtherMoeForCausalLM"],
        "num_experts": 8,
        "num_hidden_layers": 3,
        "mlp_only_layers": [],
    }
    _, tokens = write_tiny_tokens(folder / "other_texts")
    checkpoint = write_tiny_checkpoint(folder / "other", native=native)
    statistics = calibrate(
        checkpoint,
        folder / "other.safetensors",
        tokens=tokens,
        recipe=CalibrationRecipe(samples=4),
        text=TextSettings(sequence_length=32),
    )
    pruning = PruningRecipe.model_validate({"depth": "last", "width": "norm_activation"})

    def cut(name: str, target: Target) -> Path:
        made = plan(checkpoint, folder / f"{name}.json", statistics=statistics, target=target, pruning=pruning)
        return prune(checkpoint, folder / name, plan=made if name == "whole" else folder / f"{name}.json")

    rows = torch.randint(300, (2, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, whole = (load(path)(rows).main for path in (checkpoint, cut("whole", Target())))
        small = load(cut("small", Target(num_hidden_layers=2, hidden_size=24, num_experts=4)))
        logits = small(rows).main @ small.head.T
    config = json.loads((folder / "small" / "config.json").read_text())
    return {
        "same_when_whole": torch.equal(before, whole),
        "cut_shape": {name: config[name] for name in ("num_hidden_layers", "hidden_size", "num_experts")},
        "cut_logits": list(logits.shape),
        "finite": bool(logits.isfinite().all()),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = {"package": str(Path(slimqwen.__file__).parent), **criteria(folder), **divergence(), **family(folder)}
    (folder / "found.json").write_text(json.dumps(found))
