"""The report: complete for every kind of run, honest about its verdict, and safe whatever the artefacts hold."""

import json
import math
import random
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slimqwen.errors import UserError
from slimqwen.families.count import count
from slimqwen.families.qwen3_next import QWEN3_NEXT
from slimqwen.planning.experts import group_experts
from slimqwen.planning.plan import Plan, Scores, completed, target_config
from slimqwen.planning.width import kept_channels
from slimqwen.recipe import DataRecipe, DistilRecipe, PruningRecipe, Recipe, Target
from slimqwen.recipe_file import dump_recipe
from slimqwen.reporting import charts
from slimqwen.reporting.report import report
from slimqwen.reporting.run_folder import Run
from slimqwen.reporting.sections import source_shape, verdict

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

# A synthetic run, in the shapes and sizes of the demo's


def write_recipe(folder: Path, **changes: Any) -> None:
    recipe = Recipe(
        name="demo",
        run_dir=folder,
        target=FINAL,
        baselines=["pruned", "random_init", "lm_only"],
        data=DataRecipe(sequence_length=256),
        distil=DistilRecipe(tokens=TOKENS, learning_rate=1e-3, warmup_steps=20),
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
        pruning=PruningRecipe(),
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
                    "tokens_per_second": 2900.0,
                }
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
            "expert_utilisation": use,
            "sample": {
                "prompt": PROMPT,
                "completion": "        return None\n    total = sum(values)\n    return total / len(values)\n\n\n"
                f"def {name}(self, name, value=None, *, encoding='utf-8', errors='strict', newline=None):\n    pass\n",
            },
        }
    return {"format": "slimqwen.evaluation/1", "tokens": 65_536, "sequence_length": 256, "models": models}


KL = {"teacher": 0.0, "pruned": 4.9, "random_init": 0.6312, "lm_only": 0.4, "slimqwen": 0.2143}


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
    provenance = {
        "command": "slimqwen demo",
        "version": "0.1.0",
        "started": "2026-11-22T13:00:00Z",
        "machine": "2 cores, 24 GiB, CPU",
        "torch": "2.13.0",
        "transformers": "5.23.0",
    }
    (folder / "provenance.json").write_text(json.dumps(provenance))
    return folder


