"""The steps of a run: each done once, recognised by the content of its inputs and output, timed and logged."""

import os
import platform
import resource
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from slimqwen.artifacts import (
    MARKER,
    check_file_replaceable,
    check_replaceable,
    fingerprint,
    fingerprint_value,
    remove_ours,
    tidy,
    write_json,
)
from slimqwen.artifacts.json_lines import append, read_lines, value_of
from slimqwen.artifacts.step_record import FOLDER, StepRecord, records_in
from slimqwen.artifacts.warning_file import kept_in
from slimqwen.core.errors import StageFailed, UserError
from slimqwen.core.progress import say
from slimqwen.core.torchrun import world_size
from slimqwen.model.arithmetic import arithmetic, warn_of_other_arithmetic
from slimqwen.recipe import Section
from slimqwen.recipe.file import dump_recipe


class Steps:
    """Bookkeeping of a run directory.

    `.steps/` (what was made from what), stages.jsonl, warnings.jsonl, provenance.json.
    """

    def __init__(self, run_dir: Path, command: str) -> None:
        self.run_dir = run_dir
        self.command = command
        self._other_arithmetic: dict[str, Any] | None = None  # of a step that was done before
        self._has_compared = False

    def begin(self, recipe: Section) -> None:
        """Make the run directory, and note in it the resolved recipe and where it came from."""
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
            "processes": world_size(),
            **arithmetic(),
            "transformers": version("transformers"),
        }
        write_json(self.run_dir / "provenance.json", provenance)

    def step(self, name: str, output: Path, identity: Mapping[str, Any], action: Callable[[], object]) -> Path:
        """Do `action`, which makes `output`, unless it was made before and is still what was made.

        identity: all that `output` depends on, as JSON, the revision of the code that makes it among it.
        """
        file = self._file_of(name)
        key = fingerprint_value(identity)
        tidy(file)
        record = StepRecord.read(file)
        if record is not None and record.key == key and output.exists() and record.output == fingerprint(output):
            tidy(output)
            say(f"{name}: done already, {output}")
            if record.arithmetic != arithmetic():
                self._other_arithmetic = record.arithmetic
            self._log(name, 0.0, skipped=True)
            return output
        file.unlink(missing_ok=True)
        self._compare_arithmetic()
        started = time.perf_counter()
        with self.warned(name, key):
            action()
        if not output.exists():
            raise StageFailed(f"{name} ended without writing {output}.")
        made = output.relative_to(self.run_dir).as_posix()
        record = StepRecord(name=name, key=key, made=made, output=fingerprint(output), arithmetic=arithmetic())
        write_json(file, record.model_dump())
        self._log(name, time.perf_counter() - started, skipped=False)
        return output

    def _file_of(self, name: str) -> Path:
        return self.run_dir / FOLDER / f"{name.replace('/', '.')}.json"

    def records(self) -> list[StepRecord]:
        return records_in(self.run_dir)

    def is_unchanged(self, record: StepRecord) -> bool:
        """Return whether what a step made is there, and as it made it."""
        output = self.run_dir / record.made
        return output.exists() and fingerprint(output) == record.output

    def forget(self, record: StepRecord) -> None:
        """Remove what a step made, and then its record; what was changed since it was made stays, and that is said."""
        output = self.run_dir / record.made
        if self.is_unchanged(record):
            say(f"{output}: left by another schedule, removed")
            remove_ours(output)
        elif output.exists():
            say(f"{output} stays: it was changed since it was made")
        self._file_of(record.name).unlink(missing_ok=True)

    def check(self, outputs: Iterable[Path]) -> None:
        """Raise UserError, before any work, where something that is not ours lies in the place of what is to be made.

        A file that somebody put into a folder that a step made is in the way only if the folder has to be made again: a note is printed.
        """
        self._check_version()
        made = {self.run_dir / record.made: record for record in self.records()}
        for output in outputs:
            if output.suffix == ".json" and output.exists() and output in made and not self.is_unchanged(made[output]):
                raise UserError(  # people edit them: a run makes its own, and reads no other
                    f"{output} was changed since this run wrote it: move it elsewhere and give the same command again."
                )
            check_place = check_file_replaceable if output.suffix else check_replaceable
            try:
                check_place(output)
            except UserError as error:
                if output not in made or not (output / MARKER).is_file():
                    raise
                say(f"note: should {output} have to be made again, the work stops there: {error}")
        for name in ("recipe.resolved.yaml", "provenance.json"):
            check_file_replaceable(self.run_dir / name)
        log = self.run_dir / "stages.jsonl"
        lines = read_lines(log)
        if lines and not any(is_entry(line) for line in lines):
            raise UserError(
                f"{log} exists and was not written by slimqwen: move it elsewhere, or choose another folder."
            )

    def _check_version(self) -> None:
        """Raise UserError in the folder of a version before those that give everything a record or a mark."""
        file = self.run_dir / "provenance.json"
        provenance = value_of(file.read_bytes()) if file.is_file() else None
        if provenance is not None and {"version", "started"} <= provenance.keys() and "format" not in provenance:
            raise UserError(
                f"{self.run_dir} was begun by an earlier version of slimqwen, and this one cannot go on from there: finish it with "
                "that version, or choose another run_dir."
            )

    def _compare_arithmetic(self) -> None:
        """Say once that this goes on from what was computed with, for example, another number of threads."""
        earlier, self._other_arithmetic = self._other_arithmetic, None
        if earlier is not None and not self._has_compared:
            self._has_compared = True
            with self.warned("arithmetic", fingerprint_value(earlier)):
                warn_of_other_arithmetic(earlier, f"the run in {self.run_dir}")

    def warned(self, name: str, key: str) -> AbstractContextManager[None]:
        """Keep the warnings raised within this context for the report: `name`, made from `key`."""
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
        append(self.run_dir / "stages.jsonl", entry)


def is_entry(line: bytes) -> bool:
    """Return whether a line of stages.jsonl is ours."""
    entry = value_of(line)
    return entry is not None and {"step", "seconds", "skipped", "command"} <= entry.keys()


def machine() -> str:
    """Return the machine in words: `2 cores, 24 GiB, x86_64`."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, {platform.machine()}"


def device_name() -> str:
    """Return the GPU's name, or `cpu`."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
