"""The YAML of spec files: what YAML 1.2 and JSON agree on, within bounds of size and depth.

YAML 1.1, which PyYAML reads, takes `1:30` for 90, `010` for 8, `1_000` for 1000, `no` for false and `<<` for a merge.
Here all of these are text, which the fields of a spec refuse where they want a number.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

__all__ = ["MAX_DEPTH", "MAX_VALUES", "compose", "construct", "dump", "load"]

MAX_DEPTH, MAX_VALUES = 20, 10_000
_STR = "tag:yaml.org,2002:str"
_TYPES = {
    "null": (r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class _Loader(yaml.SafeLoader):
    """Reads one document; stops at the first value too many, so that its time does not grow with the file."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  # as PyYAML's own class

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]  # untyped in the stubs
        if getattr(event, "tag", None) not in (None, "!", _STR):
            raise yaml.constructor.ConstructorError(None, None, f"the tag {event.tag!r}", event.start_mark)
        self._values, self._depth = self._values + 1, self._depth + 1
        if self._depth > MAX_DEPTH or self._values > MAX_VALUES:
            raise yaml.composer.ComposerError(
                None, None, "nested too deeply, or too many values for a spec", event.start_mark
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        if index is None and isinstance(parent, yaml.MappingNode) and isinstance(node, yaml.ScalarNode):
            return yaml.ScalarNode(_STR, node.value, node.start_mark, node.end_mark)  # a key is a name
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read as text."""


for _name, (_pattern, _first) in _TYPES.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first)


def compose(text: str) -> yaml.Node | None:
    """The nodes of a document, which know their lines; None for an empty one.

    Raises:
        yaml.YAMLError: it is no YAML, has more than one document, a tag, or too many values or levels.
    """
    loader = _Loader(text)
    try:
        node: yaml.Node | None = loader.get_single_node()
        return node
    finally:
        loader.dispose()


def construct(node: yaml.Node) -> Any:
    """The data of nodes.

    Raises:
        yaml.YAMLError: a key is no name.
        ValueError: a number has thousands of digits.
    """
    return _Loader("").construct_document(node)


def load(text: str) -> Any:
    """The data of a document; errors as `compose` and `construct`."""
    node = compose(text)
    return None if node is None else construct(node)


def dump(data: Any, *, ascii_only: bool = False) -> str:
    """Data as YAML that `load` and readers of YAML 1.1 read alike.

    Raises:
        yaml.YAMLError: it is not plain.
    """
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=not ascii_only, width=110)
    return text
