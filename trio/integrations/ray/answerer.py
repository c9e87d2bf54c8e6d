"""A callable class for `Dataset.map_batches`: columns in, columns out. It needs no Ray."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...batch import BatchRow, RowAnswerer, RowOutput
from ...errors import InputError
from ...pipeline import Pipeline
from ...zoo.checkpoint import load_model

__all__ = ["RayAnswerer", "columns_of", "results_of"]

Columns = dict[str, np.ndarray[Any, Any]]


class RayAnswerer:
    """Loads a model once, attaches its pipeline, and answers batches of rows.

    ```python
    answered = dataset.map_batches(
        RayAnswerer,
        fn_constructor_args=("llava-hf/llava-1.5-7b-hf", "trio-soft-11"),
        batch_size=16,
        num_gpus=1,
        compute=ray.data.ActorPoolStrategy(size=8, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True),
    )
    ```
    """

    def __init__(
        self,
        model: str,
        spec: str | Path | Mapping[str, Any],
        *,
        max_new_tokens: int = 32,
        question: str | None = None,
        folder: str | Path = ".",
        dtype: str = "auto",
        device: str = "auto",
    ) -> None:
        """Loads a model.

        Args:
            model: of the zoo, a folder, or a name on the hub.
            spec: what `trio.load_spec` takes.
            max_new_tokens: longest answer.
            question: for rows without one of their own.
            folder: where paths of images start.
            dtype: number format of the weights.
            device: where to run.

        Raises:
            TrioError: the model cannot be loaded, or the spec is wrong or does not fit it.
        """
        network, processor = load_model(model, dtype=dtype, device=device)
        self._pipeline = Pipeline.from_spec(spec, network).attach()
        self._answerer = RowAnswerer(network, processor, self._pipeline, max_new_tokens=max_new_tokens)
        self._question, self._folder, self._model = question, Path(folder), threading.Lock()

    def __call__(self, batch: Mapping[str, Any]) -> Columns:
        """Answers a batch. A second thread may call meanwhile: its images are read while the model has the first one's.

        Args:
            batch: columns of equal length: ``id``; ``image``, a path, bytes or ``{"bytes": ..., "path": ...}``;
                ``question``; and maybe ``answer``.

        Returns:
            The columns ``id``, ``answer`` and ``error`` (text; one of the two is empty), ``visual_tokens`` (int64),
            ``kept`` (float64: visual tokens averaged over the layers), ``new_tokens`` (int64) and ``right`` (int8: 1,
            0, or -1 where the row gives no answer).

        Raises:
            InputError: a column is missing.
        """
        missing = [name for name in ("id", "image") if name not in batch]
        if missing:
            raise InputError(f"batch: no column {' and '.join(missing)}; it has {', '.join(batch)}. Rename one.")
        names = [name for name in ("id", "image", "question", "answer") if name in batch]
        kept: list[BatchRow | RowOutput] = []
        for values in zip(*(batch[name] for name in names), strict=True):
            record = dict(zip(names, values, strict=True))
            place = f"row {record['id']!r}"
            try:
                kept.append(BatchRow.of_record(record, self._folder, self._question, place))
            except InputError as error:  # a row without image or question, like one with a damaged image
                kept.append(RowOutput(str(record["id"]), None, str(error)))
        prepared = self._answerer.prepare([one for one in kept if isinstance(one, BatchRow)])
        with self._model:
            answers = iter(self._answerer.ask(prepared))
        return columns_of([one if isinstance(one, RowOutput) else next(answers) for one in kept])

    def close(self) -> None:
        """Takes the pipeline off the model."""
        if pipeline := vars(self).get("_pipeline"):  # not there where loading failed
            pipeline.detach()

    def __del__(self) -> None:  # Ray drops the object where the data set ends, and calls nothing
        self.close()


@dataclass(frozen=True)
class _Column:
    dtype: Any
    empty: Any = field(default="")


_COLUMNS = {
    "id": _Column(object),
    "answer": _Column(object),
    "error": _Column(object),
    "visual_tokens": _Column(np.int64),
    "kept": _Column(np.float64),
    "new_tokens": _Column(np.int64),
    "right": _Column(np.int8, -1),
}


def columns_of(results: Sequence[RowOutput]) -> Columns:
    """Results as columns; `results_of` is the way back."""
    return {
        name: np.array(
            [column.empty if (value := getattr(one, name)) is None else value for one in results], dtype=column.dtype
        )
        for name, column in _COLUMNS.items()
    }


def results_of(columns: Mapping[str, Any]) -> list[RowOutput]:
    """Columns as results."""
    made = []
    for values in zip(*(columns[name] for name in _COLUMNS), strict=True):
        name, answer, error, visual, kept, new, right = values
        made.append(
            RowOutput(
                str(name),
                None if error else str(answer),
                str(error) if error else None,
                int(visual),
                float(kept),
                int(new),
                None if right < 0 else bool(right),
            )
        )
    return made
