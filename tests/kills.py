"""Every command killed wherever it changes the disk, and given again: nothing may be lost, left over or different.

    python tests/kills.py                       # every point of every command
    python tests/kills.py prune distil --every 7

Each process is a fork of this one, so the imports are paid once. The killed one dies by `os._exit` just before its n-th
change of the disk, or just after it opened a file to write. Beside the output lies an earlier one that it replaces, and a
file of the user's. What comes of the second call must be, file by file, what an undisturbed one leaves.
"""

import argparse
import builtins
import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from tiny import write_tiny_checkpoint, write_tiny_tokens

from slimqwen.calibration.calibrate import calibrate
from slimqwen.core.errors import UserError
from slimqwen.data.tokenize import tokenize
from slimqwen.depth.measure import DepthEffort, measure_depth
from slimqwen.evaluation.evaluate import evaluate
from slimqwen.healing.heal import heal
from slimqwen.planning.plan import plan
from slimqwen.pruning.prune import prune
from slimqwen.recipe import (
    CalibrationRecipe,
    DistilRecipe,
    Duration,
    EvaluationRecipe,
    Execution,
    HealingRecipe,
    PruningRecipe,
    Recipe,
    Source,
    Target,
    TeacherRecipe,
    TextSettings,
)
from slimqwen.recipe.file import dump_recipe
from slimqwen.refit.refit import refit
from slimqwen.reporting.report import report
from slimqwen.runs.recipe_run import run
from slimqwen.teacher_cache.write import write_teacher_cache
from slimqwen.training.distil import distil, state_folder_of
from slimqwen.training.inputs import TrainingInputs
from slimqwen.training.moments import carry

torch.set_num_threads(1)

KILLED, CRASHED = 137, 99
WAITING = "another process is making it, waiting"  # what a command says that waits for another one's file
LENGTH = 16
TIMES = {"seconds", "tokens_per_second", "memory_bytes", "mfu"}  # of a line of metrics.jsonl
UNLIKE = {"provenance.json", "stages.jsonl", "report.html"}  # they tell when, and how long it took
Command = Callable[[Path, Path, bool], object]  # inputs, working folder, whether it is the earlier output that is made


OFTEN = Execution.model_validate({"save_every": "1 steps", "keep_states": 1, "workers": 1})


def settings(earlier: bool, **values: Any) -> DistilRecipe:
    usual: dict[str, Any] = {
        "tokens": LENGTH * 2 * (2 if earlier else 4),
        "batch_size": 2,
        "warmup": "1 steps",
        "learning_rate": 1e-3,
    }
    return DistilRecipe.model_validate(usual | values)


def run_tokens(inputs: Path, work: Path, earlier: bool) -> object:
    sources = [Source(path=inputs / "data" / "text")]
    fraction = 0.3 if earlier else 0.2
    return tokenize(
        sources, inputs / "tokenizer", work / "out", heldout_fraction=fraction, execution=Execution(workers=1)
    )


def run_calibrate(inputs: Path, work: Path, earlier: bool, *, streaming: bool = False) -> object:
    return calibrate(
        inputs / "teacher",
        work / "out.safetensors",
        tokens=inputs / "tokens",
        recipe=CalibrationRecipe(samples=2 if earlier else 4),
        execution=Execution(streaming=streaming),
        text=TextSettings(sequence_length=LENGTH),
        second_moments=True,
    )


def run_calibrate_streaming(inputs: Path, work: Path, earlier: bool) -> object:
    return run_calibrate(inputs, work, earlier, streaming=True)


def run_measure_depth(inputs: Path, work: Path, earlier: bool) -> object:
    return measure_depth(
        inputs / "teacher",
        work / "out.json",
        statistics=inputs / "statistics.safetensors",
        tokens=inputs / "tokens",
        num_hidden_layers=3 if earlier else 2,
        effort=DepthEffort(samples=2),
        text=TextSettings(sequence_length=LENGTH),
    )


def run_plan(inputs: Path, work: Path, earlier: bool) -> object:
    return plan(
        inputs / "teacher",
        work / "out.json",
        statistics=inputs / "statistics.safetensors",
        target=Target(hidden_size=28 if earlier else 24, num_experts=4),
        pruning=PruningRecipe(width="rotation"),
    )


