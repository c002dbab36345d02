"""Memory limits: the process's own control group and all above it, in both versions; its own limits. On prepared folders."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from slimqwen.core import free_memory
from slimqwen.core.free_memory import available_bytes, control_groups, limit_bytes

CPU = torch.device("cpu")
GB = 10**9


@dataclass(frozen=True)
class System:
    """A /proc and control groups that the test writes; at first a machine of 64 GB, 48 of them available, without groups."""

    folder: Path

    @property
    def proc(self) -> Path:
        return self.folder / "proc"

    def write(self, path: str, text: object) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n", encoding="utf-8")

    def mounts(self, *lines: str) -> None:
        """`ROOT POINT -KIND OPTIONS` each, POINT below the folder."""
        text = []
        for line in lines:
            places, _, kind = line.partition(" -")
            root, point = places.split(" ")
            name, options = kind.split(" ")
            text.append(f"35 31 0:32 {root} {self.folder}/{point} rw,relatime shared:9 - {name} {name} {options}")
        self.write("proc/self/mountinfo", "\n".join(text))

    def version_2(self, group: str, used: int, cache: int = 0, **limits: object) -> None:
        self.write(f"cg/{group}/memory.current", used)
        self.write(f"cg/{group}/memory.stat", f"anon 7\ninactive_file {cache - 1}\nactive_file 1\nslab 3")
        for name, value in limits.items():
            self.write(f"cg/{group}/memory.{name}", value)

    def version_1(self, group: str, limit: int, used: int, **counters: int) -> None:
        self.write(f"cg/{group}/memory.limit_in_bytes", limit)
        self.write(f"cg/{group}/memory.usage_in_bytes", used)
        self.write(f"cg/{group}/memory.stat", "\n".join(f"{name} {value}" for name, value in counters.items()))


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    made = System(tmp_path)
    made.write("proc/meminfo", "MemTotal:       64000000 kB\nMemFree: 1 kB\nMemAvailable:   48000000 kB")
    monkeypatch.setattr(free_memory, "PROC", made.proc)
    return made


def test_without_limits_it_is_what_the_machine_has(system: System) -> None:
    assert available_bytes(CPU) == 48_000_000 * 1024 and limit_bytes() == 64_000_000 * 1024
    system.mounts("/ cg -cgroup2 rw", "/ home -ext4 rw,memory")
    system.write("proc/self/cgroup", "0::/user.slice/session-1.scope")
    system.version_2("user.slice/session-1.scope", used=GB, max="max", high="max")
    system.write("proc/self/limits", "Limit  Soft Limit\nMax address space  unlimited unlimited bytes\n")
    assert available_bytes(CPU) == 48_000_000 * 1024 and limit_bytes() == 64_000_000 * 1024


def test_the_own_group_of_version_2(system: System) -> None:
    """systemd-run --scope -p MemoryMax=4G: the root of the tree has no limit. Page cache is not gone."""
    system.mounts("/ cg -cgroup2 rw,nsdelegate")
    system.write("proc/self/cgroup", "0::/user.slice/run-r1.scope")
    system.version_2("user.slice/run-r1.scope", used=3 * GB, cache=GB, max=4 * GB, high="max")
    assert available_bytes(CPU) == 2 * GB and limit_bytes() == 4 * GB
    system.version_2("user.slice/run-r1.scope", used=9 * GB, cache=GB, max=4 * GB)
    assert available_bytes(CPU) == 0


@pytest.mark.parametrize(
    "limited", ["", "system.slice", "system.slice/slurmstepd.scope", "system.slice/slurmstepd.scope/job_7"]
)
@pytest.mark.parametrize("name", ["max", "high"])
def test_every_group_above_limits_too(system: System, limited: str, name: str) -> None:
    system.mounts("/ cg -cgroup2 rw")
    system.write("proc/self/cgroup", "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0")
    system.version_2("system.slice/slurmstepd.scope/job_7/step_0/user/task_0", used=1, max="max", high="max")
    system.version_2(limited, used=GB, cache=GB // 2, **{name: 2 * GB})
    assert available_bytes(CPU) == GB + GB // 2 and limit_bytes() == 2 * GB


def test_version_1_of_slurm(system: System) -> None:
    """The job's group has the limit, the step's none; the counters with total_ are those of all below."""
    unlimited = 9223372036854771712
    system.mounts("/ unified -cgroup2 rw", "/ other -cgroup rw,cpu,cpuacct", "/ cg -cgroup rw,memory")
    system.write("proc/self/cgroup", "5:cpuacct,cpu:/\n4:memory:/slurm/uid_1/job_7/step_0\n1:name=systemd:/x\n0::/")
    system.version_1("slurm/uid_1/job_7/step_0", unlimited, used=GB)
    counters = {"inactive_file": 5, "total_inactive_file": GB, "total_active_file": GB}
    system.version_1("slurm/uid_1/job_7", 6 * GB, used=4 * GB, **counters)
    assert available_bytes(CPU) == 4 * GB and limit_bytes() == 6 * GB


def test_a_limit_above_what_a_container_sees(system: System) -> None:
    """Version 1, no name space: the mount shows the container's own group, and only `memory.stat` tells of those above."""
    system.mounts("/docker/c0ffee cg -cgroup rw,memory")
    system.write("proc/self/cgroup", "4:memory:/docker/c0ffee")
    system.version_1("", 8 * GB, used=GB, hierarchical_memory_limit=3 * GB)
    assert available_bytes(CPU) == 2 * GB and limit_bytes() == 3 * GB


