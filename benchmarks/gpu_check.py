"""One script that shows on a GPU, within minutes, what works there and how fast it is; docs/gpu-check.md explains the numbers.

    python benchmarks/gpu_check.py prepare --wheels DIR      # where a package index can be reached: the packages to bring along
    python benchmarks/gpu_check.py run --out results.jsonl [--wheels DIR] [--device cuda|cpu] [--quick] [--only NAME,NAME]
    python benchmarks/gpu_check.py summary results.jsonl

Needs the standard library only: each section is a program of its own in benchmarks/gpu_check/, with a limit on its seconds,
and appends a line of JSON to the results for each part as it ends. A section that fails, hangs or is killed leaves its line,
and the next one begins. `run` exits with 1 where a section did not pass.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).resolve().parent / "gpu_check"
TOTAL_SECONDS = 480.0
LEAST_SECONDS = 5.0  # with fewer left no section is begun
TAIL_CHARACTERS = 4000  # of what a section printed, kept where it did not pass
NUMBERS_SHOWN = 12  # of each part, in the table
LIMIT_MIB = 64.0  # of the wheels

# Beyond what an environment with PyTorch, Transformers and the usual scientific packages has.
PACKAGES = (
    "pydantic",
    "pydantic_core",
    "annotated-types",
    "typing-inspection",
    "plotly",
    "flash-linear-attention",
    "fla-core",
    "liger-kernel",
)
KERNELS = (
    "flash_linear_attention",
    "fla_core",
    "liger_kernel",
    "causal_conv1d",
)  # wheels that replace parts of a model
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


@dataclass(frozen=True)
class Section:
    """Section of the check: its program in gpu_check/, and the most seconds that it may take.

    with_kernels: whether the wheels of KERNELS can be imported in it. Where one of them breaks on a GPU, the other sections
        still have their numbers.
    """

    name: str
    cap_seconds: float
    with_kernels: bool = False
    program: str = ""  # default: the name

    def path(self, folder: Path) -> Path:
        """Return its program in the folder of sections."""
        return folder / f"{self.program or self.name}.py"


# By worth: where the time is over, the last ones are left out.
SECTIONS = (
    Section("packages", 60, with_kernels=True),
    Section("ceilings", 45),
    Section("one_rank_world", 120),
    Section("device_equality", 60),
    Section("grouped_products", 40),
    Section("deltanet", 60, with_kernels=True),
    Section("loss_variants", 75, with_kernels=True),
    Section("true_width_step", 120),
    Section("true_width_step_kernels", 90, with_kernels=True, program="true_width_step"),
    Section("streaming", 75),
    Section("decoding", 60),
)


# --- run --------------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Run the sections one after the other, each a process of its own; return the exit code."""
    chosen = options.only.split(",") if options.only else None
    sections = SECTIONS
    if options.sections != FOLDER:
        sections = tuple(Section(path.stem, 60.0) for path in sorted(options.sections.glob("*.py")))
    unknown = set(chosen or ()) - {section.name for section in sections}
    if unknown:
        print(
            f"no section {', '.join(sorted(unknown))}: there are {', '.join(s.name for s in sections)}", file=sys.stderr
        )
        return 2
    started, out = time.monotonic(), options.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    append(out, {"began": describe(options)})
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        installed = install_wheels(options.wheels, out, Path(work)) if options.wheels is not None else []
        statuses = []
        for section in sections:
            if chosen is not None and section.name not in chosen:
                continue
            left = options.total - (time.monotonic() - started)
            cap = min(options.cap or section.cap_seconds, left)
            if left < LEAST_SECONDS:
                line = {"section": section.name, "status": "skipped", "reason": "the total time is over"}
            elif section.program and options.device == "cpu":
                line = {"section": section.name, "status": "skipped", "reason": "the kernels are for a GPU"}
            else:
                sites = [site for site, is_kernels in installed if section.with_kernels or not is_kernels]
                line = run_section(section, cap, environment_of(sites, out, Path(work)), options)
            append(out, line)
            statuses.append(line["status"])
            print(f"{section.name:18} {line['status']:10} {line.get('seconds', 0.0):7.1f} s", flush=True)
    append(out, {"ended": {"seconds": round(time.monotonic() - started, 1)}})
    return int(any(status not in ("passed", "skipped") for status in statuses))


