"""Parity of vLLM with transformers on the zoo's models: ``make vllm-full`` measures, and docs/vllm.md gets the tables.

``python -m benchmarks.vllm`` runs everything in an environment that has vLLM and writes
``benchmarks/results/vllm.json``; ``--table`` puts the tables made from it into the page, which needs no vLLM.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.tables import with_block
from benchmarks.untrained import qwen2_vl, qwen3_vl
from trio import zoo
from trio.testing.engines.results import CaseResult, EngineParity, table, throughput_table

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "vllm.json"
PAGE = ROOT / "docs" / "vllm.md"
MODELS = ("tiny-llava", "tiny-llava-next", "tiny-qwen2.5-vl")
QUESTIONS = ("what number is on the black plate?", "what color is the plate?")
#: On features of random weights it keeps other tokens for noise of 1e-6, so that two engines need not agree.
UNSTEADY = "vispruner"
#: Specs whose embeddings are exported, by model; the second ones merge.
EXPORTED: dict[str, tuple[dict[str, Any], ...]] = {
    "tiny-llava": (
        {"compressor": {"name": "divprune", "keep": 16}, "positions": "compact"},
        {"compressor": {"name": "visionzip", "keep": 16}, "positions": "compact"},
    ),
    "tiny-llava-next": (
        {"compressor": {"name": "visionzip", "keep": 32}, "positions": "compact", "newlines": "never"},
    ),
}


def embeddings(name: str) -> list[CaseResult]:
    """Stock vLLM with exported embeddings against the pipeline that gets images."""
    from trio.core.images import load_image
    from trio.integrations.embeddings import export_embeddings
    from trio.testing.engines.prompts import Request, reference, sized
    from trio.testing.engines.vllm import NEW_TOKENS, run_embeddings

    model, processor = zoo.load(name, dtype="float32")
    images = sized(load_image(zoo.demo_image()))
    found = []
    for spec in EXPORTED.get(name, ()):
        asked = [Request(QUESTIONS[0], (one,)) for one in images] + [Request(QUESTIONS[1], tuple(images[:2]))]
        ends = frozenset([model.generation_config.eos_token_id])
        expected = reference(model, processor, asked, spec, NEW_TOKENS, ends)
        rows = [export_embeddings(model, processor, one.images, spec) for one in asked]
        result = run_embeddings(zoo.path(name), processor, asked, expected, rows, ends)
        case = f"no plugin, embeddings of {spec['compressor']['name']}"
        found.append(result.model_copy(update={"case": case}))
    return found


def measure() -> EngineParity:
    """Everything; takes about ten minutes on two cores."""
    from trio.testing.engines.__main__ import main

    options = ["--image", str(zoo.demo_image()), *(f"--question={one}" for one in QUESTIONS)]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        untrained = {"untrained-qwen2-vl": qwen2_vl, "untrained-qwen3-vl": qwen3_vl}
        for name, write in untrained.items():
            (folder / name).mkdir()
            write(folder / name)
        out = folder / "trained.json"
        main(["vllm", *(str(zoo.path(name)) for name in MODELS), *options, f"--out={out}"])
        result = EngineParity.from_json(out.read_text(encoding="utf-8"))
        main(
            [
                "vllm",
                *(str(folder / name) for name in untrained),
                *options,
                "--quick",
                f"--without={UNSTEADY}",
                f"--out={out}",
            ]
        )
        more = EngineParity.from_json(out.read_text(encoding="utf-8")).cases
    exported = [one for name in MODELS for one in embeddings(name)]
    return result.model_copy(update={"cases": [*result.cases, *more, *exported]})


def marks(name: str) -> tuple[str, str]:
    """The lines before and after a block of the page."""
    return f"<!-- measured: python -m benchmarks.vllm --table ({name}) -->", "<!-- end of what was measured -->"


def blocks(result: EngineParity) -> dict[str, str]:
    """The page's blocks, with the lines that mark them."""
    versions = f"{result.engine}, transformers {result.transformers}, torch {result.torch}, {result.device}, float32."
    texts = {"parity": f"{versions}\n\n{table(result)}", "throughput": throughput_table(result)}
    return {name: "\n".join([marks(name)[0], "", text, "", marks(name)[1]]) for name, text in texts.items()}


def with_blocks(page: str, result: EngineParity) -> str:
    """The page with its blocks made anew."""
    for text in blocks(result).values():
        page = with_block(page, text, PAGE.name)
    return page


def main(arguments: list[str]) -> int:
    """Measures, or writes the page."""
    if "--table" not in arguments:
        result = measure()
        RESULT.write_text(result.to_json(indent=2) + "\n", encoding="utf-8")
        sys.stdout.write(f"{table(result)}\n{throughput_table(result)}\n")
    result = EngineParity.from_json(RESULT.read_text(encoding="utf-8"))
    PAGE.write_text(with_blocks(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")
    return 0 if result.passed else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
