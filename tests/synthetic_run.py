"""A synthetic run folder for the report: every artefact, in the shapes and sizes of the demo's, with invented numbers."""

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from settings import paper

from slimqwen.evaluation.benchmark_results import identity_of
from slimqwen.families.count import count
from slimqwen.families.qwen3_next import QWEN3_NEXT
from slimqwen.planning.experts import group_experts
from slimqwen.planning.plan import Plan, Scores, completed, target_config
from slimqwen.planning.width import kept_channels
from slimqwen.recipe import DataRecipe, DistilRecipe, Recipe, Target
from slimqwen.recipe.file import dump_recipe

CONFIG = QWEN3_NEXT.normalise(
    {
        "model_type": "qwen3_next",
        "vocab_size": 2048,
        "hidden_size": 128,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
        "tie_word_embeddings": False,
        "num_nextn_predict_layers": 1,
    }
)
FINAL = Target(num_hidden_layers=6, hidden_size=96, num_experts=16, num_experts_per_tok=3)
STAGES = {1: Target(num_hidden_layers=7), 2: FINAL}
TOKENS = 540_672
STEP_TOKENS = 2048
PROMPT = "def average(values):\n    if not values:\n"


def write_recipe(folder: Path, **changes: Any) -> None:
    recipe = Recipe(
        name="demo",
        run_dir=folder,
        target=FINAL,
        baselines=["pruned", "random_init", "lm_only"],
        data=DataRecipe(sequence_length=256),
        distil=DistilRecipe(tokens=TOKENS, learning_rate=1e-3, warmup="20 steps"),
    )
    folder.mkdir(parents=True, exist_ok=True)
    dump_recipe(recipe.model_copy(update=changes), folder / "recipe.resolved.yaml")


def make_plan(config: dict[str, Any], target: Target) -> tuple[Plan, dict[str, Any]]:
    """A plan with invented scores, and the config of the model that it leaves."""
    noise = random.Random(config["num_hidden_layers"])
    target = completed(QWEN3_NEXT, target, config)
    assert target.num_hidden_layers and target.hidden_size and target.num_experts
    layers = list(range(target.num_hidden_layers))
    blocks = [f"model.layers.{layer}" for layer in range(config["num_hidden_layers"])] + ["mtp.layers.0"]
    scores = Scores(
        layer_similarity=[0.8 + 0.02 * layer for layer in range(config["num_hidden_layers"])],
        layer_block_influence=[0.5 / (1 + layer) + 0.05 for layer in range(config["num_hidden_layers"])],
        hidden=[0.3 + noise.lognormvariate(0, 0.5) for _ in range(config["hidden_size"])],
        experts={block: [noise.lognormvariate(0, 0.7) for _ in range(config["num_experts"])] for block in blocks},
    )
    similarity = torch.rand(config["num_experts"], config["num_experts"], generator=torch.Generator().manual_seed(0))
    after = target_config(QWEN3_NEXT, config, target, layers)
    plan = Plan(
        checkpoint="fingerprint",
        statistics_data="fingerprint",
        target=target,
        pruning=paper(),
        kept_layers=layers,
        kept={"hidden": kept_channels(torch.tensor(scores.hidden), target.hidden_size)},
        expert_groups={
            block: group_experts("partial", torch.tensor(scores.experts[block]), similarity, target.num_experts)
            for block in blocks
            if block.startswith("mtp.") or int(block.rpartition(".")[2]) in layers
        },
        before=count(QWEN3_NEXT, config),
        after=count(QWEN3_NEXT, after),
        scores=scores,
    )
    return plan, after


def write_plans(folder: Path, targets: Mapping[int, Target]) -> None:
    config = CONFIG
    for number, target in targets.items():
        plan, config = make_plan(config, target)
        plan.save(folder / f"stage-{number}" / "plan.json")


