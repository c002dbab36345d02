"""The real optimiser step at true shapes, as one of 8, 64 and 512 ranks: what it sends, waits for and holds, without a GPU."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TEACHER_LAYERS, STUDENT_LAYERS = 48, 36
LIMIT_BYTES = 65e9  # received by a GPU per micro-batch of 4,096 tokens
SMALL = {"vocab_size": 8192}  # where the loss is not looked at
AUTO = {"shard_ranks": "auto", "expert_ranks": "auto"}

Trace = Callable[..., Any]


@pytest.fixture(scope="module")
def trace() -> Trace:
    """`trace_step` of 80B and 23B with one layer each, or as many as are given; what was traced once is kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        module = importlib.import_module("trace_step")
    found: dict[str, Any] = {}

    def run(world: int, teacher_layers: int = 1, student_layers: int = 1, **settings: Any) -> Any:
        traced = module.Traced(
            world=world, teacher_layers=teacher_layers, student_layers=student_layers, **(AUTO | settings)
        )
        key = repr(traced)
        if key not in found:
            found[key] = module.trace_step(traced)[0]
        return found[key]

    return run


def test_bytes_per_gpu_and_micro_batch_at_64_ranks(trace: Trace) -> None:
    """What a layer adds, times the layers of 80B and 23B. A layer with DeltaNet, which is added here, has the larger mixer."""
    kinds = ("all-gather", "reduce-scatter", "all-to-all")
    received = [
        sum(trace(64, *layers, **SMALL).received(kind, 8) for kind in kinds) for layers in ((1, 1), (2, 1), (1, 2))
    ]
    teacher, student = received[1] - received[0], received[2] - received[0]
    least = sum(trace(64).received(kind, 8) for kind in kinds)
    assert 30e9 < least + (TEACHER_LAYERS - 1) * teacher + (STUDENT_LAYERS - 1) * student < LIMIT_BYTES
    between_nodes = trace(64, 1, 2, **SMALL).received("all-reduce", 8) - trace(64, **SMALL).received("all-reduce", 8)
    assert STUDENT_LAYERS * between_nodes < 22e9  # once a step, whatever the number of micro-batches
    assert trace(64).launches.total() < 4600  # of these the loss, which Triton does not trace, has most


@pytest.mark.parametrize(("world", "settings"), [(8, SMALL), (64, {}), (512, SMALL)])
def test_a_step_waits_once_and_for_the_sizes_that_shared_experts_exchange(
    trace: Trace, world: int, settings: dict[str, Any]
) -> None:
    counts = trace(world, **settings)
    # The teacher's layer, the student's in the forward pass and recomputed, the MTP module's.
    assert counts.synchronisations == {
        "training/trainer.py: read": 1,
        "parallel/expert_parallel.py: exchanged_forward": 4,
    }
    # Weights are gathered and tokens sent within a node.
    assert not [size for (kind, size) in counts.collectives if kind in ("all-gather", "all-to-all") and size != 8]


def test_a_layer_is_gathered_before_the_one_before_it_runs(trace: Trace) -> None:
    order = trace(64, 1, 2, **SMALL).order
    first, second = order.index("layer 0"), order.index("layer 1")
    before = [event for event in order[:first] if event == "all-gather"]
    teacher = 2  # its layer, and what surrounds it
    assert len(before) == teacher + 3  # what surrounds the student's layers, the first of them, and the second already
    assert "all-gather" not in order[first:second]


def test_512_ranks_gather_no_padding(trace: Trace) -> None:
    """The student has 256 experts, half as many as ranks: split by the first dimension they would be gathered twice."""
    everywhere = {"shard_ranks": None, "expert_ranks": None} | SMALL
    at_8, at_512 = trace(8, **everywhere), trace(512, **everywhere)
    for kind in ("all-gather", "reduce-scatter"):
        assert at_8.collectives[kind, 8] == at_512.collectives[kind, 512]
        assert at_512.received(kind) * 512 / 511 == pytest.approx(at_8.received(kind) * 8 / 7, rel=0.005)
