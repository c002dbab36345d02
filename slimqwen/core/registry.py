"""Functions by the names that a recipe has for them."""

from collections.abc import Callable
from enum import StrEnum
from inspect import signature
from typing import Any, Generic, TypeVar

Name = TypeVar("Name", bound=StrEnum)
Function = TypeVar("Function", bound=Callable[..., Any])


class Registry(Generic[Name, Function]):
    """One function for each member of an enum, entered where it is defined.

    `@REGISTRY.entry(Names.ONE)` above a function enters it.
    """

    def __init__(self, names: type[Name]) -> None:
        self.names = names
        self._functions: dict[Name, Function] = {}

    def entry(self, *names: Name) -> Callable[[Function], Function]:
        """Return the decorator that enters a function under these names."""

        def enter(function: Function) -> Function:
            for name in names:
                assert name not in self._functions, f"{name} has a function: {self._functions[name].__name__}"
                self._functions[name] = function
            return function

        return enter

    def __getitem__(self, name: str) -> Function:
        """Return the function of a name, a member of the enum or its plain string."""
        return self._functions[self.names(name)]

    def compute(self, name: str, value_of: Callable[[str], Any]) -> Any:
        """Call the function of `name` with `value_of(parameter)` for each of its parameters, by their names."""
        function = self[name]
        return function(**{parameter: value_of(parameter) for parameter in signature(function).parameters})
