"""The report: complete for every kind of run, honest about its verdict, and safe whatever the artefacts hold."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_run import (
    CONFIG,
    FINAL,
    KL,
    STEP_TOKENS,
    TOKENS,
    make_plan,
    make_results,
    write_full_run,
    write_metrics,
    write_plans,
    write_recipe,
)

from slimqwen.core.errors import UserError
from slimqwen.families.count import count
from slimqwen.families.qwen3_next import QWEN3_NEXT
from slimqwen.planning.experts import group_experts
from slimqwen.planning.plan import target_config
from slimqwen.recipe import (
    DepthCriterion,
    DistilRecipe,
    ExpertCompression,
    ExpertImportance,
    HealingRecipe,
    PruningRecipe,
    Target,
    WidthCriterion,
)
from slimqwen.reporting.charts import curves, heatmaps, style
from slimqwen.reporting.charts.choices import width_scores
from slimqwen.reporting.compare import compare, differences, names
from slimqwen.reporting.report import report
from slimqwen.reporting.run_folder import Run
from slimqwen.reporting.sections import cost, training
from slimqwen.reporting.sections.shapes import source_shape
from slimqwen.reporting.sections.summary import assess
from slimqwen.reporting.sections.utilisation import draw_utilisation


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
    assert full_page.sections == [
        "results",
        "benchmarks",
        "warnings",
        "shapes",
        "stages",
        "training",
        "choices",
        "experts",
        "samples",
        "cost",
        "again",
    ]
    titles = [label.removeprefix("Chart: ").split(".")[0] for label in full_page.charts if label]
    assert titles == [
        "Loss by position",
        "Loss by token frequency",
        "Where the parameters are",
        "Language-modelling loss",
        "KL to the teacher",
        "Loss of the multi-token-prediction head",
        "KL of the multi-token-prediction head",
        "Load balancing",
        "Throughput",
        "MTP acceptance",
        "Loss weights and learning rate",
        "Layers, stage 1",
        "Layers, stage 2",
        "Width, stage 2",
        "Expert importance, stage 2",
        "What became of each expert, stage 2",
        "Merge groups, stage 2",
        "Routing before and after",
        "Expert use: teacher",
        "Expert use: slimqwen",
    ]


def test_the_verdict_is_one_sentence_of_numbers(full_run: Path, full_page: Page) -> None:
    results = make_results(KL)["models"]
    share = results["slimqwen"]["total_parameters"] / results["teacher"]["total_parameters"]
    expected = (
        f"{100 * share:.0f}\u00a0% of the teacher’s parameters; held-out loss 2.99 against the teacher’s 2.71; "
        "KL to the teacher 0.21, random initialisation trained on the same tokens: 0.63."
    )
    assert assess(Run.read(full_run)).sentence == expected
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
    assert assess(Run.read(tmp_path)).tone == tone


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


def test_what_went_wrong_and_what_it_cost(full_page: Page) -> None:
    assert "stage-2/distilled: optimiser step 100 is left out: loss nan" in full_page.text
    # said by two steps, told once
    assert "stage-1/statistics, stage-1/distilled: SLOW: DeltaNet runs on reference code" in full_page.text
    assert full_page.text.count("SLOW") == 1 and "final: tensor parallel 8" in full_page.text
    # 264 steps of 0.7 s on 2 processes; 477.6 s of 2 cores at 6 W in 2 processes
    assert "slimqwen |540,672 |0.103 |2,926 |3.00 |41 % |" in full_page.text
    assert "about 0.0032 kWh. This is an estimate, not a measurement" in full_page.text


def test_energy_is_only_told_of_a_device_that_is_known(full_run: Path) -> None:
    run = Run.read(full_run)
    assert run.provenance is not None
    on_a_gpu = replace(run, provenance=run.provenance.model_copy(update={"device": "NVIDIA H100 80GB HBM3"}))
    assert "a H100 is rated at 700 W" in (cost.estimate_energy(on_a_gpu) or "")
    unknown = replace(run, provenance=run.provenance.model_copy(update={"device": ""}))
    assert cost.estimate_energy(unknown) is None


def test_curves_are_drawn_against_tokens_flops_or_hours(full_run: Path) -> None:
    run = Run.read(full_run)
    assert list(training.axis_names(run.steps)) == ["tokens", "flops", "hours"]
    assert run.steps["slimqwen"].along["hours"][-1] == pytest.approx(264 * 0.7 / 3600)
    teacher, first = run.plans[0].before, run.plans[0].after
    per_token = 6 * first.active_without_input_embedding + 2 * teacher.active_without_input_embedding
    assert run.steps["slimqwen"].along["flops"][0] == per_token * STEP_TOKENS
    alone = run.steps["lm_only"].along["flops"][0]  # its teacher says nothing
    assert alone == 6 * first.active_without_input_embedding * STEP_TOKENS
    chart = training.draw_curves(run)[0]
    assert list(chart.axes) == ["tokens", "flops", "hours"]
    assert all(len(axis["x"]) == len(chart.spec["data"]) for axis in chart.axes.values())


def test_a_result_s_layers_stand_where_the_teacher_s_are(full_run: Path) -> None:
    chart = draw_utilisation(Run.read(full_run))[0]
    layers = {trace["name"]: trace["x"] for trace in chart.spec["data"]}
    assert layers["teacher"] == [*map(str, range(8)), "MTP"]
    assert layers["slimqwen"] == [*map(str, range(6)), "MTP"]
    dropped = replace(Run.read(full_run))
    dropped.plans[0].kept_layers[:] = [0, 1, 2, 4, 5, 6, 7]
    dropped.plans[1].kept_layers[:] = [0, 1, 3, 4, 5, 6]
    again = {trace["name"]: trace["x"] for trace in draw_utilisation(dropped)[0].spec["data"]}
    assert again["slimqwen"] == ["0", "1", "4", "5", "6", "7", "MTP"]


def test_benchmarks_stand_beside_the_teacher_s(full_run: Path, full_page: Page) -> None:
    assert "model |colours, acc, n = 200 |" in full_page.text  # and not the single task of the group
    assert "teacher |0.5800 ± 0.0349 |" in full_page.text
    assert "slimqwen |0.4300 ± 0.0349 −0.1500 ± 0.0212 |" in full_page.text
    assert "Only the first 200 questions of each task" in full_page.text


def test_benchmarks_of_other_weights_are_not_the_run_s(tmp_path: Path) -> None:
    run = write_full_run(tmp_path)
    (run / "final" / "README.md").write_text("the card does not count")
    assert "slimqwen" in (Run.read(run).benchmarks or pytest.fail()).models
    (run / "final" / "config.json").write_text("{}")
    assert "runs/demo/final" in (Run.read(run).benchmarks or pytest.fail()).models
    assert "runs/demo/final |0.4300" in Page(report(run)).text


def test_a_held_out_loss_that_rose_again_is_warned_of(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    line = {"run": "slimqwen", "stage": 1, "lm": 3.0}
    heldout = {0: 3.2, 1: 3.0, 2: 3.1}
    lines = [line | {"step": step, "tokens": step + 1, "heldout_lm": loss} for step, loss in heldout.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "slimqwen: the held-out loss ended at 3.100, above its lowest, 3.000." in Page(report(tmp_path)).text


# Several runs


def test_runs_are_compared_with_the_first(full_run: Path, tmp_path: Path) -> None:
    other = write_full_run(tmp_path / "other")
    write_recipe(other, distil=DistilRecipe(tokens=TOKENS, learning_rate=2e-3, warmup="20 steps"))
    results = make_results(KL | {"slimqwen": 0.3143})
    (other / "evaluation.json").write_text(json.dumps(results))
    page = Page(compare([full_run, other], tmp_path / "both.html"))
    assert page.sections == ["results", "training", "warnings", "recipes"]
    assert "colours, acc" in page.text and "0.4300 |" in page.text
    assert page.text.count("optimiser step 100 is left out") == 2
    assert "0.214 |" in page.text and "0.314 +0.100 |" in page.text
    assert "distil.learning_rate |0.001 |0.002 |" in page.text
    assert "run_dir" not in page.text and "Before you compare" not in page.text
    assert any("Language-modelling loss" in (label or "") for label in page.charts)


def test_numbers_that_do_not_compare_are_said_to(full_run: Path, tmp_path: Path) -> None:
    other = write_full_run(tmp_path / "other")
    (other / "evaluation.json").write_text(json.dumps(make_results(KL) | {"tokens": 1000}))
    unfinished = tmp_path / "unfinished"
    write_recipe(unfinished)
    page = Page(compare([full_run, other, unfinished], tmp_path / "page.html"))
    assert "not evaluated on the same number of tokens" in page.text and "Not evaluated yet: unfinished." in page.text
    with pytest.raises(UserError, match="given twice"):
        compare([full_run, full_run], tmp_path / "page.html")


def test_recipes_differ_field_by_field() -> None:
    recipes = {
        "a": {"name": "a", "distil": {"tokens": 1, "terms": ["lm"]}},
        "b": {"name": "b", "distil": {"tokens": 2}},
    }
    assert differences(recipes) == [("distil.tokens", ["1", "2"]), ("distil.terms", ["['lm']", "–"])]


def test_runs_go_by_the_shortest_names_that_differ(tmp_path: Path) -> None:
    assert names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert names([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]


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
    assert page.sections == ["benchmarks", "warnings", "shapes", "stages", "training", "choices", "cost", "again"]
    assert "540,672 tokens, 100 % of the recipe’s" in page.text


def test_one_stage_without_baselines(tmp_path: Path) -> None:
    write_recipe(tmp_path, schedule="one_shot", baselines=[])
    write_plans(tmp_path, {1: FINAL})
    write_metrics(tmp_path, {"slimqwen": 4.9}, stages=1)
    (tmp_path / "evaluation.json").write_text(json.dumps(make_results({"teacher": 0.0, "slimqwen": 0.2})))
    page = Page(report(tmp_path))
    assert page.sections == [
        "results",
        "shapes",
        "stages",
        "training",
        "choices",
        "experts",
        "samples",
        "cost",
        "again",
    ]
    assert "after stage 1" in page.text and "after stage 2" not in page.text
    assert "random init" not in page.text.split("Do it again")[0]
    assert "the recipe has no baseline" in page.text


def test_random_init_has_no_plan_to_show(tmp_path: Path) -> None:
    write_recipe(tmp_path, init="random", baselines=[])
    write_plans(tmp_path, {1: FINAL})  # left over from an earlier recipe in the same folder
    write_metrics(tmp_path, {"slimqwen": 6.0}, stages=1)
    page = Page(report(tmp_path))
    assert page.sections == ["training", "cost", "again"]
    assert "trained from random weights" in page.text


def test_what_was_not_measured_is_a_dash(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    results = make_results({"teacher": 0.0, "slimqwen": 0.2})
    for model in results["models"].values():
        model |= {"kl_to_teacher": None, "top1_agreement": None, "mtp_acceptance": []}
    (tmp_path / "evaluation.json").write_text(json.dumps(results))
    page = Page(report(tmp_path))
    assert "– |– |" in page.text and "acc_0" not in page.text


def test_a_model_without_mtp_has_no_word_of_it(full_page: Page, tmp_path: Path) -> None:
    assert any("weight of MTP" in script for script in full_page.scripts)
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        write_recipe(folder)
        write_metrics(folder, {"slimqwen": 4.9}, stages=1)
        results = make_results({"teacher": 0.0, "slimqwen": 0.2})
        for model in results["models"].values():
            model |= {"mtp_parameters": 0, "mtp_acceptance": [], "tokens_per_verification": None}
            model |= {"mtp_loss": None, "mtp_kl_to_teacher": None}
            del model["expert_utilisation"]["mtp.layers.0"]
        (folder / "evaluation.json").write_text(json.dumps(results))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        of_mtp = {"mtp_lm", "mtp_kd", "acc_0", "acc_1"}
        lines = [{key: value for key, value in line.items() if key not in of_mtp} for line in lines]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for page in (Page(report(folders[0])), Page(compare(folders, tmp_path / "comparison.html"))):
        numbers, _, rest = page.text.partition("Do it again")
        shown = [numbers, rest.partition("Glossary")[2]]  # not the recipe, whose terms are named so
        for word in ("MTP", "multi-token", "draft", "acc_", "tokens/pass", "β"):
            assert not any(word in text for text in shown), word
        assert not any("weight of MTP" in script for script in page.scripts)


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
        ("stage-1/plan.json", "{}", "plan"),
        ("provenance.json", "{}", "command: Field required): remove it and run the recipe again to remake it."),
    ],
)
def test_an_artefact_that_is_not_one_is_named(name: str, content: str, said: str, tmp_path: Path) -> None:
    write_recipe(tmp_path)
    (tmp_path / "stage-1").mkdir()
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(said)):
        report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_plan_that_the_run_did_not_make_is_not_its_own(tmp_path: Path) -> None:
    write_full_run(tmp_path)
    assert len(Run.read(tmp_path).plans) == 2  # a folder without records: by name
    record = {"format": "slimqwen.step/1", "name": "stage-1/plan", "key": "", "output": "", "arithmetic": {}}
    (tmp_path / ".steps").mkdir()
    (tmp_path / ".steps" / "stage-1.plan.json").write_text(json.dumps(record | {"made": "stage-1/plan.json"}))
    assert len(Run.read(tmp_path).plans) == 1


@pytest.mark.parametrize("name", ["metrics.jsonl", "stages.jsonl", "warnings.jsonl"])
def test_lines_that_are_not_ours_cost_the_report_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_full_run(tmp_path)
    pages = [Page(report(tmp_path)).text]
    path = tmp_path / name
    good = path.read_bytes()
    path.write_bytes(b'{"run": "somebody\'s"}\n\xff\xfe\n[1]\n' + good + b'{"cut sho')
    capsys.readouterr()
    pages.append(Page(report(tmp_path)).text)
    assert pages[1] == pages[0]
    said = f"note: {path}: 3 of {len(good.splitlines()) + 3} lines are not what slimqwen writes (line 1 is the first)"
    assert said in capsys.readouterr().err


def test_benchmarks_that_cannot_be_read_are_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recipe(tmp_path)
    (tmp_path / "benchmarks.json").write_text("{}")
    report(tmp_path)
    assert (tmp_path / "report.html").exists()
    assert "leaves benchmarks out" in capsys.readouterr().err


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        report(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file"):
        report(tmp_path / "file")
    with pytest.raises(UserError, match=r"recipe\.resolved\.yaml"):
        report(tmp_path)


def test_out_names_the_page(full_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "pages" / "run.html"
    assert report(full_run, out) == out
    assert out.read_bytes().startswith(b"<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("field", "criterion"),
    [("depth", name) for name in DepthCriterion]
    + [("width", name) for name in WidthCriterion]
    + [("importance", name) for name in ExpertImportance]
    + [("compression", name) for name in ExpertCompression],
)
def test_every_criterion_has_its_words(tmp_path: Path, field: str, criterion: str) -> None:
    """A plan by each criterion that a recipe can name is told, and a rotation's directions are not called channels."""
    write_plans(tmp_path, {1: FINAL})
    file = tmp_path / "stage-1" / "plan.json"
    plan = json.loads(file.read_text())
    of = plan["pruning"]["experts"] if field in plan["pruning"]["experts"] else plan["pruning"]
    of[field] = criterion
    file.write_text(json.dumps(plan))
    write_recipe(tmp_path)
    page = Page(report(tmp_path))
    assert "choices" in page.sections
    if field == "width":
        assert ("96 directions left of the line" in page.text) == (criterion == "rotation")
        assert ("96 channels left of the line" in page.text) == (criterion != "rotation")


