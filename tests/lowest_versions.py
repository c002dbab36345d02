"""The lowest versions that pyproject.toml promises, as requirements for pip: `make test-lowest` runs the tests with them.

python tests/lowest_versions.py > lowest.txt
"""

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
    for requirement in tomllib.loads(PROJECT.read_text())["project"]["dependencies"]:
        print(lowest(requirement))


if __name__ == "__main__":
    main()
