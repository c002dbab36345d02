"""Keys of recipes as version 0.1 had them: read as what they are now, with a warning for each."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from slimqwen.core.errors import UserError
from slimqwen.planning.plan import Plan
from slimqwen.recipe import DistilFile, DistilRecipe, PretrainRecipe, PruningRecipe, Recipe
from slimqwen.recipe.file import describe, dump_recipe, load_recipe
from slimqwen.recipe.renamed import RENAMED, SINCE, Renamed

NEEDED: dict[str, Any] = {"run_dir": "runs/x", "target": {"hidden_size": 96}, "distil": {"tokens": 1000}}
SAMPLES: dict[str, Any] = {  # of keys whose values cannot be made up by their type
    "device": "cpu",
    "distil.loggers": ["tensorboard"],
    "distil.on_bad_step": "skip",
    "distil.spike_factor": 2.5,
    "distil.save_every_minutes": 2.5,
    "distil.expert_ranks": 4,
    "distil.micro_batch_size": 2,
    "distil.optimizer_state": "carry",
    "distil.adam_beta1": 0.5,
    "distil.adam_beta2": 0.5,
    "distil.weight_decay_exempt": ["router"],
    "distil.learning_rate_scale": {"router": 0.5},
    "distil.jsd_beta": 0.25,
    "distil.reshard_student": False,
    "pruning.repair": False,
    "pruning.experts.refit": False,
    "pruning.healing": {"samples": 32},
    "distil.reshard_teacher": False,
    "evaluation.acceptance_prompts": 16,
    "evaluation.acceptance_depth": 8,
}
BOOLEANS = ("streaming", "activation_checkpointing", "async_save", "teacher_cache.exact")


def sample(row: Renamed) -> Any:
    return SAMPLES.get(row.old, row.old.endswith(BOOLEANS) or 32)


def put(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    *sections, last = key.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    return values


def recipe(folder: Path, values: dict[str, Any], *overrides: str, name: str = "recipe.yaml") -> Recipe:
    (folder / name).write_text(yaml.safe_dump(values))
    return load_recipe(folder / name, overrides)


def needed() -> dict[str, Any]:
    return {name: dict(value) if isinstance(value, dict) else value for name, value in NEEDED.items()}


@pytest.mark.parametrize("row", RENAMED, ids=lambda row: row.old)
def test_an_old_key_is_read_as_the_new_one(row: Renamed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = sample(row)
    old = recipe(tmp_path, put(needed(), row.old, value))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"recipe.yaml: {row.old}: ") and f" is written {row.new}: " in line
    assert line.endswith(f"since {SINCE}")
    new = row.convert(value)
    assert old == recipe(tmp_path, put(needed(), row.new, ["100 steps", new] if adds_to_steps(row) else new))
    assert old != recipe(tmp_path, needed()) and not capsys.readouterr().err
    assert old == recipe(
        tmp_path, needed(), f"{row.old}={yaml.safe_dump(value, default_flow_style=True).split('...')[0]}"
    )
    assert f"--set: {row.old}: " in capsys.readouterr().err


def adds_to_steps(row: Renamed) -> bool:
    """Beside which the 100 steps of the default stay, as they did."""
    return row.old in ("distil.save_every_tokens", "distil.save_every_minutes")


def test_no_old_key_is_a_key_and_every_new_one_is() -> None:
    keys = {line.split(":")[0] for line in describe(Recipe).splitlines()}
    for row in RENAMED:
        assert row.old not in keys and row.new in keys, row


def test_the_changelog_has_every_row() -> None:
    changes = (Path(__file__).parents[1] / "CHANGELOG.md").read_text()
    table = re.findall(r"^\| (`.+) \| `([\w.]+)`.* \|$", changes, flags=re.M)
    told = {old: new for olds, new in table for old in re.findall(r"`([\w.]+)`", olds)}
    assert told == {row.old: row.new for row in RENAMED}


def test_a_recipe_of_old_keys_alone_is_the_new_one(tmp_path: Path) -> None:
    old, new = needed(), needed()
    for row in RENAMED:
        if row.old != "distil.warmup_steps":  # given with warmup_tokens it is refused, as it was
            put(old, row.old, sample(row))
        put(new, row.new, row.convert(sample(row)))
    put(new, "execution.save_every", ["32 steps", "32 tokens", "2.5 min"])
    put(new, "distil.optimizer.betas", [0.5, 0.5])
    assert recipe(tmp_path, old) == recipe(tmp_path, new)


def test_old_and_new_together_are_refused(tmp_path: Path) -> None:
    values = {**needed(), "device": "cpu", "execution": {"device": "cuda"}}
    with pytest.raises(UserError, match=f"device: is written execution.device since {SINCE}, which is given too"):
        recipe(tmp_path, values)


def test_two_old_keys_that_exclude_each_other_are_refused_and_one_as_an_override_replaces_the_other(
    tmp_path: Path,
) -> None:
    steps, tokens = (put(needed(), f"distil.warmup_{unit}", 5) for unit in ("steps", "tokens"))
    with pytest.raises(UserError, match=r"distil\.warmup_tokens: is written distil\.warmup .* leave out one of them"):
        recipe(tmp_path, put(put(needed(), "distil.warmup_steps", 5), "distil.warmup_tokens", 100))
    assert str(recipe(tmp_path, tokens, "distil.warmup_steps=7").distil.warmup) == "7 steps"
    assert str(recipe(tmp_path, steps, "distil.warmup_tokens=7").distil.warmup) == "7 tokens"


def test_of_a_wrong_value_under_an_old_key_the_key_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"distil\.optimizer\.betas\.0: must be less than 1, is 5"):
        recipe(tmp_path, put(needed(), "distil.adam_beta1", 5))
    assert "recipe.yaml: distil.adam_beta1: 5 is written distil.optimizer.betas" in capsys.readouterr().err


def test_an_override_in_either_spelling_replaces_either(tmp_path: Path) -> None:
    old, new = {**needed(), "device": "cpu"}, {**needed(), "execution": {"device": "cpu"}}
    for values in (old, new):
        for key in ("device", "execution.device"):
            assert recipe(tmp_path, values, f"{key}=cuda").execution.device == "cuda"


def test_of_batch_sizes_that_are_one_now_the_smallest_is_taken(tmp_path: Path) -> None:
    values = {**needed(), "calibration": {"batch_size": 64}, "evaluation": {"batch_size": 32}}
    assert recipe(tmp_path, values).execution.batch_size == 32


def test_what_was_written_with_every_field_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """null is what an old recipe.resolved.yaml has for what was not set; quietly, for a report."""
    values = put(put(needed(), "distil.save_every_tokens", None), "data.workers", None)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**values, "teacher_cache": {"batch_size": 8}}))
    assert load_recipe(tmp_path / "recipe.yaml", quiet=True) == recipe(tmp_path, needed())
    assert not capsys.readouterr().err


def test_files_with_one_section_have_old_keys_too(tmp_path: Path) -> None:
    (tmp_path / "distil.yaml").write_text("{tokens: 100, micro_batch_size: 2, save_every_steps: 5}")
    file = load_recipe(tmp_path / "distil.yaml", ["on_bad_step=skip"], model=DistilFile)
    assert (file.execution.micro_batch_size, file.execution.bad_steps.action) == (2, "skip")
    assert [str(every) for every in file.execution.save_every] == ["5 steps"] and file.settings().tokens == 100
    (tmp_path / "pretrain.yaml").write_text(
        "{run_dir: x, config: {}, device: cpu, data: {workers: 2}, training: {tokens: 8, terms: [lm], keep_states: 3}}"
    )
    execution = load_recipe(tmp_path / "pretrain.yaml", model=PretrainRecipe).execution
    assert (execution.device, execution.workers, execution.keep_states) == ("cpu", 2, 3)


def test_words_of_before_are_sections_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`optimizer: muon` is what it was, with the settings that stood beside it."""
    old = put(put(needed(), "distil.optimizer", "muon"), "distil.weight_decay", 0.5)
    old = put(put(old, "distil.teacher", "cache"), "teacher_cache.top_k", 7)
    made = recipe(tmp_path, put(put(old, "distil.divergence", "jsd"), "distil.jsd_beta", 0.25)).distil
    assert (made.optimizer.kind, made.optimizer.weight_decay) == ("muon", 0.5)
    assert (made.teacher.kind, made.teacher.top_k) == ("cache", 7)
    assert (made.divergence.kind, made.divergence.beta) == ("jsd", 0.25)
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_the_papers_method_is_its_criteria(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published = recipe(tmp_path, put(needed(), "pruning.method", "slimqwen-paper")).pruning
    assert published == PruningRecipe().as_published()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("recipe.yaml: pruning.method: slimqwen-paper is written")
    beside = {"method": "slimqwen-paper", "compensate": True, "experts": {"importance": "frequency", "refit": True}}
    mixed = recipe(tmp_path, put(needed(), "pruning", beside)).pruning
    experts = published.experts.model_copy(update={"importance": "frequency"})
    assert mixed == published.model_copy(update={"compensate": True, "refit_outputs": True, "experts": experts})
    assert recipe(tmp_path, needed(), "pruning.method=slimqwen").pruning == PruningRecipe()
    (tmp_path / "pruning.yaml").write_text("{method: slimqwen-paper, depth: similarity}")
    alone = load_recipe(tmp_path / "pruning.yaml", model=PruningRecipe)
    assert alone == published.model_copy(update={"depth": "similarity"})
    with pytest.raises(UserError, match=f"pruning.method: is gone since {SINCE}"):
        recipe(tmp_path, put(needed(), "pruning.method", "paper"))


def test_a_distil_section_alone_has_no_execution(tmp_path: Path) -> None:
    (tmp_path / "distil.yaml").write_text("{tokens: 8, warmup_steps: 3, keep_states: 1}")
    with pytest.raises(UserError, match=f"keep_states: is a key of the whole recipe since {SINCE}"):
        load_recipe(tmp_path / "distil.yaml", model=DistilRecipe)
    (tmp_path / "distil.yaml").write_text("{tokens: 8, warmup_steps: 3}")
    assert str(load_recipe(tmp_path / "distil.yaml", model=DistilRecipe).warmup) == "3 steps"


def test_what_is_a_section_of_its_own_now_is_refused_in_a_file_of_another(tmp_path: Path) -> None:
    (tmp_path / "pruning.yaml").write_text("{healing: {samples: 8}}")
    with pytest.raises(UserError, match=f"healing: is a key of the whole recipe since {SINCE}"):
        load_recipe(tmp_path / "pruning.yaml", model=PruningRecipe)


def test_a_plan_of_before_is_read() -> None:
    """Its criteria, as version 0.1 wrote them with every field."""
    experts = {"importance": "reap", "compression": "prune", "similarity": "expert_output", "keep_outliers": True}
    old = {"method": "slimqwen", "depth": "last", "width": "rotation", "compensate": True, "repair": False}
    old |= {"experts": {**experts, "refit": False}, "healing": None, "source_weights": None}
    values = {"pruning": old}
    made = Plan.__pydantic_validator__.validate_assignment(Plan.model_construct(), "pruning", values["pruning"]).pruning
    assert (made.depth, made.refit_readers, made.refit_outputs, made.experts.importance) == (
        "last",
        False,
        False,
        "reap",
    )
    assert old["method"] == "slimqwen"  # what was given is left alone


def test_numbers_and_words_alone(tmp_path: Path) -> None:
    distil = {"tokens": "2M", "kd_weight": 0.5, "optimizer": "muon", "warmup": "0 steps", "divergence": "reverse_kl"}
    made = recipe(tmp_path, {**needed(), "distil": distil}, "distil.optimizer.weight_decay=0.0").distil
    assert made.tokens == 2_000_000 and (made.kd_weight.start, made.kd_weight.end) == (0.5, 0.5)
    assert (made.optimizer.kind, made.optimizer.weight_decay) == ("muon", 0.0)
    assert made.divergence.kind == "reverse_kl" and made.warmup.amount == 0
    with pytest.raises(UserError, match=r"distil\.optimizer\.kind: must be 'adamw', .* \(did you mean 'muon'\?\)"):
        recipe(tmp_path, {**needed(), "distil": distil | {"optimizer": "moun"}})
    with pytest.raises(UserError, match='must be a whole number, such as 8192, 2M or 400B, is "lots"'):
        recipe(tmp_path, {**needed(), "distil": {"tokens": "lots"}})


def test_a_key_is_suggested_across_sections(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"distil\.micro_batch_sise: unknown key \(did you mean 'execution\.micro_batch_size'\?\)"
    ):
        recipe(tmp_path, {**needed(), "distil": {"tokens": 8, "micro_batch_sise": 2}})


def test_durations_and_sizes_have_units(tmp_path: Path) -> None:
    execution = {"save_every": ["500 steps", "2B tokens", "1.5 h"], "evaluate_every": "0.5M tokens"}
    made = recipe(tmp_path, {**needed(), "execution": {**execution, "memory_budget": "2GB", "evaluate_tokens": "8K"}})
    assert [str(every) for every in made.execution.save_every] == ["500 steps", "2000000000 tokens", "90 min"]
    assert str(made.execution.evaluate_every) == "500000 tokens"
    assert (made.execution.memory_budget, made.execution.evaluate_tokens) == (2_000_000_000, 8000)
    dump_recipe(made, tmp_path / "dumped.yaml")
    assert load_recipe(tmp_path / "dumped.yaml") == made
    assert recipe(tmp_path, {**needed(), "execution": {"save_every": "30 s"}}).execution.save_every[0].amount == 0.5


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (500, 'execution.save_every.0: write a duration with its unit, as "500 steps"'),
        (
            "500 stpes",
            'execution.save_every.0: write a duration as "500 steps", "2B tokens" or "30 min", not "500 stpes"',
        ),
        ("1.5 steps", 'execution.save_every.0: there is no part of a step: "1.5 steps"'),
        ("0 steps", "execution.save_every.0: must be more than 0"),
        ("1e400 tokens", 'execution.save_every.0: "1e400 tokens" is too long: at most 1,000,000,000,000,000 tokens'),
        ("2,5B tokens", 'execution.save_every.0: write a duration as "500 steps"'),  # 25B by leaving out the comma
        ("\u0661\u0662 steps", 'execution.save_every.0: write a duration as "500 steps"'),  # Arabic digits
        ("9" * 5000 + " steps", '999..." is too long'),
        ([], "execution.save_every: must have at least 1 item"),
    ],
)
def test_a_wrong_duration_is_a_sentence(value: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        recipe(tmp_path, {**needed(), "execution": {"save_every": value}})
    assert problem in str(refused.value)
    with pytest.raises(UserError, match=r"execution\.evaluate_every: must be in tokens or steps, is 5 min"):
        recipe(tmp_path, {**needed(), "execution": {"evaluate_every": "5 min"}})


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("1e400B", 'must be at most 1,000,000,000,000,000, is "1e400B"'),
        ("2,5B", 'must be a whole number, such as 8192, 2M or 400B, is "2,5B"'),
        ("9" * 5000, "must be at most 1,000,000,000,000,000"),
        ("x" * 5000, 'xxx..."'),
    ],
)
def test_a_wrong_count_is_a_sentence(value: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        recipe(tmp_path, {**needed(), "distil": {"tokens": value}})
    assert problem in str(refused.value) and len(str(refused.value)) < 400


@pytest.mark.parametrize(("betas", "problem"), [([0.9], "at least 2 items"), ([0.9, 0.9, 0.9], "at most 2 items")])
def test_a_list_of_another_length_is_a_sentence(betas: list[float], problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"distil\.optimizer\.betas: must have {problem}, is \[0\.9"):
        recipe(tmp_path, {**needed(), "distil": {"tokens": 8, "optimizer": {"kind": "muon", "betas": betas}}})


def test_thousands_may_be_parted(tmp_path: Path) -> None:
    for text in ("2,000,000", "2_000_000", "2M", "2000K", "2e6"):
        assert recipe(tmp_path, {**needed(), "distil": {"tokens": text}}).distil.tokens == 2_000_000


def test_a_word_alone_is_the_kind_of_a_section(tmp_path: Path) -> None:
    made = recipe(tmp_path, {**needed(), "execution": {"bad_steps": "skip"}}, "execution.bad_steps.spike_factor=2.0")
    assert (made.execution.bad_steps.action, made.execution.bad_steps.spike_factor) == ("skip", 2.0)
