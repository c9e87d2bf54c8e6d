"""What results are made of: frozen records that can be written as JSON and read back."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import InputError
from .printable import visible


class Record(BaseModel):
    """Fields that are checked once and never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Document(Record):
    """A record that stands for itself in a file."""

    def to_json(self, indent: int | None = None) -> str:
        """One JSON object; `from_json` gives an equal record back."""
        return self.model_dump_json(indent=indent)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Reads `to_json`'s text back.

        Raises:
            InputError: the text is no such record; the message has the first field that is wrong.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first, count = error.errors(include_url=False)[0], error.error_count()
            field_path = ".".join(map(str, first["loc"]))
            more = f" and {count - 1} more" if count > 1 else ""
            where = f"{cls.__name__}, {visible(field_path)}" if field_path else cls.__name__
            raise InputError(f"{where}: {first['msg']}{more}; give what `to_json` of this version wrote.") from error
