"""Stages and stores: what the key is made of, what is made once, and what is removed after its use."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from test_work import recipe, teacher

from slimqwen.artifacts import write_json
from slimqwen.checkpoint.config import read_json
from slimqwen.recipe import Execution, Target
from slimqwen.runs.checks import ScheduleStage
from slimqwen.runs.record import Steps
from slimqwen.runs.stage import Lazy, Stage, Store, identity_of
from slimqwen.runs.stages import Calibrating, DepthMeasuring, Planning, Refitting, TeacherCaching, Tokenizing
from slimqwen.runs.store import ContentStore, RunStore, ScratchStore
from slimqwen.runs.training_stages import Distilling, Evaluating
from slimqwen.training.trainer import Span

__all__ = ["teacher"]  # the fixture

MADE: list[str] = []


@pytest.fixture(autouse=True)
def nothing_made() -> None:
    MADE.clear()


@dataclass(frozen=True)
class Doubling(Stage):
    """A number, twice what is in `before`; or of `moments`, which are made when it begins."""

    number: int
    before: Path | None = None
    moments: Lazy | None = None

    file = "doubled.json"
    revision = 1

    @property
    def inputs(self) -> Mapping[str, Any]:
        return {"before": self.before, "moments": self.moments}

    @property
    def method(self) -> Mapping[str, Any]:
        return {"number": self.number}

    @property
    def lazy(self) -> Sequence[Lazy]:
        return [] if self.moments is None else [self.moments]

    def make(self, out: Path, execution: Execution, title: str) -> None:
        MADE.append(title)
        before = self.moments.get() if self.moments is not None else self.before
        number = self.number if before is None else read_json(before)["number"]
        write_json(out, {"format": "slimqwen.test/1", "number": 2 * number})


@dataclass(frozen=True)
class Halfway(Doubling):
    """A number that is removed after its use, and a file that only it needs."""

    needed: Sequence[Path] = field(default_factory=tuple)

    file = "moments.json"

    @property
    def used_up(self) -> Sequence[Path]:
        return self.needed


def run_store(folder: Path, **execution: Any) -> RunStore:
    return RunStore.of(Steps(folder, "test"), Execution(**execution))


def test_a_run_makes_an_artefact_once_and_again_by_another_method_or_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        assert run_store(tmp_path).within("stage-1").get(Doubling(1)) == tmp_path / "stage-1" / "doubled.json"
    run_store(tmp_path, device="cpu", batch_size=3).within("stage-1").get(Doubling(1))
    assert MADE == ["stage-1/doubled"], "how it is made is no part of the key"
    run_store(tmp_path).within("stage-1").get(Doubling(2))
    monkeypatch.setattr(Doubling, "revision", 2)
    run_store(tmp_path).within("stage-1").get(Doubling(2))
    assert MADE == ["stage-1/doubled"] * 3


def test_what_a_baseline_shares_with_the_main_run_is_found_by_its_key(tmp_path: Path) -> None:
    store = run_store(tmp_path)
    shared = store.within("stage-1").get(Doubling(1))
    assert store.within("paper").within("stage-1").get(Doubling(1)) == shared
    assert store.within("paper").within("stage-1").get(Doubling(3)) == tmp_path / "paper/stage-1/doubled.json"
    assert MADE == ["stage-1/doubled", "paper/stage-1/doubled"]


def test_a_study_finds_what_another_arm_made(tmp_path: Path) -> None:
    first, second = (ContentStore(tmp_path, "test", Execution()) for _ in range(2))
    before = first.within("stage-1").get(Doubling(1))
    assert second.within("stage-2").get(Doubling(1)) == before
    assert second.get(Doubling(2)) != before and len(MADE) == 2


def test_a_scratch_makes_everything_anew_and_goes(tmp_path: Path) -> None:
    store = ScratchStore(tmp_path / ".cut", Execution())
    store.claim()
    assert [store.get(Doubling(1)).is_file() for _ in range(2)] == [True, True] and len(MADE) == 2
    store.empty()
    assert not (tmp_path / ".cut").exists()


def training_in(store: Store, needed: Sequence[Path] = ()) -> Doubling:
    return Doubling(0, moments=Lazy(Halfway(1, needed=needed), store))


def test_a_lazy_input_is_made_when_it_is_needed_and_removed_by_a_run_after_it(tmp_path: Path) -> None:
    here = run_store(tmp_path).within("stage-2")
    state = tmp_path / "state.json"
    write_json(state, {"format": "slimqwen.test/1"})
    training = training_in(here, [state])
    identity = training.identity()
    assert MADE == [], "the key is known before"
    assert read_json(here.get(training))["number"] == 4
    assert MADE == ["stage-2/doubled", "stage-2/moments"]
    assert not (tmp_path / "stage-2" / "moments.json").exists() and not state.exists()

    again = run_store(tmp_path).within("stage-2")
    again.get(training_in(again))
    assert len(MADE) == 2 and training_in(again).identity() == identity

    kept = ContentStore(tmp_path / "study", "test", Execution())
    kept.get(training_in(kept))
    assert list((tmp_path / "study").glob("moments/*/moments.json")), "another cut may need them"


def test_a_key_holds_contents_and_no_places(tmp_path: Path) -> None:
    identities = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "part").write_text("the same")
        identities.append(identity_of({"one": folder, "list": [folder / "part"], "none": None, "text": "as it is"}))
    assert identities[0] == identities[1] and identities[0]["text"] == "as it is"


def test_no_setting_of_the_section_execution_is_part_of_a_key(tmp_path: Path, teacher: tuple[Path, Path]) -> None:
    checkpoint, tokens = teacher
    plan = tmp_path / "plan.json"
    plan.write_text("{}")
    target = Target(num_hidden_layers=3)

    def identities(**sections: Any) -> list[dict[str, Any]]:
        wanted = recipe(tmp_path, **sections)
        stages: list[Stage] = [
            Tokenizing(wanted.data, checkpoint),
            TeacherCaching(wanted, tokens, 1),
            Calibrating(wanted, checkpoint, tokens),
            DepthMeasuring(wanted, checkpoint, plan, tokens, target),
            Planning(wanted, checkpoint, plan, target, None),
            Refitting(wanted, checkpoint, checkpoint, plan, tokens),
            Distilling(wanted, ScheduleStage(1, target, Span(0, 1, 1), "stage-1"), checkpoint, tokens),
            Evaluating(wanted, {"teacher": checkpoint}, tokens),
        ]
        return [stage.identity() for stage in stages]

    usual = identities()
    other = {
        "device": "cuda:1",
        "batch_size": 5,
        "micro_batch_size": 1,
        "streaming": True,
        "workers": 3,
        "keep_states": 7,
    }
    assert identities(execution=other) == usual
    changed = identities(distil={"tokens": 128, "batch_size": 4, "load_balancing_coefficient": 0.01})
    assert [name["stage"] for name, before in zip(changed, usual, strict=True) if name != before] == [
        "teacher_cache",
        "distilled",
    ]


def test_what_calibrates_does_not_depend_on_document_boundaries(tmp_path: Path, teacher: tuple[Path, Path]) -> None:
    """It reads packed rows in either case; a training does not."""
    checkpoint, tokens = teacher
    target, plan = Target(num_hidden_layers=1), tmp_path / "plan.json"
    write_json(plan, {"format": "slimqwen.test/1"})

    def keys(documents: str) -> dict[str, Any]:
        wanted = recipe(tmp_path, data={"documents": documents})
        stages: list[Stage] = [
            Calibrating(wanted, checkpoint, tokens),
            DepthMeasuring(wanted, checkpoint, plan, tokens, target),
            Refitting(wanted, checkpoint, checkpoint, plan, tokens),
            Distilling(wanted, ScheduleStage(1, target, Span(0, 1, 1), "stage-1"), checkpoint, tokens),
        ]
        return {stage.name: stage.identity() for stage in stages}

    packed, isolated = keys("packed"), keys("isolated")
    assert [name for name in packed if packed[name] != isolated[name]] == ["distilled"]