def write_metrics(folder: Path, runs: Mapping[str, float], stages: int) -> None:
    """`runs`: name -> the KL it starts from; the LM-only run has no teacher."""
    noise = random.Random(0)
    total = TOKENS // STEP_TOKENS
    with (folder / "metrics.jsonl").open("w") as stream:
        for run, start in runs.items():
            for step in range(total):
                done = (step + 1) / total
                in_second = stages == 2 and run != "random_init" and done > 0.1
                kl = (start / 4 if stages == 2 and not in_second and run != "random_init" else start) * math.exp(
                    -(2 if run == "random_init" else 4) * (done - 0.1 * in_second)
                ) + 0.18
                entry = {
                    "run": run,
                    "stage": 2 if in_second else 1,
                    "step": step,
                    "tokens": (step + 1) * STEP_TOKENS,
                    "loss": kl + 1.0,
                    "lm": 2.7 + kl + noise.gauss(0, 0.12),
                    "mtp_lm": 3.0 + kl,
                    "load_balancing": 1.05,
                    "lambda": 1 - 0.25 * done,
                    "beta": 0.2 + 0.1 * math.cos(math.pi * done),
                    "learning_rate": 1e-3 * min(1, (step + 1) / 20) * (0.54 + 0.46 * math.cos(math.pi * done)),
                    "grad_norm": 1.0,
                    "seconds": 0.7,
                    "tokens_per_second": 2900.0,
                    "memory_bytes": 3 * 2**30,
                    "mfu": 0.41,
                }
                if step % 60 == 59:
                    entry |= {"heldout_lm": 2.75 + kl, "acc_0": 0.5 * done, "acc_1": 0.3 * done}
                if run == "slimqwen" and step == 100:
                    entry["skipped"] = 1
                    del entry["lm"]
                if run != "lm_only":
                    entry |= {"kd": kl * noise.uniform(0.8, 1.25), "mtp_kd": 1.4 * kl * noise.uniform(0.8, 1.25)}
                stream.write(json.dumps(entry) + "\n")


def make_results(kl: Mapping[str, float]) -> dict[str, Any]:
    """evaluation.json with `kl` to the teacher per model."""
    noise = random.Random(1)
    full, small = count(QWEN3_NEXT, CONFIG), count(QWEN3_NEXT, target_config(QWEN3_NEXT, CONFIG, FINAL))
    models = {}
    for name, distance in kl.items():
        counts, experts, layers = (full, 32, 8) if name == "teacher" else (small, 16, 6)
        loss = 2.71 + 1.3 * distance
        use = {}
        for block in [f"model.layers.{layer}" for layer in range(layers)] + ["mtp.layers.0"]:
            weights = [noise.lognormvariate(0, 0.6) for _ in range(experts)]
            use[block] = [weight / sum(weights) for weight in weights]
        models[name] = {
            "checkpoint": f"runs/demo/{name}",
            "total_parameters": counts.total_parameters,
            "active_parameters": counts.active_parameters,
            "mtp_parameters": counts.mtp_parameters,
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": loss / math.log(2) / 3.1,
            "kl_to_teacher": distance,
            "top1_agreement": math.exp(-distance),
            "mtp_loss": loss + 0.4,
            "mtp_kl_to_teacher": distance + 0.2,
            "mtp_acceptance": [math.exp(-(distance + 0.3) * (k + 1)) for k in range(4)],
            "tokens_per_verification": 1 + 2 * math.exp(-distance),
            "loss_by_position": {"1": loss + 1.5, "2-3": loss + 0.7, "4-7": loss},
            "loss_by_frequency": {"1-10": loss - 1, "11-100": loss, "101-1000": loss + 2},
            "calibration_error": 0.01 + 0.1 * min(distance, 1),
            "expert_utilisation": use,
            "sample": {
                "prompt": PROMPT,
                "completion": "        return None\n    total = sum(values)\n    return total / len(values)\n\n\n"
                f"def {name}(self, name, value=None, *, encoding='utf-8', errors='strict', newline=None):\n    pass\n",
            },
        }
    return {"format": "slimqwen.evaluation/1", "tokens": 65_536, "sequence_length": 256, "models": models}


