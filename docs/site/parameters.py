"""A griffe extension: the fields of a part are its parameters, with their types and defaults.

Parts have no ``__init__`` of their own that names them (pydantic makes one), so the reference would show no type, and
every parameter as required.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import griffe

BASE = "trio.core.part.Part"


class FieldsAsParameters(griffe.Extension):
    """Gives each class derived from `trio.core.part.Part` the ``__init__`` that it has at run time."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called when everything is loaded, so that base classes are known."""
        for cls in _classes(pkg):
            fields = list(_fields(cls)) if any(one.path == BASE for one in cls.mro()) else []
            if fields:
                first = griffe.Parameter("self", kind=griffe.ParameterKind.positional_only)
                cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(first, *fields)))


def _classes(module: griffe.Module) -> Iterator[griffe.Class]:
    yield from (one for one in module.classes.values() if isinstance(one, griffe.Class))
    for inner in module.modules.values():
        if isinstance(inner, griffe.Module):
            yield from _classes(inner)


def _fields(cls: griffe.Class) -> Iterator[griffe.Parameter]:
    for one in cls.attributes.values():
        annotation = one.annotation
        if annotation is None or one.name.startswith("_") or "ClassVar" in str(annotation):
            continue
        yield griffe.Parameter(
            one.name, annotation=annotation, kind=griffe.ParameterKind.keyword_only, default=one.value
        )
