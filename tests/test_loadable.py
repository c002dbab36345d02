"""Where a cut will load, said before it is made: what `check` says of it once it is there."""

from pathlib import Path
from typing import Any

import pytest
from settings import paper
from test_engines import plain
from test_every_family import alone
from tiny import write_tiny_checkpoint
from tiny_families import FAMILIES_NATIVE

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.families import family_of
from slimqwen.families.family import Layout
from slimqwen.pruning.cut import Cut
from slimqwen.recipe import Recipe, Target
from slimqwen.runs.checks import notes_of_calibration, notes_of_serving
from slimqwen.serving.check import check_checkpoint
from slimqwen.serving.loadable import loadable
from slimqwen.shapes.counts import compare, comparison_table
from slimqwen.shapes.fit import candidates_table, fit
from slimqwen.shapes.target import completed, target_config

# A target for each family, the layers that stay, and the engines that then refuse what they took before.
CUTS: list[tuple[str, Layout, Target, list[int] | None, set[str]]] = [
    ("qwen3_next", "per_expert", Target(hidden_size=24, num_experts=6), None, set()),
    ("qwen3_next", "per_expert", Target(num_hidden_layers=3), [0, 1, 3], set()),
    ("qwen3_next", "per_expert", Target(num_hidden_layers=2), [2, 3], set()),
    ("qwen3_next", "per_expert", Target(num_hidden_layers=3), [1, 2, 3], set()),
    ("qwen3_next", "fused", Target(num_experts=6), None, set()),
    ("qwen3_5_moe_text", "per_expert", Target(hidden_size=24), None, set()),
    ("qwen3_5_moe", "fused", Target(hidden_size=24), None, set()),
    ("qwen3_moe", "per_expert", Target(hidden_size=24, num_experts=4), None, set()),
    ("qwen3_moe", "fused", Target(num_experts=4), None, set()),
    ("mixtral", "per_expert", Target(num_experts=4), None, set()),
    ("mixtral", "per_expert", Target(hidden_size=24), None, {"sglang"}),
    ("mixtral", "fused", Target(hidden_size=24), None, set()),  # whose source only Transformers takes
    ("olmoe", "per_expert", Target(num_experts=4), None, set()),
    ("glm4_moe", "per_expert", Target(num_hidden_layers=2), None, set()),
]


@pytest.mark.parametrize(("family_name", "layout", "target", "layers", "new"), CUTS)
def test_what_is_said_before_is_what_check_says_after(
    tmp_path: Path, family_name: str, layout: Layout, target: Target, layers: list[int] | None, new: set[str]
) -> None:
    source = Checkpoint(plain(tmp_path, family_name, layout=layout))
    family, config = source.family, source.config
    full = completed(family, target, config)
    layers = layers or list(range(full.num_hidden_layers or 0))
    said = loadable(family, config, target_config(family, config, full, layers), source.layouts, layers=layers)

    out = tmp_path / "cut"
    out.mkdir()
    kept = {"hidden": list(range(full.hidden_size or 0))}
    kept_blocks = [block.name for block in family.moe_blocks(config) if block.layer is None or block.layer in layers]
    experts = {name: [alone(expert) for expert in range(full.num_experts or 0)] for name in kept_blocks}
    Cut(source, layers, kept, experts).write(out, "test")
    checked = check_checkpoint(out, engines=["all"])
    refused = {refusal.engine: refusal.problems for refusal in said.refusals}
    assert refused == {name: found.problems for name, found in checked.engines.items() if found.problems}
    assert {refusal.engine for refusal in said.refusals if refusal.new} == new
    assert set(said.caveats) <= set(checked.warnings)


def test_a_pattern_that_sglang_cannot_count(tmp_path: Path) -> None:
    source = Checkpoint(plain(tmp_path, num_hidden_layers=8, layer_types=None))
    layers = [0, 1, 2, 3, 5, 6, 7]
    cut = target_config(
        source.family, source.config, completed(source.family, Target(num_hidden_layers=7), source.config), layers
    )
    (refusal,) = loadable(source.family, source.config, cut, source.layouts, layers=layers).refusals
    assert (refusal.engine, refusal.new) == ("sglang", True) and "do not alternate regularly" in refusal.problems[0]


