"""Measure pruning's candidate defaults on one teacher: ways to cut x cuts x calibration draws, on text at home and away.

    python benchmarks/defaults.py OUT --teacher FOLDER --home TOKENS --away TOKENS [--cuts depth experts width all]
                                  [--ways paper today ...] [--draws 3] [--samples 64] [--measured-tokens 8192]
                                  [--training-tokens 40960 --learning-rates 3e-4 1e-3]

TOKENS are folders written by `slimqwen tokens`. Calibration and refit read the training part of --home (of both with
--mixed); a draw is a seed of its order. The KL to the teacher, before any training, is measured on the held-out part of each
text. With --training-tokens every way is also distilled on the home text, at each of the learning rates. Every result is
written to OUT/results.jsonl at once and not measured again; `--table` prints means and standard deviations over the draws, of
trained students at the rate that is best at home. Only one process may work in OUT.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch

from slimqwen.builtin import checkpoint_folder
from slimqwen.calibration.calibrate import calibrate
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.depth.measure import DepthEffort, measure_depth
from slimqwen.evaluation.fidelity import Recording, compare, heldout_rows, record
from slimqwen.healing.heal import heal
from slimqwen.model.model import load
from slimqwen.planning.plan import cuts_only_channels, plan
from slimqwen.pruning.prune import prune
from slimqwen.recipe import (
    CalibrationRecipe,
    DistilRecipe,
    Duration,
    HealingRecipe,
    PruningRecipe,
    Target,
    TextSettings,
)
from slimqwen.refit.refit import refit
from slimqwen.training.distil import distil
from slimqwen.training.inputs import TrainingInputs

SEQUENCE_LENGTH = 256


def pruning(experts: dict[str, Any] | None = None, **fields: Any) -> PruningRecipe:
    return PruningRecipe.model_validate({**fields, "experts": experts or {}})


NO_REFIT: dict[str, Any] = {"refit_outputs": False}
HEALING = HealingRecipe(samples=128)  # of the ways whose name says healed
WAYS = {
    "paper": PruningRecipe().as_published(),
    "today": pruning(),
    "today, no refit": pruning(**NO_REFIT),
    "rotation alone": pruning(**NO_REFIT, refit_readers=False),
    **{
        f"{depth}{refit}": pruning(**(NO_REFIT if refit else {}), depth=depth)
        for depth in ("similarity", "block_influence", "measured")
        for refit in (", no refit", "")
    },
    **{
        f"{importance}{refit}": pruning({"importance": importance}, **(NO_REFIT if refit else {}))
        for importance in ("frequency", "reap", "output_norm")
        for refit in (", no refit", "")
    },
    "measured, reap": pruning({"importance": "reap"}, depth="measured"),
    "measured, output_norm": pruning({"importance": "output_norm"}, depth="measured"),
    "healed": pruning(),
    "healed, no refit": pruning(**NO_REFIT),
    "measured, healed": pruning(depth="measured"),
    "reap, healed": pruning({"importance": "reap"}),
    "measured, reap, healed": pruning({"importance": "reap"}, depth="measured"),
}
"""Ways to cut, by name. A cut uses only some settings of a way: one of experts does not use the depth criterion."""


@dataclass(frozen=True)
class Bench:
    """Teacher, texts and folder of the measurements."""

    out: Path
    teacher: Path
    texts: dict[str, Path]
    mixed: bool
    samples: int
    measured_tokens: int
    depth_samples: int = 16

    @property
    def sources(self) -> dict[str, Path]:
        """Texts for calibration and refit."""
        return self.texts if self.mixed else {"home": self.texts["home"]}

    @property
    def name(self) -> str:
        return f"{'mixed' if self.mixed else 'home'}-{self.samples}"

    def statistics(self, draw: int) -> Path:
        """Calibrate with the draw's seed, unless that is done; return the statistics."""
        path = self.out / f"statistics-{self.name}-{draw}.safetensors"
        if not path.exists():
            recipe = CalibrationRecipe(samples=self.samples, sources=self.sources)
            settings: dict[str, Any] = {
                "text": TextSettings(sequence_length=SEQUENCE_LENGTH, seed=draw),
                "second_moments": True,
            }
            calibrate(self.teacher, path, recipe=recipe, **settings)
        return path

    def depth(self, target: Target, draw: int) -> Path:
        """Measure the depth with the draw's seed, unless that is done; return the measurement."""
        path = self.out / f"depth-{self.name}-{self.depth_samples}-{draw}.json"
        if not path.exists():
            measure_depth(
                self.teacher,
                path,
                statistics=self.statistics(draw),
                tokens=self.sources,
                num_hidden_layers=target.num_hidden_layers or 0,
                effort=DepthEffort(samples=self.depth_samples),
                text=TextSettings(sequence_length=SEQUENCE_LENGTH, seed=draw),
            )
        return path

    def target(self, cut: str) -> Target:
        """Return the target of a cut by name."""
        config = Checkpoint(self.teacher).config
        sizes: dict[str, dict[str, int]] = {
            "depth": {"num_hidden_layers": config["num_hidden_layers"] - max(2, config["num_hidden_layers"] // 7)},
            "experts": {"num_experts": config["num_experts"] * 3 // 4},
            "width": {"hidden_size": config["hidden_size"] * 3 // 4},
        }
        sizes["all"] = sizes["depth"] | sizes["experts"] | sizes["width"]
        fields = sizes[cut]
        if "num_experts" in fields:
            fields["num_experts_per_tok"] = min(config["num_experts_per_tok"], fields["num_experts"])
        return Target(**fields)

    def make_student(self, way: str, cut: str, draw: int, work: Path) -> Path:
        """Make the cut model in `work`, an empty folder."""
        criteria = WAYS[way]
        file = work / "plan.json"
        target = self.target(cut)
        depth = self.depth(target, draw) if criteria.depth == "measured" and target.num_hidden_layers else None
        made_plan = plan(
            self.teacher, file, statistics=self.statistics(draw), target=target, pruning=criteria, depth=depth
        )
        made = prune(self.teacher, work / "pruned", plan=file)
        settings: dict[str, Any] = {
            "teacher": self.teacher,
            "plan": file,
            "tokens": self.sources,
            "text": TextSettings(sequence_length=SEQUENCE_LENGTH, seed=draw),
        }
        if criteria.refit_outputs and not cuts_only_channels(Checkpoint(self.teacher), made_plan):
            made = refit(made, work / "refitted", samples=self.samples, **settings)
        if "healed" in way:
            made = heal(made, work / "healed", recipe=HEALING, **settings)
        return made

    def train(self, student: Path, tokens: int, learning_rate: float, draw: int, work: Path) -> Path:
        """Distil the student on the home text into `work`, at a learning rate that falls to a tenth."""
        recipe = DistilRecipe(
            tokens=tokens,
            batch_size=4,
            learning_rate=learning_rate,
            final_learning_rate=learning_rate / 10,
            warmup=Duration(max(1, tokens // (4 * SEQUENCE_LENGTH) // 20), "steps"),
            terms=["lm", "kd"],
        )
        home = self.texts["home"]
        return distil(
            TrainingInputs(student, home, teacher=self.teacher),
            work / f"trained-{learning_rate}",
            recipe=recipe,
            text=TextSettings(sequence_length=SEQUENCE_LENGTH, seed=draw),
        )

    def measure(self, student: Path) -> dict[str, float]:
        """Measure the KL to the teacher by text, nats per token."""
        return {text: compare(self._record(student, text), teacher)["kd"] for text, teacher in self._teachers().items()}

    @cache  # noqa: B019 - one bench per process
    def _teachers(self) -> dict[str, Recording]:
        return {text: self._record(self.teacher, text) for text in self.texts}

    def _record(self, folder: Path, text: str) -> Recording:
        checkpoint = Checkpoint(folder)
        rows = heldout_rows(self.texts[text], SEQUENCE_LENGTH, self.measured_tokens)
        model = load(folder)
        return record(model, checkpoint.family, checkpoint.config, rows, batch_size=4, title=f"{folder.name}, {text}")

    def __hash__(self) -> int:
        return hash((self.out, self.teacher))


def matters(way: str, cut: str) -> bool:
    """Return whether a way differs from `today` in settings that the cut uses."""
    ours, usual = WAYS[way], WAYS["today"]
    if way in ("paper", "today"):
        return True
    if cut == "width":
        return ours.refit_readers != usual.refit_readers or way == "healed"
    if not ours.refit_readers:
        return cut == "all"
    if "no refit" in way and cut == "all":
        return way == "today, no refit"
    by_depth, by_experts = ours.depth != usual.depth, ours.experts.importance != usual.experts.importance
    return {"depth": not by_experts, "experts": not by_depth, "all": True}[cut]


def results(file: Path) -> Iterator[dict[str, Any]]:
    """Read the results so far."""
    if file.exists():
        yield from map(json.loads, file.read_text().splitlines())


def results_of_kind(file: Path, key: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Read the results of trained students where `key` is of one, else those of untrained students."""
    return (line for line in results(file) if ("learning_rate" in line) == ("learning_rate" in key))


def run(bench: Bench, cuts: list[str], ways: list[str], draws: int, tokens: int, rates: list[float]) -> None:
    """Measure what results.jsonl lacks, and add it there."""
    file = bench.out / "results.jsonl"
    shared = {"samples": bench.samples, "mixed": bench.mixed, "measured_tokens": bench.measured_tokens}
    for draw in range(draws):
        for cut in cuts:
            for way in ways:
                if not matters(way, cut):
                    continue
                key = {"way": way, "criteria": WAYS[way].model_dump(mode="json"), "cut": cut, "draw": draw, **shared}
                keys = [key] + [{**key, "training_tokens": tokens, "learning_rate": rate} for rate in rates if tokens]
                missing = [
                    key
                    for key in keys
                    if not any({n: line.get(n) for n in key} == key for line in results_of_kind(file, key))
                ]
                if not missing:
                    continue
                work, started = bench.out / "work", time.perf_counter()
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                student = bench.make_student(way, cut, draw, work)
                for key in missing:
                    rate = key.get("learning_rate")
                    kl = bench.measure(student if rate is None else bench.train(student, tokens, rate, draw, work))
                    line = {**key, "kl": kl, "seconds": round(time.perf_counter() - started, 1)}
                    with file.open("a") as stream:
                        stream.write(json.dumps(line) + "\n")
                    print(cut, way, draw, rate or "", kl, flush=True)
                shutil.rmtree(work)


def table(file: Path) -> str:
    """Format a Markdown table: one row per cut and way, mean (standard deviation) over the draws of each text.

    Trained students have rows of their own, at the learning rate whose mean at home is the lowest.
    """
    cells: dict[tuple[str, str, str, int], dict[float, dict[str, list[float]]]] = {}
    for line in results(file):
        row = (line["cut"], line["way"], "both" if line["mixed"] else "home", line.get("training_tokens", 0))
        numbers = cells.setdefault(row, {}).setdefault(line.get("learning_rate", 0.0), {})
        for text, kl in line["kl"].items():
            numbers.setdefault(text, []).append(kl)
    texts = list(dict.fromkeys(text for rates in cells.values() for row in rates.values() for text in row))
    titles = ["cut", "way", "calibrated on", "trained on", "at", "draws", *texts]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for (cut, way, calibrated, tokens), rates in sorted(cells.items()):
        rate, row = min(rates.items(), key=lambda found: fmean(found[1]["home"]))
        numbers = [f"{fmean(row[text]):.3f} ({pstdev(row[text]):.3f})" for text in texts]
        training = (f"{tokens:,} tokens", f"{rate:g}") if tokens else ("", "")
        lines.append(f"| {' | '.join([cut, way, calibrated, *training, str(len(row[texts[0]])), *numbers])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--teacher", default="builtin")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--away", type=Path, required=True)
    parser.add_argument("--mixed", action="store_true", help="calibrate on both texts")
    parser.add_argument("--cuts", nargs="+", default=["depth", "experts", "width", "all"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--depth-samples", type=int, default=16)
    parser.add_argument("--measured-tokens", type=int, default=8192)
    parser.add_argument("--training-tokens", type=int, default=0, help="also distil every way on this many tokens")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--table", action="store_true", help="only print the table of the results so far")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if not given.table:
        torch.manual_seed(0)
        texts = {"home": given.home, "away": given.away}
        teacher = checkpoint_folder(given.teacher)
        bench = Bench(given.out, teacher, texts, given.mixed, given.samples, given.measured_tokens, given.depth_samples)
        run(bench, given.cuts, given.ways, given.draws, given.training_tokens, given.learning_rates)
    print(table(given.out / "results.jsonl"))


if __name__ == "__main__":
    main()
