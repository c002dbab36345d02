"""Which packages are there, in which versions, and whether slimqwen can be imported with them: the first thing to know."""

import importlib
import importlib.metadata
import os
import re
import tomllib
from pathlib import Path

from section import Section, Skip

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = ("triton", "flash-linear-attention", "fla-core", "causal-conv1d", "liger-kernel", "accelerate")
MODULES = (
    "slimqwen.training.distil",
    "slimqwen.calibration.calibrate",
    "slimqwen.evaluation.speed",
    "slimqwen.cli.app",
)


def version_of(package: str) -> str | None:
    """Return the installed version of a package, None where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers_of(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: 2.11.0+cu130 is (2, 11, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in found[0].split(".")) if found else ()


def main() -> None:
    with Section() as section:
        with section.part("required") as part:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            missing, old = [], []
            for requirement in project["dependencies"]:
                name, _, least = requirement.partition(">=")
                version = version_of(name)
                part.note(**{name: version or "missing"})
                if version is None:
                    missing.append(name)
                elif numbers_of(version) < numbers_of(least):
                    old.append(f"{name} {version} is older than {least}")
            part.failures += [f"missing: {', '.join(missing)}"] * bool(missing) + old
        with section.part("optional") as part:
            part.note(**{name: version_of(name) or "missing" for name in OPTIONAL})
            part.note(PYTORCH_ALLOC_CONF=os.environ.get("PYTORCH_ALLOC_CONF", "unset"))
        for module in MODULES:
            with section.part(f"import {module}"):
                importlib.import_module(module)
        with section.part("gpu") as part:
            if not section.on_gpu:
                raise Skip("--device cpu")
            import torch

            part.check("a GPU is there", torch.cuda.is_available())
            capability = torch.cuda.get_device_capability()
            part.note(
                cuda=torch.version.cuda,
                name=torch.cuda.get_device_name(),
                capability=".".join(map(str, capability)),
                nccl=".".join(map(str, torch.cuda.nccl.version())),
                memory_gib=torch.cuda.get_device_properties(0).total_memory / 2**30,
            )
            triton = numbers_of(version_of("triton") or "0")
            if capability == (9, 0) and (3, 4) <= triton < (3, 7, 1):
                part.note(warning="Triton 3.4 to below 3.7.1 on Hopper: DeltaNet's backward by fla raises or is wrong")
            if capability >= (10, 0):
                part.note(
                    warning="Blackwell: gradients of experts without a token are not zeroed in the grouped product"
                )


if __name__ == "__main__":
    main()
