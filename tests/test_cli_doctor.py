"""`trio doctor`: what a bug report needs."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from trio.cli import app
from trio.core import upstream
from trio.runtime import canary


def run(*arguments: str):
    return CliRunner().invoke(app, ["doctor", *arguments])


def text(output: str) -> str:
    """What is printed, without the lines of tables and wrapping."""
    return " ".join(output.replace("│", " ").split())


def test_one_family():
    result = run("--family", "llava", "--family", "qwen2_5_vl")
    assert result.exit_code == 0, result.output
    for said in ("python", "torch", upstream.version(), "cache argument", "the promises hold on 2 of 2 families"):
        assert said in result.output


def test_json_has_everything_and_nothing_else_is_printed():
    result = run("--family", "llava", "--json")
    found = json.loads(result.output)
    assert found["versions"]["transformers"] == upstream.version()
    assert found["families"]["llava"]["holds"] and len(found["families"]["llava"]["promises"]) == 6
    assert found["found"]["rotary argument"]


def test_a_broken_promise_is_named_and_the_exit_code_is_1(monkeypatch):
    monkeypatch.setattr(canary, "_close", lambda *_: (_ for _ in ()).throw(canary._BrokenPromise("off by 3")))
    result = run("--family", "llava")
    assert result.exit_code == 1
    assert "FAILED" in result.output and "off by 3" in text(result.output) and "0 of 1" in result.output


def test_what_cannot_be_resolved_is_named(monkeypatch):
    monkeypatch.delattr(upstream.DynamicLayer, "crop")
    result = run("--family", "llava")
    assert result.exit_code == 1 and "`crop`" in " ".join(result.output.split())


def test_a_family_that_is_not_known():
    result = run("--family", "lava")
    assert result.exit_code == 2 and "Did you mean 'llava'" in result.output


@pytest.mark.parametrize("name", ["llava", "mistral3"])
def test_default_models_are_built_from_configurations_alone(name):
    model, config = upstream.default_model(name)
    assert config.model_type == name and model.config_class is type(config)
