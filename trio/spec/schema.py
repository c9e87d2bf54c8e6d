"""The JSON schema of spec files."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from ..registry import Registry, registry_of
from .models import PART_HELP


def json_schema(spec: type[BaseModel], *, parts: bool) -> dict[str, Any]:
    """The schema (draft 2020-12) of a spec's files.

    Args:
        spec: the model of a whole spec.
        parts: also offer the names of all registered parts, which imports them.
    """
    schema = spec.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "trio pipeline spec"
    schema["required"] = ["version"]
    schema["anyOf"] = [{"required": [name]} for name in ("resize", "compressor", "stages")]
    if parts:
        stage = schema["$defs"]["StageSpec"]["properties"]
        for kind in ("scorer", "selector"):
            stage[kind] = _part_schema(registry_of(kind), stage[kind], schema)
        properties = schema["properties"]
        properties["compressor"] = _part_schema(registry_of("compressor"), properties["compressor"], schema)
    return schema


def _part_schema(registry: Registry[Any], old: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a part with its known names and their parameters offered first; other names stay allowed."""
    names = registry.names()
    if not names:
        return old
    return {
        "description": old.get("description", PART_HELP),
        "default": old.get("default"),
        "anyOf": [
            {"enum": names},
            *(_known_part(registry, name) for name in names if not registry.describe(name).broken),
            {"type": "object", "properties": {"name": {"anyOf": [{"enum": names}, {"type": "string"}]}}},
            *[{key: value for key, value in old.items() if key not in ("description", "default")}],
        ],
    }


def _known_part(registry: Registry[Any], name: str) -> dict[str, Any]:
    """What an editor offers once the name is written: the parameters, with what they mean."""
    info = registry.describe(name)
    parameters = {one.name: {"description": one.description} for one in info.parameters}
    return {
        "type": "object",
        "description": info.summary,
        "properties": {"name": {"enum": [name, *info.aliases]}, **parameters},
        "required": ["name"],
    }
