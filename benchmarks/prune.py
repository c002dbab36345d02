"""Speed and memory of `prune` on a checkpoint of Qwen3-Next-80B-A3B's true shapes.

    python benchmarks/prune.py [--layers 4] [--dir DIR] [--json]

Makes a synthetic checkpoint (per-expert layout, MTP included, real vocabulary) and a plan (hidden 2048 -> 1536, experts
512 -> 256 by partial merging, all layers), then alternates: the stage prune in a process of its own, and `cp` of its output,
on the same disk. Both start with their input dropped from the page cache and end when their output is on the disk
(fsync). Throughput is bytes written over seconds, medians; the time of prune is that of the stage, from opening the
checkpoint to its final check, without imports. It reads about 2.5 times as much as it writes; cp equally much.
Anonymous memory is RssAnon of /proc/PID/status, sampled every 50 ms.
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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from synthetic import write_synthetic

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
started = time.perf_counter()
prune(source, out, plan=plan)
print(time.perf_counter() - started)
"""


def random_plan(source: Checkpoint, target: Target) -> Plan:
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
            ExpertCompression.PARTIAL,
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


def run_prune(source: Path, plan: Path, out: Path) -> tuple[float, int]:
    """Prune in a process of its own; return the seconds and the peak of anonymous bytes."""
    command = [sys.executable, "-c", PRUNE, source, plan, out]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(SAMPLE_EVERY_SECONDS)
    if process.returncode:
        raise SystemExit("prune failed")
    assert process.stdout is not None
    return float(process.stdout.read()), peak


def copy(source: Path, destination: Path) -> None:
    """Copy a folder and flush it to disk."""
    subprocess.run(["cp", "-r", source, destination], check=True)
    for file in destination.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def seconds(action: Callable[[], object]) -> float:
    """Time `action`."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure(folder: Path, config: dict[str, Any], target: Target, repeats: int) -> dict[str, Any]:
    """Measure prune and cp in `folder`."""
    source, pruned, copied, plan = (folder / name for name in ("source", "pruned", "copied", "plan.json"))
    source.mkdir()
    spent = seconds(lambda: write_synthetic(source, config))
    checkpoint = Checkpoint(source)
    print(f"synthetic checkpoint: {bytes_in_words(checkpoint.bytes())} in {spent:.0f} s", file=sys.stderr)
    random_plan(checkpoint, target).save(plan)
    peaks, prune_seconds, cp_seconds = [], [], []
    for _ in range(repeats):
        shutil.rmtree(pruned, ignore_errors=True)
        drop_from_page_cache(source.iterdir())
        spent, peak = run_prune(source, plan, pruned)
        prune_seconds.append(spent)
        peaks.append(peak)
        drop_from_page_cache(pruned.iterdir())
        cp_seconds.append(seconds(lambda: copy(pruned, copied)))
        shutil.rmtree(copied)
    result = Checkpoint(pruned)
    written = result.bytes()
    for name, spent_each in (("prune", prune_seconds), ("cp", cp_seconds)):
        rates = ", ".join(f"{bytes_in_words(written / spent)}/s" for spent in spent_each)
        print(f"{name}: {bytes_in_words(written)} written at {rates}", file=sys.stderr)
    return {
        "throughput_over_cp": round(statistics.median(cp_seconds) / statistics.median(prune_seconds), 3),
        "peak_anonymous_bytes": max(peaks),
        "largest_tensor_bytes": max(map(result.nbytes, result.specs)),
        "checkpoint_bytes": checkpoint.bytes(),
        "written_bytes": written,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=512, help="routed experts per layer; half of them are kept")
    parser.add_argument("--dir", type=Path, help="a folder on the disk to measure; default: the system's temporary one")
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
            print(f"{name:>22}  {bytes_in_words(value) if name.endswith('bytes') else value}")


if __name__ == "__main__":
    main()
