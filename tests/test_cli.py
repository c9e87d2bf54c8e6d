"""The command line: what each command prints, and what it says about wrong input (exit code 2, one paragraph)."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

import trio
from trio.cli import app
from trio.cli.common import load_image
from trio.cli.tables import console, duration, layer_ranges, print_table, quantity
from trio.spec import load_spec, shipped_specs

pytestmark = pytest.mark.contract

ROOT = Path(trio.__file__).parent.parent


def processor_time() -> float:
    """Seconds of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def trio_(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of the zoo's recipe with its processor, saved: the commands do not depend on what it knows."""
    import torch

    from lab.training.recipes import RECIPES, build_model, build_processor
    from lab.training.vocabulary import build_tokenizer

    folder = tmp_path_factory.mktemp("model")
    recipe, tokenizer = RECIPES["tiny-llava"], build_tokenizer()
    torch.manual_seed(0)
    build_model(recipe, tokenizer).save_pretrained(folder)
    build_processor(recipe, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def image(tmp_path: Path) -> Path:
    file = tmp_path / "image.png"
    Image.radial_gradient("L").resize((168, 168)).convert("RGB").save(file)
    return file


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files with default names are not written into the repository."""
    monkeypatch.chdir(tmp_path)


# Help ----------------------------------------------------------------------------------------------------------------


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['trio', '--help']\n"
        "import atexit; atexit.register(lambda: print([m for m in ('torch', 'transformers', 'pydantic') "
        "if m in sys.modules]))\n"
        "from trio.cli import app; app()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    seconds = []
    for _ in range(3):  # processor time, which other tests on the machine do not lengthen
        start = processor_time()
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
        seconds.append(processor_time() - start)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().endswith("[]")
    assert min(seconds) < 0.5


@pytest.mark.parametrize(
    "command", ["run", "list", "show", "validate", "schema", "check", "fidelity", "tune", "calibrate"]
)
def test_every_command_has_help(command: str) -> None:
    result = trio_(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout
    assert command in trio_("--help").stdout


def test_version() -> None:
    assert trio_("--version").stdout == f"trio-vlm {trio.__version__}\n"


# run -----------------------------------------------------------------------------------------------------------------


def test_run_json(model: Path, image: Path) -> None:
    result = trio_("run", "--model", model, "--image", image, "--question", "how many circles ?", "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["question"] == "how many circles ?"
    assert set(facts["answer"]) == {"full", "compressed"}
    assert facts["visual_tokens"] == 144
    assert abs(facts["average_kept"] - 16) <= 0.5
    assert facts["kept"] == [20, 12]
    assert [stage["after_layer"] for stage in facts["stages"]] == [0, 4]
    assert facts["visual_by_layer"] == [20] * 4 + [12] * 4
    assert facts["flops_reduction"] > 1
    assert facts["kv_reduction"] > 2
    assert facts["overlay"] is None
    assert not list(Path.cwd().glob("*overlay*"))


def test_run_prints_a_table_and_draws(model: Path, image: Path, tmp_path: Path) -> None:
    target = tmp_path / "kept.png"
    result = trio_(
        "run", "-m", model, "-i", image, "-q", "what shape ?", "-s", "trio-11", "--out", target, "--max-new-tokens", 4
    )
    assert result.exit_code == 0, result.stderr
    words = " ".join(result.stdout.split())
    for shown in (
        "what shape ?",
        "full",
        "compressed",
        "layer 1-2",
        "average",
        "FLOP",
        "KV cache",
        "time to first token",
    ):
        assert shown in words
    assert f"kept tokens drawn to {target}" in result.stdout
    with Image.open(target) as drawn:
        assert drawn.width > 3 * 336


def test_run_writes_the_default_overlay(model: Path, image: Path) -> None:
    result = trio_("run", "-m", model, "-i", image, "-q", "what shape ?", "--max-new-tokens", 1)
    assert result.exit_code == 0, result.stderr
    assert Path("trio-overlay.png").is_file()
    assert "trio-overlay.png" in result.stdout
    first = Path("trio-overlay.png").read_bytes()
    result = trio_("run", "-m", model, "-i", image, "-q", "what shape ?", "--max-new-tokens", 1)
    assert "kept tokens drawn to trio-overlay-2.png" in result.stdout
    assert Path("trio-overlay-2.png").is_file() and Path("trio-overlay.png").read_bytes() == first


def test_run_with_two_images_and_a_file(model: Path, image: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("version: 1\nname: mine\nstages: [{after_layer: 2, keep: 10, scorer: random, selector: top-k}]\n")
    result = trio_("run", "-m", model, "-i", image, "-i", image, "-q", "hi", "-s", file, "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert (facts["spec"], facts["visual_tokens"], facts["kept"]) == ("mine", 288, [20])


def test_run_agrees_with_the_python_api(model: Path, image: Path) -> None:
    import transformers

    from trio.cli.common import inputs_for

    facts = json.loads(trio_("run", "-m", model, "-i", image, "-q", "what shape ?", "--json").stdout)
    network = transformers.AutoModelForImageTextToText.from_pretrained(model).eval()
    processor = transformers.AutoProcessor.from_pretrained(model)
    inputs = inputs_for(processor, [load_image(image)], "what shape ?")
    with trio.Pipeline.from_spec("trio-soft-11", network):
        out = network.generate(**inputs, max_new_tokens=32, do_sample=False)
    answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert facts["answer"]["compressed"] == answer


def test_run_without_arguments() -> None:
    """The demo: the zoo's model, image and question."""
    result = trio_("run")
    assert result.exit_code == 0, result.stderr
    assert trio.zoo.demo_question() in result.stdout
    assert Path("trio-overlay.png").is_file()
    facts = json.loads(trio_("run", "--json").stdout)
    assert facts["model"] == "tiny-llava"
    assert facts["spec"] == "trio-soft-11"
    assert facts["answer"]["full"]
    assert abs(facts["average_kept"] - 0.111 * facts["visual_tokens"]) <= 0.5


# check ---------------------------------------------------------------------------------------------------------------


def test_check(model: Path) -> None:
    result = trio_("check", model, "--promise", "identity")
    assert result.exit_code == 0, result.stderr
    assert "identity" in result.stdout
    assert "checks hold" in result.stdout
    facts = json.loads(trio_("check", model, "--promise", "identity", "--json").stdout)
    assert facts["passed"]
    assert {one["promise"] for one in facts["checks"]} == {"identity"}


def test_check_fails_with_exit_code_1(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trio import testing
    from trio.testing import Check, CheckResults

    failed = CheckResults("x", (Check("identity", "logits", False, "they differ by 3"),))
    monkeypatch.setattr(testing, "check_adapter", lambda *args, **kwargs: failed)
    result = trio_("check", model)
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    assert "they differ by 3" in result.stdout


# list ----------------------------------------------------------------------------------------------------------------


def test_list() -> None:
    result = trio_("list")
    assert result.exit_code == 0, result.stderr
    for name in ("objective-gradient", "last-token-attention", "random", "nms", "top-k", "llava", *shipped_specs()):
        assert name in result.stdout


def test_list_has_a_line_an_entry() -> None:
    result = trio_("list", "scorers")
    assert result.stdout.splitlines()[0] == "scorers"
    assert len(result.stdout.splitlines()) == 1 + len(trio.scorers.base.SCORERS.names())
    assert trio_("list", "scorer").stdout == result.stdout


def test_list_of_a_name_has_the_full_text() -> None:
    words = " ".join(trio_("list", "nms").stdout.split())
    assert words.startswith("selector nms Greedy non-maximum suppression")
    assert "threshold (float, default 0.8) cosine similarity from which on a token counts as a duplicate" in words
    assert "source: trio" in words
    assert trio_("list", "selector", "nms").stdout == trio_("list", "nms").stdout
    both = trio_("list", "random").stdout
    assert "scorer random" in both and "compressor random" in both  # a name of two kinds shows both
    assert "also called fastv" in trio_("list", "fastv").stdout
    assert "arxiv" in trio_("list", "trio-11").stdout.lower()


def test_list_json_and_patterns() -> None:
    everything = json.loads(trio_("list", "--json").stdout)
    assert set(everything) == {"scorers", "selectors", "compressors", "adapters", "towers", "specs", "models"}
    assert all(row["source"] for rows in everything.values() for row in rows)
    (nms,) = [row for row in everything["selectors"] if row["name"] == "nms"]
    assert nms["parameters"]["threshold"]["default"] == "0.8"
    some = json.loads(trio_("list", "specs", "*llava*", "--json").stdout)
    assert {row["name"] for row in some["specs"]} == {name for name in shipped_specs() if "llava" in name}
    assert set(some) == {"specs"}
    assert json.loads(trio_("list", "scorers", "no*such*", "--json").stdout) == {"scorers": []}
    (nms,) = json.loads(trio_("list", "nms", "--json").stdout)["selectors"]
    assert set(json.loads(trio_("list", "nms", "--json").stdout)) == {"selectors"}


def test_list_shows_broken_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "site" / "rotten-0.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rotten\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text("[trio.scorers]\nspoilt = no_such_module:Scorer\n")
    monkeypatch.syspath_prepend(str(info.parent))
    result = trio_("list", "scorers")
    assert result.exit_code == 0
    assert "broken: the plugin rotten 0.3" in " ".join(result.stdout.split())
    assert "objective-gradient" in result.stdout
    (row,) = json.loads(trio_("list", "scorers", "spoilt", "--json").stdout)["scorers"]
    assert "no_such_module" in row["broken"]
    asked = trio_("show", "trio-11", "--json")
    assert asked.exit_code == 0


# Narrow terminals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["list"], ["list", "visionzip"], ["show", "trio-llava-1.5-64"], ["doctor"]])
def test_narrow_output_stays_within_the_width(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if command == ["doctor"]:
        command = ["doctor", "--family", "llava"]
    for width in (40, 100):
        monkeypatch.setenv("COLUMNS", str(width))
        result = trio_(*command)
        assert result.exit_code == 0, result.stderr
        assert max(map(len, result.stdout.splitlines())) <= width
    assert "…" not in trio_("show", "trio-llava-1.5-64").stdout


def test_a_table_that_does_not_fit_becomes_a_list(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from rich.table import Table

    table = Table("", "tokens", title="cost")
    table.add_column("FLOPs", justify="right")
    table.add_row("full", "576\nof 576", "2.98 TFLOP")
    table.add_row("compressed", "", "0.61 TFLOP")
    monkeypatch.setenv("COLUMNS", "30")
    print_table(console(), table)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["cost", "full", "  tokens: 576 of 576", "  FLOPs: 2.98 TFLOP", "compressed", "  FLOPs: 0.61 TFLOP"]
    monkeypatch.setenv("COLUMNS", "60")
    print_table(console(), table)
    assert "│" in capsys.readouterr().out


# One meaning a flag --------------------------------------------------------------------------------------------------


def test_a_flag_means_one_thing_in_every_command() -> None:
    import typer.main

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # a group
    long_of: dict[str, set[str]] = {}
    kinds: dict[str, set[str]] = {}
    for command in commands.values():
        for option in (one for one in command.params if one.param_type_name == "option"):
            long = next(name for name in option.opts if name.startswith("--"))
            kinds.setdefault(long, set()).add(f"flag {option.is_flag}")
            for short in set(option.opts) - {long}:
                long_of.setdefault(short, set()).add(long)
    assert {short: names for short, names in long_of.items() if len(names) > 1} == {}
    assert {long: found for long, found in kinds.items() if len(found) > 1} == {}
    assert kinds["--json"] == {"flag True"} and kinds["--out"] == {"flag False"}


# show ----------------------------------------------------------------------------------------------------------------


def test_show_on_the_published_shape() -> None:
    result = trio_("show", "trio-llava-1.5-64")
    assert result.exit_code == 0, result.stderr
    for shown in (
        "llava-1.5-7b",
        "576",
        "2-10",
        "92",
        "11-15",
        "54",
        "16-32",
        "22",
        "average 64.0 of 576",
        "predicted cost",
    ):
        assert shown in result.stdout


def test_show_json(model: Path) -> None:
    facts = json.loads(trio_("show", "trio-llava-1.5-64", "--json").stdout)
    assert facts["stages"] == [{"after_layer": a, "kept": k} for a, k in ((1, 92), (10, 54), (15, 22))]
    assert facts["average_kept"] == 64
    assert facts["kv_reduction"] == pytest.approx((576 + 64) / (64 + 64))
    here = json.loads(trio_("show", "trio-11", "--model", model, "--json").stdout)
    assert (here["visual_tokens"], here["model"]) == (144, str(model))
    more = json.loads(trio_("show", "trio-11", "--model", "qwen2.5-vl-7b", "--tokens", "900", "--json").stdout)
    assert more["visual_tokens"] == 900


def test_show_yaml_round_trips(tmp_path: Path) -> None:
    file = tmp_path / "copy.yaml"
    file.write_text(trio_("show", "trio-11", "--yaml").stdout)
    assert load_spec(file) == load_spec("trio-11")


# validate, schema ----------------------------------------------------------------------------------------------------


def test_validate(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("version: 1\nstages: [{after_layer: 2, keep: 10}]\n")
    bad.write_text("version: 1\nstages:\n  - after_layer: 2\n    kepe: 10\n")
    result = trio_("validate", good, "trio-11")
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"{good}: ok (custom: 1 stages)" in result.stdout
    result = trio_("validate", good, bad, tmp_path / "none.yaml")
    assert result.exit_code == 2
    assert f"{good}: ok" in result.stdout
    assert f"{bad}, line 4, stages[0].kepe: unknown key 'kepe'. Did you mean 'keep'?" in result.stderr
    assert "none.yaml: cannot be read" in result.stderr


def test_schema_is_valid_and_accepts_the_shipped_specs() -> None:
    result = trio_("schema")
    assert result.exit_code == 0
    schema = json.loads(result.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    for name in shipped_specs():
        text = (Path(trio.__file__).parent / "spec" / "shipped" / f"{name}.yaml").read_text()
        jsonschema.validate(yaml.safe_load(text), schema)


# Wrong input ---------------------------------------------------------------------------------------------------------


def _damaged(folder: Path) -> dict[str, Path]:
    whole = folder / "whole.png"
    Image.effect_noise((200, 200), 80).save(whole)
    files = {"corrupt": folder / "corrupt.png", "cut": folder / "cut.png", "huge": folder / "huge.png"}
    files["corrupt"].write_bytes(b"this is no image")
    files["cut"].write_bytes(whole.read_bytes()[:2000])
    Image.new("1", (20_000, 10_000)).save(files["huge"])
    (folder / "empty").mkdir()
    files["empty"] = folder / "empty"
    (folder / "odd").mkdir()
    (folder / "odd" / "config.json").write_text('{"model_type": "bert"}')
    files["odd"] = folder / "odd"
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    files["broken"] = folder / "broken"
    files["yaml"] = folder / "bad.yaml"
    files["yaml"].write_text("version: 1\nstages: [\n")
    files["deep"] = folder / "deep.yaml"
    files["deep"].write_text("version: 1\nstages: [{after_layer: 8, keep: 10}]\n")
    return files


RUN = ["run", "-m", "{model}", "-i", "{image}", "-q", "hi"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([*RUN[:3], "-i", "nowhere.png", "-q", "hi"], "image 'nowhere.png': there is no such file; check the path"),
        ([*RUN[:3], "-i", "{corrupt}", "-q", "hi"], "corrupt.png': not an image that can be read; give a PNG"),
        ([*RUN[:3], "-i", "{cut}", "-q", "hi"], "cut.png': cannot be read (image file is truncated"),
        ([*RUN[:3], "-i", "{huge}", "-q", "hi"], "huge.png': more than 89 million pixels; scale it down"),
        ([*RUN[:3], "-i", "{empty}", "-q", "hi"], "empty': cannot be read"),
        (RUN[:5], "--question: missing; an image of your own needs a question, --question TEXT"),
        ([*RUN[:6], " "], "--question: it is empty"),
        ([*RUN, "--spec", "trio-12"], "there is no shipped spec 'trio-12'. Did you mean 'trio-11'"),
        ([*RUN, "--spec", "nowhere.yaml"], "nowhere.yaml: cannot be read (No such file or directory); check the path"),
        ([*RUN, "--spec", "{yaml}"], "bad.yaml, line 3: not valid YAML"),
        ([*RUN, "--spec", "{deep}"], "stages[0].after_layer: found 8, but the model has 8 decoder layers"),
        ([*RUN, "--out", "kept.gif"], "--out 'kept.gif': the name has to end in .png, .jpg or .webp"),
        ([*RUN, "--out", "nowhere/kept.png"], "--out 'nowhere/kept.png': there is no folder"),
        ([*RUN, "--device", "warp"], "device 'warp': "),
        (["run", "-m", "tiny-lava"], "model 'tiny-lava': neither a model of the zoo"),
        (["run", "-m", "{empty}"], "the folder has no config.json"),
        (["run", "-m", "{odd}"], "transformers has no image-text-to-text model for it"),
        (["run", "-m", "{broken}"], "cannot be loaded"),
        (["show", "trio-12"], "there is no shipped spec 'trio-12'"),
        (["show", "trio-11", "--model", "llava-1.5-8b"], "model 'llava-1.5-8b': neither a model of the zoo"),
        (["show", "trio-11", "--model", "{broken}"], "its config cannot be read"),
        (["show", "trio-11", "--model", "{odd}"], "no vision_config"),
        (["check", "nothing-here"], "model 'nothing-here': neither a model of the zoo"),
        (["check", "{model}", "--promise", "nothing"], "nothing"),
        (["validate", "{yaml}"], "bad.yaml, line 3: not valid YAML"),
        (["run", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["run", "--no-such-option"], "No such option"),
        (["run", "--dtype", "int3"], "--dtype"),
        (["show"], "Missing argument"),
        (["shwo"], "No such command"),
        (["list", "scores"], "list 'scores': there is no such kind, part, spec or model. Did you mean 'scorers'"),
        (["list", "selector", "nsm"], "list 'nsm': there is no such selector. Did you mean 'nms'?"),
        (["list", "selektor", "nms"], "list 'selektor': there is no such kind. Did you mean 'selectors'?"),
        (["list", "specs", "a", "b"], "list: found 3 words; give at most a kind and a name"),
        (["list", "--name", "*"], "No such option"),
        (["run", "--picture", "x.png"], "No such option"),
        (["run", "--overlay", "x.png"], "No such option"),
        (["fidelity", "x"], "Missing option '--images'"),
        (["tune", "x", "-t", "tokens<=11%"], "Missing option '--out'"),
        (["calibrate", "x", "--images", "images"], "Missing option '--out'"),
        (["eval", "--spec", "trio-11"], "Missing option '--out'"),
        (["doctor", "--family", "lava"], "--family: there is no 'lava'. Did you mean 'llava'"),
        (["schema", "x"], "unexpected extra argument"),
    ],
)
def test_wrong_input(args: list[str], says: str, model: Path, image: Path, tmp_path: Path) -> None:
    names: dict[str, Any] = {"model": model, "image": image, **_damaged(tmp_path)}
    if args[0] == "run" and args[1:2] == ["-m"] and args[2] in ("{empty}", "{odd}", "{broken}", "tiny-lava"):
        args = [*args, *RUN[3:]]
    result = trio_(*(arg.format(**names) for arg in args))
    assert result.exit_code == 2, (result.stdout, result.stderr)
    assert says in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr + result.stdout
    if result.stderr.startswith("trio: "):
        assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert isinstance(result.exception, SystemExit)


def test_a_broken_part_is_the_user_s_to_read(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("version: 1\nstages:\n  - after_layer: 1\n    keep: 3\n    scorer: {name: random, sead: 3}\n")
    result = trio_("show", file)
    assert result.exit_code == 2
    assert "line 5, stages[0].scorer: scorer 'random': unknown parameter 'sead'. Did you mean 'seed'?" in result.stderr


# Small helpers -------------------------------------------------------------------------------------------------------


def test_helpers() -> None:
    assert quantity(2.98e12, "FLOP") == "2.98 TFLOP"
    assert quantity(999, "FLOP") == "999 FLOP"
    assert quantity(2048, "B", base=1024) == "2.00 KiB"
    assert duration(0.0123) == "12 ms"
    assert duration(2.5) == "2.50 s"
    assert layer_ranges([9, 9, 4]) == [("1-2", (9,)), ("3", (4,))]
    assert layer_ranges([]) == []


def test_images_are_upright_rgb(tmp_path: Path) -> None:
    turned = Image.new("RGB", (40, 20), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (20, 40)
    Image.new("LA", (4, 4)).save(tmp_path / "grey.png")
    assert load_image(tmp_path / "grey.png").mode == "RGB"
