"""What training is predicted to take on many GPUs, against the real step on fake tensors: within 10 % and 1 %, at true widths."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from slimqwen.recipe import Execution
from slimqwen.shapes.traffic import predict_traffic
from slimqwen.shapes.training_memory import TrainingSettings, measure, predict

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# The first of two layers has DeltaNet, the second and a single one attention.
TRACED: list[tuple[int, dict[str, Any]]] = [
    (2, {"gpus": 8}),
    (2, {"gpus": 64, "shard_ranks": 8, "expert_ranks": 8, "micro_batches": 2}),
    (1, {"gpus": 8, "expert_ranks": 4, "recompute_activations": False}),
]


@pytest.mark.parametrize(("layers", "settings"), TRACED, ids=str)
def test_the_peak_and_the_traffic_on_many_gpus(
    layers: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
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
    family, *configs = trace.shapes(layers, layers)
    teacher, student = (measure(family, config, predicted, trains=config is configs[1]) for config in configs)
    assert predict(student, teacher, predicted).peak_bytes == pytest.approx(counts.peak_bytes, rel=0.1)
    traffic, micro_batches = predict_traffic(student, teacher, predicted), predicted.micro_batches
    around = 2 * teacher.weights.around.total * (predicted.copy_ranks - 1) // predicted.copy_ranks  # once in a training
    gathered = traffic.gathered_bytes + traffic.experts_gathered_bytes
    assert counts.received("all-gather") == pytest.approx(micro_batches * gathered + around, rel=0.01)
    reduced = traffic.reduced_bytes + traffic.experts_reduced_bytes
    assert counts.received("reduce-scatter") == pytest.approx(micro_batches * reduced, rel=0.01)
    assert counts.received("all-to-all") == pytest.approx(micro_batches * traffic.exchanged_bytes, rel=0.01)
    assert counts.received("all-reduce") == pytest.approx(traffic.all_reduced_bytes, rel=0.01, abs=1e6)