def run_section(
    section: Section, cap: float, environment: Mapping[str, str], options: argparse.Namespace
) -> dict[str, Any]:
    """Run one section for at most `cap` seconds; return its line."""
    command = [sys.executable, str(section.path(options.sections)), "--name", section.name]
    command += ["--device", options.device, "--cap", f"{cap:.1f}", *(["--quick"] if options.quick else [])]
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        # A session of its own, so that what the section starts ends with it.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=ROOT, start_new_session=True
        )
        status = None
        try:
            process.wait(timeout=cap)
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = round(time.monotonic() - started, 1)
        if status is None:
            status = status_of(process.returncode)
        line = {"section": section.name, "status": status, "seconds": seconds, "exit_code": process.returncode}
        if status != "passed":
            log.seek(0)
            line["log"] = log.read().decode("utf-8", errors="replace")[-TAIL_CHARACTERS:]
    return line


def status_of(exit_code: int) -> str:
    """Name what an exit code says of a section."""
    if exit_code < 0:
        return "killed"
    return {0: "passed", 77: "skipped"}.get(exit_code, "failed")


def environment_of(sites: list[Path], out: Path, work: Path) -> dict[str, str]:
    """Return a section's environment; what it writes goes to `work`, which ends with the run."""
    usual = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    before = [path for path in usual.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths = [*map(str, sites), str(ROOT), str(ROOT / "benchmarks"), str(FOLDER), *before]
    return {
        **usual,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "GPU_CHECK_OUT": str(out),
        "TMPDIR": str(work),
    }


def install_wheels(wheels: Path, out: Path, work: Path) -> list[tuple[Path, bool]]:
    """Install a folder's wheels into `work`; return the folders to import them from, and whether those are kernels."""
    files = sorted(wheels.glob("*.whl"))
    kernels = [file for file in files if file.name.partition("-")[0].lower() in KERNELS]
    installed = []
    for name, chosen in (("wheels", [file for file in files if file not in kernels]), ("kernels", kernels)):
        if chosen:
            line = install(name, chosen, work / name)
            append(out, line)
            installed += [(work / name, name == "kernels")] * (line["status"] == "passed")
    return installed


def install(name: str, files: list[Path], site: Path) -> dict[str, Any]:
    """Install wheels into the folder `site`, without an index; return the results' line about it."""
    started = time.monotonic()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--target", str(site), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    line = {"section": name, "seconds": round(time.monotonic() - started, 1), "numbers": {"wheels": len(files)}}
    if done.returncode:
        return line | {"status": "failed", "reason": done.stderr[-TAIL_CHARACTERS:]}
    return line | {"status": "passed"}


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """Describe this run: when, of which commit, on what."""
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit.stdout.strip() or None,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "device": options.device,
        "quick": options.quick,
    }


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line of JSON, in one write."""
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(line).encode() + b"\n")


# --- prepare ----------------------------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace) -> int:
    """Download wheels into a folder, for a machine without a package index; return the exit code."""
    options.wheels.mkdir(parents=True, exist_ok=True)
    known = pinned(ROOT / "constraints.txt")
    failed = []
    for package in options.packages or PACKAGES:
        name = package.partition("==")[0]
        wanted = package if "==" in package else f"{package}=={known[key(name)]}" if key(name) in known else package
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", options.python_version]
        for tag in PLATFORMS:
            command += ["--platform", tag]
        done = subprocess.run([*command, "--dest", str(options.wheels), wanted], capture_output=True, text=True)
        print(f"{wanted:40} {'ok' if done.returncode == 0 else done.stderr.strip().splitlines()[-1]}", flush=True)
        if done.returncode:
            failed.append(wanted)
    size = sum(file.stat().st_size for file in options.wheels.glob("*.whl")) / 2**20
    print(f"{size:.1f} MiB of wheels in {options.wheels}")
    if size > options.limit_mib:
        print(f"more than {options.limit_mib:g} MiB: leave packages out", file=sys.stderr)
    return int(bool(failed) or size > options.limit_mib)


def pinned(constraints: Path) -> dict[str, str]:
    """Return the versions that the tests ran with, by package."""
    lines = (line.partition("#")[0].partition(";")[0].strip() for line in constraints.read_text().splitlines())
    pairs = (line.split("==") for line in lines if line.count("==") == 1)
    return {key(name.strip()): version.strip() for name, version in pairs}


def key(package: str) -> str:
    """Return a package's name as all its spellings have it."""
    return package.lower().replace("_", "-")


