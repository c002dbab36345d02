"""The memory that this process can still allocate: what the machine has free, and every limit on the process.

The limits are those of its control group and that group's ancestors, in version 1 and 2 (a container's, SLURM's, systemd's),
and the process's own (`ulimit -v`, `ulimit -d`). On Linux all of it is below /proc; elsewhere only the machine's size is known.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

PROC = Path("/proc")

# A limit of /proc/self/limits, and the line of /proc/self/status with the amount in use.
OWN_LIMITS = {"Max address space": "VmSize", "Max data size": "VmData"}


def available_bytes(device: torch.device) -> int | None:
    """Return the bytes that can be allocated without swapping; on a GPU the smaller of its own memory and the machine's.

    (Models are loaded through the machine's memory.) None where the system does not report it.
    """
    amounts = list(_amounts(PROC))
    if device.type == "cuda":
        amounts.append(torch.cuda.mem_get_info(device)[0])
    return min(amounts, default=None)


def limit_bytes() -> int | None:
    """Return the memory of the machine, or the lowest limit of the control groups of this process if that is lower.

    Unlike `available_bytes` it does not depend on what other processes use. None where the system does not report it.
    """
    return min(_limits(PROC), default=None)


def _limits(proc: Path) -> Iterator[int]:
    total = _counters(proc / "meminfo").get("MemTotal")
    if total is not None:
        yield 1024 * total
    for group in control_groups(proc):
        yield from group.limits()


def _amounts(proc: Path) -> Iterator[int]:
    """Yield the bytes left under each limit on this process, at least 0. proc: where /proc is mounted."""
    yield from _free_on_machine(proc)
    for group in control_groups(proc):
        for left in group.left():
            yield max(0, left)
    for left in _left_by_rlimits(proc):
        yield max(0, left)


def _free_on_machine(proc: Path) -> Iterator[int]:
    available = _counters(proc / "meminfo").get("MemAvailable")
    if available is not None:
        yield 1024 * available
    else:  # not Linux: the whole memory
        names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
        if hasattr(os, "sysconf") and all(name in os.sysconf_names for name in names):
            yield prod(os.sysconf(name) for name in names)


def _left_by_rlimits(proc: Path) -> Iterator[int]:
    """Yield the bytes left under the soft limits on address space and data, less what this process has mapped already."""
    used = _counters(proc / "self" / "status")
    for line in _lines(proc / "self" / "limits"):
        for name, counter in OWN_LIMITS.items():
            soft = line.removeprefix(name).split()
            if line.startswith(name) and soft[0].isdecimal():
                yield int(soft[0]) - 1024 * used.get(counter, 0)


# --- control groups ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Version:
    """File and counter names of a cgroup version. Page cache counts as used there, and can be reclaimed."""

    limits: tuple[str, ...]
    used: str
    page_cache: tuple[str, ...]


VERSION_1 = Version(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
# Above memory.high the kernel does not kill the group; it throttles it until enough memory is reclaimed.
VERSION_2 = Version(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))


@dataclass(frozen=True)
class ControlGroup:
    """A control group that this process belongs to, directly or through a descendant."""

    folder: Path
    version: Version

    def limits(self) -> Iterator[int]:
        """Yield the group's limits in bytes; nothing where it has none."""
        numbers = [_number(self.folder / name) for name in self.version.limits]
        # In version 1 also the lowest limit of all ancestors, which may be invisible in a container.
        numbers.append(_counters(self.folder / "memory.stat").get("hierarchical_memory_limit"))
        yield from (number for number in numbers if number is not None)

    def left(self) -> Iterator[int]:
        """Yield the bytes left under each limit, page cache counted as free."""
        used = _number(self.folder / self.version.used)
        if used is None:
            return
        counters = _counters(self.folder / "memory.stat")
        unreclaimable = used - sum(counters.get(name, 0) for name in self.version.page_cache)
        yield from (limit - unreclaimable for limit in self.limits())


def control_groups(proc: Path) -> Iterator[ControlGroup]:
    """Yield the groups that limit this process's memory: its own and all ancestors that are visible to it."""
    paths = _own_paths(proc / "self" / "cgroup")
    for line in _lines(proc / "self" / "mountinfo"):
        before, _, after = line.partition(" - ")
        places, kinds = before.split(" "), after.split(" ")
        if len(places) < 5 or len(kinds) < 3:
            continue
        if kinds[0] == "cgroup2":
            version, path = VERSION_2, paths.get("")
        elif kinds[0] == "cgroup" and "memory" in kinds[2].split(","):
            version, path = VERSION_1, paths.get("memory")
        else:
            continue
        if path is not None:
            root, mounted = _unescaped(places[3]), Path(_unescaped(places[4]))
            yield from (ControlGroup(folder, version) for folder in _up_from(path, root, mounted))


def _own_paths(file: Path) -> Mapping[str, str]:
    """Return the path of this process's group by controller; version 2 is under the empty name."""
    paths: dict[str, str] = {}
    for line in _lines(file):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if path.startswith("/"):
            paths |= dict.fromkeys(controllers.split(","), path)
    return paths


def _up_from(path: str, root: str, mounted: Path) -> Iterator[Path]:
    """Yield the folders of a group and of its ancestors, up to the mount point.

    path: of the group. root: of the group that is mounted at `mounted`. Where `path` is not below `root`, as in a
    container with another cgroup namespace, only the mount point is known.
    """
    below = os.path.relpath(path, root)
    folder = mounted if below.split("/")[0] == ".." else mounted / below
    while folder != mounted:
        yield folder
        folder = folder.parent
    yield mounted


def _unescaped(text: str) -> str:
    r"""Decode a path of mountinfo, in which a space is \040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


# --- the files of /proc and of control groups -------------------------------------------------------------------------


def _lines(path: Path) -> list[str]:
    """Return the lines of a file; none where it does not exist or cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """Return the number in a file; None where there is none, or "max"."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdecimal() else None


def _counters(path: Path) -> dict[str, int]:
    """Return the numbers, by name, of a file like meminfo ("MemFree:  12 kB") or memory.stat ("inactive_file 4096")."""
    counters = {}
    for line in _lines(path):
        name, _, rest = line.replace(":", " ", 1).partition(" ")
        with suppress(ValueError, IndexError):
            counters[name] = int(rest.split()[0])
    return counters
