"""The script that checks a GPU: its driver against sections that fail, hang and are killed; its sections on a CPU."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
SECTIONS = ROOT / "benchmarks" / "gpu_check"

BEFORE = """
from section import Section, Skip
with Section() as section:
    with section.part("first") as part:
        part.note(answer=42)
"""
IMPORTS = """
from importlib.util import find_spec
from section import Section
with Section() as section, section.part("found") as part:
    part.note(**{name: find_spec(name) is not None for name in ("brought_along", "fla_core")})
"""
PROGRAMS = {
    "a_passes": BEFORE,
    "b_fails": BEFORE
    + """
    with section.part("raises"):
        raise ValueError("broken on purpose")
    with section.part("above its limit") as part:
        part.check_below("error", float("nan"), 1.0)
    with section.part("last") as part:
        part.check("one is one", 1 == 1)
""",
    "c_hangs": """
import subprocess, sys, time
from pathlib import Path
"""
    + BEFORE
    + """
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(__file__).with_suffix(".pid").write_text(str(child.pid))
    def wait_for_ever():
        time.sleep(600)
    wait_for_ever()
""",
    "d_killed": BEFORE + "\n    import os\n    os.kill(os.getpid(), 9)\n",
    "e_crashes": "raise SystemError('before any part')\n",
    "f_skips": """
from section import Section, Skip
with Section() as section, section.part("only"):
    raise Skip("not here")
""",
    "g_passes": BEFORE,
}


def gpu_check(*arguments: object, **named: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **named)


def write_programs(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names or PROGRAMS:
        (folder / f"{name}.py").write_text(PROGRAMS[name])
    return folder


def lines_of(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()]


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_what_fails_hangs_or_is_killed_stops_nothing_else(tmp_path: Path) -> None:
    folder, out = write_programs(tmp_path / "sections"), tmp_path / "results.jsonl"
    done = gpu_check("run", "--out", out, "--device", "cpu", "--sections", folder, "--cap", 4)
    assert done.returncode == 1, done.stderr
    lines = lines_of(out)
    whole = {line["section"]: line for line in lines if "section" in line and "part" not in line}
    assert {name: line["status"] for name, line in whole.items()} == {
        "a_passes": "passed",
        "b_fails": "failed",
        "c_hangs": "timed out",
        "d_killed": "killed",
        "e_crashes": "failed",
        "f_skips": "skipped",
        "g_passes": "passed",
    }
    parts = {(line["section"], line["part"]): line for line in lines if "part" in line}
    for name in ("a_passes", "b_fails", "c_hangs", "d_killed", "g_passes"):  # what was done before is kept
        assert parts[name, "first"]["numbers"] == {"answer": 42}
    assert parts["b_fails", "raises"]["reason"] == "ValueError: broken on purpose"
    assert parts["b_fails", "above its limit"]["failures"] == ["error is nan, above 1"]
    assert parts["b_fails", "last"]["status"] == "passed"
    assert parts["f_skips", "only"]["reason"] == "not here"
    assert "wait_for_ever" in whole["c_hangs"]["log"]  # where it hung
    assert "before any part" in whole["e_crashes"]["log"]
    assert not is_running(int((folder / "c_hangs.pid").read_text()))

    table = gpu_check("summary", out).stdout
    assert "| b_fails | above its limit | failed |" in table and "error is nan, above 1" in table
    assert "| a_passes | first | passed |" in table and "answer 42" in table
    assert re.search(r"\| c_hangs \| \*\*all\*\* \| timed out \| \d+\.\d \|", table)


def test_results_come_as_they_are_made_and_the_driver_takes_its_section_along(tmp_path: Path) -> None:
    folder, out = write_programs(tmp_path / "sections", "a_passes", "c_hangs"), tmp_path / "results.jsonl"
    command = [sys.executable, str(SCRIPT), "run", "--out", str(out), "--device", "cpu", "--sections", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pid = folder / "c_hangs.pid"
    end = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    assert [line["section"] for line in lines_of(out)[1:]] == ["a_passes", "a_passes", "c_hangs"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert not is_running(int(pid.read_text()))


def test_no_section_begins_when_the_time_is_over(tmp_path: Path) -> None:
    folder, out = write_programs(tmp_path / "sections", "a_passes"), tmp_path / "results.jsonl"
    gpu_check("run", "--out", out, "--device", "cpu", "--sections", folder, "--total", 1)
    assert [line["reason"] for line in lines_of(out) if "section" in line] == ["the total time is over"]


def test_a_line_that_was_cut_off_is_left_out_of_the_table(tmp_path: Path) -> None:
    whole = json.dumps({"section": "ceilings", "part": "launches", "status": "passed", "seconds": 1.0, "numbers": {}})
    (tmp_path / "results.jsonl").write_text(f"{whole}\n{whole[:20]}")
    assert gpu_check("summary", tmp_path / "results.jsonl").stdout.count("ceilings") == 1


def test_broken_wheels_are_a_line_and_the_sections_run(tmp_path: Path) -> None:
    folder, out = write_programs(tmp_path / "sections", "a_passes"), tmp_path / "results.jsonl"
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "fla_core-0.0-py3-none-any.whl").write_text("no archive")
    gpu_check("run", "--out", out, "--device", "cpu", "--sections", folder, "--wheels", tmp_path / "wheels")
    statuses = {line["section"]: line["status"] for line in lines_of(out) if "section" in line}
    assert statuses == {"kernels": "failed", "a_passes": "passed"}


def test_a_broken_kernel_is_kept_from_sections_that_are_not_about_it(tmp_path: Path) -> None:
    folder, wheels, out = tmp_path / "sections", tmp_path / "wheels", tmp_path / "results.jsonl"
    for path in (folder, wheels):
        path.mkdir()
    for name in ("brought_along", "fla_core"):
        write_wheel(wheels, name)
    (folder / "imports.py").write_text(IMPORTS)
    done = gpu_check("run", "--out", out, "--device", "cpu", "--sections", folder, "--wheels", wheels)
    assert done.returncode == 0, out.read_text()
    lines = {(line["section"], line.get("part")): line for line in lines_of(out) if "section" in line}
    assert lines["wheels", None]["numbers"] == lines["kernels", None]["numbers"] == {"wheels": 1}
    assert lines["imports", "found"]["numbers"] == {"brought_along": True, "fla_core": False}


def write_wheel(folder: Path, name: str) -> None:
    """Write a wheel with one empty module of its own name."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


