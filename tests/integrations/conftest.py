"""lmms-eval has an environment of its own (`make lmms-eval`); elsewhere only what needs no lmms-eval is tested."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = [] if find_spec("lmms_eval") else ["test_lmms_eval_run.py"]
