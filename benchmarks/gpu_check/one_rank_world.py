"""A world of one rank on the device's own backend (NCCL on a GPU): FSDP2, expert parallelism, saves, a resume.

`distil` itself runs, in a process group that one process makes: every collective, sharded tensor and asynchronous save of a
run on many GPUs, and no traffic between GPUs. Compared with the same steps without a process group.
"""

import json
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from material import SEQUENCE_LENGTH, recipe_of, write_student, write_tokens
from safetensors.torch import load_file
from section import Part, Section, Skip, error_of
from torch.distributed.device_mesh import init_device_mesh

from slimqwen.builtin import TEACHER
from slimqwen.parallel.ranks import ALONE, Ranks, join_ranks
from slimqwen.recipe import Execution, TextSettings, TrainedParts
from slimqwen.training import distil as distil_module
from slimqwen.training.state import States, saved_states
from slimqwen.training.trainer import Trainer

STEPS = 4
STOPPED_BEFORE = 3  # that step, after as many saves
# Relative: the same numbers in another order of summation; on a GPU in bfloat16, gathered in another place.
LOSS_LIMIT = {"cuda": 2e-2, "cpu": 1e-3}
WEIGHTS_LIMIT = (
    1e-2  # of all weights together; steps from a state that was lost or zero differ by more (docs/gpu-check.md)
)

ON_ONE_GPU: dict[str, dict[str, Any]] = {  # ways to need less memory of it, all with the same result
    "student offloaded": {"offload": "student"},
    "student and teacher offloaded": {"offload": "all"},
    "teacher layer by layer": {"streaming_teacher": True},
}


class Stopped(Exception):
    """End of a training in its middle."""


@contextmanager
def world(device: str) -> Iterator[tuple[Ranks, Ranks]]:
    """Make a world of this process alone; yield its ranks without and with expert parallelism."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    if device == "cuda":
        torch.cuda.set_device(0)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", 0))
    else:
        dist.init_process_group("gloo")
    mesh = init_device_mesh(device, (1,), mesh_dim_names=("shard",))
    experts_mesh = init_device_mesh(device, (1, 1, 1), mesh_dim_names=("replicate", "shard", "expert"))
    yield Ranks(0, 1, mesh), Ranks(0, 1, mesh, experts_mesh)
    dist.destroy_process_group()


def train(
    folder: Path,
    name: str,
    ranks: Ranks | None,
    device: str,
    *,
    is_asynchronous: bool = False,
    stop_before: int | None = None,
    trains: str = "all",
    **settings: object,
) -> list[dict[str, Any]]:
    """Run `distil` as `ranks`, or as it does by itself, saving after each step; return the lines of its metrics.

    trains: the recipe's `train`. settings: of `execution`.
    """

    @contextmanager
    def join(*arguments: Any, **others: Any) -> Iterator[Ranks]:
        with nullcontext(ranks) if ranks is not None else join_ranks(*arguments, **others) as joined:
            yield joined

    original = Trainer.step

    def step(self: Trainer, number: int) -> dict[str, float]:
        if number == stop_before:
            raise Stopped
        return original(self, number)

    out = folder / name / "out"
    out.parent.mkdir(exist_ok=True)
    execution = Execution.model_validate(
        {"device": device, "save_every": "1 steps", "async_save": is_asynchronous, "micro_batch_size": 1} | settings
    )
    with patch.object(distil_module, "join_ranks", join), patch.object(Trainer, "step", step):
        distil_module.distil(
            distil_module.TrainingInputs(folder / "student", folder / "tokens", teacher=TEACHER),
            out,
            recipe=recipe_of(STEPS).model_copy(update={"train": [TrainedParts(trains)]}),
            text=TextSettings(sequence_length=SEQUENCE_LENGTH),
            execution=execution,
        )
    return metrics_of(out.parent)


def compare(part: Part, lines: list[dict[str, Any]], expected: list[dict[str, Any]], limit: float) -> None:
    """Check each step's loss and gradient norm against those of another training."""
    assert len(lines) == len(expected) == STEPS
    for name in ("loss", "lm", "kd", "mtp_kd", "load_balancing", "grad_norm"):
        errors = [abs(a[name] - b[name]) / abs(b[name]) for a, b in zip(lines, expected, strict=True)]
        part.note(**{f"{name}_error_of_last_step": errors[-1]})
        part.check_below(f"{name}_error_of_first_step", errors[0], limit)


