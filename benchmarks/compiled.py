"""What compiling a stage's scoring would give: kernels of `torch.compile`, counted on a processor.

``python -m benchmarks.compiled`` writes ``benchmarks/results/compiled.json``, of which ``python -m
benchmarks.performance`` makes a section of docs/performance.md. The package itself compiles nothing.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch._dynamo import explain
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.counting import count
from trio.adapters import adapter_for
from trio.core.probe import LayerInputs, rows_of_span
from trio.testing import tiny_llava

RESULT = Path(__file__).parent / "results" / "compiled.json"
BATCH, TOKENS, ROWS, LAYER = 2, 64, 16, 1


def counted() -> dict[str, Any]:
    """Kernels of scoring, forward and backward: eager, by `torch.compile` alone, and traced as one graph.

    Raises:
        SystemExit: the compiled scoring gives other saliencies.
    """
    torch.manual_seed(0)
    model = tiny_llava()
    adapter = adapter_for(model)
    adapter.probe_kind(LAYER)  # the probe's check of itself is made once, and is none of the scoring
    hidden = torch.randn(BATCH, TOKENS, int(adapter.text_config.hidden_size))
    valid = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    rotary = adapter.rotary(hidden, torch.arange(TOKENS).expand(BATCH, -1))

    def score(hidden: torch.Tensor, rotary: Any, valid: torch.Tensor) -> torch.Tensor:
        inputs = LayerInputs(hidden, valid, rotary, padded=False)
        return adapter.probe(LAYER, inputs).saliency(rows_of_span(valid, slice(TOKENS - ROWS, TOKENS)))

    with torch.no_grad():
        eager = count(lambda: score(hidden, rotary, valid)).launches
        expected = score(hidden, rotary, valid)
        found = explain(score)(hidden, rotary, valid)
        traced: Any = torch.compile(make_fx(score)(hidden, rotary, valid))
        actual, code = run_and_get_code(traced, hidden, rotary, valid)
    if not torch.allclose(actual, expected, rtol=1e-4, atol=1e-7):
        raise SystemExit("compiled, the scoring gives other saliencies")
    calls = "\n".join(code)
    return {
        "command": "python -m benchmarks.compiled",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "eager": eager,
        "graphs": found.graph_count,
        "breaks": found.graph_break_count,
        "products": len(re.findall(r"extern_kernels\.\w+\(", calls)),
        "fused": len(re.findall(r"^\s+cpp_fused\w*\(", calls, re.MULTILINE)),
    }


if __name__ == "__main__":
    RESULT.write_text(json.dumps(counted(), indent=1) + "\n", encoding="utf-8")
