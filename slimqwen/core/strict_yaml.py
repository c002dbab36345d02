"""The subset of YAML that recipes use: safe, small, each key once. Anything else in a file is a `YAMLError`.

PyYAML's own constructors raise a different class for each kind of invalid value (`!!int x`, `!!timestamp x`, deep nesting);
here each of them is reported with line, column and a message.
"""

import re
from typing import Any

import yaml

DEEPEST = 32  # of nesting; a recipe has 4
LARGEST_INTEGER = 2**63 - 1
LONGEST_NUMBER = 64  # characters; float64 has 17 digits
WORDS = {"int": "whole number", "float": "number", "bool": "true or false"}
HALF_CHARACTER = re.compile("[\ud800-\udfff]")
OCTAL = re.compile(r"[-+]?0[0-9_]")


def load(text: str) -> Any:
    """Parse `text` into mappings, lists, text, numbers, true and false, null. Raises `yaml.YAMLError`."""
    return yaml.load(text, _Loader)


def dump(values: Any) -> str:
    """Write values as YAML that `load` reads back equal."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def problem_of(error: yaml.YAMLError) -> str:
    """Describe an error on one line: its line and column, and what is wrong."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    return str(error).splitlines()[0]


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that also refuses duplicate keys, and aliases (`*name`), which can expand exponentially."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _problem("aliases (*name) are not supported, write the value out", event.start_mark)
        if self._depth >= DEEPEST:
            raise _problem(f"nested more than {DEEPEST} deep", event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        mapping = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in mapping.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _problem("a key must be a word", key.start_mark)
            if key.tag == TAG + "merge":
                raise _problem("merge keys (<<) are not supported, write the values out", key.start_mark)
            if key.value in seen:
                raise _problem(f"the key '{key.value}' is given twice", key.start_mark)
            seen.add(key.value)
        return mapping

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except (ValueError, KeyError, AttributeError, TypeError, IndexError, OverflowError):
            kind = node.tag.removeprefix(TAG)
            raise _problem(f"this is not a valid {WORDS.get(kind, kind)}", node.start_mark) from None


class _Dumper(yaml.SafeDumper):
    """A safe YAML dumper that quotes text which `_Loader` would parse as a number."""


def _problem(text: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=mark)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    """Parse 1e-4 as a float and 40e9 as an integer, since token counts are often written so."""
    value = float(loader.construct_yaml_float(node))
    whole = "e" in node.value.lower() and value.is_integer() and abs(value) <= LARGEST_INTEGER
    return int(value) if whole else value


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    if ":" in node.value:  # YAML 1.1 takes 1:30 for 90
        raise _problem("a whole number has no colon (quote it where it is text)", node.start_mark)
    if OCTAL.match(node.value):  # and 010 for 8
        raise _problem("a whole number does not begin with 0 (quote it where it is text)", node.start_mark)
    value = loader.construct_yaml_int(node) if len(node.value) <= LONGEST_NUMBER else LARGEST_INTEGER + 1
    if abs(value) > LARGEST_INTEGER:
        raise _problem("a whole number this large is not supported", node.start_mark)
    return value


def _refuse_bytes(loader: _Loader, node: yaml.Node) -> None:
    raise _problem("!!binary is not supported: write it as text", node.start_mark)


def _construct_text(loader: _Loader, node: yaml.ScalarNode) -> str:
    text: str = loader.construct_scalar(node)
    if HALF_CHARACTER.search(text):
        raise _problem("a lone surrogate (half of a character) is not valid text", node.start_mark)
    return text


TAG = "tag:yaml.org,2002:"
# YAML 1.1, which PyYAML implements, requires a dot and a signed exponent in a float: 1e-4 would be text.
FLOAT_WITHOUT_DOT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+\Z")
_Loader.add_implicit_resolver(TAG + "float", FLOAT_WITHOUT_DOT, list("-+0123456789"))
_Dumper.add_implicit_resolver(TAG + "float", FLOAT_WITHOUT_DOT, list("-+0123456789"))
_Loader.add_constructor(TAG + "float", _construct_float)
_Loader.add_constructor(TAG + "int", _construct_int)
_Loader.add_constructor(TAG + "binary", _refuse_bytes)
_Loader.add_constructor(TAG + "str", _construct_text)
_Loader.add_constructor(TAG + "timestamp", _construct_text)  # a name such as 2026-01-31 stays text