# --- in the commands --------------------------------------------------------------------------------------------------


def test_plan_says_it_and_speaks_of_nothing_that_the_model_lacks() -> None:
    native = FAMILIES_NATIVE["mixtral"]
    family = family_of(native, "test")
    config = family.normalise(native)
    text = comparison_table(compare(family, config, Target(hidden_size=24)))
    assert (
        "does not load in sglang 0.5.23: it requires head_dim 8 x num_attention_heads 4 to equal hidden_size 24" in text
    )
    assert "loads in transformers" in text
    for word in ("DeltaNet", "Qwen", "MTP", "recurrent", "80B"):
        assert word not in text
    next_native = FAMILIES_NATIVE["qwen3_next"]
    theirs = family_of(next_native, "test")
    text = comparison_table(compare(theirs, theirs.normalise(next_native), Target(hidden_size=24)))
    for word in ("DeltaNet state", "SlimQwen-23A2B", "MTP module, apart", "with MTP", "recurrent"):
        assert word in text
    # The tiny one's own fault, and nothing of the cut:
    assert "does not load in llama.cpp 0c1e57098 (nor does the model before): it requires linear_key_head_dim" in text


def test_each_shape_of_a_search_has_the_engines_that_refuse_it() -> None:
    native = FAMILIES_NATIVE["mixtral"] | {"num_local_experts": 16, "hidden_size": 64}
    family = family_of(native, "test")
    config = family.normalise(native)
    candidates = fit(family, config, "total=0.2M", align=16)
    narrow = [candidate for candidate in candidates if candidate.target.hidden_size != 64]
    whole = [candidate for candidate in candidates if candidate.target.hidden_size == 64]
    assert narrow and whole
    for candidate in narrow:
        assert [refusal.engine for refusal in candidate.refusals] == ["sglang"]
    assert not any(candidate.refusals for candidate in whole)
    table = candidates_table(candidates)
    header, *rows = table.splitlines()[: len(candidates) + 1]
    assert header.endswith("does not load in")
    for row, candidate in zip(rows, candidates, strict=True):
        assert row.split()[-1] == ("sglang" if candidate in narrow else "-")
    assert "to equal hidden_size" in table.splitlines()[-1] and "MTP" not in table
    assert "does not load in" not in candidates_table(whole)


def a_recipe(folder: Path, **values: Any) -> Recipe:
    wanted = {
        "target": {"hidden_size": 24},
        "distil": {"tokens": 1000},
        "teacher": str(folder / "teacher"),
        "run_dir": folder,
    }
    return Recipe.model_validate(wanted | values)


def test_a_run_says_at_once_what_its_result_will_not_load_in(tmp_path: Path) -> None:
    source = Checkpoint(write_tiny_checkpoint(tmp_path / "teacher", native=FAMILIES_NATIVE["mixtral"]))
    (note,) = notes_of_serving(source, completed(source.family, Target(hidden_size=24), source.config))
    assert note.startswith("warning: the result of this run does not load in sglang 0.5.23: it requires head_dim")
    assert notes_of_serving(source, completed(source.family, Target(num_experts=4), source.config)) == []


def test_a_run_that_is_refitted_by_one_source_of_text_says_what_to_do(tmp_path: Path) -> None:
    one = {"data": {"sources": [{"path": tmp_path / "wiki"}]}}
    (note,) = notes_of_calibration(a_recipe(tmp_path, **one))
    assert f"one source of text ({tmp_path / 'wiki'})" in note
    assert "calibration.sources" in note and "data.sources" in note and "weight" in note
    named = {"calibration": {"sources": {"wiki": tmp_path / "tokens"}}}
    (note,) = notes_of_calibration(a_recipe(tmp_path, **named))
    assert "one source of text (wiki)" in note

    two = {"data": {"sources": [{"path": tmp_path / "wiki"}, {"path": tmp_path / "code"}]}}
    for values in (
        {"teacher": "builtin"},  # which has read nothing else: the demo
        two,
        one | {"calibration": {"sources": {"wiki": tmp_path / "a", "code": tmp_path / "b"}}},
        one | {"pruning": paper()},  # which refits nothing
        one | {"init": "random"},
    ):
        assert notes_of_calibration(a_recipe(tmp_path, **values)) == []
