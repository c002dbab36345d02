"""The model card: its front matter is what huggingface_hub reads back, and nothing is said that is not known."""

import os
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token
from tiny import put_json

from slimqwen.core import strict_yaml
from slimqwen.core.terminal import visible
from slimqwen.evaluation.benchmark_results import Benchmarks
from slimqwen.evaluation.result import Evaluation, ModelEvaluation, Sample
from slimqwen.recipe import HealingRecipe, PruningRecipe, Recipe
from slimqwen.reporting.card import model_card
from slimqwen.reporting.markdown import block, code, plain
from slimqwen.reporting.parentage import Parentage, hub_name, inherited, parentage_of

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
    card = ModelCard(
        model_card(a_recipe(teacher), parentage_of(teacher), an_evaluation(), "slimqwen run x.yaml", made_from)
    )
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


def test_the_card_describes_refit_and_healing_where_there_were_any(teacher: Path) -> None:
    plain_recipe = a_recipe(teacher)
    both = plain_recipe.model_copy(update={"healing": HealingRecipe(samples=2048)})
    neither = plain_recipe.model_copy(update={"pruning": PruningRecipe(refit_outputs=False)})
    random = both.model_copy(update={"init": "random"})
    cards = {
        name: model_card(recipe, parentage_of(teacher), an_evaluation(), "x", {}).partition("## Use")[0]
        for name, recipe in {"refit": plain_recipe, "both": both, "neither": neither, "random": random}.items()
    }
    refitted = "in closed form, layer by layer, on 1,024 sequences, without training."
    healed = "residual stream, for 2 epochs of 2,048 sequences."
    assert {name: (refitted in card, healed in card) for name, card in cards.items()} == {
        "refit": (True, False),
        "both": (True, True),
        "neither": (False, False),
        "random": (False, False),
    }
    assert "slimqwen.\n\n| model |" in cards["neither"]  # and no gap


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
    card = ModelCard(
        model_card(a_recipe(teacher), parentage_of(teacher), an_evaluation(), "x", {}, some_benchmarks("slimqwen"))
    )
    row = "| gsm8k, exact_match (strict-match) | 1,319 | 0.4000 ± 0.0135 | 0.5000 ± 0.0138 | -0.1000 ± 0.0071 |"
    assert row in card.text
    (result,) = (result for result in card.data.eval_results if result.dataset_type == "gsm8k")
    assert (result.metric_type, result.metric_name) == ("exact_match", "exact_match (strict-match)")
    assert result.metric_value == 0.4  # and not the teacher's


def test_benchmarks_of_another_checkpoint_are_not_told(teacher: Path) -> None:
    card = model_card(a_recipe(teacher), parentage_of(teacher), an_evaluation(), "x", {}, some_benchmarks("another"))
    assert card == model_card(a_recipe(teacher), parentage_of(teacher), an_evaluation(), "x", {})


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    put_json(tmp_path / "config.json", {"_name_or_path": "/data/models/teacher"})
    data = ModelCard(model_card(a_recipe(tmp_path), parentage_of(tmp_path), an_evaluation(), "x", {})).data.to_dict()
    assert not {"base_model", "base_model_relation", "license"} & data.keys()


def test_the_teachers_own_words(tmp_path: Path) -> None:
    put_json(tmp_path / "config.json", {"_name_or_path": "Org/Name"})
    assert hub_name(tmp_path) == "Org/Name"
    for silent in (
        "no front matter",
        "---\n- a\n---\n",
        "---\nlicense: mit\n",
        "---\n---\n",
        "",
        "\n# x\n---\na: b\n---\n",
    ):
        (tmp_path / "README.md").write_text(silent)
        assert inherited(tmp_path) == {}


FRONT = "---\nlicense: apache-2.0\nlanguage: [en, no]\n{}\n---\n# Teacher\n"


