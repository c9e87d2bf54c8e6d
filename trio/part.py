"""The base of every part: a small frozen class whose fields are its validated parameters."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Part"]


class Part(BaseModel):
    """Base of `Scorer`, `Selector` and `Compressor`.

    The class fields of a part are its parameters, with their types, ranges and defaults; an unknown or a wrong one is
    refused when the part is made. Parts are frozen: what a run needs to remember belongs to the runtime, not here, so
    one object can serve any number of models.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, validate_default=True)
