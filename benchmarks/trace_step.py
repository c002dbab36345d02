"""What an optimiser step sends, launches, waits for and keeps in memory on one GPU of many, counted without a GPU.

    python benchmarks/trace_step.py [--layers N] [--world 64] [--node 8] [--shard-ranks N] [--expert-ranks N] [--json]

The real `Trainer.step` at the shapes of recipes/qwen3-next-80b-a3b.json and recipes/slimqwen-23a2b.yaml, as rank 0 of `--world`
ranks, on fake tensors (`fake_ranks.py`, which says what is exact): a step of `--micro-batches` micro-batches of 4,096 tokens,
gathered in bfloat16 and computed by the kernels that a GPU has. `--layers` of both models; by default all, 48 and 36.
"""

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from fake_ranks import Counts, fake_ranks, tracing

from slimqwen.checkpoint.config import read_config
from slimqwen.data.stream import Batch
from slimqwen.families import Config, Family
from slimqwen.model.model import MtpCausalLM
from slimqwen.parallel import ranks as ranks_module
from slimqwen.parallel import sharded_checkpoint
from slimqwen.parallel.job import Job
from slimqwen.parallel.ranks import Ranks
from slimqwen.parallel.shares import choose_shares
from slimqwen.recipe import DistilRecipe, Duration, Execution, Target
from slimqwen.recipe.file import load_recipe
from slimqwen.shapes.target import completed, target_config
from slimqwen.training.teacher import LiveTeacher
from slimqwen.training.trainer import Span, Student, Trainer

ROOT = Path(__file__).parent.parent
STEPS = 10_000  # of the whole run: in the middle all terms of the loss have a weight


@dataclass(frozen=True)
class Traced:
    """What is traced.

    shard_ranks, expert_ranks: a number, or `auto` as in a recipe, for nodes of `node` ranks; None for all, and for 1.
    teacher_layers, student_layers, vocab_size: None for those of the models.
    """

    world: int = 64
    node: int = 8
    shard_ranks: int | str | None = None
    expert_ranks: int | str | None = None
    teacher_layers: int | None = None
    student_layers: int | None = None
    vocab_size: int | None = None
    sequence_length: int = 4096
    micro_batches: int = 1
    execution: Execution = field(default_factory=lambda: Execution(recompute_activations=True))


class Rows:
    """Rows of fake tokens, as many as are wanted."""

    def __init__(self, sequence_length: int) -> None:
        self.sequence_length = sequence_length

    def batch(self, first: int, rows: int, step: int = 1) -> Batch:
        """Return `rows` rows."""
        return Batch(torch.zeros(rows, self.sequence_length + 1, dtype=torch.int64))

    def count_targets(self, first: int, rows: int) -> tuple[int, int]:
        """Return the predictions of both heads on `rows` rows without padding."""
        return rows * self.sequence_length, rows * (self.sequence_length - 1)


def shapes(teacher_layers: int | None, student_layers: int | None) -> tuple[Family, Config, Config]:
    """Return the family, and the configs of the 80B teacher, without an MTP module, and of the 23B student."""
    family, config = read_config(ROOT / "recipes/qwen3-next-80b-a3b.json")
    target = load_recipe(ROOT / "recipes/slimqwen-23a2b.yaml", model=Target)
    student = target_config(family, config, completed(family, target, config))
    teacher = config | {"num_nextn_predict_layers": 0}
    return family, with_layers(family, teacher, teacher_layers), with_layers(family, student, student_layers)


def with_layers(family: Family, config: Config, layers: int | None) -> Config:
    """Return the config of a model that has the first `layers` of this one's, the last with attention."""
    if layers is None:
        return config
    kept = [*range(layers - 1), layers + -layers % config["full_attention_interval"] - 1]
    return family.resized(config, family.sizes(config), kept, config["num_experts_per_tok"])


def load_fake(family: Family, config: Config, ranks: Ranks, *, trains: bool) -> MtpCausalLM:
    """Load what no file holds, as on GPUs: the student in float32 and gathered in bfloat16, the teacher in bfloat16."""
    has_mtp = bool(config["num_nextn_predict_layers"])
    checkpoint: Any = SimpleNamespace(family=family, config=config, folder=Path("fake"), has_mtp=has_mtp)

    def shard_as_on_gpus(model: MtpCausalLM, ranks: Ranks, *, mixed_precision: bool, **settings: Any) -> None:
        ranks_module.shard(model, ranks, mixed_precision=trains, **settings)

    with patch.object(sharded_checkpoint, "fill_own"), patch.object(sharded_checkpoint, "shard", shard_as_on_gpus):
        return sharded_checkpoint.load_sharded(
            checkpoint,
            ranks,
            torch.float32 if trains else torch.bfloat16,
            torch.device("cpu"),
            trains=trains,
            reshard_after_forward=True,
        )


