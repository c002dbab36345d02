"""The cost of calibration beside a plain forward pass, and layer by layer, on layers of Qwen3-Next-80B-A3B's true shapes.

    python benchmarks/calibrate.py [--rows 8] [--dir DIR] [--json]

Makes a synthetic checkpoint of two layers (DeltaNet, full attention; bfloat16, one tensor per expert, real vocabulary).

First each layer by itself, its weights resident in float32 (6.6 GB, the other layer's on disk), on the same hidden
states, alternating between:
- plain: Transformers' forward with its grouped_mm experts;
- ours: the same forward with all statistics of `slimqwen calibrate`;
- all experts, on fewer rows, compared with ours on equally many: the forward, and then every expert on every token as in
  REAP's observer, for the same sums over the routed tokens.
Ratios are of the median times, summed over the two layers.

Then `slimqwen calibrate --streaming` on both layers, in a process of its own: tokens/s, and its anonymous memory (RssAnon of
/proc/PID/status, sampled every 50 ms) beside its prediction.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from prune import anonymous_bytes
from synthetic import folder_to_use, write_synthetic
from torch import Tensor
from torch.nn import functional as F

from slimqwen.calibration.observe import add_layer_sums, observe_blocks
from slimqwen.calibration.statistics import Part, Statistics
from slimqwen.checkpoint.config import read_json
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.bytesize import bytes_in_words, bytes_of
from slimqwen.core.stopwatch import Stopwatch
from slimqwen.layerwise.step import Step, steps_of
from slimqwen.layerwise.weights import ExpertsOnDisk, weights_of, without_weights
from slimqwen.model.device import reproducible
from slimqwen.model.model import MtpCausalLM

CONFIG = Path(__file__).parents[1] / "recipes" / "qwen3-next-80b-a3b.json"
CPU = torch.device("cpu")
PART = Part("text", 0)
SAMPLE_EVERY_SECONDS = 0.05


# --- one layer at a time, in memory -----------------------------------------------------------------------------------


@contextmanager
def resident(step: Step, model: MtpCausalLM, checkpoint: Checkpoint) -> Iterator[None]:
    """Keep a layer's weights in memory in float32, its experts stacked as Transformers expects them."""
    block = step.blocks[0]
    assert block.experts is not None
    with weights_of(step.blocks, model, checkpoint, torch.float32, CPU, Stopwatch()):
        for name in block.experts.fused:
            stacked = ExpertsOnDisk(checkpoint, block, name, torch.float32, Stopwatch()).stacked(CPU)
            vars(model.module_of(block.prefix + name))[name.rpartition(".")[2]] = stacked
        yield


def run_observed(step: Step, model: MtpCausalLM, hidden: Tensor, tokens: Tensor) -> None:
    """Run the layer, and add up the statistics of the batch."""
    sums = Statistics("checkpoint", "data", {PART: {"main": tokens[:, 1:].numel(), "mtp": 0}})
    with observe_blocks(model, step.blocks, sums, Stopwatch()), sums.part(PART):
        after = step.run(hidden, tokens)
        assert step.number is not None
        add_layer_sums(sums, step.number, 2, hidden, after)


def run_all_experts(step: Step, hidden: Tensor, tokens: Tensor) -> None:
    """Run the layer, and then every expert on every token, as an observer with access to modules only must."""
    moe: Any = step.moe

    def observe(_module: Any, inputs: Any, _output: Any) -> None:
        x = inputs[0].flatten(0, 1)
        _, gates, chosen = moe.gate(x)
        for expert in range(moe.experts.num_experts):
            gate, up = F.linear(x, moe.experts.gate_up_proj[expert]).chunk(2, dim=-1)
            output = F.linear(F.silu(gate) * up, moe.experts.down_proj[expert])
            share = (gates * (chosen == expert)).sum(dim=-1)
            sums.append(((share > 0).sum(), share.sum(), share @ output.norm(dim=-1), (share > 0).float() @ output))

    sums: list[Any] = []
    hook = moe.register_forward_hook(observe)
    step.run(hidden, tokens)
    hook.remove()


