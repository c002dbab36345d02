"""The time of an optimiser step by part, and the Trainer's overhead over the unavoidable work.

    python benchmarks/step.py [--json] [--device cpu|cuda] [--sequence-length N] [--batch-size N] [--micro-batch-size N]
                              [--counts running|exact]

Real steps of slimqwen's own Trainer with random weights and tokens: on a CPU at the shapes of the built-in teacher and the
demo's student, on a GPU a few layers of Qwen3-Next-80B-A3B and SlimQwen-23A2B with their true widths, experts and
vocabulary. Steps and the bare work alternate in one process; every ratio is the median of the rounds' ratios. On a GPU
the parts are timed by CUDA events, without synchronising before the end of a round.

    step_over_parts     a step over its bare work: the teacher's forward and an LM step of the student (forward, the same
                        fused loss, backward, clipping, AdamW), written here without the Trainer
    other_fraction      share of a step outside PARTS
    tokens_per_second   of steps
    mfu                 where the GPU's peak is known, as in metrics.jsonl (`training/speed.py`)
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from slimqwen.checkpoint.config import read_config
from slimqwen.data.packed import PackedTokens, PackedWriter
from slimqwen.data.stream import Batch, TokenStream
from slimqwen.families import Config, Family
from slimqwen.losses.loss import LossWeights, align, chunked_loss, count_targets
from slimqwen.model.device import reproducible, resolve_device, resolve_dtype
from slimqwen.model.kernels import kernels_of
from slimqwen.model.model import MtpCausalLM, initialise
from slimqwen.model.peaks import dense_bf16_flops
from slimqwen.recipe import BalancingCounts, DistilRecipe, Duration, Execution, Target
from slimqwen.recipe.file import load_recipe
from slimqwen.shapes.target import completed, target_config
from slimqwen.training import trainer as trainer_module
from slimqwen.training.balancing import StepCounts
from slimqwen.training.batches import Batches
from slimqwen.training.speed import flops_per_token
from slimqwen.training.teacher import LiveTeacher
from slimqwen.training.trainer import Span, Student, Trainer

ROOT = Path(__file__).parent.parent
DEMO = Target(num_hidden_layers=6, hidden_size=96, num_experts=16, num_experts_per_tok=3)  # slimqwen/builtin/demo.yaml
STEPS = 10_000  # of the whole run: learning rate and weights of the terms hardly change during the rounds

PARTS = {  # parts of `Trainer.step`: the functions that it calls, by owner and name
    "data": [(Batches, "take"), (Batch, "to")],
    "teacher": [(LiveTeacher, "signal")],
    "expert counts": [(Trainer, "count_experts")],
    "student": [(Trainer, "forward")],
    "loss": [(trainer_module, "chunked_loss"), (trainer_module, "load_balancing_loss"), (StepCounts, "meet")],
    "backward": [(torch.Tensor, "backward")],
    "optimiser": [(trainer_module, "clip_grad_norm"), (torch.optim.AdamW, "step")],
    "waiting": [(Trainer, "read")],
}


@dataclass
class Clock:
    """Clock of seconds per part, of outermost calls only: CUDA events on a GPU, the process's clock elsewhere."""

    device: torch.device
    spans: list[tuple[str, Any, Any]] = field(default_factory=list)
    is_running: bool = False

    def now(self) -> Any:
        """Return the time, or record a CUDA event."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Time a part, unless within another."""
        if self.is_running:  # inside another part
            yield
            return
        self.is_running, start = True, self.now()
        yield
        self.spans.append((part, start, self.now()))
        self.is_running = False

    def stop(self) -> dict[str, float]:
        """Return the sum per part, and start again."""
        seconds: dict[str, float] = {}
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        for part, start, end in self.spans:
            took = start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start
            seconds[part] = seconds.get(part, 0.0) + took
        self.spans.clear()
        return seconds


def profile_step(trainer: Trainer, step: int) -> dict[str, float]:
    """Make a step; return the seconds by part, and of the "step" itself."""
    inner, outer = Clock(trainer.device), Clock(trainer.device)
    with ExitStack() as stack:
        for part, functions in PARTS.items():
            for owner, name in functions:
                stack.enter_context(patch.object(owner, name, _timed(getattr(owner, name), inner, part)))
        with outer.measure("step"):
            trainer.step(step)
    return outer.stop() | inner.stop()


def _timed(function: Callable[..., Any], clock: Clock, part: str) -> Callable[..., Any]:
    """Wrap `function` so that its calls are timed as `part`."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        with clock.measure(part):
            return function(*args, **kwargs)

    return timed


def time_bare_work(trainer: Trainer, step: int) -> dict[str, float]:
    """Time the teacher's forward ("teacher") and an LM step of the student ("lm_step") on the same rows."""
    recipe, model, clock = trainer.recipe, trainer.student.model, Clock(trainer.device)
    assert trainer.teacher is not None
    batch = trainer.stream.batch(step * recipe.batch_size, recipe.batch_size).to(trainer.device)
    micro_batches = batch.split(trainer.micro_batch_size)
    with clock.measure("teacher"):
        signals = [trainer.teacher.signal(micro_batch) for micro_batch in micro_batches]
    weights = LossWeights.from_terms(recipe.terms, 0.5, 0.3).per_token(*count_targets(batch.tokens))
    with clock.measure("lm_step"):
        trainer.optimizer.zero_grad(set_to_none=True)
        for micro_batch, signal in zip(micro_batches, signals, strict=True):
            with trainer.mixed_precision():
                hidden = model(micro_batch.tokens)
                predictions = align(micro_batch.tokens, hidden.main, hidden.mtp)
                loss, _ = chunked_loss(
                    predictions,
                    model.head,
                    weights,
                    teacher=signal,
                    chunk_tokens=trainer.execution.loss_chunk_tokens,
                    unscaled=True,
                )
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.parameters.values(), recipe.optimizer.max_grad_norm)
        trainer.optimizer.step()
    return clock.stop()


