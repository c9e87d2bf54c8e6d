"""``python -m trio.testing.engines vllm MODEL...``: parity of an engine, in an environment that has it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .results import EngineParity, table


def main(arguments: list[str] | None = None) -> int:
    """Runs the suite; the result is 0 where everything agrees."""
    parser = argparse.ArgumentParser(prog="python -m trio.testing.engines", description=__doc__)
    parser.add_argument("engine", choices=["vllm"])
    parser.add_argument("models", nargs="+", help="folders of checkpoints that fit the machine in float32")
    parser.add_argument("--image", type=Path, required=True, help="that the questions are about")
    parser.add_argument("--question", action="append", required=True, help="two or more")
    parser.add_argument("--spec", default="divprune-16", help="of the engine, as vLLM takes it")
    parser.add_argument("--without", action="append", default=[], help="compressor that is not asked for")
    parser.add_argument("--quick", action="store_true", help="the short run")
    parser.add_argument("--out", type=Path, help="where the result goes, as JSON")
    given = parser.parse_args(arguments)

    import torch
    import transformers
    import vllm

    cases: list[Any] = []
    speeds: list[Any] = []
    for number, model in enumerate(given.models):
        found, speed = _model(Path(model), given, first=number == 0)
        cases += found
        speeds += speed
    result = EngineParity(
        engine=f"vLLM {vllm.__version__}",
        transformers=transformers.__version__,
        torch=torch.__version__,
        device="CPU",
        cases=cases,
        throughput=speeds,
    )
    if given.out is not None:
        given.out.write_text(result.to_json(indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(f"{table(result)}\n{'passed' if result.passed else 'failed'}\n")
    return 0 if result.passed else 1


def _model(model: Path, given: argparse.Namespace, first: bool) -> tuple[list[Any], list[Any]]:
    import transformers

    from ...adapters import adapter_for
    from ...core.images import load_image
    from ...encoders.towers.clip import ClipTower
    from ...encoders.towers.find import tower_for
    from ...encoders.towers.qwen_vl import QwenTower
    from ...pipeline import Pipeline
    from . import vllm as engine
    from .prompts import reference, requests, sized

    loader: Any = transformers
    stock = loader.AutoModelForImageTextToText.from_pretrained(model, dtype="float32").eval()
    processor = loader.AutoProcessor.from_pretrained(model)
    name, _, count = given.spec.rpartition("-")
    tiled = adapter_for(stock).whole_beside_tiles
    default = {
        "compressor": {"name": name, "keep": int(count) if count.isdigit() else count},
        "positions": "auto",
        "newlines": "never" if tiled else "with-row",
    }
    Pipeline.from_spec(default, stock)  # refused here, before an engine is started
    image = load_image(given.image)
    reading = isinstance(tower_for(stock), ClipTower | QwenTower)
    asked = requests(image, given.question, reading=reading, without=given.without)
    end = stock.generation_config.eos_token_id
    ends = frozenset([end] if isinstance(end, int) else end or [])
    expected = reference(stock, processor, asked, default, engine.NEW_TOKENS, ends)
    found = [
        engine.run_case(case, model, processor, asked, expected, given.spec, ends)
        for case in engine.CASES
        if (case.quick or not given.quick) and (case.every or first)
    ]
    speed = []
    if not given.quick and first:
        found.append(engine.run_server(model, asked, expected, given.spec, ends))
    if not given.quick:
        images = [sized(image)[at % 3].rotate(at) for at in range(64)]
        speed.append(engine.throughput(model, processor, images, given.question[0], given.spec))
    return found, speed


if __name__ == "__main__":
    raise SystemExit(main())
