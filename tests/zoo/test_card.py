"""The tables in the documentation are the measured ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab.training.card import card, filled, sections
from trio import zoo

PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"


@pytest.mark.parametrize("name", zoo.names())
def test_card_and_page_show_the_measured_numbers(name: str) -> None:
    assert (zoo.path(name) / "README.md").read_text() == card(name)
    text = PAGE.read_text()
    assert all(f"<!-- begin {section} -->" in text for section in sections(name))
    assert filled(text, sections(name)) == text


@pytest.mark.parametrize("name", zoo.names())
def test_every_model_meets_the_bar(name: str) -> None:
    """At least 90% overall, and five types whose lower end is 15 points above the blank image."""
    result = json.loads((zoo.path(name) / "accuracy.json").read_text())
    assert result["scenes"] >= 400 and result["split"] == "test"
    assert result["full"]["overall"]["accuracy"] >= 0.90
    gains = [
        row["low"] - result["blank"][kind]["accuracy"] for kind, row in result["full"].items() if kind != "overall"
    ]
    assert sum(gain >= 0.15 for gain in gains) >= 5
