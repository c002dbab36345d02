"""What each rank of a training took, in a file per rank, and the busiest of them in metrics.jsonl."""

import time
from pathlib import Path

from slimqwen.artifacts.json_lines import append
from slimqwen.training.metrics import MetricsLog
from slimqwen.training.speed import peak_memory
from slimqwen.training.trainer import Trainer

FOLDER = "ranks"  # beside metrics.jsonl
EVERY_STEPS = 10
MOST_RANKS = 1 << 20


class RankLog:
    """Log of each rank's own numbers, every `EVERY_STEPS` steps: `ranks/rank-3.jsonl`. Of one rank there is none.

    In a line: `seconds` and `cpu_seconds`, a step's mean since the line before, by the clock and of the processor; `memory_bytes`, the
    peak so far; `expert_pairs`, the (token, expert) pairs of this step that this rank's experts of the student had in all its passes,
    where ranks share them. All ranks wait for the slowest in every step, so `seconds` is alike on all; a rank that waits for gloo uses
    no processor, and on CPUs the slow one has the most `cpu_seconds`. A GPU's work is in neither. What lies between two steps
    (held-out text, saving) is in the memory alone.

    The pairs are those of the step alone, not a mean since the line before: a resumed training would lack the steps before its state.
    A step that is made again after an interruption has a line again.
    """

    def __init__(self, trainer: Trainer, metrics: MetricsLog) -> None:
        self._trainer = trainer
        self._metrics = metrics
        self._steps, self._seconds, self._cpu_seconds = 0, 0.0, 0.0
        self._began_at, self._pairs_before = 0.0, 0

    def begin(self) -> None:
        """Note the processor's seconds and the pairs before a step."""
        self._began_at, self._pairs_before = time.process_time(), self._count_pairs()

    def log(self, step: int, seconds: float) -> dict[str, float]:
        """Count the step since `begin`, which took `seconds`, and write the line if it is time. All ranks must call it.

        Returns what metrics.jsonl gets of it: the busiest rank and its `cpu_seconds`, and the most `expert_pairs` of a rank.
        """
        ranks = self._trainer.ranks
        if ranks.size == 1:
            return {}
        self._steps, self._seconds = self._steps + 1, self._seconds + seconds
        self._cpu_seconds += time.process_time() - self._began_at
        if (step + 1) % EVERY_STEPS:
            return {}
        cpu_seconds, pairs = self._cpu_seconds / self._steps, self._count_pairs() - self._pairs_before
        values: dict[str, float] = {
            "seconds": self._seconds / self._steps,
            "cpu_seconds": cpu_seconds,
            "memory_bytes": peak_memory(self._trainer.device),
        }
        if ranks.experts_mesh is not None:
            values["expert_pairs"] = pairs
        label = {"run": self._metrics.run, "stage": self._metrics.stage, "step": step, "rank": ranks.rank}
        append(self.file, label | values)
        self._steps, self._seconds, self._cpu_seconds = 0, 0.0, 0.0
        microseconds, busiest = divmod(ranks.largest(int(cpu_seconds * 1e6) * MOST_RANKS + ranks.rank), MOST_RANKS)
        found: dict[str, float] = {"busiest_rank": busiest, "busiest_rank_cpu_seconds": microseconds / 1e6}
        if ranks.experts_mesh is not None:
            found["most_expert_pairs"] = ranks.largest(pairs)
        return found

    @property
    def file(self) -> Path:
        """Return the file of this rank."""
        return self._metrics.path.parent / FOLDER / f"rank-{self._trainer.ranks.rank}.jsonl"

    def _count_pairs(self) -> int:
        """Return the pairs that this rank's experts have had so far; 0 where ranks share none."""
        if self._trainer.ranks.experts_mesh is None:
            return 0
        return sum(getattr(module, "received_pairs", 0) for module in self._trainer.student.model.modules())