@pytest.mark.parametrize("path", ["/../../init.scope", "/elsewhere", "/docker/c0ffee/../x"])
def test_a_group_that_is_not_below_the_mount_is_the_mount(system: System, path: str) -> None:
    system.mounts("/docker/c0ffee cg -cgroup2 rw")
    system.write("proc/self/cgroup", f"0::{path}")
    system.version_2("", used=GB, max=2 * GB)
    system.write("memory.max", 1)  # outside of the mount
    system.write("memory.current", 0)
    assert available_bytes(CPU) == GB
    assert [group.folder for group in control_groups(system.proc)] == [system.folder / "cg"]


def test_a_mount_with_a_space_and_lines_that_say_nothing(system: System) -> None:
    system.mounts(r"/ my\040groups -cgroup2 rw")
    system.write("proc/self/cgroup", "0::/a b:c\nnonsense\n\n7:")
    system.write("my groups/a b:c/memory.max", 2 * GB)
    system.write("my groups/a b:c/memory.current", GB)
    with (system.proc / "self" / "mountinfo").open("a") as file:
        file.write("broken\n1 2 - cgroup2\n")
    assert available_bytes(CPU) == GB


@pytest.mark.parametrize(("name", "counter"), [("Max address space", "VmSize"), ("Max data size", "VmData")])
def test_the_process_s_own_limits(system: System, name: str, counter: str) -> None:
    """ulimit -v and -d; the soft one counts, less what the process has mapped."""
    system.write(
        "proc/self/limits", f"Limit         Soft Limit   Hard Limit  Units\n{name}   {4 * GB}   {9 * GB}   bytes"
    )
    system.write("proc/self/status", f"Name:\tpython\n{counter}:\t  1000000 kB")
    assert available_bytes(CPU) == 4 * GB - 1_024_000_000
    assert limit_bytes() == 64_000_000 * 1024


def test_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not Linux: what the machine has, or nothing."""
    monkeypatch.setattr(free_memory, "PROC", tmp_path)
    assert limit_bytes() is None
    available = available_bytes(CPU)
    assert available is None or available > 1 << 20


def test_this_process_has_memory() -> None:
    available, limit = available_bytes(CPU), limit_bytes()
    assert available is None or 1 << 20 < available < 1 << 50
    assert limit is None or available is None or available <= limit