def test_refit_and_healing_stand_with_the_choices(tmp_path: Path) -> None:
    write_plans(tmp_path, {1: FINAL})
    write_recipe(tmp_path)
    refitted = "matrices of experts and dense MLPs were solved for in closed form, layer by layer, on 1,024 sequences"
    page = Page(report(tmp_path))
    assert refitted in page.text and "healed" not in page.text
    write_recipe(tmp_path, healing=HealingRecipe(samples=48, epochs=1), pruning=PruningRecipe(refit_outputs=False))
    page = Page(report(tmp_path))
    assert refitted not in page.text and "residual stream, for 1 epoch of 48 sequences." in page.text


# The figures


def test_width_scores_split_at_the_cut() -> None:
    figure = width_scores([0.1, 0.9, 0.5, 0.7], [1, 3], "directions", "share of the second moments")
    assert figure.layout.yaxis.title.text == "share of the second moments"
    assert "residual directions" in figure.layout.xaxis.title.text
    kept, dropped = figure.data[:2]
    assert list(kept.y) == [0.9, 0.7] and list(kept.customdata) == [1, 3]
    assert list(dropped.y) == [0.5, 0.1] and list(dropped.x) == [2, 3]


def test_expert_fates_follow_importance() -> None:
    importance = torch.tensor([3.0, 1.0, 5.0, 2.0])
    groups = group_experts("partial", importance, torch.ones(4, 4), 2)
    figure = heatmaps.expert_fates({"model.layers.0": importance.tolist()}, {"model.layers.0": groups})
    heatmap = figure.data[0]
    assert heatmap.customdata.tolist() == [[2, 0, 3, 1]]
    assert heatmap.z.tolist() == [[0, 1, 2, 2]]  # kept, base, absorbed, absorbed
    assert [trace.name for trace in figure.data[1:]] == ["kept", "base", "absorbed"]


