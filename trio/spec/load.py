"""Finding and reading specs: by the name of a shipped one, from a file, from plain data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import InputError, TrioError, UnknownNameError, did_you_mean
from .files import read_spec_file
from .messages import at, line_of, short, steps, translate
from .models import PipelineSpec

SHIPPED = Path(__file__).parent / "shipped"


def shipped_specs() -> list[str]:
    """The names of the specs that come with the package, sorted."""
    return sorted(file.stem for file in SHIPPED.glob("*.yaml"))


def load_spec(source: str | Path | Mapping[str, Any] | PipelineSpec, *, check_parts: bool = True) -> PipelineSpec:
    """Read and validate a spec.

    Args:
        source: the name of a shipped spec, the path of a YAML or JSON file, a mapping or a `PipelineSpec`.
        check_parts: also find every part and validate its own parameters.

    Raises:
        UnknownNameError: no shipped spec and no part has the name.
        SpecError: the file cannot be read or the spec is wrong; the message names the spec path and the line.
        InputError: `source` is nothing that a spec can be read from.
    """
    origin = ""
    lines: dict[tuple[str | int, ...], int] | None = None
    if isinstance(source, PipelineSpec):
        spec = source
    else:
        if isinstance(source, Mapping):
            data: Any = dict(source)
        elif isinstance(source, str | Path):
            file, origin = _find(source)
            data, lines = read_spec_file(file, origin)
        else:
            raise InputError(
                f"spec: found {short(source)}; allowed are a shipped name, a path, a mapping or a PipelineSpec."
            )
        try:
            spec = PipelineSpec.model_validate(data)
        except ValidationError as error:
            raise translate(error, PipelineSpec, origin, lines) from error
    if check_parts:
        try:
            spec.check_parts()
        except TrioError as error:
            spec_path = str(error).partition(":")[0]
            inner = error.__cause__ if isinstance(error.__cause__, TrioError) else error
            raise at(inner, spec_path, line_of(steps(spec_path), lines), origin) from error
    return spec


def _find(source: str | Path) -> tuple[Path, str]:
    if isinstance(source, str) and source in shipped_specs():
        return SHIPPED / f"{source}.yaml", f"shipped spec {source}"
    file = Path(source)
    looks_like_path = isinstance(source, Path) or file.suffix in (".yaml", ".yml", ".json") or len(file.parts) > 1
    if looks_like_path or file.is_file():
        return file, str(file)
    raise UnknownNameError(
        f"there is no shipped spec {source!r}. {did_you_mean(str(source), shipped_specs())}Shipped: "
        f"{', '.join(shipped_specs())}; or give the path of a YAML file."
    )
