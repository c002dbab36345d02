import json
import os
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, Field
from settings import paper

from slimqwen.core.errors import UserError
from slimqwen.recipe import PruningRecipe, Recipe, Target
from slimqwen.recipe.file import describe, dump_recipe, load_recipe
from slimqwen.recipe.pruning import PAPER

SMALLEST = """\
run_dir: runs/x
target: {hidden_size: 96}
distil:
  tokens: 1000
"""


def written(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as refused:
        load_recipe(path, overrides)
    assert refused.value.exit_code == 2
    return str(refused.value)


def test_the_smallest_recipe(tmp_path):
    recipe = load_recipe(written(tmp_path, SMALLEST))
    assert recipe.run_dir == Path("runs/x")
    assert recipe.target == Target(hidden_size=96)
    assert recipe.distil.tokens == 1000
    assert recipe.distil.learning_rate == 4e-4


def test_all_problems_are_reported_at_once(tmp_path):
    path = written(
        tmp_path,
        """\
        run_dir: runs/x
        schedul: joint
        learning_rate: 1.0
        target: {hidden_size: -4}
        data: {sources: [{path: text, keep_fraction: 2}]}
        baselines: [lm_onyl]
        distil: {lerning_rate: 0.1, batch_size: true, warmup: "5", optimizer: {betas: [-1, 0.9]}}
        """,
    )
    first, *lines = refusal(path).splitlines()
    assert first == f"{path} has 10 problems:"
    assert sorted(lines) == sorted(
        [
            "  schedul: unknown key (did you mean 'schedule'?)",
            "  learning_rate: unknown key (did you mean 'distil.learning_rate'?)",
            "  target.hidden_size: must be greater than 0, is -4",
            "  data.sources.0.keep_fraction: must be at most 1, is 2",
            "  baselines.0: must be 'pruned', 'paper_pruned', 'paper', 'random_init' or 'lm_only', is \"lm_onyl\" (did you mean 'lm_only'?)",
            "  distil.tokens: missing (Training tokens of the whole run, over all stages: 400B, 2_000_000)",
            "  distil.lerning_rate: unknown key (did you mean 'learning_rate'?)",
            "  distil.batch_size: must be a whole number, is true",
            '  distil.warmup: write a duration as "500 steps", "2B tokens" or "30 min", not "5"',
            "  distil.optimizer.betas.0: must be at least 0, is -1",
        ]
    )


def test_one_problem_and_the_sentence_of_a_validator(tmp_path):
    path = written(tmp_path, SMALLEST + "  batch_size: 8\nexecution: {micro_batch_size: 3}\n")
    assert refusal(path) == f"{path} has 1 problem:\n  execution.micro_batch_size 3 does not divide distil.batch_size 8"


def test_overrides(tmp_path):
    path = written(
        tmp_path,
        """\
        run_dir: runs/x
        distil: {tokens: 1000}
        stages:
        - {target: {num_hidden_layers: 4}, token_fraction: 0.1}
        - {target: {hidden_size: 96}, token_fraction: 0.9}
        """,
    )
    recipe = load_recipe(
        path,
        [
            "distil.learning_rate=1e-4",
            "distil.tokens=40e9",
            "distil.terms=[lm,mtp_lm]",
            "distil.kd_weight.end=0.5",
            "stages.0.token_fraction=0.2",
            "stages.1.token_fraction=0.8",
            "evaluation.tokens=4096",
            "name=a=b",
        ],
    )
    assert recipe.distil.learning_rate == 1e-4
    assert recipe.distil.tokens == 40_000_000_000
    assert recipe.distil.terms == ["lm", "mtp_lm"]
    assert (recipe.distil.kd_weight.start, recipe.distil.kd_weight.end) == (1.0, 0.5)
    assert recipe.stages is not None
    assert [stage.token_fraction for stage in recipe.stages] == [0.2, 0.8]
    assert recipe.evaluation.tokens == 4096
    assert recipe.name == "a=b"


def test_the_papers_criteria_and_what_follows_from_a_width(tmp_path):
    ours = load_recipe(written(tmp_path, SMALLEST)).pruning
    assert (ours.width, ours.compensate, ours.refit_readers, ours.refit_outputs) == ("rotation", True, True, True)
    papers = ours.as_published()
    assert (papers.width, papers.compensate, papers.refit_readers) == ("norm_activation", False, False)
    assert (papers.depth, papers.experts.importance, papers.experts.compression) == ("last", "reap", "partial")
    assert yaml.safe_load(PAPER.read_text()).keys() == PruningRecipe.model_fields.keys() - {"source_weights"}
    # Without rotation there is nothing to refit; asked for, it is refused.
    assert not load_recipe(written(tmp_path, SMALLEST + "pruning: {width: norm_activation}")).pruning.refit_readers
    with pytest.raises(UserError, match="set width: rotation too"):
        load_recipe(written(tmp_path, SMALLEST + "pruning: {width: norm_activation, refit_readers: true}"))


def test_the_paper_beside_itself_is_refused(tmp_path):
    with pytest.raises(UserError, match="its pruning is the paper's"):
        load_recipe(written(tmp_path, SMALLEST + f"pruning: {json.dumps(paper().model_dump())}\nbaselines: [paper]"))


def test_an_override_removes_a_value(tmp_path):
    path = written(tmp_path, SMALLEST + "execution: {micro_batch_size: 4}\n")
    assert load_recipe(path).execution.micro_batch_size == 4
    assert load_recipe(path, ["execution.micro_batch_size=null"]).execution.micro_batch_size is None


def test_bad_overrides_are_reported_with_the_other_problems(tmp_path):
    path = written(tmp_path, SMALLEST + "  batch_size: 0\nbaselines: [pruned]\n")
    lines = refusal(
        path,
        "distil.tokens",
        "distil.lerning_rate=1",
        "run_dir.x=1",
        "baselines.1=lm_only",
        "data.sources.0.path=text",
        "seed=[",
    ).splitlines()
    assert lines == [
        f"{path} has 7 problems:",
        "  --set distil.tokens: write it as key=value",
        '  --set run_dir.x=1: run_dir is "runs/x" and has nothing below it',
        "  --set baselines.1=lm_only: baselines has 1 items, counted from 0, and no item '1'",
        "  --set data.sources.0.path=text: the file has no list 'sources' to change an item of: set the whole list",
        "  --set seed=[: the value is not valid YAML: line 1, column 2: expected the node content, but found "
        "'<stream end>'",
        "  distil.batch_size: must be greater than 0, is 0",
        "  distil.lerning_rate: unknown key (did you mean 'learning_rate'?)",
    ]


@pytest.mark.parametrize("text", ["4e-4", "4E-4", "4.0e-4", "0.0004", "+4e-4", "40e-5"])
def test_numbers_as_people_write_them(tmp_path, text):
    assert load_recipe(written(tmp_path, SMALLEST + f"  learning_rate: {text}\n")).distil.learning_rate == 4e-4


def test_a_fractional_count_is_refused(tmp_path):
    assert "distil.batch_size: must be a whole number, is 2.5" in refusal(
        written(tmp_path, SMALLEST + "  batch_size: 2.5\n")
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "{path} is empty: a recipe is a list of key: value pairs"),
        ("# only a comment\n", "{path} is empty: a recipe is a list of key: value pairs"),
        ("- a\n", '{path} must hold key: value pairs at its top level, not ["a"]'),
        ("a: 1\nb: [2\n", "{path} is not valid YAML: line 3, column 1: expected ',' or ']', but got '<stream end>'"),
        ("a: 1\nb: {c: 2, c: 3}\n", "{path} is not valid YAML: line 2, column 11: the key 'c' is given twice"),
        ("a: &x 1\nb: *x\n", "{path} is not valid YAML: line 2, column 4: aliases (*name) are not supported"),
        ("a: !!python/name:os.system\n", "{path} is not valid YAML: line 1, column 4: could not determine a constr"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, sentence):
    path = written(tmp_path, text)
    assert refusal(path).startswith(sentence.format(path=path))


def test_files_that_cannot_be_read(tmp_path):
    written(tmp_path, SMALLEST, "demo.yaml")
    assert refusal(tmp_path / "dmo.yaml") == f"there is no file {tmp_path / 'dmo.yaml'} (did you mean 'demo.yaml'?)"
    assert refusal(tmp_path) == f"{tmp_path} cannot be read: Is a directory"
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    assert refusal(tmp_path / "latin.yaml") == f"{tmp_path / 'latin.yaml'} is not a text file in UTF-8 (byte 6 is not)"


def test_dump_and_load_give_the_same_recipe(tmp_path):
    recipe = Recipe.model_validate(
        {
            "name": "1e5",  # text that must not come back as a number
            "run_dir": "runs/é",
            "distil": {"tokens": 7, "learning_rate": 1e-4, "final_learning_rate": 3e-5, "terms": ["lm"]},
            "stages": [{"target": {"num_experts": 8}, "token_fraction": 1}],
            "data": {"sources": [{"path": "text"}, {"builtin": "python-packages"}]},
        }
    )
    path = tmp_path / "recipe.resolved.yaml"
    dump_recipe(recipe, path)
    assert load_recipe(path) == recipe
    assert "\nschedule: depth_first\n" in path.read_text()  # defaults are written out
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_any_model_can_be_loaded(tmp_path):
    path = written(tmp_path, "num_experts: 8\n")
    assert load_recipe(path, ["hidden_size=96"], model=Target) == Target(num_experts=8, hidden_size=96)


def test_describe_names_every_field():
    class Inner(BaseModel):
        depth: int = Field(description="How deep.")

    class Outer(BaseModel):
        kind: str = Field("plain", description="Which kind.")
        inner: Inner = Field(Inner(depth=3), description="Inside.")
        parts: list[Inner] | None = None

    assert describe(Outer) == "\n".join(
        [
            'kind: text, default "plain"',
            "    Which kind.",
            "inner: section",
            "    Inside.",
            "inner.depth: whole number, default 3",
            "    How deep.",
            "parts: list of section, default null",
            "parts.N.depth: whole number, required",
            "    How deep.",
        ]
    )


def test_describe_covers_what_a_dumped_recipe_holds(tmp_path):
    recipe = load_recipe(written(tmp_path, SMALLEST))
    described = {line.split(":")[0] for line in describe(Recipe).splitlines() if not line.startswith(" ")}

    def keys(value: object, prefix: str = "") -> set[str]:
        if isinstance(value, list):
            return {key for item in value for key in keys(item, prefix + "N.")}
        if isinstance(value, dict):
            return {prefix + key for key in value} | {k for key in value for k in keys(value[key], f"{prefix}{key}.")}
        return set()

    assert keys(json.loads(recipe.model_dump_json())) <= described


@pytest.mark.parametrize(
    "value",
    [
        "!!int x",
        "!!int 1:z",
        "!!float x",
        "!!bool x",
        "!!binary \u00e9",
        "!!binary aGVsbG8=",
        "1:30",
        "010",
        "-0_7",
        "!!omap 5",
        "!!merge x",
        "=",
        "!!python/object:os.system {}",
        "[" * 5000,
        "[" * 2000 + "]" * 2000,
        "{a: " * 2000 + "}" * 2000,
        "9" * 5000,
        "0x" + "f" * 5000,
        "-0b" + "1" * 100,
        "1:" * 3000 + "1",
        '"\\ud800"',
        "? [a]",
        "{<<: 4}",
        "{<<: {end: 1}}",
        "&a [*a]",
    ],
)
def test_whatever_yaml_holds_is_one_sentence(tmp_path, value):
    lines = refusal(written(tmp_path, SMALLEST + f"  batch_size: {value}\n")).splitlines()
    assert len(lines) == 1 and "is not valid YAML: line " in lines[0] and len(lines[0]) < 400
    lines = refusal(written(tmp_path, SMALLEST), f"name={value}").splitlines()
    assert len(lines) == 2 and "the value is not valid YAML" in lines[1] and len(lines[1]) < 400


def test_a_key_without_end_is_refused(tmp_path):
    assert "at most 32 parts" in refusal(written(tmp_path, SMALLEST), ".".join("a" * 3000) + "=1")


def test_dates_are_the_text_that_was_written(tmp_path):
    for text in ("2026-01-31", "2024-13-45", "2026-01-31 10:00:00"):
        recipe = load_recipe(written(tmp_path, SMALLEST + f"name: {text}\n"), [f"run_dir={text}"])
        assert (recipe.name, recipe.run_dir) == (text, Path(text))
        dump_recipe(recipe, tmp_path / "dumped.yaml")
        assert load_recipe(tmp_path / "dumped.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("calibration.samples=1e18", "calibration.samples: must be at most 1000000000000000, is 1000000000000000000"),
        ("calibration.samples=9223372036854775808", "a whole number this large is not supported"),
        ("calibration.samples=1e30", "calibration.samples: must be a whole number, is 1e"),
        ("seed=9223372036854775808", "a whole number this large is not supported"),
        ("target.num_experts=1e16", "target.num_experts: must be at most"),
        (
            "data.sources=[{path: x, weight: 5e-324}]",
            "data.sources.0.weight: 4.94066e-324 is too small to compute with",
        ),
        ("pruning.source_weights={a: 5e-324}", "pruning.source_weights.a: 4.94066e-324 is too small"),
        ("distil.final_learning_rate=5e-324", "too small to compute with"),
        ("distil.optimizer.max_grad_norm=1e308", "distil.optimizer.max_grad_norm: must be at most"),
        ("distil.warmup=100000T steps", "is too long: at most 1,000,000,000,000,000 steps"),
        ("distil.optimizer.learning_rate_scale={routr: 1}", "distil.optimizer.learning_rate_scale.routr: must be"),
        ("distil.optimizer.learning_rate_scale={routr: 1}", "(did you mean 'router'?)"),
        ("schedule=depth-first", "(did you mean 'depth_first'?)"),
        ("baselines=[lmonly]", "(did you mean 'lm_only'?)"),
        ("data.sources=[{builtin: stdlib}]", "(did you mean 'python-stdlib'?)"),
    ],
)
def test_values_that_cannot_be_meant(tmp_path, override, sentence):
    assert sentence in refusal(written(tmp_path, SMALLEST), override)


