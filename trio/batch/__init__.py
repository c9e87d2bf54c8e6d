"""Jobs on many rows: each row of a table is an image with a question, and gets one line with the answer.

`rows` reads the table, `answerer` asks the model, `shards` writes the answers whole or not at all, `job` brings them
together: every row comes out exactly once, also where the job was stopped and begun again. `docs/scale.md` says what
large jobs need.
"""

from .answerer import RowAnswerer, RowOutput
from .job import Engine, LocalEngine, run_job
from .rows import BatchRow, RowSource, open_rows
from .shards import Shards
from .summary import BatchSummary

__all__ = [
    "BatchRow",
    "BatchSummary",
    "Engine",
    "LocalEngine",
    "RowAnswerer",
    "RowOutput",
    "RowSource",
    "Shards",
    "open_rows",
    "run_job",
]
