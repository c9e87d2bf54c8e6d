"""lmms-eval, Ray, vLLM and quantised weights have environments of their own (`make lmms-eval`, `make ray`, `make vllm`,
`make quantised`); not collected elsewhere.
"""

from __future__ import annotations

from importlib.util import find_spec

NEEDS = {
    "test_lmms_eval_run.py": "lmms_eval",
    "test_quantised_run.py": "torchao",
    "test_ray_run.py": "ray",
    "test_vllm_run.py": "vllm",
}
collect_ignore = [file for file, library in NEEDS.items() if find_spec(library) is None]