def test_zero_is_a_weight_and_the_largest_seed_a_seed(tmp_path):
    recipe = load_recipe(
        written(tmp_path, SMALLEST),
        ["distil.final_learning_rate=0", f"seed={2**63 - 1}", "pruning.source_weights={a: 0}"],
    )
    assert (recipe.distil.final_learning_rate, recipe.seed) == (0.0, 2**63 - 1)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DISK", str(tmp_path / "di$k"))
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.setenv("EMPTY", "")
    return tmp_path / "home"


PATHS = """\
run_dir: ~/run
teacher: ${DISK}/teacher
target: {hidden_size: 96}
data:
  sources: [{path: $DISK/a.jsonl, weight: 1}, {megatron: ~/b, weight: 2}]
  heldout_sources: [{path: "$$x/~/./$DISK"}]
calibration: {sources: {a: "~", b: ./~/c}}
distil: {tokens: 1000}
"""


def test_home_and_variables_in_every_path(tmp_path, home):
    disk = tmp_path / "di$k"
    recipe = load_recipe(written(tmp_path, PATHS))
    assert recipe.run_dir == home / "run"
    assert recipe.teacher == f"{disk}/teacher"
    assert [source.path or source.megatron for source in recipe.data.sources] == [disk / "a.jsonl", home / "b"]
    assert recipe.data.heldout_sources[0].path == Path(f"$x/~/{disk}")
    assert recipe.calibration.sources == {"a": home, "b": Path("~/c")}

    dump_recipe(recipe, tmp_path / "resolved.yaml")
    resolved = (tmp_path / "resolved.yaml").read_text()
    assert f"run_dir: {home}/run\n" in resolved
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


