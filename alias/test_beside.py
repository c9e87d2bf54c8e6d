"""The second wheel beside the async library `trio`; run by `make alias`, in an environment that has both."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch

SITE = Path(sys.prefix)
COMMAND = SITE / "bin" / "trio-vlm"
CHECKOUT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command, which must succeed."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_both_are_what_they_say_and_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import trio_vlm

        import trio

        assert trio_vlm.Pipeline.__module__ == "trio_vlm.pipeline"
    assert trio.run(trio.sleep, 0) is None
    for module in (trio, trio_vlm):
        assert module.__file__ is not None and Path(module.__file__).is_relative_to(SITE)
    assert metadata.version("trio-vlm-alias") == trio_vlm.__version__
    assert trio_vlm.DISTRIBUTION == "trio-vlm-alias"


def test_every_module_is_in_the_wheel_and_finds_what_it_imports() -> None:
    import trio_vlm

    home = Path(trio_vlm.__file__).parent
    files = {file.relative_to(home) for file in home.rglob("*") if "__pycache__" not in file.parts}
    sources = CHECKOUT / "trio"
    assert files == {file.relative_to(sources) for file in sources.rglob("*") if "__pycache__" not in file.parts}
    modules = sorted(str(file.with_suffix("")).replace("/", ".") for file in files if file.suffix == ".py")
    # lmms-eval with its loggers, and vLLM, are in environments of their own.
    elsewhere = ("integrations.lmms_eval.", "integrations.vllm.")
    wanted = [f"trio_vlm.{name}".removesuffix(".__init__") for name in modules if not name.startswith(elsewhere)]
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    run(sys.executable, "-c", code, *wanted, cwd=SITE)  # an import of `trio.errors` would meet the async library


def test_every_part_is_listed_as_one_of_the_package() -> None:
    import trio_vlm

    registries = [getattr(trio_vlm, f"{kind}S") for kind in ("SCORER", "SELECTOR", "COMPRESSOR", "TOWER", "ADAPTER")]
    for registry in registries:
        parts = [registry.describe(name) for name in registry.names()]
        assert parts and all(part.source == "trio" and part.summary and not part.broken for part in parts)
        assert all(registry.get(part.name).__module__.startswith("trio_vlm.") for part in parts)
        assert registry.group == f"trio.{registry.kind}s"  # a plugin is found by either distribution


def test_a_plugin_is_found_through_the_same_entry_points(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").write_text(
        'import trio_vlm\n\n\nclass First(trio_vlm.Scorer):\n    """The first tokens."""\n\n'
        "    def score(self, ctx):\n        return -ctx.visual_index.float()\n"
    )
    info = tmp_path / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[trio.scorers]\nfirst = elsewhere:First\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import trio_vlm
info = trio_vlm.SCORERS.describe("first")
print(info.source, info.summary, info.broken)
"""
    assert run(sys.executable, "-c", code, cwd=SITE).strip() == "elsewhere 1.0 The first tokens."


def test_shipped_specs_are_valid() -> None:
    import trio_vlm
    from trio_vlm.spec import shipped_specs

    assert len(shipped_specs()) > 20
    assert all(trio_vlm.load_spec(name).name == name for name in shipped_specs())


@pytest.mark.parametrize("spec", ["trio-soft-11", "visionzip-llava-1.5-64"])
def test_a_pipeline_keeps_the_tokens_that_it_keeps_under_the_first_name(spec: str) -> None:
    import trio_vlm
    from PIL import Image

    model, processor = trio_vlm.zoo.load("tiny-llava")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": trio_vlm.zoo.demo_question()}]}
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[Image.open(trio_vlm.zoo.demo_image())], return_tensors="pt")
    pipeline = trio_vlm.Pipeline.from_spec(spec, model)
    with pipeline, torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    code = f"""
import sys
sys.path.insert(0, {str(CHECKOUT)!r})
import trio
from PIL import Image
model, processor = trio.zoo.load("tiny-llava")
inputs = processor(text=[{text!r}], images=[Image.open(trio.zoo.demo_image())], return_tensors="pt")
pipeline = trio.Pipeline.from_spec({spec!r}, model)
with pipeline:
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
print(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(pipeline.report.model_dump_json(include={{"stages", "compressor"}}))
"""
    first = run(sys.executable, "-W", "ignore", "-c", code, cwd=SITE).splitlines()
    assert first == [answer, pipeline.report.model_dump_json(include={"stages", "compressor"})]
    assert answer


def test_the_command_runs(tmp_path: Path) -> None:
    import trio_vlm

    assert run(COMMAND, "--version", cwd=tmp_path).split()[-1] == trio_vlm.__version__
    assert "FLOPs" in run(COMMAND, "run", cwd=tmp_path)
    assert (tmp_path / "trio-overlay.png").is_file()
    assert "divprune" in run(COMMAND, "list", cwd=tmp_path)


def test_the_entry_point_for_lmms_eval_names_this_package() -> None:
    points = metadata.distribution("trio-vlm-alias").entry_points
    assert {point.value for point in points if point.group == "lmms_eval.models"} == {
        "trio_vlm.integrations.lmms_eval:manifest"
    }


def test_a_missing_name_is_explained_without_the_conflict() -> None:
    import trio_vlm

    with pytest.raises(AttributeError, match=r"'trio', which is imported as 'trio'\."):
        trio_vlm.open_nursery  # noqa: B018
