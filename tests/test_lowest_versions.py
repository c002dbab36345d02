"""The lowest versions that pyproject.toml promises are written so that a test run can install them (`make test-lowest`)."""

import os
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from lowest_versions import PROJECT, lowest

DEPENDENCIES = tomllib.loads(PROJECT.read_text())["project"]["dependencies"]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))


def test_a_requirement_becomes_its_lowest_version() -> None:
    assert lowest("torch>=2.11") == "torch==2.11"
    for other in ("torch", "torch>2.11", "torch>=2.11,<3", "lm-eval[hf]>=0.4"):
        with pytest.raises(ValueError, match="is not NAME>=VERSION"):
            lowest(other)


@pytest.mark.parametrize("requirement", DEPENDENCIES)
def test_what_is_pinned_is_not_below_what_is_promised(requirement: str) -> None:
    pins = dict(
        line.lower().split("==")
        for line in (Path(PROJECT).parent / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    name, version = lowest(requirement).split("==")
    assert numbers(pins[name]) >= numbers(version)


@pytest.mark.skipif("LOWEST_WITHOUT" not in os.environ, reason="only `make test-lowest` installs the lowest versions")
@pytest.mark.parametrize("requirement", DEPENDENCIES)
def test_the_lowest_version_is_the_one_that_is_tested(requirement: str) -> None:
    name, promised = lowest(requirement).split("==")
    if name not in os.environ["LOWEST_WITHOUT"].split():
        found = numbers(version(name))
        assert found[: len(numbers(promised))] == numbers(promised) and not any(found[len(numbers(promised)) :])