def test_home_and_variables_in_overrides(tmp_path, home):
    path = written(tmp_path, SMALLEST)
    recipe = load_recipe(path, ["run_dir=~/x", "teacher=$DISK/t", "calibration.sources={a: ~/y}"])
    assert (recipe.run_dir, recipe.teacher) == (home / "x", str(tmp_path / "di$k" / "t"))
    assert recipe.calibration.sources == {"a": home / "y"}
    assert load_recipe(path, ["teacher=builtin"]).teacher == "builtin"


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("$NOWHERE/x", "run_dir: the variable NOWHERE is not set: set it, or write $$ for a dollar sign"),
        ("${NOWHERE}/x", "run_dir: the variable NOWHERE is not set"),
        ("$EMPTY/x", "run_dir: the variable EMPTY is not set"),
        ("${a-b}/x", "run_dir: the variable a-b is not set"),
        ("~nobody-of-this-name/x", "run_dir: there is no home folder ~nobody-of-this-name"),
        ('"a\\0b"', "run_dir: a path cannot hold the character NUL"),
        ('""', "run_dir: must not be empty"),
    ],
)
def test_paths_that_lead_nowhere(tmp_path, home, value, sentence):
    assert sentence in refusal(written(tmp_path, SMALLEST), f"run_dir={value}")
    assert sentence.replace("run_dir", "teacher") in refusal(written(tmp_path, SMALLEST), f"teacher={value}")


def test_a_path_that_a_program_gives_is_taken_as_it_is(home):
    recipe = Recipe.model_validate(
        {"run_dir": Path("~/$NOWHERE"), "teacher": "./~/$x", "target": {"hidden_size": 8}, "distil": {"tokens": 8}}
    )
    assert (recipe.run_dir, recipe.teacher) == (Path("~/$NOWHERE"), "./~/$x")
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_a_recipe_comes_through_a_pipe_and_ends(tmp_path):
    read, write = os.pipe()
    os.write(write, SMALLEST.encode())
    os.close(write)
    assert load_recipe(f"/dev/fd/{read}").distil.tokens == 1000
    os.close(read)
    assert "too large to be a recipe" in refusal(Path("/dev/zero"))
