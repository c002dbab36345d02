"""Measure how close `distil.learning_rate: auto` comes to the best rate of a grid, in whole trainings and in forks of them.

    python benchmarks/learning_rate.py OUT --start harsh [--seed 0] [--steps 96] [--rates 5e-4 1e-3 ...] [--forks 8 16] [--whole]
                                       [--auto] [--measured-tokens 16384]
    python benchmarks/learning_rate.py OUT --table

A start is a cut of the built-in teacher. From it, at every rate, the whole training of --steps steps is run (--whole), and forks
of this many of its steps (--forks); --auto trains once by `distil` with `learning_rate: auto`. The KL to the teacher is measured
on held-out text, nats per token. Every result is written to OUT/results.jsonl at once and not measured again; --table prints
them. Only one process may work in OUT.
"""

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from slimqwen.artifacts.json_lines import append, read_lines, value_of
from slimqwen.builtin import DEMO_RECIPE, checkpoint_folder
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import StageFailed
from slimqwen.data.store import training_stream
from slimqwen.evaluation.fidelity import Recording, compare, heldout_rows, record
from slimqwen.model.device import reproducible
from slimqwen.model.model import MtpCausalLM, load
from slimqwen.recipe import DistilRecipe, PruningRecipe, Target, TextSettings
from slimqwen.recipe.file import load_recipe
from slimqwen.runs.checks import stages_of
from slimqwen.runs.schedule import follow_schedule
from slimqwen.runs.stages import Tokenizing
from slimqwen.runs.store import ContentStore
from slimqwen.study.variation import changed
from slimqwen.training.distil import distil
from slimqwen.training.inputs import TrainingInputs
from slimqwen.training.learning_rate import FILE, RateChoice
from slimqwen.training.teacher import LiveTeacher
from slimqwen.training.trainer import Span, Student, Trainer

BATCH_SIZE = 4
END_RATE = 3e-5 / 4e-4  # of the peak, as in the recipe's defaults
STARTS: dict[str, dict[str, Any]] = {
    "harsh": {},  # the demo's: layers -25 %, width -25 %, experts -50 %
    "gentle": {"target": Target(num_hidden_layers=7, hidden_size=112, num_experts=24).model_dump()},
    "paper": {"pruning": PruningRecipe().as_published().model_dump()},  # the demo's shape by the paper's criteria
}


