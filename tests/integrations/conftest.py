"""lmms-eval and Ray have environments of their own (`make lmms-eval`, `make ray`); not collected elsewhere."""
"""lmms-eval and vLLM have environments of their own (`make lmms-eval`, `make vllm`); elsewhere only what needs neither
of them is tested.
"""

from __future__ import annotations

from importlib.util import find_spec

NEEDS = {"test_lmms_eval_run.py": "lmms_eval", "test_ray_run.py": "ray"}
collect_ignore = [file for file, library in NEEDS.items() if find_spec(library) is None]
collect_ignore = [
    *([] if find_spec("lmms_eval") else ["test_lmms_eval_run.py"]),
    *([] if find_spec("vllm") else ["test_vllm_run.py"]),
]
