"""The section on costs: time, memory, device hours and an estimate of the energy."""

import re
from dataclasses import dataclass

import numpy as np

from slimqwen.core.progress import duration
from slimqwen.reporting.run_folder import Provenance, Run
from slimqwen.reporting.sections.amounts import NOTHING, Cell, number, share
from slimqwen.reporting.titles import title_of

# Rated power, from the manufacturers' data sheets. A device matches the first entry whose words are all in its name.
DEVICE_WATTS = {
    "B200": 1000,
    "GH200": 900,
    "H200": 700,
    "H100 PCIe": 350,
    "H100 NVL": 400,
    "H100": 700,
    "H800": 700,
    "A100 PCIe": 300,
    "A100": 400,
    "L40S": 350,
    "L4": 72,
    "RTX 5090": 575,
    "RTX 4090": 450,
    "RTX 3090": 350,
    "MI300X": 750,
}
CORE_WATTS = 6  # a server processor of 64 cores is rated at some 350 to 400 W


@dataclass(frozen=True)
class TimeRow:
    """A row of the table of times."""

    step: str
    time: str
    share: float  # of the longest step
    memory: str


def list_times(run: Run) -> list[TimeRow]:
    """List the last execution of each step."""
    longest = max((step.seconds for step in run.times), default=0.0) or 1.0
    return [
        TimeRow(
            step.step,
            duration(step.seconds) if step.seconds >= 1 else "< 1 s",
            step.seconds / longest,
            "–" if step.peak_memory_bytes is None else f"{step.peak_memory_bytes / 2**30:,.2f} GiB",
        )
        for step in run.times
    ]


def tabulate_costs(run: Run) -> list[tuple[str, str, list[Cell]]]:
    """Make a row per training: tokens, device hours, tokens per second, peak memory of a process, MFU."""
    rows = []
    for name, steps in run.steps.items():
        hours = device_hours(run, name)
        seconds = steps.values["seconds"]
        speed = None if hours is None else steps.tokens[-1] / seconds.sum()
        memory = np.nanmax(steps.values["memory_bytes"]) / 2**30 if steps.has("memory_bytes") else None
        mfu = float(np.nanmean(steps.values["mfu"])) if steps.has("mfu") else None
        cells = [
            number(steps.tokens[-1], 0),
            NOTHING if hours is None else Cell(f"{hours:,.3g}", hours),
            number(speed, 0),
            number(memory, 2),
            share(mfu),
        ]
        rows.append((name, title_of(name), cells))
    return rows


def device_hours(run: Run, name: str) -> float | None:
    """Return the hours of a training's steps times the number of processes, one device each; None where not timed."""
    steps = run.steps.get(name)
    if steps is None or not np.isfinite(steps.along["hours"]).all():
        return None
    return float(steps.along["hours"][-1]) * (run.provenance.processes if run.provenance else 1)


def estimate_energy(run: Run) -> str | None:
    """Estimate the energy of all steps of the run, in a sentence; None where the device is unknown."""
    provenance = run.provenance
    if provenance is None or not run.times:
        return None
    rated = _watts(provenance)
    if rated is None:
        return None
    watts, assumption = rated
    seconds = sum(step.seconds for step in run.times)
    kwh = watts * provenance.processes * seconds / 3.6e6
    return (
        f"Energy: about {kwh:,.2g} kWh. This is an estimate, not a measurement: {assumption}, at full power for the "
        f"{duration(seconds)} that all steps took{_times(provenance.processes)}; memory, hosts and cooling are left out."
    )


def _times(processes: int) -> str:
    return f", times {processes} devices" if processes > 1 else ""


def _watts(provenance: Provenance) -> tuple[float, str] | None:
    """Return the power of one device, and the source of the number in words."""
    words = set(re.split(r"[^a-z0-9]+", provenance.device.lower()))
    for name, watts in DEVICE_WATTS.items():
        if set(name.lower().split()) <= words:
            return watts, f"a {name} is rated at {watts} W"
    cores = re.match(r"(\d+) cores", provenance.machine)
    if provenance.device == "cpu" and cores is not None:
        return CORE_WATTS * int(cores[1]), f"{cores[1]} processor cores are assumed to need {CORE_WATTS} W each"
    return None
