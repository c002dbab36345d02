"""Which release of a package is installed, as numbers that compare."""

import re
from importlib.metadata import PackageNotFoundError, version


def release(package: str) -> tuple[int, ...]:
    """Return the installed release of a package, (2, 11, 0) of `2.11.0+cpu`; () where it is not installed.

    What follows the numbers (`rc1`, `.dev3`, `+cu130`) is left out.
    """
    try:
        found = re.match(r"\d+(\.\d+)*", version(package))
    except PackageNotFoundError:
        return ()
    return tuple(int(number) for number in found[0].split(".")) if found else ()


def in_words(release: tuple[int, ...]) -> str:
    """Return a release as it is written, `2.11.0`."""
    return ".".join(map(str, release))
