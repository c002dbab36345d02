"""The model card: its front matter is what huggingface_hub reads back, and nothing is said that is not known."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tiny import put_json

from slimqwen.evaluation.benchmark_results import Benchmarks
from slimqwen.evaluation.result import Evaluation, ModelEvaluation, Sample
from slimqwen.recipe import Recipe
from slimqwen.reporting.card import hub_name, inherited, model_card

TEACHER_CARD = "---\nlicense: apache-2.0\nlanguage: [en]\ntags: [chat]\n---\n# Teacher\n"


def an_evaluation() -> Evaluation:
    model = ModelEvaluation(
        checkpoint="x",
        total_parameters=1000,
        active_parameters=100,
        mtp_parameters=10,
        loss=2.5,
        perplexity=12.18,
        bits_per_byte=1.1,
        kl_to_teacher=0.25,
        top1_agreement=0.5,
        mtp_loss=3.0,
        mtp_kl_to_teacher=0.5,
        mtp_acceptance=[0.5],
        tokens_per_verification=1.75,
        expert_utilisation={},
        sample=Sample(prompt="a", completion="b"),
    )
    return Evaluation(
        format="slimqwen.evaluation/1", tokens=64, sequence_length=16, models={"teacher": model, "slimqwen": model}
    )


def a_recipe(teacher: Path) -> Recipe:
    values = {
        "run_dir": Path("runs/x"),
        "teacher": str(teacher),
        "target": {"num_experts": 4},
        "distil": {"tokens": 100},
    }
    return Recipe.model_validate({"name": "smaller", **values})


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    folder = tmp_path / "models--Org--Teacher-80B" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    put_json(folder / "config.json", {})
    (folder / "README.md").write_text(TEACHER_CARD)
    return folder


def test_front_matter_is_what_the_hub_reads(teacher: Path) -> None:
    made_from = {"teacher": "a" * 64}
    card = ModelCard(model_card(a_recipe(teacher), teacher, an_evaluation(), "slimqwen run x.yaml", made_from))
    data = card.data
    assert (data.base_model, data.base_model_relation, data.license) == ("Org/Teacher-80B", "finetune", "apache-2.0")
    assert (data.library_name, data.pipeline_tag, data.language) == ("transformers", "text-generation", ["en"])
    assert "slimqwen" in data.tags and "chat" not in data.tags
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        "loss": 2.5,
        "perplexity": 12.18,
    }
    assert "| 50.0% | 1.75 |" in card.text and "Benchmarks" not in card.text
    assert "a" * 64 in card.text and "slimqwen run x.yaml" in card.text


def some_benchmarks(own: str) -> Benchmarks:
    row = {"task": "gsm8k", "metric": "exact_match", "filter": "strict-match", "part_of": None, "documents": 1319}
    rows = [
        row | {"model": "teacher", "value": 0.5, "stderr": 0.0138, "difference": 0.0, "difference_stderr": 0.0},
        row | {"model": own, "value": 0.4, "stderr": 0.0135, "difference": -0.1, "difference_stderr": 0.0071},
    ]
    return Benchmarks.model_validate(
        {
            "format": "slimqwen.benchmarks/1",
            "teacher": "teacher",
            "models": {"teacher": "x", own: "y"},
            "limit": None,
            "shots": None,
            "results": rows,
        }
    )


def test_benchmarks_are_told_with_their_errors(teacher: Path) -> None:
    card = ModelCard(model_card(a_recipe(teacher), teacher, an_evaluation(), "x", {}, some_benchmarks("slimqwen")))
    row = "| gsm8k, exact_match (strict-match) | 1,319 | 0.4000 ± 0.0135 | 0.5000 ± 0.0138 | -0.1000 ± 0.0071 |"
    assert row in card.text
    (result,) = (result for result in card.data.eval_results if result.dataset_type == "gsm8k")
    assert (result.metric_type, result.metric_name) == ("exact_match", "exact_match (strict-match)")
    assert result.metric_value == 0.4  # and not the teacher's


def test_benchmarks_of_another_checkpoint_are_not_told(teacher: Path) -> None:
    card = model_card(a_recipe(teacher), teacher, an_evaluation(), "x", {}, some_benchmarks("another"))
    assert card == model_card(a_recipe(teacher), teacher, an_evaluation(), "x", {})


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    put_json(tmp_path / "config.json", {"_name_or_path": "/data/models/teacher"})
    data = ModelCard(model_card(a_recipe(tmp_path), tmp_path, an_evaluation(), "x", {})).data.to_dict()
    assert not {"base_model", "base_model_relation", "license"} & data.keys()


def test_the_teachers_own_words(tmp_path: Path) -> None:
    put_json(tmp_path / "config.json", {"_name_or_path": "Org/Name"})
    assert hub_name(tmp_path) == "Org/Name"
    for broken in ("no front matter", "---\nlicense: [\n---\n", "---\n- a\n---\n"):
        (tmp_path / "README.md").write_text(broken)
        assert inherited(tmp_path) == {}
