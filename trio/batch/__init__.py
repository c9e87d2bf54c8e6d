"""Jobs on many rows, and requests of many callers, answered in batches.

In a job each row of a table is an image with a question, and gets one line with the answer.

`rows` reads the table, `answerer` asks the model, `shards` writes the answers whole or not at all, `job` brings them
together: every row comes out exactly once, also where the job was stopped and begun again. `docs/scale.md` says what
large jobs need.

In a service `batcher` puts waiting `requests` of one spec together; `docs/serving.md` has an HTTP service on it.
"""

from .answerer import RowAnswerer, RowOutput
from .batcher import DynamicBatcher
from .job import Engine, LocalEngine, run_job
from .requests import PromptAnswer, PromptRequest, QueueFullError
from .rows import BatchRow, RowSource, open_rows
from .shards import Shards
from .stats import BatcherStats
from .summary import BatchSummary

__all__ = [
    "BatchRow",
    "BatchSummary",
    "BatcherStats",
    "DynamicBatcher",
    "Engine",
    "LocalEngine",
    "PromptAnswer",
    "PromptRequest",
    "QueueFullError",
    "RowAnswerer",
    "RowOutput",
    "RowSource",
    "Shards",
    "open_rows",
    "run_job",
]