def test_expert_use_is_in_multiples_of_an_even_share() -> None:
    heatmap = heatmaps.expert_use({"model.layers.0": [0.25, 0.5, 0.25, 0.0], "mtp.layers.0": [0.5, 0.5]}).data[0]
    assert heatmap.customdata.tolist() == [[1, 0, 2, 3], [0, 1, -1, -1]]
    assert heatmap.z[0].tolist() == [1.0, 0.0, 0.0, -heatmaps.LARGEST_MULTIPLE]
    assert heatmap.z[1][:2].tolist() == [0.0, 0.0] and np.isnan(heatmap.z[1][2:]).all()
    assert list(heatmap.y) == ["0", "MTP"]


def test_curves_are_not_smoothed_across_a_cut() -> None:
    steps = curves.Steps(
        stage=np.repeat([1.0, 2.0], 100),
        along={"tokens": np.arange(1.0, 201.0)},
        values={"kd": np.repeat([1.0, 5.0], 100)},
    )
    figure = curves.learning_curves({"slimqwen": steps}, "kd", "nats", logarithmic=True)
    assert set(figure.data[1].y) == {1.0, 5.0}
    assert [shape.x0 for shape in figure.layout.shapes] == [100.0]
    assert figure.layout.annotations[0].text == "stage 2"


