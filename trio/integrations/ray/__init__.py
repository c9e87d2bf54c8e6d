"""Ray Data: rows answered by actors on a cluster. Nothing of Ray is imported before a job begins.

`RayAnswerer` is for `Dataset.map_batches`; `RayEngine` is what ``trio batch --ray`` runs.
"""

from .answerer import RayAnswerer
from .engine import RayEngine

__all__ = ["RayAnswerer", "RayEngine"]
