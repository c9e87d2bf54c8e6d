"""The declarative description of a pipeline: pydantic models, YAML with line numbers, JSON schema.

A spec says *what* is done; `trio.spec.schedule` says what that means for a model of a given depth, and the registries
find the parts. Nothing here imports torch until a spec's parts are checked.
"""

from .load import load_spec, shipped_specs
from .models import Budget, CompressorSpec, Group, Keep, PartSpec, PipelineSpec, StageSpec

__all__ = [
    "Budget",
    "CompressorSpec",
    "Group",
    "Keep",
    "PartSpec",
    "PipelineSpec",
    "StageSpec",
    "load_spec",
    "shipped_specs",
]
