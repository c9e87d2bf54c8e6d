"""What results are made of: frozen records that can be written as JSON and read back."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict


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
            pydantic.ValidationError: the text is no such record.
        """
        return cls.model_validate_json(text)