class Bench:
    """Start of one seed: the cut, the teacher, and the teacher's recording on the measured text."""

    def __init__(self, out: Path, start: str, seed: int, measured_tokens: int) -> None:
        run_dir = json.dumps(str(out / "work"))
        recipe = load_recipe(DEMO_RECIPE, [f"run_dir={run_dir}", "schedule=one_shot", "baselines=[]"])
        recipe = changed(recipe, {"seed": seed, **STARTS[start]})
        store = ContentStore(recipe.run_dir, "benchmarks/learning_rate.py", recipe.execution)
        store.begin(recipe)
        self.teacher_folder = checkpoint_folder(recipe.teacher)
        self.tokens = store.get(Tokenizing(recipe.data, self.teacher_folder))
        stages = stages_of(recipe, Checkpoint(self.teacher_folder))
        made = follow_schedule(recipe, stages, store, tokens=self.tokens, trains=False)
        self.out, self.student, self.seed = out, made.last, seed
        self.length = recipe.data.sequence_length
        self.teacher = load(self.teacher_folder)
        self.rows = heldout_rows(self.tokens, self.length, measured_tokens)
        self.teacher_recording = self.record_model(self.teacher, self.teacher_folder)

    def recipe(self, steps: int, rate: float | None) -> DistilRecipe:
        """Return the training of `steps` steps; a rate of None is `auto`."""
        usual = {
            "tokens": steps * BATCH_SIZE * self.length,
            "batch_size": BATCH_SIZE,
            "warmup": f"{max(steps // 12, 1)} steps",
        }
        rates = (
            {"learning_rate": "auto"}
            if rate is None
            else {"learning_rate": rate, "final_learning_rate": END_RATE * rate}
        )
        return DistilRecipe.model_validate(usual | rates)

    def train(self, steps: int, rate: float, fork: int | None) -> dict[str, float]:
        """Return the KL after the training, or after `fork` of its steps; infinite where it diverged."""
        source, model = Checkpoint(self.student), load(self.student)
        trainer = Trainer(
            Student(model, source.family, source.config),
            LiveTeacher(self.teacher, teaches_mtp=False),
            training_stream(self.tokens, self.length, self.seed),
            self.recipe(steps, rate),
            Span(0, steps, steps),
        )
        model.train()
        made = range(steps) if fork is None else [(2 * i + 1) * steps // (2 * fork) for i in range(fork)]
        try:
            with reproducible(trainer.device):
                for step in made:
                    trainer.step(step)
        except StageFailed:
            return {"kl": float("inf")}
        model.eval()
        return {"kl": self.kl(model)}

    def train_auto(self, steps: int, name: str) -> dict[str, float]:
        """Return the KL after a training with `auto`, the chosen rate, and the cost of choosing it."""
        trained = distil(
            TrainingInputs(self.student, self.tokens, teacher=self.teacher_folder),
            self.out / name,
            recipe=self.recipe(steps, None),
            text=TextSettings(sequence_length=self.length, seed=self.seed),
            title=name,
        )
        choice = RateChoice.load(trained / FILE)
        found = {"chosen": choice.rate, "forks": len(choice.forks), "fork_steps": choice.steps, "share": choice.share}
        return {"kl": self.kl(load(trained)), **found}

    def kl(self, model: MtpCausalLM) -> float:
        """Return KL(teacher || model) on the measured text."""
        kl: float = compare(self.record_model(model, self.student), self.teacher_recording)["kd"]
        return kl

    def record_model(self, model: MtpCausalLM, folder: Path) -> Recording:
        """Run the model on the measured text."""
        of = Checkpoint(folder)
        recording: Recording = record(model, of.family, of.config, self.rows, batch_size=8, title="measure")
        return recording


def table(lines: list[dict[str, Any]]) -> str:
    """Format a line per start and length: the KL at every rate, and at the chosen one."""
    by_case: dict[tuple[Any, ...], dict[float | str, float]] = defaultdict(dict)
    for line in lines:
        of = line["of"]
        case = (of["start"], of["seed"], of["steps"], of["fork"] or 0)
        by_case[case]["auto" if of["rate"] is None else of["rate"]] = line["kl"]
    rates = sorted({rate for found in by_case.values() for rate in found if isinstance(rate, float) and rate})
    rows = [["start", "seed", "steps", "of them", *(f"{rate:.3g}" for rate in rates), "auto"]]
    for (start, seed, steps, fork), found in sorted(by_case.items()):
        if not steps:
            rows.append([start, str(seed), "none", "", f"{found[0.0]:.4f}"])
            continue
        numbers = [f"{found[rate]:.4f}" if rate in found else "" for rate in (*rates, "auto")]
        rows.append([start, str(seed), str(steps), str(fork or "all"), *numbers])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", choices=STARTS, default="harsh")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--rates", type=float, nargs="*", default=[])
    parser.add_argument("--forks", type=int, nargs="*", default=[])
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--auto", action="store_true")
    parser.add_argument("--measured-tokens", type=int, default=16_384)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()

    file = given.out / "results.jsonl"
    lines = [line for line in map(value_of, read_lines(file)) if line is not None]
    if given.table:
        print(table(lines))
        return
    done = {json.dumps(line["of"], sort_keys=True) for line in lines}
    case = {"start": given.start, "seed": given.seed}
    wanted = [{**case, "steps": 0, "fork": None, "rate": 0.0}]
    for fork in [*given.forks, *([None] if given.whole else [])]:
        wanted += [{**case, "steps": given.steps, "fork": fork, "rate": rate} for rate in given.rates]
    if given.auto:
        wanted.append({**case, "steps": given.steps, "fork": None, "rate": None})
    left = [of for of in wanted if json.dumps(of, sort_keys=True) not in done]
    bench = Bench(given.out, given.start, given.seed, given.measured_tokens) if left else None
    for of in left:
        assert bench is not None
        started = time.monotonic()
        if not of["steps"]:
            found = {"kl": bench.kl(load(bench.student))}
        elif of["rate"] is None:
            found = bench.train_auto(of["steps"], f"auto-{of['start']}-{of['seed']}-{of['steps']}")
        else:
            found = bench.train(of["steps"], of["rate"], of["fork"])
        append(file, {"of": of, **found, "seconds": round(time.monotonic() - started, 1)})
        print(of, found, flush=True)


if __name__ == "__main__":
    main()