def run_prune(inputs: Path, work: Path, earlier: bool) -> object:
    size = 30_000 if earlier else 60_000
    return prune(inputs / "teacher", work / "out", plan=inputs / "plan.json", shard_bytes=size)


def run_refit(inputs: Path, work: Path, earlier: bool) -> object:
    return refit(
        inputs / "pruned",
        work / "out",
        teacher=inputs / "teacher",
        plan=inputs / "plan.json",
        tokens=inputs / "tokens",
        samples=2 if earlier else 4,
        text=TextSettings(sequence_length=LENGTH),
    )


def run_heal(inputs: Path, work: Path, earlier: bool) -> object:
    return heal(
        inputs / "pruned",
        work / "out",
        teacher=inputs / "teacher",
        plan=inputs / "plan.json",
        tokens=inputs / "tokens",
        recipe=HealingRecipe(samples=2 if earlier else 4, epochs=1),
        text=TextSettings(sequence_length=LENGTH),
    )


def run_teacher_cache(inputs: Path, work: Path, earlier: bool) -> object:
    return write_teacher_cache(
        inputs / "teacher",
        work / "out",
        tokens=inputs / "tokens",
        recipe=TeacherRecipe(top_k=4 if earlier else 8),
        execution=Execution(cache_file_bytes=2_000),
        text=TextSettings(sequence_length=LENGTH),
        sequences=12,
    )


def run_distil(inputs: Path, work: Path, earlier: bool, save_every: Duration | None = None, **values: Any) -> object:
    return distil(
        TrainingInputs(inputs / "pruned", inputs / "tokens", teacher=inputs / "teacher"),
        work / "out",
        recipe=settings(earlier, **values),
        execution=OFTEN if save_every is None else OFTEN.model_copy(update={"save_every": [save_every]}),
        text=TextSettings(sequence_length=LENGTH),
    )


def run_distil_at_its_own_rate(inputs: Path, work: Path, earlier: bool) -> object:
    return run_distil(inputs, work, earlier, learning_rate="auto", save_every=Duration(4, "steps"))


def run_carry(inputs: Path, work: Path, earlier: bool) -> object:
    trained = inputs / "trained"
    return carry(state_folder_of(trained), trained, work / "out", plan=inputs / "second-plan.json")


def run_evaluate(inputs: Path, work: Path, earlier: bool) -> object:
    return evaluate(
        {"teacher": inputs / "teacher"},
        work / "out.json",
        tokens=inputs / "tokens",
        recipe=evaluation(earlier),
        text=TextSettings(sequence_length=LENGTH),
    )


def evaluation(earlier: bool) -> EvaluationRecipe:
    return EvaluationRecipe(
        tokens=32 if earlier else 64,
        acceptance={"prompts": 1, "prompt_tokens": 8, "new_tokens": 6, "depth": 3},
    )


def run_report(inputs: Path, work: Path, earlier: bool) -> object:
    if not (work / "recipe.resolved.yaml").exists():
        dump_recipe(recipe(inputs, work / "run", earlier), work / "recipe.resolved.yaml")
    return report(work)


def recipe(inputs: Path, run_dir: Path, earlier: bool) -> Recipe:
    return Recipe(
        name="tiny",
        run_dir=run_dir,
        teacher=str(inputs / "teacher"),
        target=Target(hidden_size=24, num_experts=4),
        schedule="one_shot",
        data={  # type: ignore[arg-type]
            "sources": [{"path": inputs / "data" / "text"}],
            "heldout_sources": [{"path": inputs / "data" / "heldout_text"}],
            "sequence_length": LENGTH,
        },
        pruning=PruningRecipe(width="norm_activation"),
        calibration=CalibrationRecipe(samples=2),
        distil=settings(earlier),
        evaluation=evaluation(earlier),
        execution=OFTEN,
    )


def run_run(inputs: Path, work: Path, earlier: bool) -> object:
    return run(recipe(inputs, work / "run", earlier))


COMMANDS: dict[str, Command] = {
    name.removeprefix("run_").replace("_", "-"): function
    for name, function in list(globals().items())
    if name.startswith("run_")
}