def test_long_runs_are_thinned() -> None:
    steps = curves.Steps(np.ones(50_000), {"tokens": np.arange(50_000.0)}, {"lm": np.full(50_000, 2.0)})
    curve = curves.learning_curves({"slimqwen": steps}, "lm", "nats").data[1]
    assert len(curve.x) == curves.POINTS_PER_CURVE and curve.x[-1] == 49_999
    assert np.allclose(curve.y, 2.0)  # a constant stays one, ends included


def test_skipped_steps_leave_a_gap_and_not_a_hole() -> None:
    values = np.full(100, 2.0)
    values[50] = np.nan
    steps = curves.Steps(np.ones(100), {"tokens": np.arange(100.0)}, {"lm": values})
    smooth = curves.learning_curves({"slimqwen": steps}, "lm", "nats").data[1].y
    assert np.isnan(smooth[50]) and np.allclose(np.delete(smooth, 50), 2.0)


def test_merge_groups_count_their_members() -> None:
    groups = group_experts("partial", torch.tensor([3.0, 1.0, 5.0, 2.0]), torch.ones(4, 4), 2)
    heatmap = heatmaps.merge_groups({"model.layers.0": groups}).data[0]
    assert heatmap.z.tolist() == [[3, 1]] and heatmap.text[0] == ["0 + 1, 3", "2"]


# The style sheet


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_text_stands_out_from_what_is_behind_it(theme: str) -> None:
    """WCAG 2.2 AA: 4.5 : 1 for text (1.4.3), 3 : 1 for the lines of a chart (1.4.11)."""
    sheet = (Path(curves.__file__).parents[1] / "page.css").read_text()
    light, dark, on_paper = (
        dict(re.findall(r"--([\w-]+): (#\w{6});", block)) for block in re.findall(r":root \{(.*?)\}", sheet, re.DOTALL)
    )
    colours = {"light": light, "dark": dark, "print": on_paper}[theme]

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(colour: str, behind: str) -> float:
        brighter, darker = sorted((luminance(colour), luminance(colours[behind])), reverse=True)
        return (brighter + 0.05) / (darker + 0.05)

    for text in ("ink", "muted", "accent", "good", "mixed", "bad"):
        for behind in ("page", "panel") if text in ("good", "mixed", "bad") else ("page", "panel", "highlight"):
            assert contrast(colours[text], behind) >= 4.5, f"{text} on {behind}"
    for line in {*style.RUN_COLOURS.values(), *style.PART_COLOURS, *style.ROLE_COLOURS.values()}:
        assert contrast(line, "page") >= 3, f"{line} on the page"
