"""Ray: rows answered, and models evaluated, by actors on a cluster. Nothing of Ray is imported before a job begins.

`RayAnswerer` is for `Dataset.map_batches`; `RayEngine` is what ``trio batch --ray`` runs, `RayEvaluation` what
``trio eval --ray`` runs.
"""

from .answerer import RayAnswerer
from .engine import RayEngine
from .evaluation import RayEvaluation

__all__ = ["RayAnswerer", "RayEngine", "RayEvaluation"]
