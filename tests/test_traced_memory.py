"""What training is predicted to take on many GPUs, against the real step on fake tensors: within 10 %, at true widths."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from slimqwen.recipe import Execution
from slimqwen.shapes.training_memory import TrainingSettings, training_memory

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# The first of two layers has DeltaNet, the second and a single one attention.
TRACED: list[tuple[int, dict[str, Any]]] = [
    (2, {"gpus": 8}),
    (2, {"gpus": 64, "shard_ranks": 8, "expert_ranks": 8, "micro_batches": 2}),
    (1, {"gpus": 8, "expert_ranks": 4, "recompute_activations": False}),
]


@pytest.mark.parametrize(("layers", "settings"), TRACED, ids=str)
def test_the_peak_on_many_gpus(layers: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    trace = importlib.import_module("trace_step")
    predicted = TrainingSettings(**{"recompute_activations": True} | settings)
    traced = trace.Traced(
        world=predicted.gpus,
        shard_ranks=predicted.shard_ranks,
        expert_ranks=predicted.expert_ranks,
        teacher_layers=layers,
        student_layers=layers,
        micro_batches=predicted.micro_batches,
        execution=Execution(recompute_activations=predicted.recompute_activations),
    )
    counts, _ = trace.trace_step(traced)
    family, teacher, student = trace.shapes(layers, layers)
    memory = training_memory(family, student, teacher, predicted)
    assert memory.peak_bytes == pytest.approx(counts.peak_bytes, rel=0.1)