def make_inputs(folder: Path) -> None:
    """What the commands read: a tiny teacher, tokens, statistics, a plan, a pruned and a trained model with its state."""
    tokenizer, _ = write_tiny_tokens(folder / "data")
    shutil.copytree(tokenizer, folder / "tokenizer")
    shutil.copytree(folder / "data" / "tokens", folder / "tokens")
    write_tiny_checkpoint(folder / "teacher", tokenizer=tokenizer)
    teacher, tokens, plan_file = folder / "teacher", folder / "tokens", folder / "plan.json"

    def measured(checkpoint: Path, out: Path) -> Path:
        calibrate(
            checkpoint,
            out,
            tokens=tokens,
            recipe=CalibrationRecipe(samples=4),
            execution=Execution(streaming=False),
            text=TextSettings(sequence_length=LENGTH),
            second_moments=True,
        )
        return out

    statistics = measured(teacher, folder / "statistics.safetensors")
    narrow = PruningRecipe(width="norm_activation")
    plan(teacher, plan_file, statistics=statistics, target=Target(hidden_size=24, num_experts=4), pruning=narrow)
    prune(teacher, folder / "pruned", plan=plan_file)
    trained = folder / "trained"
    distil(
        TrainingInputs(folder / "pruned", tokens),
        trained,
        recipe=settings(True, terms=["lm"]),
        execution=OFTEN,
        text=TextSettings(sequence_length=LENGTH),
        keep_state=True,
    )
    statistics = measured(trained, folder / "second.safetensors")
    plan(trained, folder / "second-plan.json", statistics=statistics, target=Target(num_experts=2), pruning=narrow)


class Disk:
    """Counts the changes of the disk under a folder, and stops the process at one of them. In a forked child only."""

    def __init__(self, folder: Path, at: int | None, stop: Callable[[], None]) -> None:
        self.folder, self.at, self.stop = str(folder), at, stop
        self.changes = 0

    def change(self) -> None:
        self.changes += 1
        if self.changes == self.at:
            self.stop()

    def watch(self) -> None:
        for name in ("rename", "replace", "unlink", "remove", "rmdir", "mkdir"):
            setattr(os, name, self._counting(getattr(os, name)))
        os.open = self._counting_open(os.open, lambda flags: bool(flags & (os.O_WRONLY | os.O_RDWR)))  # type: ignore[assignment]
        opened = self._counting_open(io.open, lambda mode: any(letter in str(mode) for letter in "wxa+"))
        builtins.open = io.open = opened  # type: ignore[assignment]

    def _is_watched(self, path: Any, options: dict[str, Any]) -> bool:
        if options.get("dir_fd") is not None:  # as shutil.rmtree calls it
            return True
        return isinstance(path, str | os.PathLike) and os.path.abspath(os.fspath(path)).startswith(self.folder)

    def _counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(path: Any, *rest: Any, **options: Any) -> Any:
            if self._is_watched(path, options):
                self.change()
            return function(path, *rest, **options)

        return counted

    def _counting_open(self, function: Callable[..., Any], writes: Callable[[Any], bool]) -> Callable[..., Any]:
        def counted(path: Any, mode: Any = "r", *rest: Any, **options: Any) -> Any:
            watched = writes(mode) and self._is_watched(path, options)
            if watched:
                self.change()
            result = function(path, mode, *rest, **options)
            if watched:
                self.change()  # it is there, and empty
            return result

        return counted