def test_the_driver_needs_the_standard_library_only() -> None:
    for file in (SCRIPT, SECTIONS / "section.py"):
        tree = ast.parse(file.read_text())
        at_import = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {alias.name for node in at_import if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in at_import if isinstance(node, ast.ImportFrom)}
        assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names, file


def test_every_program_is_a_section() -> None:
    """A new section is entered in the driver's list, and the list names no file that is gone."""
    tree = ast.parse(SCRIPT.read_text())
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Section"
    ]
    programs = set()
    for call in calls:
        named = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
        first = getattr(call.args[0], "value", None)
        if isinstance(first, str):
            programs.add(named.get("program") or first)
    assert programs == {file.stem for file in SECTIONS.glob("*.py")} - {"section", "material"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "section",
    [
        "packages",
        "ceilings",
        "one_rank_world",
        "device_equality",
        "grouped_products",
        "deltanet",
        "loss_variants",
        "true_width_step",
        "true_width_step_kernels",
        "streaming",
        "decoding",
    ],
)
def test_each_section_runs_on_a_cpu(tmp_path: Path, section: str) -> None:
    out = tmp_path / "results.jsonl"
    done = gpu_check(
        *("run", "--out", out, "--device", "cpu", "--quick", "--only", section, "--cap", 300),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = [line for line in lines_of(out) if "section" in line]
    assert done.returncode == 0, lines
    assert all(line["status"] in ("passed", "skipped") for line in lines)
    assert all(line["reason"] for line in lines if line["status"] == "skipped" and "part" in line)
    assert section == "true_width_step_kernels" or any(line["status"] == "passed" for line in lines)
