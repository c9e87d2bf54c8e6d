"""Spec files from strangers: bounded in time, never quoted where they are no spec, and read as they look."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from trio.core.printable import visible
from trio.errors import SpecError
from trio.spec import PipelineSpec, load_spec
from trio.spec.reading import dump, load

HEAD = "version: 1\nstages: [{after_layer: 1, keep: 9}]\n"


def refused(file: Path) -> str:
    """What is said about a file; it has to be said soon."""
    start = time.process_time()
    with pytest.raises(SpecError) as caught:
        load_spec(file)
    assert time.process_time() - start < 5
    assert str(caught.value).startswith(str(file))
    assert len(str(caught.value)) < 5000
    return str(caught.value)


def written(tmp_path: Path, text: str, suffix: str = ".yaml") -> Path:
    file = tmp_path / f"x{suffix}"
    file.write_text(text)
    return file


# What is never opened, never quoted ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "hunter2:x:0:0:hunter2:/root:/bin/bash\n",
        "hunter2: hunter2\n",
        "- hunter2\n",
        "hunter2\n",
        "*hunter2",
        "!hunter2 x",
        "'hunter2",
        "hunter2: [hunter2",
        "hunter2: 1\nhunter2: 2\n",
        "{version: hunter2, name: hunter2, hunter2: 1}",
        "version: 2\nname: [hunter2]\nhunter2: 1\n",
        "%hunter2\n",
        "hunter2: @hunter2\n",
        "? [hunter2]\n: x\n",
        '{"hunter2": "hunter2", "hunter2": "hunter2"}',
    ],
)
@pytest.mark.parametrize("suffix", [".yaml", ".json", ""])
def test_a_file_that_was_never_a_spec_is_not_quoted(text: str, suffix: str, tmp_path: Path) -> None:
    assert "hunter2" not in refused(written(tmp_path, text, suffix))


def test_the_password_file() -> None:
    with pytest.raises(SpecError) as caught:
        load_spec("/etc/passwd")
    assert "root" not in str(caught.value)


def test_pipes_and_devices_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for file in (tmp_path / "pipe.yaml", Path("/dev/zero")):
        assert "not a plain file" in refused(file)
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec("a\0b.yaml")


# Bounds --------------------------------------------------------------------------------------------------------------

BOMB = "version: 1\na0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
HOSTILE = {
    "many stages": "version: 1\nstages:\n" + "".join(f"- {{after_layer: {i}, keep: 5}}\n" for i in range(18_000)),
    "many wrong stages": "version: 1\nstages:\n" + "- {aftr_layer: x}\n" * 3000,
    "stages at one layer": "version: 1\nstages:\n" + "- {after_layer: 1, keep: 5}\n" * 1900,
    "deep": "version: 1\nx: " + "[" * 100_000,
    "deep blocks": "version: 1\nx:\n" + "".join(" " * i + "- \n" for i in range(900)),
    "deep mappings": "version: 1\nx: " + "{a: " * 50_000,
    "aliases": BOMB,
    "aliases in a key": BOMB + "? *a11\n: x\n",
    "merges": BOMB + "<<: *a11\n",
    "digits": HEAD.replace("9", "9" * 5000),
    "digits of a float": HEAD.replace("9", "9" * 5000 + ".5"),
    "one long text": "version: 1\nname: [" + "x " * 500_000,
    "escapes": 'version: 1\nname: "' + "\\x41" * 250_000,
    "comments": "version: 1\n" + "#\n" * 500_000,
    "documents": "version: 1\n" + "---\n" * 250_000,
    "directives": "%TAG !a! b\n" * 90_000,
    "anchors": "version: 1\nx:\n" + "- &a 1\n" * 100_000,
    "questions": "version: 1\n" + "? " * 400_000,
    "keys": "version: 1\n" + "".join(f"k{i}: 1\n" for i in range(90_000)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_yaml_is_refused_soon(case: str, tmp_path: Path) -> None:
    refused(written(tmp_path, HOSTILE[case][: (1 << 20) - 1]))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"version": 1, "x": ' + "[" * 200_000 + "]" * 200_000 + "}",
        '{"version": 1, "x": ' + "[" * 900 + "]" * 900 + "}",
        '{"version": 1, "stages": [{"after_layer": 1, "keep": ' + "9" * 5000 + "}]}",
        '{"version": 1, "stages": [{"after_layer": ' + "9" * 4000 + ', "keep": 3}]}',
        json.dumps({"version": 1, "stages": [{"after_layer": i, "keep": 5} for i in range(18_000)]}),
    ],
)
def test_hostile_json_is_refused_soon(text: str, tmp_path: Path) -> None:
    refused(written(tmp_path, text, ".json"))


def test_many_stages_are_counted_before_they_are_compared() -> None:
    stages = [{"after_layer": i, "keep": 5} for i in range(100_000)]
    start = time.process_time()
    with pytest.raises(SpecError, match="at most 1000 items"):
        PipelineSpec.parse({"stages": stages})
    assert len(PipelineSpec.parse({"stages": stages[:1000]}).stages) == 1000
    assert time.process_time() - start < 2


@pytest.mark.parametrize("number", [10**9 + 1, 10**400, 10**5000], ids=["too many", "no float", "no text"])
@pytest.mark.parametrize("place", ["after_layer", "keep", "average", "version", "name", "count"])
def test_numbers_beyond_all_models_are_refused(place: str, number: int) -> None:
    stage: dict[str, Any] = {"after_layer": 1, "keep": 9}
    data: dict[str, Any] = {"version": 1, "stages": [stage]}
    if place == "average":
        data["budget"] = {"average": number}
    elif place == "count":
        stage["keep"] = {"count": number, "per": "sample"}
    else:
        (stage if place in stage else data)[place] = number
    with pytest.raises(SpecError, match=place if place != "count" else "keep"):
        load_spec(data)


# Read as it looks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1:30", "010", "0o17", "0x10", "1_000", "0b11", "yes", "no", "on", "off", "!!int 9"])
def test_numbers_of_old_yaml_are_refused(text: str, tmp_path: Path) -> None:
    said = refused(written(tmp_path, HEAD.replace("9", text)))
    assert "line 2" in said
    assert "Remove the tag" in said if "!" in text else f"stages[0].keep: found '{text}'" in said


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5), ("-5", -5), ("+5", 5), ("0", 0), ("0.5", 0.5), (".5", 0.5), ("1e3", 1000.0), ("-1.5E-2", -0.015),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None), ("yes", "yes"),
        ("2020-01-01", "2020-01-01"), ("1:30", "1:30"), ("010", "010"), ("1e", "1e"), ("=", "="), ("<<", "<<"),
        (".", "."), ("'5'", "5"), ("!!str 5", "5"), ("-.inf", float("-inf")),
    ],
)  # fmt: skip
def test_scalars(text: str, value: Any) -> None:
    found = load(f"x: {text}\n")["x"]
    assert (found, type(found)) == (value, type(value))
    if not text.startswith(("!", "'")):
        assert load(dump({"x": text})) == yaml.safe_load(dump({"x": text})) == {"x": text}
    assert load(dump({"x": value})) == yaml.safe_load(dump({"x": value})) == {"x": value}


def test_keys_are_names(tmp_path: Path) -> None:
    assert load("{yes: 1, 2: 2, null: 3, 1.5: 4, <<: 5}") == {"yes": 1, "2": 2, "null": 3, "1.5": 4, "<<": 5}
    assert load("[&a 1, {*a : 2}]") == [1, {"1": 2}]
    assert "unknown key '<<'" in refused(written(tmp_path, HEAD + "<<: {name: x}\n"))
    assert "a key is a list" in refused(written(tmp_path, HEAD + "? [a]\n: x\n"))
    assert "the key is there twice" in refused(written(tmp_path, HEAD + "name: a\nname: b\n"))


def test_aliases_within_bounds_are_read(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        "version: 1\nstages:\n- {after_layer: 1, keep: 9, scorer: &s {name: random}}\n"
        "- {after_layer: 2, keep: 8, scorer: *s}\n",
    )
    first, second = load_spec(file).stages
    assert first.scorer == second.scorer


# Control characters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("character", ["\x1b", "\n", "\x9b", "\x7f", "\u202e", "\u2028", "\ud800"])
def test_names_have_no_control_characters(character: str, tmp_path: Path) -> None:
    for name in (f"a{character}b", character):
        with pytest.raises(SpecError, match=r"name: found .*(no control characters|unicode string)") as caught:
            PipelineSpec.parse({"name": name, "stages": [{"after_layer": 1, "keep": 3}]})
        assert visible(str(caught.value)) == str(caught.value)
    said = refused(written(tmp_path, HEAD + f"name: {json.dumps(f'a{character}b')}\n", ".yaml"))
    assert visible(said) == said


def test_a_spec_is_written_without_control_characters() -> None:
    text = "a\x1b[31m\u202eb\x9b"
    spec = PipelineSpec.parse({"description": text, "stages": [{"after_layer": 1, "keep": 3}]})
    assert visible(spec.to_yaml()) == spec.to_yaml()
    assert PipelineSpec.parse(load(spec.to_yaml())).description == text
    assert "é😀" in PipelineSpec.parse({**spec.to_dict(), "description": "é😀"}).to_yaml()


def test_what_is_visible() -> None:
    assert visible("é\n\x1b[0m\u202e\x9b") == "é\n\\x1b[0m\\u202e\\x9b"
    assert visible("a\nb", keep="") == "a\\nb"
