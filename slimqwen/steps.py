"""The steps of a run: each done once, recognised by the content of its inputs and output, timed and logged."""

import json
import os
import platform
import resource
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from slimqwen.artifacts import fingerprint, fingerprint_value, tidy, write_json, write_text
from slimqwen.errors import StageFailed
from slimqwen.progress import say
from slimqwen.recipe import Section
from slimqwen.recipe_file import dump_recipe
from slimqwen.warning import kept_in


class Steps:
    """Bookkeeping of a run directory: `.steps/` (what was made from what), stages.jsonl, warnings.jsonl,
    provenance.json."""

    def __init__(self, run_dir: Path, command: str) -> None:
        self.run_dir = run_dir
        self.command = command

    def begin(self, recipe: Section) -> None:
        """The run directory, its resolved recipe and where it came from."""
        for name in ("warnings.jsonl", "metrics.jsonl"):  # the others are written anew
            tidy(self.run_dir / name)
        dump_recipe(recipe, self.run_dir / "recipe.resolved.yaml")
        provenance = {
            "format": "slimqwen.provenance/1",
            "command": self.command,
            "version": version("slimqwen"),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "device": device_name(),
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
            "torch": version("torch"),
            "transformers": version("transformers"),
        }
        write_json(self.run_dir / "provenance.json", provenance)

    def step(self, name: str, output: Path, inputs: Mapping[str, Any], action: Callable[[], object]) -> Path:
        """Do `action`, which makes `output`, unless the same inputs made it before and it is still what they made."""
        record = self.run_dir / ".steps" / f"{name.replace('/', '.')}.json"
        key = fingerprint_value({"version": version("slimqwen"), **inputs})
        tidy(record)
        if record.exists() and output.exists() and record.read_text() == record_text(key, output):
            tidy(output)
            say(f"{name}: done already, {output}")
            self._log(name, 0.0, skipped=True)
            return output
        record.unlink(missing_ok=True)
        started = time.perf_counter()
        with self.warned(name, key):
            action()
        if not output.exists():
            raise StageFailed(f"{name} ended without writing {output}.")
        write_text(record, record_text(key, output))
        self._log(name, time.perf_counter() - started, skipped=False)
        return output

    def warned(self, name: str, key: str) -> AbstractContextManager[None]:
        """Where warnings are raised that the report is to show: `name`, made from `key`."""
        return kept_in(self.run_dir / "warnings.jsonl", step=name, key=key)

    def _log(self, name: str, seconds: float, *, skipped: bool) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of the process so far: Linux counts KiB
        entry = {
            "step": name,
            "seconds": seconds,
            "peak_memory_bytes": peak,
            "skipped": skipped,
            "command": self.command,
        }
        with (self.run_dir / "stages.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")


def machine() -> str:
    """`2 cores, 24 GiB, x86_64`"""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, {platform.machine()}"


def device_name() -> str:
    """The GPU's name, or `cpu`."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def record_text(key: str, output: Path) -> str:
    """What is noted of a finished step: what it was made from, and what it made."""
    return json.dumps({"key": key, "output": fingerprint(output)}) + "\n"
