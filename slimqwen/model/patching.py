"""Changes of a module that it is no part of: attributes, `forward`, children. The one place that does it.

`tests/test_patching.py` fails where a release of torch stores them in another way.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any, TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)

ABSENT = object()  # the value of an attribute that an object does not have of its own


def override(target: object, **attributes: Any) -> None:
    """Set attributes in front of the parameters, buffers and methods of the same names, which stay what they are.

    So anything can stand for a parameter: a tensor that is none, or an object that reads one. A `forward` takes no `self`.
    """
    vars(target).update(
        attributes
    )  # which a module looks up before its parameters, and Python before the class's methods


@contextmanager
def overridden(target: object, **attributes: Any) -> Iterator[None]:
    """Override attributes while open. Afterwards, also after an exception, they are what they were; may be nested."""
    own = vars(target)
    before = {name: own.get(name, ABSENT) for name in attributes}
    override(target, **attributes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is ABSENT:
                own.pop(name, None)
            else:
                own[name] = value


def has_parameter(module: nn.Module, name: str) -> bool:
    """Return whether a module has a parameter of this name of its own, overridden or not."""
    return isinstance(module._parameters.get(name), nn.Parameter)


def with_children(module: Module, **children: nn.Module) -> Module:
    """Return the same module, sharing everything with it but these children."""
    other = copy(module)
    other._modules = {**module._modules, **children}
    return other
