"""How much of what a model knew is left: questions, controls, statistics and reports.

```python
from .. import evaluation

task = evaluation.shapesvqa(limit=50)
results = evaluation.evaluate(model, processor, task, ["trio-soft-11"], out="runs/eval")
```

`docs/evaluation.md` says what is measured and how, `docs/shapesvqa.md` and `docs/documents.md` what is asked. Names are
resolved when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..documents.task import documents
    from ..shapesvqa.task import shapesvqa
    from .protocol import evaluate
    from .results import EvaluationResults
    from .task import LabelledSample, Task, jsonl

__all__ = ["EvaluationResults", "LabelledSample", "Task", "documents", "evaluate", "jsonl", "shapesvqa"]

_HOME = {
    "EvaluationResults": "results",
    "LabelledSample": "task",
    "Task": "task",
    "documents": ".documents.task",
    "evaluate": "protocol",
    "jsonl": "task",
    "shapesvqa": ".shapesvqa.task",
}


def __getattr__(name: str) -> Any:
    """Resolve a public name."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