KL = {"teacher": 0.0, "pruned": 4.9, "random_init": 0.6312, "lm_only": 0.4, "slimqwen": 0.2143}


def make_benchmarks(final: Path) -> dict[str, Any]:
    """benchmarks.json of a teacher and of what lies in `final`: a group, and a single task of it."""
    row = {"part_of": None, "filter": "none", "documents": 200, "stderr": 0.0349}
    of_teacher = {"difference": 0.0, "difference_stderr": 0.0}
    rows = [
        {"model": "teacher", "task": "colours", "metric": "acc", "value": 0.58, **row, **of_teacher},
        {"model": "runs/demo/final", "task": "colours", "metric": "acc", "value": 0.43, **row}
        | {"difference": -0.15, "difference_stderr": 0.0212},
        {"model": "teacher", "task": "light", "metric": "acc", "value": 0.9, **row, **of_teacher, "part_of": "colours"},
    ]
    return {
        "format": "slimqwen.benchmarks/1",
        "teacher": "teacher",
        "models": {"teacher": "teacher", "runs/demo/final": str(final)},
        "identities": {"teacher": "a" * 64, "runs/demo/final": identity_of(final)},
        "limit": 200,
        "shots": None,
        "results": rows,
    }


WARNINGS = [
    ("recipe", "note: the warm-up of 20 steps is long"),
    ("stage-1/statistics", "SLOW: DeltaNet runs on reference code"),
    ("stage-1/distilled", "SLOW: DeltaNet runs on reference code"),
    ("stage-2/distilled", "optimiser step 100 is left out: loss nan"),
    ("final", "tensor parallel 8 does not divide num_attention_heads 4."),
]


def write_full_run(folder: Path) -> Path:
    write_recipe(folder)
    write_plans(folder, STAGES)
    write_metrics(folder, {"slimqwen": 4.9, "random_init": 6.0, "lm_only": 4.9}, stages=2)
    (folder / "evaluation.json").write_text(json.dumps(make_results(KL)))
    times = {
        "tokens": 21.0,
        "stage-1/statistics": 30.4,
        "stage-1/plan": 0.2,
        "stage-1/pruned": 0.1,
        "stage-1/distilled": 31.0,
        "stage-2/statistics": 28.0,
        "stage-2/plan": 0.3,
        "stage-2/pruned": 0.1,
        "stage-2/distilled": 143.0,
        "random_init/initial": 0.4,
        "random_init/distilled": 160.0,
        "evaluation": 62.0,
        "final": 0.5,
    }
    memory = 900_000_000
    with (folder / "stages.jsonl").open("w") as stream:
        for step, seconds in times.items():
            memory += 40_000_000
            entry = {"step": step, "seconds": seconds, "peak_memory_bytes": memory, "command": "slimqwen demo"}
            stream.write(json.dumps(entry | {"skipped": False}) + "\n")
        for step in times:  # the same command again: everything was there
            stream.write(json.dumps({"step": step, "seconds": 0.0, "peak_memory_bytes": 1, "skipped": True}) + "\n")
    lines = [{"step": step, "key": "a", "text": text} for step, text in WARNINGS]
    (folder / "warnings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "final").mkdir(exist_ok=True)
    (folder / "final" / "config.json").write_text(json.dumps({"of": str(folder)}))
    (folder / "benchmarks.json").write_text(json.dumps(make_benchmarks(folder / "final")))
    provenance = {
        "command": "slimqwen demo",
        "version": "0.1.0",
        "started": "2026-11-22T13:00:00Z",
        "machine": "2 cores, 24 GiB, x86_64",
        "device": "cpu",
        "processes": 2,
        "torch": "2.13.0",
        "transformers": "5.23.0",
    }
    (folder / "provenance.json").write_text(json.dumps(provenance))
    return folder
