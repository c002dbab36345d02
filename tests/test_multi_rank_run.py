"""A whole run on several ranks (gloo): what one rank makes of it, kills in any stage, another number of ranks, one sentence."""

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, run_ranks
from rounding import FORWARD, TRAINED, error
from safetensors.torch import load_file
from test_pipeline import tiny_recipe

from slimqwen.artifacts import alone_in
from slimqwen.calibration.calibrate import calibrate
from slimqwen.calibration.statistics import Statistics
from slimqwen.calibration.text import CalibrationText
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.cli import main
from slimqwen.core.errors import StageFailed, UserError
from slimqwen.core.torchrun import rank
from slimqwen.evaluation.result import Evaluation
from slimqwen.planning.plan import Plan
from slimqwen.recipe import CalibrationRecipe, Execution, Recipe, TeacherRecipe
from slimqwen.recipe.file import dump_recipe
from slimqwen.runs import stages, training_stages
from slimqwen.runs.recipe_run import run
from slimqwen.teacher_cache import write
from slimqwen.training.trainer import Trainer

SHORT: dict[str, Any] = {
    "baselines": ["pruned"],
    "distil": {"tokens": 16 * 4 * 10, "batch_size": 4, "warmup": "2 steps", "learning_rate": 1e-3},
    "evaluation": {"tokens": 64, "acceptance": {"prompts": 1, "prompt_tokens": 8, "new_tokens": 6, "depth": 3}},
}
# With stages of every kind: the first cut is healed, all trainings but one read the teacher's cache.
FULL: dict[str, Any] = {
    "baselines": ["paper_pruned", "pruned", "random_init", "lm_only"],
    "distil": {**SHORT["distil"], "teacher": {"kind": "cache", "top_k": 8}},
    "healing": {"samples": 4, "epochs": 1, "batch_size": 2, "learning_rate": 1e-3},
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """What one process makes of the tiny recipe."""
    folder = tmp_path_factory.mktemp("multi_rank_run")
    recipe = tiny_recipe(folder, folder / "run", **SHORT)
    run(recipe)
    return recipe


def recipe_in(run_dir: Path, alone: Recipe, **changes: Any) -> Recipe:
    """The same recipe in another folder."""
    return tiny_recipe(Path(alone.teacher).parent, run_dir, **{**SHORT, **changes})


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def files_in(folder: Path) -> set[str]:
    """All files of a run, but for those of its evaluation that have a checkpoint's fingerprint for a name, and each rank's log."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in files if not {".evaluation.json.measured", "ranks"} & set(path.parts)}


def assert_the_same_statistics(found: Statistics, expected: Statistics, tolerance: float) -> None:
    """Sums that were added up in another order, of all tokens."""
    assert (found.tokens, found.data) == (expected.tokens, expected.data)
    assert found.sums.keys() == expected.sums.keys()
    for name, sums in expected.sums.items():
        assert error(found.sums[name], sums) < tolerance, name


def assert_the_same_run(found: Path, expected: Path) -> None:
    """Files, plans, steps and numbers of two runs, of which what is computed may differ by rounding."""
    assert files_in(found) == files_in(expected)
    statistics = (Statistics.load(folder / "stage-1" / "statistics.safetensors") for folder in (found, expected))
    assert_the_same_statistics(*statistics, FORWARD)
    for stage in ("stage-1", "stage-2"):
        mine, other = (Plan.load(folder / stage / "plan.json") for folder in (found, expected))
        assert (mine.kept_layers, mine.kept, mine.target) == (other.kept_layers, other.kept, other.target), stage
        members = [
            {name: [group.members for group in groups] for name, groups in plan.expert_groups.items()}
            for plan in (mine, other)
        ]
        assert members[0] == members[1], stage
    steps, expected_steps = (lines_of(folder / "metrics.jsonl") for folder in (found, expected))
    for step, expected_step in zip(steps, expected_steps, strict=True):
        assert [step[name] for name in ("run", "stage", "step", "tokens")] == [
            expected_step[name] for name in ("run", "stage", "step", "tokens")
        ]
        assert step["loss"] == pytest.approx(expected_step["loss"], rel=TRAINED)
    mine, other = (Evaluation.load(folder / "evaluation.json").models for folder in (found, expected))
    assert list(mine) == list(other)
    for name, numbers in other.items():
        assert mine[name].loss == pytest.approx(numbers.loss, rel=TRAINED), name


def assert_ranks_are_logged(run_dir: Path, size: int) -> None:
    """A line of each rank for the tenth step, and in metrics.jsonl the busiest of them."""
    (step,) = (line for line in lines_of(run_dir / "metrics.jsonl") if "busiest_rank" in line)
    logs = [lines_of(run_dir / "ranks" / f"rank-{number}.jsonl") for number in range(size)]
    assert [(line["rank"], line["stage"], line["step"]) for (line,) in logs] == [(n, 2, 9) for n in range(size)]
    seconds = [line["cpu_seconds"] for (line,) in logs]
    assert step["step"] == 9 and seconds[step["busiest_rank"]] == max(seconds) > 0
    assert step["busiest_rank_cpu_seconds"] == pytest.approx(max(seconds), abs=1e-6)


@pytest.mark.rounding
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_many_ranks_make_what_one_makes(alone: Recipe, tmp_path: Path, size: int) -> None:
    recipe = recipe_in(tmp_path / "run", alone)
    codes, said = Ranks(size, run, recipe).end(300.0)
    assert codes == [0] * size and "sequential all_reduce" not in said, said  # PyTorch's warning, of every rank
    assert_the_same_run(recipe.run_dir, alone.run_dir)
    assert_ranks_are_logged(recipe.run_dir, size)
    if size == 4:
        return
    steps = [line["step"] for line in lines_of(recipe.run_dir / "stages.jsonl")]
    assert steps == [line["step"] for line in lines_of(alone.run_dir / "stages.jsonl")]  # of one rank only
    assert json.loads((recipe.run_dir / "provenance.json").read_text())["processes"] == 2
    before = {path: path.stat().st_mtime_ns for path in recipe.run_dir.rglob("model.safetensors")}
    run(recipe)  # one rank finds all of it done
    assert {path: path.stat().st_mtime_ns for path in recipe.run_dir.rglob("model.safetensors")} == before
    assert all(line["skipped"] for line in lines_of(recipe.run_dir / "stages.jsonl")[len(steps) :])


# --- statistics --------------------------------------------------------------------------------------------------------


def measure(recipe: Recipe, out: Path) -> None:
    """`calibrate` on three sequences, fewer than four ranks."""
    calibrate(
        Path(recipe.teacher),
        out,
        tokens=recipe.run_dir / "tokens",
        recipe=CalibrationRecipe(samples=3),
        text=recipe.text,
        execution=Execution(batch_size=2),
        second_moments=True,
    )


@pytest.mark.rounding
def test_statistics_are_those_of_one_rank(alone: Recipe, tmp_path: Path) -> None:
    """Of four ranks one has no sequence. Layer by layer: tests/test_layers_on_ranks.py."""
    measure(alone, tmp_path / "one.safetensors")
    run_ranks(4, measure, alone, tmp_path / "many.safetensors")
    found, expected = (Statistics.load(tmp_path / f"{name}.safetensors") for name in ("many", "one"))
    assert_the_same_statistics(found, expected, FORWARD)


def test_shares_of_the_ranks_are_every_row_once(alone: Recipe) -> None:
    tokens, teacher = alone.run_dir / "tokens", Checkpoint(Path(alone.teacher))
    text = CalibrationText(tokens, teacher, samples=5, sequence_length=16, seed=0)
    shares = [text.share(rank, 4) for rank in range(4)]
    assert [sum(share.sections) for share in shares] == [2, 1, 1, 1]

    def rows(some: CalibrationText) -> list[tuple[str, int, list[int]]]:
        return [(*part, row.tolist()) for part, batch in some.batches(2) for row in batch]

    assert sorted(row for share in shares for row in rows(share)) == sorted(rows(text))


# --- teacher cache -----------------------------------------------------------------------------------------------------


def cache(recipe: Recipe, out: Path, streaming: bool, ended_after: int | None = None) -> None:
    """`teacher-cache` with a sequence to a shard; the second rank ends without a word after some of its shards."""
    if ended_after is not None and rank() == 1:
        original, written = write.write_shard, 0

        def write_or_end(*arguments: Any) -> None:
            nonlocal written
            if written == ended_after:
                os._exit(9)
            written += 1
            original(*arguments)

        write.write_shard = write_or_end
    write.write_teacher_cache(
        Path(recipe.teacher),
        out,
        tokens=recipe.run_dir / "tokens",
        recipe=TeacherRecipe(kind="cache", top_k=4),
        text=recipe.text,
        sequences=7,
        execution=Execution(cache_file_bytes=1, streaming=streaming),
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_a_teacher_cache_is_that_of_one_rank(alone: Recipe, tmp_path: Path, streaming: bool) -> None:
    """Killed and continued on the way: shards that were finished stay."""
    run_ranks(1, cache, alone, tmp_path / "one", streaming)
    codes, said = Ranks(2, cache, alone, tmp_path / "many", streaming, 2).end()
    assert codes == [1, 9], said
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / ".many.partial").glob("shard-*.safetensors")}
    assert 2 <= len(finished) < 7
    run_ranks(2, cache, alone, tmp_path / "many", streaming)
    shards = sorted(path.name for path in (tmp_path / "one").glob("shard-*.safetensors"))
    assert len(shards) == 7 and files_in(tmp_path / "many") == files_in(tmp_path / "one")
    for path, written_at in finished.items():
        assert (tmp_path / "many" / path.name).stat().st_mtime_ns == written_at
    for name in shards:  # each is computed by one process, from the same sequence alone
        found, expected = (load_file(tmp_path / folder / name) for folder in ("many", "one"))
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), (name, key)


# --- ended by one rank -------------------------------------------------------------------------------------------------


def before_make(kind: type[stages.Stage], number: int, action: Callable[[], None]) -> None:
    """Do `action` when this process is about to make the stage `kind` for the `number`-th time, from 1."""
    original, count = kind.make, 0

    def make(self: Any, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == number:
            action()
        original(self, *arguments)

    kind.make = make  # type: ignore[method-assign]


def run_until(recipe: Recipe, kind: str, number: int, killed: int, step: int | None = None) -> None:
    """Run, and end the rank `killed` without a word as it begins a stage, or the optimiser step `step` of it."""

    def end() -> None:
        os._exit(9)

    def end_at_step() -> None:
        original = Trainer.step

        def step_or_end(self: Trainer, at: int) -> dict[str, float]:
            if at == step:
                end()
            return original(self, at)

        Trainer.step = step_or_end  # type: ignore[method-assign]

    if rank() == killed:
        classes = {**vars(stages), **vars(training_stages)}
        before_make(classes[kind], number, end if step is None else end_at_step)
    run(recipe)


@pytest.mark.slow
@pytest.mark.rounding
def test_killed_in_any_stage_and_continued_by_other_numbers_of_ranks(alone: Recipe, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path / "run", alone)
    made = recipe.run_dir / ".steps"
    for size, kind, number, killed, step in (
        (2, "Calibrating", 1, 0, None),  # the other waits
        (2, "Distilling", 1, 1, None),  # all work
        (1, "Distilling", 1, 0, 2),
        (2, "Pruning", 1, 0, None),  # stage 2
        (2, "Evaluating", 1, 0, None),
    ):
        codes, said = Ranks(size, run_until, recipe, kind, number, killed, step).end()
        assert codes == [9 if rank == killed else 1 for rank in range(size)], (kind, said)
        assert "Traceback" not in said and (size == 1 or said.count("has lost") == 1), (kind, said)
        assert not (made / "final.json").exists()
    run_ranks(2, run, recipe)
    assert_the_same_run(recipe.run_dir, alone.run_dir)


@pytest.mark.slow
@pytest.mark.rounding
def test_kills_at_random_moments_of_all_stages(alone: Recipe, tmp_path: Path) -> None:
    """kill -9 of any rank at any moment; the others end within seconds, and other numbers of ranks continue."""
    expected = recipe_in(tmp_path / "alone", alone, **FULL)
    started = time.monotonic()
    run_ranks(1, run, expected, timeout_seconds=300.0)
    seconds = time.monotonic() - started
    recipe = recipe_in(tmp_path / "run", alone, **FULL)
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    for size in (2, 2, 1, 4, 2):
        ranks = Ranks(size, run, recipe)
        begun = recipe.run_dir / "recipe.resolved.yaml"
        before = begun.stat().st_mtime_ns if begun.exists() else None
        while not (begun.exists() and begun.stat().st_mtime_ns != before):
            assert ranks.processes[0].is_alive(), seed
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, seconds / 2))
        ranks.processes[chance.randrange(size)].kill()
        killed_at = time.monotonic()
        codes, said = ranks.end(300.0)
        assert codes == [0] * size or (-9 in codes and time.monotonic() - killed_at < 20), (seed, said)
        assert set(codes) <= {-9, 0, 1} and "Traceback" not in said, (seed, said)
    run_ranks(2, run, recipe, timeout_seconds=300.0)
    assert_the_same_run(recipe.run_dir, expected.run_dir)


def command(recipe: Recipe, *overrides: str, kind: str = "", failing: int = -1, code: int = 0) -> None:
    """`slimqwen run` as a process of torchrun's; the rank `failing` raises an error as it begins the stage `kind`."""

    def fail() -> None:
        raise {1: StageFailed, 2: UserError}[code]("the disk is on fire.")

    if rank() == failing:
        before_make({**vars(stages), **vars(training_stages)}[kind], 1, fail)
    file = recipe.run_dir.with_name(f"recipe-of-rank-{rank()}.yaml")
    dump_recipe(recipe, file)
    sys.argv = ["slimqwen", "run", str(file), *(word for pair in overrides for word in ("--set", pair))]
    main()


def program(*words: str) -> None:
    """A command of `slimqwen`, as a process of torchrun's."""
    sys.argv = ["slimqwen", *words]
    main()


def test_commands_on_two_ranks(alone: Recipe, tmp_path: Path) -> None:
    """Pruning, which they share out, is what the run made of it; the report the first writes; an error is printed once."""
    stage, out = alone.run_dir / "stage-1", tmp_path / "pruned"
    words = ["prune", str(alone.teacher), "--plan", str(stage / "plan.json"), "--out", str(out)]
    run_ranks(2, program, *words)
    assert (out / "model.safetensors").read_bytes() == (stage / "pruned" / "model.safetensors").read_bytes()
    page = alone.run_dir / "report.html"
    before = page.stat().st_mtime_ns
    run_ranks(2, program, "report", str(alone.run_dir))
    assert page.stat().st_mtime_ns > before
    codes, said = Ranks(2, program, *words[:-1], str(alone.teacher)).end()
    assert codes == [2, 2] and said.count("error:") == 1, said
    codes, said = Ranks(2, program, "prune", "--no-such-option").end()
    assert codes == [2, 2] and said.count("No such option") == 1, said


def test_a_second_job_in_the_same_folder_ends_with_one_sentence(alone: Recipe) -> None:
    with alone_in(alone.run_dir):
        codes, said = Ranks(2, command, alone).end()
    assert codes == [2, 2], said
    assert said.count("error:") == 1 and f"{alone.run_dir} is being made by another process" in said, said


def failing_command(recipe: Recipe, kind: str, failing: int, code: int) -> None:
    command(recipe, kind=kind, failing=failing, code=code)


@pytest.mark.parametrize(("kind", "failing", "code"), [("Planning", 0, 1), ("Distilling", 1, 2)])
def test_an_error_of_one_rank_ends_all_with_one_sentence(
    alone: Recipe, tmp_path: Path, kind: str, failing: int, code: int
) -> None:
    recipe = recipe_in(tmp_path / "run", alone)
    codes, said = Ranks(2, failing_command, recipe, kind, failing, code).end()
    assert codes == [code, code], said
    assert said.count("error:") == 1 and f"rank {failing}: error: the disk is on fire." in said, said


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("distil.batch_size=3", "batch_size 3 cannot be shared by 2 ranks"),
        ("execution.expert_ranks=3", "expert_ranks 3 does not divide the 2 ranks"),
        ("distil.batch_sizes=2", "did you mean"),
    ],
)
def test_what_every_rank_finds_wrong_is_printed_once(
    alone: Recipe, tmp_path: Path, override: str, sentence: str
) -> None:
    recipe = recipe_in(tmp_path / "run", alone)
    codes, said = Ranks(2, command, recipe, override).end()
    assert codes == [2, 2], said
    assert said.count(sentence) == 1 and said.count("error:") == 1, said
    assert not recipe.run_dir.exists()