def seconds(action: Callable[[], object]) -> float:
    """Time `action`."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


@torch.inference_mode()
def time_layers(
    checkpoint: Checkpoint, rows: int, few_rows: int, sequence_length: int, repeats: int
) -> dict[str, float]:
    """Return the median seconds of each variant by name, summed over the layers."""
    model = without_weights(checkpoint, torch.float32, CPU)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, sequence_length, checkpoint.config["hidden_size"], generator=generator)
    tokens = torch.zeros(rows, sequence_length + 1, dtype=torch.int64)
    few, few_tokens = hidden[:few_rows], tokens[:few_rows]
    totals: dict[str, float] = {}
    for step in steps_of(model):
        ways = {
            "plain": lambda step=step: step.run(hidden, tokens),
            "ours": lambda step=step: run_observed(step, model, hidden, tokens),
            "ours, few rows": lambda step=step: run_observed(step, model, few, few_tokens),
            "all experts, few rows": lambda step=step: run_all_experts(step, few, few_tokens),
        }
        with resident(step, model, checkpoint), reproducible(CPU):
            for way in list(ways.values())[:3]:
                way()  # the first run reads the weights
            times = [{name: seconds(way) for name, way in ways.items()} for _ in range(repeats)]
        for name in ways:
            median = statistics.median(turn[name] for turn in times)
            totals[name] = totals.get(name, 0.0) + median
            print(
                f"layer {step.number}, {name}: {median:.2f} s of {[round(t[name], 2) for t in times]}", file=sys.stderr
            )
    return totals


# --- layer by layer, from disk ----------------------------------------------------------------------------------------


def run_streaming(checkpoint: Path, folder: Path, samples: int, sequence_length: int, budget: str) -> dict[str, float]:
    """Run `slimqwen calibrate --streaming`, and return its speed, its peak memory and its prediction of that."""
    text, out = folder / "tokens", folder / "statistics.safetensors"
    slimqwen = [sys.executable, "-m", "slimqwen"]
    tokenize = [*slimqwen, "tokens", "python-stdlib", "--tokenizer", "builtin", "--out", str(text)]
    subprocess.run(tokenize, check=True, stdout=subprocess.DEVNULL)
    command = ["calibrate", str(checkpoint), "--tokens", str(text), "--out", str(out), "--streaming"]
    command += ["--samples", str(samples), "--sequence-length", str(sequence_length), "--memory-budget", budget]
    process = subprocess.Popen(
        [*slimqwen, *command, "--device", "cpu"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(SAMPLE_EVERY_SECONDS)
    printed = process.stderr.read()
    print(printed, file=sys.stderr)
    predicted, speed, own = (
        re.search(pattern, printed)
        for pattern in (
            r"it takes ([\d.]+ \w+) of memory",
            r"([\d,]+) tokens/s through all layers",
            r"(\d+)% of the time",
        )
    )
    if process.returncode or not (predicted and speed and own):
        raise SystemExit("slimqwen calibrate failed")
    return {
        "tokens_per_second": int(speed[1].replace(",", "")),
        "forward_fraction": int(own[1]) / 100,
        "peak_anonymous_bytes": peak,
        "predicted_bytes": bytes_of(predicted[1]),
    }


def measure(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Run both parts in `folder`."""
    config = read_json(CONFIG) | {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts": options.experts,
        "num_nextn_predict_layers": 0,
    }
    source = folder / "source"
    source.mkdir()
    spent = seconds(lambda: write_synthetic(source, config))
    checkpoint = Checkpoint(source)
    print(f"synthetic checkpoint: {bytes_in_words(checkpoint.bytes())} in {spent:.0f} s", file=sys.stderr)
    totals = time_layers(checkpoint, options.rows, options.few_rows, options.sequence_length, options.repeats)
    return {
        "time_over_forward": round(totals["ours"] / totals["plain"], 3),
        "all_experts_over_ours": round(totals["all experts, few rows"] / totals["ours, few rows"], 3),
        **run_streaming(source, folder, options.samples, options.sequence_length, options.memory_budget),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="sequences of the batch that is observed")
    parser.add_argument("--few-rows", type=int, default=1, help="sequences for the observer that runs every expert")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--samples", type=int, default=64, help="sequences of the streaming run")
    parser.add_argument("--memory-budget", default="2GB", help="of the streaming run")
    parser.add_argument("--experts", type=int, default=512, help="routed experts per layer, of which 10 are chosen")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--dir", type=folder_to_use, help="a folder on the disk to use; default: the system's temporary one"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        result = measure(Path(folder), options)
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:>22}  {bytes_in_words(value) if name.endswith('bytes') else value}")


if __name__ == "__main__":
    main()
