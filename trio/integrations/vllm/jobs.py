"""``trio batch --engine vllm``: a job's rows answered by vLLM, with the job's spec as the engine's own."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from typing import Any

from PIL import Image

from ... import DISTRIBUTION
from ...batch.answerer import Answerer, RowOutput, right_of
from ...batch.rows import BatchRow, RowSource
from ...core.images import prompt_for
from ...errors import InputError, TrioError, UnsupportedModelError, first_line
from ...measure.ahead import prepared
from ...measure.answering import decode
from ...spec import PipelineSpec, load_spec
from ...zoo.find import find_model
from .settings import KEY

__all__ = ["VllmAnswerer", "VllmEngine", "check_engine"]

#: Rows that the engine is given at once; it makes batches of them by itself. Their images are in memory, and those of
#: as many rows that come next.
ROWS = 128


def check_engine(spec: PipelineSpec) -> None:
    """Refuses what cannot work before anything is read or loaded.

    Raises:
        UnsupportedModelError: the spec is decided inside the language model.
        InputError: vLLM is not installed.
    """
    if not spec.engine_ready:
        raise UnsupportedModelError(
            f"--engine vllm: spec {spec.name!r}: {spec.engine_ready.reason}. Or give --engine transformers."
        )
    if find_spec("vllm") is None:
        raise InputError(
            "--engine vllm: vLLM is not installed; in an environment of its own: pip install "
            f"'{DISTRIBUTION}[vllm]' (docs/vllm.md)."
        )


@dataclass(frozen=True)
class VllmEngine:
    """Answers rows with vLLM on this machine, in the order of the rows.

    Attributes:
        model: of the zoo, a folder, or a name on the hub.
        spec: what `trio.load_spec` takes, ready for an engine.
        batch_size: prompts that run at the same time, at most.
        max_new_tokens: longest answer.
        dtype: number format of the weights; ``auto``: as the checkpoint says.
        options: further ones of `vllm.LLM`.
    """

    model: str
    spec: Mapping[str, Any]
    batch_size: int = 8
    max_new_tokens: int = 32
    dtype: str = "auto"
    options: Mapping[str, Any] | None = None

    def answers(self, source: RowSource, done: Set[str]) -> Generator[RowOutput, None, None]:
        """As of `trio.batch.Engine`.

        Raises:
            TrioError: the engine does not start.
        """
        rows = (row for row in source.rows() if row.id not in done)
        batches = iter(lambda: list(islice(rows, ROWS)), [])
        with closing(VllmAnswerer(self)) as answerer, closing(prepared(answerer.prepare, batches, ahead=1)) as coming:
            for batch in coming:
                yield from answerer.ask(batch)


class VllmAnswerer(Answerer):
    """An engine of vLLM, which answers batches of rows."""

    def __init__(self, job: VllmEngine) -> None:
        """Starts the engine.

        Raises:
            UnsupportedModelError: the spec cannot work in it.
            InputError: vLLM is not installed, or cannot load the model.
        """
        check_engine(load_spec(job.spec))
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is the job's
        import torch
        import transformers

        loader: Any = transformers  # its typing changes from version to version
        place = find_model(job.model)
        vllm, exceptions = import_module("vllm"), import_module("vllm.exceptions")
        self.of_a_row = (TrioError, ValueError, exceptions.VLLMClientError)
        try:
            written = getattr(loader.AutoConfig.from_pretrained(place), "dtype", None) or torch.float32
            self._processor = loader.AutoProcessor.from_pretrained(place)
            self._engine = vllm.LLM(
                place,
                **{
                    # Left to itself vLLM would take float32 weights as bfloat16.
                    "dtype": str(written).removeprefix("torch.") if job.dtype == "auto" else job.dtype,
                    "hf_overrides": {KEY: dict(job.spec)},
                    "limit_mm_per_prompt": {"image": 1},
                    "max_num_seqs": job.batch_size,
                    "enforce_eager": not torch.accelerator.is_available(),
                    **(job.options or {}),
                },
            )
        except TrioError:
            raise
        except (ValueError, RuntimeError, OSError, exceptions.VLLMError) as error:
            raise InputError(
                f"--engine vllm: model {job.model!r}: vLLM does not start with it ({first_line(error)})."
            ) from error
        registry = import_module("vllm.multimodal").MULTIMODAL_REGISTRY
        self._prompts = registry.create_processor(self._engine.llm_engine.model_config)
        # Greedy; penalties are the checkpoint's, as on transformers.
        self._sampling = self._engine.get_default_sampling_params()
        self._sampling.temperature, self._sampling.top_p, self._sampling.top_k = 0.0, 1.0, 0
        self._sampling.max_tokens = job.max_new_tokens

    def close(self) -> None:
        """Ends the engine."""
        self._engine.llm_engine.engine_core.shutdown()

    def _inputs(self, rows: Sequence[BatchRow], images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """As of `Answerer`: prompts with their images."""
        return [
            {"prompt": prompt_for(self._processor, 1, row.question), "multi_modal_data": {"image": image}}
            for row, image in zip(rows, images, strict=True)
        ]

    def _outputs(self, rows: Sequence[BatchRow], inputs: Any) -> list[RowOutput]:
        """As of `Answerer`: an error of a row comes before any runs."""
        images = [one["multi_modal_data"]["image"] for one in inputs]
        outputs = self._engine.generate(inputs, self._sampling, use_tqdm=False)
        tokens = [list(one.outputs[0].token_ids) for one in outputs]
        results = []
        for row, image, text, new in zip(rows, images, decode(self._processor, tokens), tokens, strict=True):
            sizes = self._prompts.sizes(image.height, image.width)
            left = float(sum(self._prompts.default_spec.counts(sizes)))  # in every layer
            right = right_of(text, row.answers)
            results.append(RowOutput(row.id, text, None, sum(sizes), left, len(new), right))
        return results