@pytest.mark.parametrize(
    "line",
    [
        "date: 2024-13-45",
        "x: !!int y",
        "x: !!timestamp y",
        "x: !!python/object:os.system {}",
        "x: " + "9" * 5000,
        "x: 0x" + "f" * 5000,
        "x: a---b",
        'x: "a\\0\\ud800"',
        "x: &a [1, 2]\ny: [*a, *a]",
    ],
)
def test_odd_fields_of_a_teachers_card_do_not_matter(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text(FRONT.format(line))
    assert inherited(tmp_path) == {"license": "apache-2.0", "language": ["en", "no"]}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (FRONT.format("author: Andr\u00e9").encode("latin-1"), "is not UTF-8"),
        (FRONT.format("").encode("utf-16"), "is not UTF-8"),
        (FRONT.format("x: " + "[" * 2000 + "]" * 2000).encode(), "nested too deep"),
        (FRONT.format("x: [").encode(), "not valid YAML"),
        (FRONT.format("x: *nothing").encode(), "not valid YAML"),
    ],
)
def test_a_teachers_card_that_cannot_be_read_costs_a_warning(
    content: bytes, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_bytes(content)
    parentage = parentage_of(tmp_path)
    assert parentage == Parentage()
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line and str(tmp_path / "README.md") in line and "licence" in line
    model_card(a_recipe(tmp_path), parentage, an_evaluation(), "x", {})


@pytest.mark.parametrize("value", ["{a: b}", "[[en]]", '"a\\nb\\e[31m"', "[]", "a" * 501])
def test_a_licence_that_is_no_text_is_left_out_and_said(
    value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text(f"---\nlicense: {value}\nlanguage: en\nlicense_name: null\n---\n")
    assert inherited(tmp_path) == {"language": "en"}
    (line,) = capsys.readouterr().err.splitlines()
    assert "the teacher's license" in line and "\x1b" not in line and len(line) < 400


def test_a_card_that_is_no_file_or_is_endless_is_not_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "README.md")
    assert inherited(tmp_path) == {}
    (tmp_path / "README.md").unlink()
    with (tmp_path / "README.md").open("wb") as stream:
        stream.write(FRONT.format("").encode())
        stream.truncate(1 << 33)  # a hole: nothing is on the disk
    assert inherited(tmp_path)["license"] == "apache-2.0"


NASTY = [
    "`code` and ``` more",
    "a | b || c",
    "---",
    "# x #",
    "line\nbreak\n---\nlicense: mit\n---",
    "<script>alert(1)</script> &amp; <!-- -->",
    "![x](http://a) [y](javascript:z) *b* __c__ _d_ ~~e~~ $f$",
    "back\\slash\\",
    "\x1b[31mred",
    "null",
    "{a: b} @x %y 'q' \"r\"",
]


@pytest.mark.parametrize("name", NASTY)
def test_names_and_paths_are_text_wherever_they_stand_in_the_card(name: str, teacher: Path) -> None:
    recipe = a_recipe(teacher).model_copy(update={"name": name, "teacher": f"/models/{name}"})
    text = model_card(recipe, parentage_of(teacher), an_evaluation(), f"slimqwen run '{name}'", {"teacher": "a" * 64})
    card = ModelCard(text)
    assert card.data.license == "apache-2.0" and card.data.model_name == visible(name)
    tokens = MarkdownIt("commonmark").enable("table").enable("strikethrough").parse(card.content.split("\n---\n", 1)[1])
    headings = [tokens[i + 1] for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert text_of(headings[0]) == visible(name)
    assert [text_of(heading) for heading in headings[1:]] == ["Use", "How it was made"]
    spans = [child.content for token in tokens for child in token.children or [] if child.type == "code_inline"]
    assert visible(f"/models/{name}") in spans and visible(f"slimqwen run '{name}'") in spans
    assert not [token for token in tokens if token.type.startswith("html")]
    recipes = [token.content for token in tokens if token.type == "fence" and token.info == "yaml"]
    assert [strict_yaml.load(recipe)["name"] for recipe in recipes] == [name]


def text_of(inline: Token) -> str:
    assert {child.type for child in inline.children or []} <= {"text", "text_special"}
    return "".join(child.content for child in inline.children or [])


@pytest.mark.parametrize("text", NASTY)
def test_markdown_of_a_text_reads_as_the_text(text: str) -> None:
    parser = MarkdownIt("commonmark").enable("table").enable("strikethrough")
    row = parser.parse(f"| a | b |\n|---|---|\n| {plain(text)} | c |\n")
    cells = [text_of(token) for token in row if token.type == "inline"]
    assert cells == ["a", "b", visible(text).strip(), "c"]
    (span,) = parser.parse(code(text))[1].children or []
    assert (span.type, span.content) == ("code_inline", visible(text))
    (fence,) = parser.parse(block(text, "yaml"))
    assert fence.content == visible(text, keep="\n") + "\n"


def test_a_model_without_mtp_has_no_word_of_it(teacher: Path) -> None:
    full = an_evaluation()
    plain = {
        name: model.model_copy(update={"mtp_parameters": 0, "mtp_acceptance": [], "tokens_per_verification": None})
        for name, model in full.models.items()
    }
    card = model_card(
        a_recipe(teacher), parentage_of(teacher), full.model_copy(update={"models": plain}), "slimqwen run x.yaml", {}
    )
    text = card.partition("## How it was made")[0]
    for word in ("MTP", "draft", "tokens/pass", "Tokens/pass"):
        assert word not in text
    header, rule, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in (header, rule, *rows)} == {9} and len(rows) == 2
    with_it = model_card(a_recipe(teacher), parentage_of(teacher), full, "x", {}).partition("## How it was made")[0]
    header, rule, *rows = [line for line in with_it.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in (header, rule, *rows)} == {11} and "MTP module of" in with_it