def trace_step(traced: Traced) -> tuple[Counts, int]:
    """Trace one step; return its counts, and the bytes that both models and the optimiser hold before it."""
    family, teacher_config, student_config = shapes(traced.teacher_layers, traced.student_layers)
    if traced.vocab_size is not None:
        teacher_config, student_config = (
            c | {"vocab_size": traced.vocab_size} for c in (teacher_config, student_config)
        )
    batch_size = traced.world * traced.micro_batches
    recipe = DistilRecipe(
        tokens=STEPS * batch_size * traced.sequence_length, batch_size=batch_size, warmup=Duration(0, "steps")
    )
    shares = {"shard_ranks": traced.shard_ranks or "all", "expert_ranks": traced.expert_ranks or 1}
    execution = Execution.model_validate({**traced.execution.model_dump(), **shares, "micro_batch_size": 1})
    experts = [config["num_experts"] for config in (teacher_config, student_config)]
    chosen = choose_shares(traced.world, min(traced.node, traced.world), experts, execution, lambda ranks: True)
    device = torch.device("cpu")
    with fake_ranks(traced.world):
        job = Job(0, traced.world)
        meshes = ranks_module._meshes(job, device, *chosen)
        ranks = Ranks(0, traced.world, *meshes)
        with tracing() as trace:
            teacher = LiveTeacher(load_fake(family, teacher_config, ranks, trains=False).eval(), teaches_mtp=False)
            student = Student(load_fake(family, student_config, ranks, trains=True).train(), family, student_config)
            rows: Any = Rows(traced.sequence_length)
            trainer = Trainer(student, teacher, rows, recipe, Span(0, STEPS, STEPS), ranks, execution)
            for number, layer in enumerate(student.model.backbone.get_decoder().layers):
                layer.register_forward_pre_hook(lambda *_, number=number: trace.note(f"layer {number}"))
            trace.counts, held = Counts(), trace.live
            trainer.step(STEPS // 2)
    return trace.counts, held


def main() -> None:
    """Trace one step and print what was counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="End with one line of JSON.")
    parser.add_argument("--world", type=int, default=64)
    parser.add_argument("--node", type=int, default=8, help="Ranks of a node, for what is auto.")
    parser.add_argument("--shard-ranks", default="auto", help="A number, all, or auto: those of a node.")
    parser.add_argument("--expert-ranks", default="auto", help="A number, or auto.")
    parser.add_argument("--layers", type=int, help="Of teacher and student; by default all.")
    parser.add_argument("--teacher-layers", type=int)
    parser.add_argument("--student-layers", type=int)
    parser.add_argument("--micro-batches", type=int, default=1)
    options = parser.parse_args()
    traced = Traced(
        world=options.world,
        node=options.node,
        shard_ranks=_number(options.shard_ranks),
        expert_ranks=_number(options.expert_ranks),
        teacher_layers=options.teacher_layers or options.layers,
        student_layers=options.student_layers or options.layers,
        micro_batches=options.micro_batches,
    )
    start = time.perf_counter()
    counts, held = trace_step(traced)
    result = summarise(counts, held)
    for name, value in result.items():
        print(f"{name:24} {value if not isinstance(value, dict) else ''}")
        for key, number in value.items() if isinstance(value, dict) else ():
            print(f"    {key:50} {number:,}")
    print(f"traced in {time.perf_counter() - start:.0f} s")
    if options.json:
        print(json.dumps(result))


def _number(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def summarise(counts: Counts, held: int) -> dict[str, Any]:
    """Return the counts as JSON."""
    return {
        "received_gb": round(sum(counts.received_bytes.values()) / 1e9, 2),
        "received_bytes": {f"{kind} of {size}": n for (kind, size), n in sorted(counts.received_bytes.items())},
        "collectives": {f"{kind} of {size}": n for (kind, size), n in sorted(counts.collectives.items())},
        "launches": sum(counts.launches.values()),
        "most_launched": dict(counts.launches.most_common(12)),
        "synchronisations": dict(counts.synchronisations),
        "held_bytes": held,
        "peak_bytes": counts.peak_bytes,
    }


if __name__ == "__main__":
    main()