def forked(action: Callable[[], object], log: Path) -> int:
    """The process id of a child that does `action`, its words in `log`; it exits as the command line would."""
    child = os.fork()
    if child:
        return child
    code = CRASHED
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        action()
        code = 0
    except UserError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def ended_or_waiting(child: int, log: Path) -> int | None:
    """The exit code of a child, or None where it says that it waits for another process."""
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if log.exists() and WAITING in log.read_text():
            return None
        time.sleep(0.05)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Trial:
    """One command in a folder of its own: `begin` puts an earlier output and a user's file there."""

    def __init__(self, name: str, inputs: Path, scratch: Path) -> None:
        self.name, self.inputs = name, inputs
        self.command = COMMANDS[name]
        self.start, self.work = scratch / name / "start", scratch / name / "work"
        self.log = scratch / name / "log"
        self.start.mkdir(parents=True)
        (self.start / "notes.txt").write_text("mine")
        # The same path at all times: records and messages tell it.
        self.start.rename(self.work)
        self._check(ended(forked(lambda: self.command(inputs, self.work, True), self.log)))
        self.work.rename(self.start)
        self.begin()
        counted = scratch / name / "changes"
        self._check(ended(forked(lambda: self._count(counted), self.log)))
        self.changes = int(counted.read_text())
        self.expected = snapshot(self.work)

    def begin(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.start, self.work, symlinks=True)

    def _count(self, out: Path) -> None:
        disk = Disk(self.work, None, lambda: None)
        disk.watch()
        self.command(self.inputs, self.work, False)
        out.write_text(str(disk.changes))

    def _check(self, code: int) -> None:
        assert code == 0, f"{self.name} ended with {code}: {self.log.read_text()[-2000:]}"

    def _watched(self, at: int, stop: Callable[[], None]) -> None:
        Disk(self.work, at, stop).watch()
        self.command(self.inputs, self.work, False)

    def kill(self, at: int) -> list[str]:
        """Kill before change number `at`, give the command again, and say what is wrong."""
        self.begin()
        code = ended(forked(lambda: self._watched(at, lambda: os._exit(KILLED)), self.log))
        if code == 0:
            return []  # a change fewer than counted: the order of threads
        if code != KILLED:
            return [f"exit {code} instead of being killed: {self.log.read_text()[-800:]}"]
        code = ended(forked(lambda: self.command(self.inputs, self.work, False), self.log))
        if code != 0:
            return [f"given again, exit {code}: {self.log.read_text()[-800:]}"]
        return unlike(self.expected, snapshot(self.work))

    def twice(self) -> list[str]:
        """A second process while the first is in the middle of it, and say what is wrong."""
        self.begin()
        readable, writable = os.pipe()
        paused, pause = os.pipe()

        def stop() -> None:
            os.write(pause, b".")
            os.read(readable, 1)

        first = forked(lambda: self._watched(self.changes // 2, stop), self.log)
        os.read(paused, 1)
        second_log = self.log.with_name("second")
        second = forked(lambda: self.command(self.inputs, self.work, False), second_log)
        refused = ended_or_waiting(second, second_log)
        os.write(writable, b".")
        wrong = [f"the first: exit {code}: {self.log.read_text()[-500:]}"] if (code := ended(first)) else []
        code, said = (ended(second) if refused is None else refused), second_log.read_text()
        if not ((code == 2 and f"process {first} on" in said) or (code == 0 and WAITING in said)):
            wrong.append(f"the second: exit {code}: {said[-500:]}")
        return wrong + unlike(self.expected, snapshot(self.work))


def snapshot(folder: Path) -> dict[str, str]:
    """Every file, hidden ones and modes too, by what is in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = f"{path.stat().st_mode:o} " if not path.is_dir() else "folder"
        if path.is_file():
            found[name] += "" if path.name in UNLIKE else hashlib.sha256(_contents(path)).hexdigest()
    return found


def _contents(path: Path) -> bytes:
    if path.name != "metrics.jsonl":
        return path.read_bytes()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return json.dumps([{key: value for key, value in line.items() if key not in TIMES} for line in lines]).encode()


def unlike(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    names = sorted(expected.keys() | found.keys())
    states = {
        name: ("lost" if name not in found else "left over" if name not in expected else "unlike") for name in names
    }
    return [f"{state}: {name}" for name, state in states.items() if expected.get(name) != found.get(name)]


def trials(names: list[str], scratch: Path) -> Iterator[Trial]:
    inputs = scratch / "inputs"
    child = forked(lambda: make_inputs(inputs), scratch / "log")  # no backward pass in the process that forks
    assert ended(child) == 0, (scratch / "log").read_text()[-2000:]
    for name in names:
        yield Trial(name, inputs, scratch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", choices=[*COMMANDS, []], help="default: all")
    parser.add_argument("--every", type=int, default=1, help="kill at every n-th point")
    arguments = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory(prefix="slimqwen-kills-") as scratch:
        for trial in trials(arguments.commands or list(COMMANDS), Path(scratch)):
            started, wrong = time.monotonic(), {}
            points = range(1, trial.changes + 1, arguments.every)
            for at in points:
                if found := trial.kill(at):
                    wrong[at] = found
            at_once = trial.twice()
            failed = failed or bool(wrong) or bool(at_once)
            print(
                f"{trial.name}: {len(points)} of {trial.changes} points, {len(wrong)} with a fault; two at once: "
                f"{at_once or 'fine'}; {time.monotonic() - started:.0f} s",
                flush=True,
            )
            for at, found in wrong.items():
                print(f"  at {at}: {found[:5]}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
