"""What `teacher-cache` reads from the checkpoint layer by layer, with a pass for each file and with a pass for many.

    python benchmarks/teacher_passes.py [--experts 128] [--files 8] [--dir DIR] [--repeats 3] [--json]

Makes a synthetic checkpoint of two layers of Qwen3-Next-80B-A3B's true shapes (a small vocabulary, no MTP) and runs
`slimqwen teacher-cache --streaming` on a text of `--files` files of 256 tokens in turns: with room for the hidden states of
one file, and of all. The first file is a pass of its own in either case, which measures. `read` are the bytes that came from the
disk (ru_inblock), which every run begins with the checkpoint dropped from the page cache; medians.

Where the page cache holds the checkpoint, one file after another reads it from there, and the difference is small. What a larger
checkpoint does is seen where the memory is limited to less than the checkpoint's size, by a control group around this command:
on a CPU the page cache must then still hold one layer, whose experts are read for every file of a pass.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from prune import CONFIG, drop_from_page_cache
from synthetic import folder_to_use, write_synthetic

from slimqwen.checkpoint.config import read_json
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.bytesize import bytes_in_words

VOCAB_SIZE = 4096
SEQUENCES, SEQUENCE_LENGTH = 4, 64  # of a file
BYTES_PER_TOKEN = 276 - 16  # of the cache at k = 64: ids of this vocabulary fit into 16 bits
WAYS = {"a pass for each file": "1B", "a pass for many": "1GB"}
SLIMQWEN = [sys.executable, "-m", "slimqwen"]


def run(checkpoint: Path, tokens: Path, out: Path, files: int, hidden_states_size: str) -> tuple[float, int]:
    """Write a cache; return the seconds and the bytes read from the disk."""
    drop_from_page_cache(checkpoint.iterdir())
    command = [
        *SLIMQWEN,
        "teacher-cache",
        checkpoint,
        "--tokens",
        tokens,
        "--out",
        out,
        "--streaming",
        "--device",
        "cpu",
    ]
    command += ["--sequences", files * SEQUENCES, "--sequence-length", SEQUENCE_LENGTH]
    command += [
        "--shard-size",
        f"{SEQUENCES * SEQUENCE_LENGTH * BYTES_PER_TOKEN}B",
        "--hidden-states-size",
        hidden_states_size,
    ]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock, time.perf_counter()
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    blocks = resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock - before
    return time.perf_counter() - started, 512 * blocks


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run both ways in turns in `folder`."""
    config = read_json(CONFIG) | {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts": options.experts,
        "num_nextn_predict_layers": 0,
        "vocab_size": VOCAB_SIZE,
    }
    source, tokens = folder / "source", folder / "tokens"
    source.mkdir()
    write_synthetic(source, config)
    command = [*SLIMQWEN, "tokens", "python-stdlib", "--tokenizer", "builtin", "--out", str(tokens)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    spent: dict[str, list[tuple[float, int]]] = {name: [] for name in WAYS}
    for turn in range(options.repeats):
        for name, size in WAYS.items():
            out = folder / f"cache-{turn}-{size}"
            spent[name].append(run(source, tokens, out, options.files, size))
            made = len(list(out.glob("shard-*")))
            assert made == options.files, f"{made} files"
    seconds, read = ([statistics.median(run[i] for run in runs) for runs in spent.values()] for i in (0, 1))
    return {
        "checkpoint_bytes": Checkpoint(source).bytes(),
        "read_bytes_of_each": read[0],
        "read_bytes_of_many": read[1],
        "seconds_of_each": round(seconds[0], 1),
        "seconds_of_many": round(seconds[1], 1),
        "read_of_many_over_each": round(read[1] / max(read[0], 1), 3),
        "seconds_of_many_over_each": round(seconds[1] / seconds[0], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=128, help="routed experts per layer, of which 10 are chosen")
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument(
        "--dir", type=folder_to_use, help="a folder on the disk to use; default: the system's temporary one"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        result = measure(Path(folder), options)
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:>27}  {bytes_in_words(value) if '_bytes' in name else value}")


if __name__ == "__main__":
    main()