# --- summary ----------------------------------------------------------------------------------------------------------


def summary(options: argparse.Namespace) -> int:
    """Print the results as a table in Markdown, one row for each section and part; return the exit code."""
    lines = list(read(options.results))
    for line in lines:
        if "began" in line:
            print(", ".join(f"{name} {value}" for name, value in line["began"].items()), end="\n\n")
    rows = [("section", "part", "status", "seconds", "numbers"), ("---", "---", "---", "---:", "---")]
    rows += [row_of(line) for line in lines if "section" in line]
    for row in rows:
        print(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |")
    return 0


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Read the lines; one that a killed process left unfinished is left out."""
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict):
            yield line


def row_of(line: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the cells of a line."""
    numbers = [f"{name} {in_digits(value)}" for name, value in line.get("numbers", {}).items()]
    words = "; ".join([*line.get("failures", ()), *first_line(line.get("reason")), *shown(numbers)])
    if not words and line["status"] != "passed":
        words = "; ".join(last_line(line.get("log")))
    seconds = f"{line['seconds']:.1f}" if "seconds" in line else ""
    return line["section"], line.get("part", "**all**"), line["status"], seconds, words


def shown(numbers: list[str]) -> list[str]:
    """Return the first numbers, and how many more there are."""
    more = len(numbers) - NUMBERS_SHOWN
    return numbers if more <= 0 else [*numbers[:NUMBERS_SHOWN], f"and {more} more"]


def first_line(text: str | None) -> Iterable[str]:
    """Return the first line of a reason."""
    return [text.strip().splitlines()[0]] if text and text.strip() else []


def last_line(text: str | None) -> Iterable[str]:
    """Return the last line of what a section printed; nothing where that is a part's own line, which has its row."""
    lines = text.strip().splitlines() if text else []
    return lines[-1:] if lines and not lines[-1].startswith("{") else []


def in_digits(value: object) -> str:
    """Write a number in four digits, and anything else as it is."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("run", help="run the sections, and append their results to a file")
    command.add_argument("--out", type=Path, required=True, help="lines of JSON are appended here")
    command.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    command.add_argument("--quick", action="store_true", help="tiny shapes: shows that the script itself works")
    command.add_argument("--only", help="names of sections, separated by commas")
    command.add_argument("--wheels", type=Path, help="a folder of wheels to install for the run, made by `prepare`")
    command.add_argument("--total", type=float, default=TOTAL_SECONDS, help="seconds of all sections together")
    command.add_argument("--cap", type=float, help="seconds of each section, instead of its own limit")
    command.add_argument("--sections", type=Path, default=FOLDER, help="another folder of sections, for tests")
    command.set_defaults(action=run)

    command = commands.add_parser("prepare", help="download the wheels that a machine without an index lacks")
    command.add_argument("packages", nargs="*", help=f"NAME or NAME==VERSION; default: {', '.join(PACKAGES)}")
    command.add_argument("--wheels", type=Path, required=True, help="the folder that they are put into")
    command.add_argument("--python-version", default="3.12", help="of that machine")
    command.add_argument("--limit-mib", type=float, default=LIMIT_MIB)
    command.set_defaults(action=prepare)

    command = commands.add_parser("summary", help="print a table of the results")
    command.add_argument("results", type=Path)
    command.set_defaults(action=summary)
    return parser


if __name__ == "__main__":
    given = build_parser().parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # which ends the section too
    sys.exit(given.action(given))
