"""A few points of the harness `kills.py`, which tries every point of every command when it is run by itself."""

import subprocess
import sys
from pathlib import Path


def test_killed_anywhere_and_given_again_or_given_twice_at_once() -> None:
    command = [
        sys.executable,
        Path(__file__).with_name("kills.py"),
        "tokens",
        "plan",
        "prune",
        "carry",
        "--every",
        "13",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
