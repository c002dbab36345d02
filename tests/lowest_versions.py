"""The lowest versions that pyproject.toml promises, as requirements for pip: `make test-lowest` runs tests with them.

python tests/lowest_versions.py [--without NAME ...] > lowest.txt
"""

import argparse
import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def lowest(requirement: str) -> str:
    """`torch==2.11` of `torch>=2.11`. Raises ValueError for a requirement of another form, which promises no lowest version."""
    found = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement)
    if found is None:
        raise ValueError(f"{requirement} is not NAME>=VERSION")
    return f"{found[1]}=={found[2]}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--without", nargs="*", default=[], help="packages to leave out")
    left_out = parser.parse_args().without
    for requirement in tomllib.loads(PROJECT.read_text())["project"]["dependencies"]:
        pin = lowest(requirement)
        if pin.partition("==")[0] not in left_out:
            print(pin)


if __name__ == "__main__":
    main()
