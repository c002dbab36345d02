"""How much memory this process can still have: what the machine has free, and every limit that it runs under.

Limits are those of its control group and of all groups above it, in version 1 and 2 (a container's, SLURM's, systemd's), and
the process's own (`ulimit -v`, `ulimit -d`). Linux tells all of it below /proc; elsewhere only the machine's size is known.
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

# A limit of /proc/self/limits, and the line of /proc/self/status that says how much of it is used.
OWN_LIMITS = {"Max address space": "VmSize", "Max data size": "VmData"}


def available_bytes(device: torch.device) -> int | None:
    """Memory that can be had without swapping; on a GPU the less of its own and the machine's, through which models pass.

    None where the system does not tell.
    """
    amounts = list(_amounts(PROC))
    if device.type == "cuda":
        amounts.append(torch.cuda.mem_get_info(device)[0])
    return min(amounts, default=None)


def limit_bytes() -> int | None:
    """The memory of the machine, or what the control groups that this process is in may have at most, where that is less.

    Unlike `available_bytes` it does not change while others work. None where the system does not tell.
    """
    return min(_limits(PROC), default=None)


def _limits(proc: Path) -> Iterator[int]:
    total = _counters(proc / "meminfo").get("MemTotal")
    if total is not None:
        yield 1024 * total
    for group in control_groups(proc):
        yield from group.limits()


def _amounts(proc: Path) -> Iterator[int]:
    """What each thing that limits this process leaves it, never less than 0. proc: where /proc is mounted."""
    yield from _free_of_the_machine(proc)
    for group in control_groups(proc):
        for left in group.left():
            yield max(0, left)
    for left in _left_to_the_process(proc):
        yield max(0, left)


def _free_of_the_machine(proc: Path) -> Iterator[int]:
    available = _counters(proc / "meminfo").get("MemAvailable")
    if available is not None:
        yield 1024 * available
    else:  # not Linux: all there is
        names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
        if hasattr(os, "sysconf") and all(name in os.sysconf_names for name in names):
            yield prod(os.sysconf(name) for name in names)


def _left_to_the_process(proc: Path) -> Iterator[int]:
    """Of the limits on addresses and on data, soft ones: what this process maps already is gone."""
    used = _counters(proc / "self" / "status")
    for line in _lines(proc / "self" / "limits"):
        for name, counter in OWN_LIMITS.items():
            soft = line.removeprefix(name).split()
            if line.startswith(name) and soft[0].isdecimal():
                yield int(soft[0]) - 1024 * used.get(counter, 0)


# --- control groups ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Version:
    """How a version of control groups calls what it tells of memory. Page cache, which counts as used, can be taken back."""

    limits: tuple[str, ...]
    used: str
    page_cache: tuple[str, ...]


VERSION_1 = Version(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
# Above memory.high the system does not kill, it lets the group wait until it has taken enough back.
VERSION_2 = Version(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))


@dataclass(frozen=True)
class ControlGroup:
    """A group that this process, or a group of it, is in."""

    folder: Path
    version: Version

    def limits(self) -> Iterator[int]:
        """In bytes. Nothing where it has none."""
        numbers = [_number(self.folder / name) for name in self.version.limits]
        # In version 1 also the least limit of all groups above, of which a container may see none.
        numbers.append(_counters(self.folder / "memory.stat").get("hierarchical_memory_limit"))
        yield from (number for number in numbers if number is not None)

    def left(self) -> Iterator[int]:
        """What each limit leaves, page cache counted as free."""
        used = _number(self.folder / self.version.used)
        if used is None:
            return
        counters = _counters(self.folder / "memory.stat")
        taken = used - sum(counters.get(name, 0) for name in self.version.page_cache)
        yield from (limit - taken for limit in self.limits())


def control_groups(proc: Path) -> Iterator[ControlGroup]:
    """The groups that limit this process's memory: its own and all above, as far as they can be seen from here."""
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
    """The path of this process's group by controller; that of version 2 by the empty name."""
    paths: dict[str, str] = {}
    for line in _lines(file):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if path.startswith("/"):
            paths |= dict.fromkeys(controllers.split(","), path)
    return paths


def _up_from(path: str, root: str, mounted: Path) -> Iterator[Path]:
    """The folders of a group and of all above it, up to where the file system is mounted.

    path: of the group. root: of the group that is seen at `mounted`. Where the one is not below the other, as in a
    container that was given another view, only what is mounted is known.
    """
    below = os.path.relpath(path, root)
    folder = mounted if below.split("/")[0] == ".." else mounted / below
    while folder != mounted:
        yield folder
        folder = folder.parent
    yield mounted


def _unescaped(text: str) -> str:
    r"""A path of mountinfo, in which a space is \040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


# --- the files of /proc and of control groups -------------------------------------------------------------------------


def _lines(path: Path) -> list[str]:
    """None where there is no such file, or it may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none, or "max"."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdecimal() else None


def _counters(path: Path) -> dict[str, int]:
    """The numbers by name of a file like meminfo ("MemFree:  12 kB") or memory.stat ("inactive_file 4096")."""
    counters = {}
    for line in _lines(path):
        name, _, rest = line.replace(":", " ", 1).partition(" ")
        with suppress(ValueError, IndexError):
            counters[name] = int(rest.split()[0])
    return counters