def shapes(on_gpu: bool, layers: int) -> tuple[Family, Config, Config]:
    """Return the family, and the configs of teacher and student."""
    if not on_gpu:
        family, config = read_config(ROOT / "slimqwen/builtin/teacher/config.json")
        return family, config, target_config(family, config, completed(family, DEMO, config))
    family, config = read_config(ROOT / "recipes/qwen3-next-80b-a3b.json")
    target = load_recipe(ROOT / "recipes/slimqwen-23a2b.yaml", model=Target)
    every = config["num_hidden_layers"]
    kept = [*list(range(0, every, every // layers))[: layers - 1], every - 1]  # the last has full attention
    teacher = family.resized(config, family.sizes(config), kept, config["num_experts_per_tok"])
    student = target_config(
        family, teacher, completed(family, target.model_copy(update={"num_hidden_layers": layers}), teacher)
    )
    return family, teacher | {"num_nextn_predict_layers": 0}, student


def random_model(config: Config, device: torch.device, dtype: torch.dtype) -> MtpCausalLM:
    """Initialise a model on its device: random numbers for billions of weights take a CPU minutes."""
    with torch.device(device):
        return initialise(config, seed=0, device=device).to(dtype)


def random_stream(folder: Path, vocab_size: int, tokens: int, sequence_length: int) -> TokenStream:
    """Write random tokens to `folder`, and open them."""
    with PackedWriter(folder / "train", vocab_size) as writer:
        writer.add(torch.randint(vocab_size, (tokens,), generator=torch.Generator().manual_seed(0)).numpy())
    return TokenStream(PackedTokens(folder / "train"), sequence_length, seed=0)


def summarise(measured: list[dict[str, float]], step_tokens: int) -> dict[str, float]:
    """Print the seconds by part over all rounds, and return the results."""

    def median(of: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(of(seconds) for seconds in measured)

    def parts(seconds: dict[str, float]) -> float:
        return sum(took for part, took in seconds.items() if part in PARTS)

    for name in (*(part for part in PARTS if part in measured[0]), "step", "bare teacher", "bare lm_step"):
        took = sorted(seconds[name] for seconds in measured)
        share = median(lambda seconds, name=name: seconds[name] / seconds["step"])
        print(f"{name:14} {statistics.median(took):9.4f} s  {share:6.1%}  ({took[0]:.4f} to {took[-1]:.4f})")
    return {
        "step_over_parts": median(lambda s: s["step"] / (s["bare teacher"] + s["bare lm_step"])),
        "other_fraction": median(lambda s: 1 - parts(s) / s["step"]),
        "tokens_per_second": median(lambda s: step_tokens / s["step"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="End with one line of JSON.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--layers", type=int, default=4, help="Of teacher and student, on a GPU.")
    parser.add_argument("--sequence-length", type=int, help="Default: 4,096 on a GPU, 256 on a CPU.")
    parser.add_argument("--batch-size", type=int, help="Default: 4 on a GPU, 8 on a CPU.")
    parser.add_argument("--micro-batch-size", type=int, help="Default: the batch size.")
    parser.add_argument(
        "--counts",
        choices=["running", "exact"],
        default="running",
        help="Of the load balancing; running from one micro-batch to the next.",
    )
    parser.add_argument("--rounds", type=int, help="Default: 20 on a GPU, 10 on a CPU.")
    options = parser.parse_args()

    device = resolve_device(options.device)
    on_gpu = device.type == "cuda"
    sequence_length = options.sequence_length or (4096 if on_gpu else 256)
    batch_size = options.batch_size or (4 if on_gpu else 8)
    rounds = options.rounds or (20 if on_gpu else 10)
    family, teacher_config, student_config = shapes(on_gpu, options.layers)
    teacher = LiveTeacher(random_model(teacher_config, device, resolve_dtype("auto", device)).eval(), teaches_mtp=False)
    student = Student(random_model(student_config, device, torch.float32).train(), family, student_config)
    step_tokens = batch_size * sequence_length
    counts = BalancingCounts(kind=options.counts, rows=options.micro_batch_size or batch_size)
    recipe = DistilRecipe(
        tokens=STEPS * step_tokens, batch_size=batch_size, warmup=Duration(0, "steps"), load_balancing_counts=counts
    )
    execution = Execution(device=options.device, micro_batch_size=options.micro_batch_size)

    where = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{where}: {batch_size} rows of {sequence_length:,} tokens, {execution.micro_batch_size or batch_size} at a time"
    )
    for kernel in kernels_of(family, student_config, device):
        print(f"  {kernel.part}: {kernel.used}" + (f" (faster: {kernel.remedy})" if kernel.remedy else ""))
    with tempfile.TemporaryDirectory() as folder, reproducible(device):
        stream = random_stream(Path(folder), student_config["vocab_size"], 64 * step_tokens, sequence_length)
        trainer = Trainer(student, teacher, stream, recipe, Span(0, STEPS, STEPS), execution=execution)
        measured = []
        for number in range(rounds + 1):
            measured.append(
                profile_step(trainer, number) | {f"bare {k}": v for k, v in time_bare_work(trainer, number).items()}
            )
    result = summarise(measured[1:], step_tokens)  # without the first round, which warmed up
    peak = dense_bf16_flops(device)
    if peak is not None:
        result["mfu"] = result["tokens_per_second"] * flops_per_token(trainer) / peak
    for key, value in result.items():
        print(f"{key:18} {value:.4g}")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
