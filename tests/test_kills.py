"""A few points of the harness `kills.py`, which tries every point of every command when it is run by itself."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "arguments", [["tokens", "plan", "carry", "--every", "9"], ["prune", "teacher-cache", "--every", "37"]]
)
def test_killed_anywhere_and_given_again_or_given_twice_at_once(arguments: list[str]) -> None:
    script = Path(__file__).with_name("kills.py")
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
