"""Load on examples/service.py over the loopback interface: nothing is lost or mixed up, and every answer is checked.

``python -m benchmarks.service`` runs two services of tiny-llava, with batches and without, which take turns under the
same load, and writes ``benchmarks/results/service.json``; ``--table`` puts the table into docs/serving.md. Clients
send requests with a spec of their own each, as JSON or as a stream, and close some of them early. Every answer is
compared with that of the question asked alone, by transformers' own calls on a model with the pipeline attached.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx
import torch
import transformers
from PIL import Image

import trio
from benchmarks.tables import table_head, table_row, write_block
from trio import zoo
from trio.measure.bench import describe
from trio.measure.shapesvqa.examples import examples

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "service.json"
PAGE = ROOT / "docs" / "serving.md"
BEGIN, END = "<!-- service: python -m benchmarks.service --table -->", "<!-- end of service -->"
MODEL, REQUESTS, CLIENTS, BLOCKS, TASKS, BATCH = "tiny-llava", 2000, 16, 8, 240, 8
#: Names of shipped specs, and specs that a client writes out: a compressor alone, and one with a stage.
SPECS: tuple[str | dict[str, Any], ...] = (
    "trio-soft-11",
    "trio-soft-33",
    "trio-11",
    {"version": 1, "name": "own-divprune", "compressor": {"name": "divprune", "keep": 30}},
    {
        "version": 1,
        "name": "own-both",
        "compressor": {"name": "visionzip", "keep": 72},
        "stages": [{"after_layer": 4, "keep": 20, "scorer": "objective-gradient", "selector": "top-k"}],
    },
)
LENGTHS = (1, 4, 8)


@dataclass(frozen=True)
class LoadTask:
    """A request and the answer that it must get: what the JSON of the answer has to say."""

    body: dict[str, Any] = field(repr=False)
    expected: dict[str, Any]


@dataclass
class Tally:
    """What came of the requests of one load.

    Attributes:
        outcomes: how many requests ended how; `wrong` and `failed` must not be.
        latencies: seconds of each request that was answered.
        first_texts: seconds to the first text of each that was streamed.
        sizes: of the batches that the answers came from, by answer.
        seconds: of the whole load.
        problems: what was wrong, a line each.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    first_texts: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def make_tasks(count: int, seed: int = 0) -> list[LoadTask]:
    """Requests with no, one and two images of several sizes, each answered alone on a model of its own."""
    chosen = random.Random(seed)
    shown = examples("test", scenes=count // 6 + 4)[: count // 2]
    shown += examples("test", scenes=count // 6 + 4, varied=True)[: count - len(shown)]
    model, processor = zoo.load(MODEL)
    pipelines = [trio.Pipeline.from_spec(spec, model) for spec in SPECS]
    tasks = []
    for number, one in enumerate(shown):
        images = [one.image] if number % 10 else []
        if number % 10 == 1:
            images.append(chosen.choice(shown).image)
        which, length = number % len(SPECS), chosen.choice(LENGTHS)
        body = {
            "question": one.question,
            "images": [base64.b64encode(png(image)).decode() for image in images],
            "spec": SPECS[which],
            "max_new_tokens": length,
            "places": True,
        }
        tasks.append(LoadTask(body, alone(model, processor, pipelines[which], images, one.question, length)))
    return tasks


def png(image: Image.Image) -> bytes:
    """The bytes of a file."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def alone(
    model: Any, processor: Any, pipeline: trio.Pipeline, images: Sequence[Image.Image], question: str, length: int
) -> dict[str, Any]:
    """What a question gets alone, from transformers and an attached pipeline."""
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, images=list(images) or None, return_tensors="pt")
    with pipeline, torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=length, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        places: list[list[int]] = []
        if images:
            sample = pipeline.report.samples[0]
            if sample.stages:
                places = [list(group.indices) for group in sample.stages[-1].groups]
            elif sample.compressor is not None:
                places = [list(image.indices) for image in sample.compressor.images]
    ended = int(out[-1]) == model.generation_config.eos_token_id
    return {
        "text": processor.decode(out, skip_special_tokens=True).strip(),
        "finish": "end" if ended else "length",
        "spec": pipeline.spec.name,
        "new_tokens": len(out),
        "visual_tokens": 144 * len(images),
        "places": places,
    }


async def load(url: str, tasks: Sequence[LoadTask], requests: int, *, clients: int = CLIENTS, seed: int = 0) -> Tally:
    """Sends requests, each client one after another, and checks what comes back."""
    tally, chosen = Tally(), random.Random(seed)
    todo = iter([(number, chosen.choice(tasks), chosen.random()) for number in range(requests)])

    async def client() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=300) as http:
            for number, task, chance in todo:
                try:
                    await ask(http, number, task, chance, tally)
                except Exception as error:
                    tally.outcomes["failed"] += 1
                    tally.problems.append(f"request {number}: {type(error).__name__}: {error}")

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    tally.seconds = time.perf_counter() - begin
    return tally


async def ask(http: httpx.AsyncClient, number: int, task: LoadTask, chance: float, tally: Tally) -> None:
    """One request: of 16 eight as JSON, six as a stream, one closed before its answer and one within its stream."""
    begin = time.perf_counter()
    if number % 16 < 8:
        got = (await http.post("/answer", json=task.body)).raise_for_status().json()
    elif number % 16 == 8:
        try:
            got = (await asyncio.wait_for(http.post("/answer", json=task.body), 0.05 * chance)).json()
        except TimeoutError:
            tally.outcomes["closed before the answer"] += 1
            return
    else:
        text, got = "", {}
        async with http.stream("POST", "/answer", json={**task.body, "stream": True}) as response:
            response.raise_for_status()
            async for kind, data in events(response):
                if kind == "answer":
                    got = data
                elif kind == "text":
                    if not text:
                        first = time.perf_counter() - begin
                    text += data["text"]
                    if number % 16 == 9:
                        tally.outcomes["closed in the stream"] += 1
                        return
                else:
                    raise ValueError(f"{kind}: {data}")
        if text != got.get("text"):
            tally.problems.append(f"request {number}: streamed {text!r}, answered {got.get('text')!r}")
            tally.outcomes["wrong"] += 1
            return
        if text:
            tally.first_texts.append(first)
    wrong = {name: (got.get(name), value) for name, value in task.expected.items() if got.get(name) != value}
    tally.outcomes["wrong" if wrong else "right"] += 1
    if wrong:
        tally.problems.append(f"request {number}: (found, expected) {wrong}")
    tally.latencies.append(time.perf_counter() - begin)
    tally.sizes.append(got["batch_size"])


async def events(response: httpx.Response) -> Any:
    """The server-sent events of a response: name and data."""
    kind = ""
    async for line in response.aiter_lines():
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield kind, json.loads(line.removeprefix("data: "))


def metrics(url: str) -> dict[str, float]:
    """The metrics of a service, by name with labels."""
    lines = httpx.get(f"{url}/metrics", timeout=60).raise_for_status().text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


@contextmanager
def service(*options: str) -> Iterator[str]:
    """A service in a process of its own with one thread for the model; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, environment = f"http://127.0.0.1:{port}", {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "examples/service.py", "--model", MODEL, "--port", str(port), *options]
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        for _ in range(600):
            with suppress(httpx.TransportError):
                httpx.get(f"{url}/health").raise_for_status()
                break
            if process.poll() is not None:
                raise SystemExit(f"the service ended with {process.returncode} before it listened")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def drained(url: str) -> dict[str, float]:
    """The metrics once no request is open."""
    for _ in range(600):
        found = metrics(url)
        if not found["trio_open_requests"]:
            return found
        time.sleep(0.05)
    raise SystemExit("requests are still open half a minute after the last client has gone")


def measure() -> dict[str, Any]:
    """Both services under the same blocks of requests, in turns; what each block took."""
    tasks = make_tasks(TASKS)
    tallies: dict[int, list[Tally]] = {BATCH: [], 1: []}
    processor: dict[int, list[float]] = {BATCH: [], 1: []}
    with service("--max-batch", str(BATCH)) as batched, service("--max-batch", "1") as single:
        urls = {BATCH: batched, 1: single}
        for url in urls.values():
            asyncio.run(load(url, tasks, 64))  # not counted
        outcomes = {size: Counter(drained(url)) for size, url in urls.items()}
        runnable = []
        for block in range(BLOCKS):
            runnable.append(os.getloadavg()[0])
            for size in (BATCH, 1) if block % 2 else (1, BATCH):
                before = drained(urls[size])["process_cpu_seconds_total"]
                tallies[size].append(asyncio.run(load(urls[size], tasks, REQUESTS // BLOCKS, seed=block + 1)))
                processor[size].append(drained(urls[size])["process_cpu_seconds_total"] - before)
        for size, url in urls.items():
            outcomes[size] = Counter(drained(url)) - outcomes[size]
    problems = [line for size in tallies for tally in tallies[size] for line in tally.problems]
    for size in tallies:
        ended = sum(tally.outcomes.total() for tally in tallies[size])
        problems += [] if ended == REQUESTS else [f"{ended} of {REQUESTS} requests have an end"]
        problems += [f"{name}: {n}" for name, n in outcomes[size].items() if "failed" in name or "refused" in name]
    if problems:
        raise SystemExit("\n".join(problems[:20]))
    machine = describe(torch.device("cpu"), torch.float32)
    return {
        "command": "python -m benchmarks.service",
        "machine": f"{machine.device}, one thread a service, torch {torch.__version__}, transformers "
        f"{transformers.__version__}",
        "model": MODEL,
        "requests": REQUESTS,
        "clients": CLIENTS,
        "blocks": BLOCKS,
        "load_average": round(sum(runnable) / BLOCKS, 1),
        "cores": os.cpu_count(),
        "tasks": TASKS,
        "specs": [spec if isinstance(spec, str) else spec["name"] for spec in SPECS],
        "services": {str(size): summary(tallies[size], outcomes[size]) for size in tallies},
        "throughput": ratio([tally.seconds for tally in tallies[1]], [tally.seconds for tally in tallies[BATCH]]),
        "processor": ratio(processor[1], processor[BATCH]),
    }


def ratio(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Quartiles of the ratios, block by block."""
    return [round(one, 3) for one in quantiles([a / b for a, b in zip(above, below, strict=True)], n=4)]


def summary(tallies: Sequence[Tally], outcomes: Counter[str]) -> dict[str, Any]:
    """All blocks of one service."""
    ended: Counter[str] = sum((tally.outcomes for tally in tallies), Counter())
    latencies = [one for tally in tallies for one in tally.latencies]
    firsts = [one for tally in tallies for one in tally.first_texts]
    sizes = [one for tally in tallies for one in tally.sizes]
    asked = {name: int(n) for name, n in outcomes.items() if name.startswith("trio_requests_total")}
    return {
        "outcomes": dict(sorted(ended.items())),
        "service_outcomes": {re.findall('"(.*)"', name)[0]: n for name, n in sorted(asked.items())},
        "requests_a_second": round(ended.total() / sum(tally.seconds for tally in tallies), 2),
        "latency_ms": percentiles(latencies),
        "first_text_ms": percentiles(firsts),
        "batch_size": round(sum(sizes) / len(sizes), 2),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds: 50th, 95th and 99th percentile."""
    cuts = quantiles(seconds, n=100, method="inclusive")
    return {f"p{number}": round(1e3 * cuts[number - 1], 1) for number in (50, 95, 99)}


def table(data: dict[str, Any]) -> str:
    """The measured block of the page."""
    both = {int(size): found for size, found in data["services"].items()}
    rows = [table_head(["", *("no batches" if size == 1 else f"batches of at most {size}" for size in both)])]
    rows.append(table_row(["requests a second", *(f"{found['requests_a_second']:.1f}" for found in both.values())]))
    rows.append(table_row(["requests in a batch, mean", *(f"{found['batch_size']:.1f}" for found in both.values())]))
    for name, title in (("latency_ms", "to the answer"), ("first_text_ms", "to the first text of a stream")):
        cells = (" / ".join(f"{found[name][p]:.0f}" for p in ("p50", "p95", "p99")) for found in both.values())
        rows.append(table_row([f"ms {title}: median / 95% / 99%", *cells]))
    for name in ("right", "closed before the answer", "closed in the stream", "wrong", "failed"):
        rows.append(table_row([name, *(f"{found['outcomes'].get(name, 0):,}" for found in both.values())]))
    low, middle, high = data["throughput"]
    low_cpu, middle_cpu, high_cpu = data["processor"]
    specs = ", ".join(f"`{spec}`" for spec in data["specs"])
    said = (
        f"`{data['model']}`, {data['requests']:,} requests to each service from {data['clients']} clients, "
        f"{data['tasks']} different ones, with {len(data['specs'])} specs ({specs}); {data['machine']}. "
        f"The machine was shared: {data['load_average']} processes wanted to run on its {data['cores']} cores, on "
        f"average. With batches {middle:.2f} times as many requests a second ({low:.2f} to {high:.2f}: quartiles of "
        f"{data['blocks']} pairs of blocks), and {middle_cpu:.2f} times as many in a second of the processor "
        f"({low_cpu:.2f} to {high_cpu:.2f})."
    )
    return "\n".join([BEGIN, "", said, "", *rows, "", END])


def main() -> None:
    """Measures, or writes the page's block."""
    if "--table" not in sys.argv:
        RESULT.write_text(json.dumps(measure(), indent=1) + "\n")
    write_block(PAGE, table(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