def main() -> None:
    with Section() as section, tempfile.TemporaryDirectory() as temporary:
        folder, device = Path(temporary), section.device
        limit = LOSS_LIMIT[device]
        write_student(folder)
        write_tokens(folder)
        alone: list[dict[str, Any]] = []
        with section.part("without a process group") as part:
            alone = train(folder, "alone", ALONE, device)
            part.note(first_loss=alone[0]["loss"], last_loss=alone[-1]["loss"])
        for name, settings in ON_ONE_GPU.items():
            with section.part(name) as part:
                if section.quick:
                    raise Skip("--quick offloads beside frozen experts only")
                compare(part, train(folder, name.replace(" ", "-"), None, device, **settings), alone, limit)
        with section.part("routed experts frozen") as part:
            lines = train(folder, "frozen", None, device, trains="no_experts")
            compare_frozen(part, folder)
            part.note(first_loss=lines[0]["loss"], last_loss=lines[-1]["loss"])
            offloaded = train(folder, "frozen-offloaded", None, device, trains="no_experts", offload="student")
            compare(part, offloaded, lines, limit)
        with world(device) as (sharded, shared):
            for name, ranks in (("fsdp2", sharded), ("expert_parallel", shared)):
                with section.part(name) as part:
                    lines = train(folder, name, ranks, device)
                    part.note(backend=dist.get_backend_config())
                    compare(part, lines, alone, limit)
                for saves in ("asynchronous", "synchronous"):  # where the first do not work, at least the second may
                    with section.part(f"{name}, three {saves} saves and a resume") as part:
                        if section.quick and ranks is sharded:
                            raise Skip("--quick resumes the other one only")
                        resume(part, folder, f"{name}-{saves}", ranks, device, is_asynchronous=saves == "asynchronous")
                        lines = metrics_of(folder / f"{name}-{saves}")
                        compare(part, lines, alone, limit)
                        compare_weights(part, folder / f"{name}-{saves}", folder / name)
                    if section.statuses[-1] != "failed":
                        break


def compare_frozen(part: Part, folder: Path) -> None:
    """Check that routed experts came out with the bits that they went in with, and that something else was trained."""
    before, after = (load_file(folder / name / "model.safetensors") for name in ("student", "frozen/out"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    part.check("experts keep their bits", {name for name in before if ".experts." in name} <= same)
    part.check("the rest is trained", len(same) < len(before))


def resume(part: Part, folder: Path, name: str, ranks: Ranks, device: str, *, is_asynchronous: bool) -> None:
    """Train up to a step, saving after each; end, and train on from what is saved."""
    with suppress(Stopped):
        train(folder, name, ranks, device, is_asynchronous=is_asynchronous, stop_before=STOPPED_BEFORE)
    states = list(saved_states(folder / name / ".out.state"))
    part.note(states=len(states), newest=states[-1].name)
    part.check("the third state is there", states[-1].name == f"step-{STOPPED_BEFORE:09d}")
    loaded: list[int] = []
    with patch.object(States, "load", loads_counted(States.load, loaded)):
        train(folder, name, ranks, device, is_asynchronous=is_asynchronous)
    part.check("resumed at the third step", loaded == [STOPPED_BEFORE])


def compare_weights(part: Part, resumed: Path, uninterrupted: Path) -> None:
    """Check that two trainings ended with the same weights."""
    found, expected = (load_file(run / "out" / "model.safetensors") for run in (resumed, uninterrupted))
    difference = sum(float((found[key].double() - expected[key].double()).square().sum()) for key in expected)
    size = sum(float(tensor.double().square().sum()) for tensor in expected.values())
    part.note(worst_tensor_error=max(error_of(found[key], expected[key]) for key in expected))
    part.check_below("weights_error_over_uninterrupted", (difference / size) ** 0.5, WEIGHTS_LIMIT)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of a training's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def loads_counted(load: Any, loaded: list[int]) -> Any:
    """Wrap `States.load` so that the step it returns is noted."""

    def counted(self: States) -> Any:
        result = load(self)
        loaded.extend([] if result is None else [result[0]])
        return result

    return counted


if __name__ == "__main__":
    main()
