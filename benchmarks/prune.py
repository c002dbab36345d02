"""Speed and memory of `prune` on a checkpoint of Qwen3-Next-80B-A3B's true shapes.

    python benchmarks/prune.py [--layers 4] [--dir DIR] [--json]

Makes a synthetic checkpoint (per-expert layout, MTP included, real vocabulary) and two plans (hidden 2048 -> 1536, experts
512 -> 256 by partial merging, or by dropping the others, all layers), then alternates: the stage prune by either plan in a
process of its own, and `cp` of its output, on the same disk. All start with their input dropped from the page cache and end
when their output is on the disk (fsync). Throughput is bytes written over seconds, medians; the time of prune is that of the
stage, from opening the checkpoint to its final check, without imports. Merging, it reads about 2.5 times as much as it
writes; otherwise 1.4 times; cp equally much. `cpu_seconds_over_cp` compares the processor's time in the same way, user and
system, which other work on the machine hardly changes. Anonymous memory is RssAnon of /proc/PID/status, sampled every 50 ms.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from synthetic import folder_to_use, write_synthetic

from slimqwen.checkpoint.config import read_json
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.bytesize import bytes_in_words
from slimqwen.families.count import count
from slimqwen.planning.choose import Scores
from slimqwen.planning.experts import group_experts
from slimqwen.planning.plan import Plan
from slimqwen.planning.width import kept_channels
from slimqwen.recipe import ExpertCompression, PruningRecipe, Target
from slimqwen.shapes.target import completed, target_config

CONFIG = Path(__file__).parents[1] / "recipes" / "qwen3-next-80b-a3b.json"
SAMPLE_EVERY_SECONDS = 0.05
PRUNE = """
import sys, time
from pathlib import Path
import transformers
from slimqwen.pruning.prune import prune
source, plan, out = map(Path, sys.argv[1:])
started, used = time.perf_counter(), time.process_time()
prune(source, out, plan=plan)
print(time.perf_counter() - started, time.process_time() - used)
"""


def random_plan(source: Checkpoint, target: Target, compression: ExpertCompression) -> Plan:
    """Make a plan from random importance and similarity."""
    family, config = source.family, source.config
    generator = torch.Generator().manual_seed(0)
    target = completed(family, target, config)
    assert target.num_hidden_layers and target.hidden_size and target.num_experts
    layers = list(range(target.num_hidden_layers))
    blocks = [block.name for block in family.moe_blocks(config) if block.layer is None or block.layer in layers]
    experts = config["num_experts"]
    groups = {
        block: group_experts(
            compression,
            torch.rand(experts, generator=generator),
            torch.rand(experts, experts, generator=generator),
            target.num_experts,
        )
        for block in blocks
    }
    channels = kept_channels(torch.rand(config["hidden_size"], generator=generator), target.hidden_size)
    return Plan(
        checkpoint=source.fingerprint(),
        statistics_data="random",
        target=target,
        pruning=PruningRecipe(),
        kept_layers=layers,
        kept={family.hidden.name: channels},
        expert_groups=groups,
        before=count(family, config),
        after=count(family, target_config(family, config, target, layers)),
        scores=Scores(layer_similarity=[], layer_block_influence=[], hidden=[], experts={}),
    )


def drop_from_page_cache(files: Iterable[Path]) -> None:
    """Flush files to disk and drop them from the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # dirty pages would stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def anonymous_bytes(pid: int) -> int:
    """Return the RssAnon of a process; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")), 0)


@dataclass(frozen=True)
class Spent:
    """What a run took: seconds by the clock and of the processor, and anonymous memory at the peak."""

    seconds: float
    cpu_seconds: float
    anonymous_bytes: int = 0


def run_prune(source: Path, plan: Path, out: Path) -> Spent:
    """Prune in a process of its own."""
    command = [sys.executable, "-c", PRUNE, source, plan, out]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(SAMPLE_EVERY_SECONDS)
    if process.returncode:
        raise SystemExit("prune failed")
    assert process.stdout is not None
    seconds, cpu_seconds = map(float, process.stdout.read().split())
    return Spent(seconds, cpu_seconds, peak)


def copy(source: Path, destination: Path) -> Spent:
    """Copy a folder and flush it to disk."""
    started, used = time.perf_counter(), _cpu_seconds()
    subprocess.run(["cp", "-r", source, destination], check=True)
    for file in destination.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    return Spent(time.perf_counter() - started, _cpu_seconds() - used)


def _cpu_seconds() -> float:
    """Return the processor's time of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def measure(folder: Path, config: dict[str, Any], target: Target, repeats: int) -> dict[str, Any]:
    """Measure prune, by a plan that merges experts and one that drops them, and cp in `folder`."""
    source = folder / "source"
    source.mkdir()
    started = time.perf_counter()
    write_synthetic(source, config)
    checkpoint = Checkpoint(source)
    spent = time.perf_counter() - started
    print(f"synthetic checkpoint: {bytes_in_words(checkpoint.bytes())} in {spent:.0f} s", file=sys.stderr)
    plans = {"": ExpertCompression.PARTIAL, "_without_merging": ExpertCompression.PRUNE}
    pruned: dict[str, list[Spent]] = {name: [] for name in plans}
    copied: dict[str, list[Spent]] = {name: [] for name in plans}
    for _ in range(repeats):
        for name, compression in plans.items():
            plan, out, other = folder / f"plan{name}.json", folder / "pruned", folder / "copied"
            random_plan(checkpoint, target, compression).save(plan)
            shutil.rmtree(out, ignore_errors=True)
            drop_from_page_cache(source.iterdir())
            pruned[name].append(run_prune(source, plan, out))
            drop_from_page_cache(out.iterdir())
            copied[name].append(copy(out, other))
            shutil.rmtree(other)
    result = Checkpoint(folder / "pruned")
    written = result.bytes()
    for name in plans:
        for what, runs in ((f"prune{name}", pruned[name]), ("cp", copied[name])):
            rates = ", ".join(f"{bytes_in_words(written / spent.seconds)}/s" for spent in runs)
            print(f"{what}: {bytes_in_words(written)} written at {rates}", file=sys.stderr)
    ratios = {
        f"throughput_over_cp{name}": _median(copied[name], "seconds") / _median(pruned[name], "seconds")
        for name in plans
    }
    ratios |= {
        f"cpu_seconds_over_cp{name}": _median(pruned[name], "cpu_seconds") / _median(copied[name], "cpu_seconds")
        for name in plans
    }
    return {
        **{name: round(ratio, 3) for name, ratio in ratios.items()},
        "peak_anonymous_bytes": max(spent.anonymous_bytes for runs in pruned.values() for spent in runs),
        "largest_tensor_bytes": max(map(result.nbytes, result.specs)),
        "checkpoint_bytes": checkpoint.bytes(),
        "written_bytes": written,
    }


def _median(runs: list[Spent], what: str) -> float:
    return max(statistics.median(getattr(spent, what) for spent in runs), 1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=512, help="routed experts per layer; half of them are kept")
    parser.add_argument(
        "--dir", type=folder_to_use, help="a folder on the disk to measure; default: the system's temporary one"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    config = read_json(CONFIG) | {"num_hidden_layers": options.layers, "num_experts": options.experts}
    target = Target(hidden_size=1536, num_experts=options.experts // 2)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        result = measure(Path(folder), config, target, options.repeats)
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:>35}  {bytes_in_words(value) if name.endswith('bytes') else value}")


if __name__ == "__main__":
    main()
