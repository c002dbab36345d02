"""What slimqwen makes of three tiny models is what golden.json says, and a difference is told in words.

golden.json holds digests of what has no arithmetic in it and summaries of what has, compared by the tolerances of
rounding.py: it was written on one machine and holds on every other. `make golden` writes it anew.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden.capture import PLANS, capture
from golden.compare import WHAT_TO_DO, differences, read, summaries
from golden.models import MODELS
from golden.revisions import REVISIONS, STAGES, revision_lines, to_raise
from golden.summary import Artefact, split_json

from slimqwen.runs.stages import Planning

pytestmark = [pytest.mark.rounding, pytest.mark.slow]

MARGIN = 1e-3  # of the largest score: ten times what a pass may differ by


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Artefact]]:
    """The folder of everything, and what was found in it."""
    folder = tmp_path_factory.mktemp("golden")
    return folder, capture(folder)


def test_everything_is_as_golden(made: tuple[Path, dict[str, Artefact]]) -> None:
    said = differences(read(), made[1])
    assert not said, "\n".join([*said, WHAT_TO_DO, to_raise(read(), made[1]) or ""])


def test_no_choice_is_near_a_tie(made: tuple[Path, dict[str, Artefact]]) -> None:
    """Else rounding could choose another expert or channel on another machine, and golden.json would not hold there."""
    for file in (made[0] / family / name for family in MODELS for name in PLANS):
        plan = json.loads(file.read_text())
        assert margin(plan["scores"]["hidden"], len(plan["kept"]["hidden"])) > MARGIN, file
        for block, groups in plan["expert_groups"].items():
            scores, keep = plan["scores"]["experts"][block], len(groups)
            assert margin(scores, keep) > MARGIN, (file, block)
            if plan["pruning"]["experts"]["compression"] == "partial":  # half of them stays untouched
                assert margin(scores, keep // 2) > MARGIN, (file, block)


def margin(scores: list[float], keep: int) -> float:
    """Between the last score that is kept and the first that is not, as a share of the largest."""
    ordered = sorted(scores, reverse=True)
    return (ordered[keep - 1] - ordered[keep]) / ordered[0] if keep < len(ordered) else 1.0


# One test: another worker would make everything again.
def test_a_difference_is_seen_and_told(made: tuple[Path, dict[str, Artefact]]) -> None:
    """Of what was made, one thing after another is changed: too little for a loss to tell, but not what rounding does."""
    folder, artefacts = made

    for name, key in (
        ("qwen3_next/run/stage-1/refitted", "model.layers.1.mlp.experts.*.down_proj.weight"),
        ("mixtral/run/one_shot/refitted", "model.layers.1.block_sparse_moe.experts.*.w2.weight"),
        ("glm4_moe/run/one_shot/refitted", "model.layers.1.mlp.experts.*.down_proj.weight"),
        ("mixtral/healed", "model.layers.1.block_sparse_moe.experts.*.w1.weight"),
        ("glm4_moe/random/stage-1/initial", "model.layers.1.mlp.experts.*.gate_proj.weight"),
    ):
        values = artefacts[name].numbers[key].copy()
        values[: len(values) // 4] *= 1.001  # one of the four experts that are kept
        (said,) = told(artefacts, name, numbers=artefacts[name].numbers | {key: values})
        assert name in said and key in said and re.search(r"e-0[34] of its norm", said)

    for name, key in (
        ("qwen3_next/stage-1/depth.json", "measured[].kl"),
        ("glm4_moe/stage-1/depth.json", "measured[].refitted_kl"),
        ("qwen3_next/healed/added", "mtp.*"),
        ("mixtral/healed/added", "model.layers.0.*"),
    ):
        (said,) = told(artefacts, name, numbers=artefacts[name].numbers | {key: 1.001 * artefacts[name].numbers[key]})
        assert name in said and key in said and re.search(r"e-0[34] of its norm", said)

    name = "mixtral/run/paper/one_shot/plan.json"
    plan = json.loads((folder / name).read_text())
    dropped = min(set(range(32)) - set(plan["kept"]["hidden"]))
    plan["kept"]["hidden"] = sorted([dropped, *plan["kept"]["hidden"][1:]])
    (said,) = told(artefacts, name, lines=split_json(plan)[0])
    assert f"{name}: lines new: 1 of" in said and "kept.hidden" in said

    lines = artefacts["help/prune"].lines
    (said,) = told(artefacts, "help/prune", lines=[*lines[:4], lines[4] + " Quickly.", *lines[5:]])
    assert "help/prune: lines new: 1 of" in said and said.endswith("Quickly.")
    assert told(artefacts, "help/prune", lines=lines[::-1]) == [
        f"help/prune: its {len(lines)} lines are in another order."
    ]

    numbers = dict(artefacts["glm4_moe/metrics"].numbers)
    numbers["steps[].kd"] = np.full(20, np.nan)
    numbers["invented"] = numbers.pop("steps[].lm")
    (said,) = told(artefacts, "glm4_moe/metrics", numbers=numbers)
    for words in ("steps[].kd differs by inf", "steps[].lm is gone", "invented is new"):
        assert words in said

    renamed = {("invented" if name == "tokens" else name): artefact for name, artefact in artefacts.items()}
    assert differences(summaries(artefacts), renamed) == [
        "tokens is no longer made.",
        "invented is new: golden.json does not have it.",
    ]


def test_other_results_need_another_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: a plan that changed, and the cut that follows from it."""

    def results(plan: str, cut: str) -> dict[str, Artefact]:
        lines = {"a/run/one_shot/plan.json": plan, "a/run/one_shot/pruned": cut, "help/prune": plan}
        return {name: Artefact([line]) for name, line in lines.items()} | {REVISIONS: Artefact(revision_lines())}

    golden = summaries(results("before", "before"))
    assert to_raise(golden, results("before", "before")) is None
    said = to_raise(golden, results("after", "after"))
    assert said is not None and said.startswith(
        "a/run/one_shot/plan.json: another result by the same revision of Planning"
    )
    assert said.endswith("raise Planning.revision in slimqwen.runs.stages.")
    assert "Pruning" in (to_raise(golden, results("before", "after")) or "")
    monkeypatch.setattr(Planning, "revision", Planning.revision + 1)
    assert to_raise(golden, results("after", "after")) is None
    assert differences(golden, results("before", "before")) != []  # and then golden.json is written anew


def test_every_result_in_golden_belongs_to_a_stage() -> None:
    """But for texts: help, recipes, what a run copies into final/."""
    texts = r"help/.*|recipe.*|.*/recipe\.resolved\.yaml|.*/final/config\.json|" + REVISIONS
    results = [name for name in read() if not re.fullmatch(texts, name)]
    assert len(results) > 30
    for name in results:
        assert [stage for stage, pattern in STAGES.items() if re.fullmatch(pattern, name)] != [], name


def told(artefacts: Mapping[str, Artefact], name: str, **changes: Any) -> list[str]:
    """What is said where one artefact is another."""
    return differences(summaries(artefacts), {**artefacts, name: replace(artefacts[name], **changes)})