class Page(HTMLParser):
    """What a browser would see: tags with attributes, visible text, data of charts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.pieces: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = re.sub(r"\s+", " ", "".join(self.pieces))
        self.sections = [attributes["id"] for tag, attributes in self.tags if tag == "section"]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        here = self.tags[-1][0] if self.tags else ""
        if here != "style":
            (self.scripts if here == "script" else self.pieces).append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self.tags.append((f"/{tag}", {}))
        elif tag in ("td", "th"):
            self.pieces.append(" |")

    @property
    def charts(self) -> list[str | None]:
        return [attributes["aria-label"] for tag, attributes in self.tags if attributes.get("class") == "plot"]


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_full_run(tmp_path_factory.mktemp("runs") / "full")


@pytest.fixture(scope="module")
def full_page(full_run: Path) -> Page:
    return Page(report(full_run))


# What the page shows


def test_a_full_run_has_every_section_in_order(full_page: Page) -> None:
    assert full_page.sections == (
        ["results", "shapes", "stages", "training", "choices", "experts", "samples", "cost", "again"]
    )
    titles = [label.removeprefix("Chart: ").split(".")[0] for label in full_page.charts if label]
    assert titles == [
        "Where the parameters are",
        "Language-modelling loss",
        "KL to the teacher",
        "KL of the multi-token-prediction head",
        "Loss weights and learning rate",
        "Layers, stage 1",
        "Layers, stage 2",
        "Width, stage 2",
        "Expert importance, stage 2",
        "What became of each expert, stage 2",
        "Expert use: teacher",
        "Expert use: SlimQwen",
    ]


def test_the_verdict_is_one_sentence_of_numbers(full_run: Path, full_page: Page) -> None:
    results = make_results(KL)["models"]
    share = results["slimqwen"]["total_parameters"] / results["teacher"]["total_parameters"]
    expected = (
        f"{100 * share:.0f}\u00a0% of the teacher’s parameters; held-out loss 2.99 against the teacher’s 2.71; "
        "KL to the teacher 0.21, random initialisation trained on the same tokens: 0.63."
    )
    assert verdict(Run.read(full_run)).sentence == expected
    assert expected.replace("\u00a0", " ") in full_page.text
    assert "It worked" in full_page.text


@pytest.mark.parametrize(
    ("kl", "tone"),
    [
        ({"slimqwen": 0.2, "random_init": 0.6}, "good"),
        ({"slimqwen": 0.55, "random_init": 0.6}, "mixed"),
        ({"slimqwen": 0.7, "random_init": 0.6}, "bad"),
        ({"slimqwen": 0.3, "random_init": 0.6, "pruned": 0.25}, "bad"),
        ({"slimqwen": 0.2, "pruned": 4.0}, "good"),
        ({"slimqwen": 4.1, "pruned": 4.0}, "bad"),
        ({"slimqwen": 0.2}, "plain"),
    ],
)
def test_the_verdict_follows_the_numbers(kl: dict[str, float], tone: str, tmp_path: Path) -> None:
    write_recipe(tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps(make_results({"teacher": 0.0} | kl)))
    assert verdict(Run.read(tmp_path)).tone == tone


def test_tables_hold_the_numbers(full_page: Page) -> None:
    before, after = count(QWEN3_NEXT, CONFIG), count(QWEN3_NEXT, target_config(QWEN3_NEXT, CONFIG, FINAL))
    for part, parameters in before.parts.items():
        assert f"{parameters:,} |{after.parts[part]:,} |" in full_page.text
    for cells in ("0.631", "0.214", "acc_3", "Experts per token (top-k) |4 |3 |", "65,536"):
        assert cells in full_page.text
    assert "after stage 1 |7 |128 |32 |4 |53,248 |" in full_page.text
    assert "after stage 2 |6 |96 |16 |3 |487,424 |" in full_page.text
    assert "2 min 23 s" in full_page.text  # the execution of stage-2/distilled, not the skip after it
    assert "slimqwen demo" in full_page.text
    assert "first_stage_token_fraction: 0.1" in full_page.text
    assert "return total / len(values)" in full_page.text


def test_the_source_shape_is_read_off_the_plan() -> None:
    plan, _ = make_plan(CONFIG, FINAL)
    assert source_shape(plan) == Target(num_hidden_layers=8, hidden_size=128, num_experts=32, num_experts_per_tok=4)


# Runs with pieces missing


def test_a_recipe_alone_makes_a_page(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    page = Page(report(tmp_path))
    assert page.sections == ["again"] and not page.charts
    assert "Not evaluated yet." in page.text


def test_a_run_that_is_not_evaluated_yet(tmp_path: Path) -> None:
    write_full_run(tmp_path)
    (tmp_path / "evaluation.json").unlink()
    page = Page(report(tmp_path))
    assert page.sections == ["shapes", "stages", "training", "choices", "cost", "again"]
    assert "540,672 tokens, 100 % of the recipe’s" in page.text


def test_one_stage_without_baselines(tmp_path: Path) -> None:
    write_recipe(tmp_path, schedule="one_shot", baselines=[])
    write_plans(tmp_path, {1: FINAL})
    write_metrics(tmp_path, {"slimqwen": 4.9}, stages=1)
    (tmp_path / "evaluation.json").write_text(json.dumps(make_results({"teacher": 0.0, "slimqwen": 0.2})))
    page = Page(report(tmp_path))
    assert page.sections == ["results", "shapes", "stages", "training", "choices", "experts", "samples", "again"]
    assert "after stage 1" in page.text and "after stage 2" not in page.text
    assert "random init" not in page.text.split("Do it again")[0]
    assert "no baseline was asked for" in page.text


def test_random_init_has_no_plan_to_show(tmp_path: Path) -> None:
    write_recipe(tmp_path, init="random", baselines=[])
    write_plans(tmp_path, {1: FINAL})  # left over from an earlier recipe in the same folder
    write_metrics(tmp_path, {"slimqwen": 6.0}, stages=1)
    page = Page(report(tmp_path))
    assert page.sections == ["training", "again"]
    assert "trained from random weights" in page.text


def test_what_was_not_measured_is_a_dash(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    results = make_results({"teacher": 0.0, "slimqwen": 0.2})
    for model in results["models"].values():
        model |= {"kl_to_teacher": None, "top1_agreement": None, "mtp_acceptance": []}
    (tmp_path / "evaluation.json").write_text(json.dumps(results))
    page = Page(report(tmp_path))
    assert "– |– |" in page.text and "acc_0" not in page.text


def test_lines_cut_short_by_a_kill_are_passed_over(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    write_metrics(tmp_path, {"slimqwen": 4.9}, stages=1)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-40])
    assert len(Run.read(tmp_path).steps["slimqwen"].tokens) == TOKENS // STEP_TOKENS - 1


# One file, offline, whatever the artefacts hold


def test_the_page_asks_for_nothing_from_elsewhere(full_run: Path, full_page: Page) -> None:
    loading = [(tag, a) for tag, a in full_page.tags if {"src", "href", "srcset", "data", "action"} & a.keys()]
    assert loading == []
    policy = next(a["content"] for tag, a in full_page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'") and "http" not in policy
    html = (full_run / "report.html").read_text(encoding="utf-8")
    assert "@import" not in html.split("</style>")[0] and "url(" not in html.split("</style>")[0]
    assert len(html.encode()) < 5_000_000
    assert sum("plotly.js v" in script for script in full_page.scripts) == 1


def test_text_from_files_is_never_markup(tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script><img src=https://example.org/x>"
    write_full_run(tmp_path)
    write_recipe(tmp_path, name=hostile, teacher=hostile)
    results = make_results(KL)
    results["models"]["slimqwen"]["sample"] = {"prompt": hostile, "completion": hostile}
    results["models"][hostile] = results["models"].pop("pruned")
    results["models"]["slimqwen"]["expert_utilisation"] = {f"model.{hostile}": [0.5, 0.5]}
    (tmp_path / "evaluation.json").write_text(json.dumps(results))
    (tmp_path / "provenance.json").write_text(json.dumps({"command": hostile}))
    write_metrics(tmp_path, {"slimqwen": 4.9, hostile: 5.0}, stages=2)

    page = Page(report(tmp_path))

    assert page.text.count(hostile) >= 6  # shown, as text
    assert not [data for data in page.scripts if data.startswith("{") and "<" in data]
    assert not [a for tag, a in page.tags if tag == "img" or "src" in a]
    scripts = [a for tag, a in page.tags if tag == "script"]
    assert len(scripts) == len(page.charts) + 2  # plotly's and ours


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("evaluation.json", '{"format": "slimqwen.evaluation/1", "models": {"teacher": {}}}', "evaluation"),
        ("evaluation.json", "not json", "evaluation.json"),
        ("metrics.jsonl", '{"run": "slimqwen"}', "line 1, stage"),
        ("stages.jsonl", '{"step": "final"}', "seconds"),
        ("stage-1/plan.json", "{}", "plan"),
    ],
)
def test_an_artefact_that_is_not_one_is_named(name: str, content: str, said: str, tmp_path: Path) -> None:
    write_recipe(tmp_path)
    (tmp_path / "stage-1").mkdir()
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(said)):
        report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        report(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"recipe\.resolved\.yaml"):
        report(tmp_path)


def test_out_names_the_page(full_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "pages" / "run.html"
    assert report(full_run, out) == out
    assert out.read_bytes().startswith(b"<!DOCTYPE html>")


# The figures


def test_width_scores_split_at_the_cut() -> None:
    figure = charts.width_scores([0.1, 0.9, 0.5, 0.7], kept=[1, 3])
    kept, dropped = figure.data[:2]
    assert list(kept.y) == [0.9, 0.7] and list(kept.customdata) == [1, 3]
    assert list(dropped.y) == [0.5, 0.1] and list(dropped.x) == [2, 3]


def test_expert_fates_follow_importance() -> None:
    importance = torch.tensor([3.0, 1.0, 5.0, 2.0])
    groups = group_experts("partial", importance, torch.ones(4, 4), 2)
    figure = charts.expert_fates({"model.layers.0": importance.tolist()}, {"model.layers.0": groups})
    heatmap = figure.data[0]
    assert heatmap.customdata.tolist() == [[2, 0, 3, 1]]
    assert heatmap.z.tolist() == [[0, 1, 2, 2]]  # kept, base, absorbed, absorbed
    assert [trace.name for trace in figure.data[1:]] == ["kept", "base", "absorbed"]


def test_expert_use_is_in_multiples_of_an_even_share() -> None:
    heatmap = charts.expert_use({"model.layers.0": [0.25, 0.5, 0.25, 0.0], "mtp.layers.0": [0.5, 0.5]}).data[0]
    assert heatmap.customdata.tolist() == [[1, 0, 2, 3], [0, 1, -1, -1]]
    assert heatmap.z[0].tolist() == [1.0, 0.0, 0.0, -charts.LARGEST_MULTIPLE]
    assert heatmap.z[1][:2].tolist() == [0.0, 0.0] and np.isnan(heatmap.z[1][2:]).all()
    assert list(heatmap.y) == ["0", "MTP"]


def test_curves_are_not_smoothed_across_a_cut() -> None:
    steps = charts.Steps(
        stage=np.repeat([1.0, 2.0], 100),
        tokens=np.arange(1.0, 201.0),
        values={"kd": np.repeat([1.0, 5.0], 100)},
    )
    figure = charts.learning_curves({"slimqwen": steps}, "kd", "nats", logarithmic=True)
    assert set(figure.data[1].y) == {1.0, 5.0}
    assert [shape.x0 for shape in figure.layout.shapes] == [100.0]
    assert figure.layout.annotations[0].text == "stage 2"


def test_long_runs_are_thinned() -> None:
    steps = charts.Steps(np.ones(50_000), np.arange(50_000.0), {"lm": np.full(50_000, 2.0)})
    curve = charts.learning_curves({"slimqwen": steps}, "lm", "nats").data[1]
    assert len(curve.x) == charts.POINTS_PER_CURVE and curve.x[-1] == 49_999
    assert np.allclose(curve.y, 2.0)  # a constant stays one, ends included
