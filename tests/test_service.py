"""The HTTP service of examples/service.py: under load, at its limits, with clients that go, and when it ends."""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from PIL import Image
from support.serving import Gate, alone, asked, until

import trio
from benchmarks import service as benchmark
from examples.service import Limits, Service, main, make_app
from trio import zoo
from trio.batch import DynamicBatcher

ASKED = asked(12)
SPEC = "trio-soft-11"
LIMITS = Limits(images=2, image_bytes=60_000, pixels=40_000, question=200, new_tokens=50, seconds=60)


def encoded(image: Image.Image, kind: str = "PNG") -> str:
    out = io.BytesIO()
    image.save(out, kind)
    return base64.b64encode(out.getvalue()).decode()


def body(number: int = 0, **more: Any) -> dict[str, Any]:
    one = ASKED[number]
    return {"question": one.question, "images": [encoded(one.image)], "places": True, **more}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return zoo.load("tiny-llava")


@pytest.fixture(scope="module")
def judge() -> tuple[Any, Any]:
    """A model of its own, which no service uses."""
    return zoo.load("tiny-llava")


@pytest.fixture
def gate(loaded: tuple[Any, Any]) -> Iterator[Gate]:
    gate = Gate(loaded[0])
    yield gate
    gate.remove()


class Running:
    """A service on the loopback interface, in a thread."""

    def __init__(self, loaded: tuple[Any, Any], limits: Limits = LIMITS, allowed: Any = None) -> None:
        batcher = DynamicBatcher(*loaded, trio.load_spec(SPEC), max_batch=2, max_wait=0.0, max_queue=3)
        self.batcher, self.service = batcher, Service(batcher, limits, allowed)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(make_app(self.service), log_level="critical"))
        self.thread = threading.Thread(target=self.server.run, args=([self._socket],), daemon=True)
        self.thread.start()
        until(lambda: self.server.started)
        self.pool = ThreadPoolExecutor(16)

    def ask(self, content: Any = None, **options: Any) -> httpx.Response:
        with httpx.Client(base_url=self.url, timeout=60) as http:
            return http.post("/answer", json=body() if content is None else content, **options)

    def asks(self, *contents: dict[str, Any]) -> list[Any]:
        """Asks at the same time; the responses to come, once all are in the queue or in the model."""
        before = self.batcher.stats
        futures = [self.pool.submit(self.ask, content) for content in contents]

        def taken() -> int:
            stats = self.batcher.stats
            return stats.waiting + stats.running - before.waiting - before.running

        until(lambda: taken() == len(contents))
        return futures

    def get(self, place: str) -> httpx.Response:
        return httpx.get(f"{self.url}/{place}", timeout=60)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


@pytest.fixture
def running(loaded: tuple[Any, Any], gate: Gate) -> Iterator[Running]:
    running = Running(loaded)
    yield running
    gate.remove()
    running.stop()


def right(response: httpx.Response, judge: tuple[Any, Any], number: int = 0, length: int = 50) -> bool:
    """Whether a response has what the question gets alone."""
    one, found = ASKED[number], response.json()
    expected = alone(*judge, SPEC, [one.image], one.question, max_new_tokens=length)
    return response.status_code == 200 and (found["text"], found["new_tokens"], found["places"]) == expected


def stream(url: str, content: dict[str, Any], *, leave: bool = False) -> list[tuple[str, Any]]:
    """The events of a stream; with `leave` the client closes it after the first one."""

    async def read() -> list[tuple[str, Any]]:
        sent = {**content, "stream": True}
        async with (
            httpx.AsyncClient(timeout=60) as http,
            http.stream("POST", f"{url}/answer", json=sent) as response,
        ):
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            found = []
            async for one in benchmark.events(response):
                found.append(one)
                if leave:
                    break
            return found

    return asyncio.run(read())


def test_48_requests_of_several_specs_streams_and_clients_that_go_with_the_command_itself() -> None:
    tasks = benchmark.make_tasks(30)
    with benchmark.service("--max-batch", "4") as url:
        tally = asyncio.run(benchmark.load(url, tasks, 48, clients=8))
        after = benchmark.drained(url)
    assert tally.problems == []
    assert tally.outcomes.total() == 48 and not {"wrong", "failed"} & tally.outcomes.keys()
    assert tally.outcomes["right"] >= 42 and len(tally.first_texts) >= 12 and max(tally.sizes) > 1
    assert 42 <= after['trio_requests_total{outcome="answered"}'] <= 48
    assert after["trio_waiting_requests"] == after["trio_running_requests"] == 0
    assert not [name for name in after if "failed" in name or "refused" in name or 'status="5' in name]


def test_the_load_knows_a_wrong_answer(running: Running) -> None:
    """An answer of another task, another count of tokens, a place too many: each is seen."""
    (task,) = benchmark.make_tasks(1)
    for name, value in (("text", "nothing"), ("new_tokens", 99), ("places", [[1]]), ("spec", "another")):
        wrong = benchmark.LoadTask(task.body, {**task.expected, name: value})
        tally = asyncio.run(benchmark.load(running.url, [wrong], 1, clients=1))
        assert tally.outcomes == {"wrong": 1} and name in tally.problems[0]
    tally = asyncio.run(benchmark.load(running.url, [benchmark.LoadTask({"question": ""}, {})], 1, clients=1))
    assert tally.outcomes == {"failed": 1}


def test_an_answer_says_what_it_took(running: Running, judge: tuple[Any, Any]) -> None:
    response = running.ask()
    assert right(response, judge)
    found = response.json()
    assert found["spec"] == SPEC and found["visual_tokens"] == 144 and 0 < found["kept"] < 144
    assert found["batch_size"] == 1 and 0 <= found["waited"] <= found["seconds"]
    assert "places" not in running.ask(body(places=False)).json()
    text_only = running.ask({"question": "what is it ?"}).json()
    assert text_only["visual_tokens"] == text_only["kept"] == 0


def test_a_stream_ends_with_the_answer(running: Running, judge: tuple[Any, Any]) -> None:
    found = stream(running.url, body(3))
    assert [kind for kind, _ in found[:-1]] == ["text"] * (len(found) - 1) and found[-1][0] == "answer"
    assert "".join(data["text"] for _, data in found[:-1]) == found[-1][1]["text"]
    one = ASKED[3]
    expected = alone(*judge, SPEC, [one.image], one.question, max_new_tokens=50)
    assert (found[-1][1]["text"], found[-1][1]["new_tokens"], found[-1][1]["places"]) == expected


NOISE = Image.frombytes("RGB", (180, 180), random.Random(0).randbytes(180 * 180 * 3))
WRONG: dict[str, tuple[Any, int, str]] = {
    "no JSON": ("{", 422, "request: .*; give a JSON object with question, images"),
    "no object": ([1], 422, "give a JSON object"),
    "unknown key": (body(seed=1), 422, r"request\.seed: "),
    "no question": ({"images": []}, 422, r"request\.question: Field required; give text"),
    "a number as question": (body(question=3), 422, r"request\.question: .* valid string; give text"),
    "an empty question": (body(question="  "), 422, r"request\.question: it is empty"),
    "a long question": (body(question="a" * 201), 422, r"request\.question: found 201 characters; at most 200"),
    "a special token": (body(question="<image> ?"), 422, "found '<image>'"),
    "a long answer": (body(max_new_tokens=51), 422, r"request\.max_new_tokens: found 51 tokens; at most 50"),
    "no answer": (body(max_new_tokens=0), 422, "found 0; give a number from 1"),
    "many images": (body(images=[encoded(ASKED[0].image)] * 3), 422, r"request\.images: found 3 images; at most 2"),
    "no base64": (body(images=["file:///etc/passwd"]), 422, r"request\.images\[0\]: this is not base64"),
    "no image": (
        body(images=[base64.b64encode(b"hello").decode()]),
        422,
        r"images\[0\]: not an image that can be read",
    ),
    "a damaged image": (body(images=[encoded(NOISE)[:9000]]), 422, r"request\.images\[0\]: cannot be read .*damaged"),
    "a large file": (body(images=[encoded(NOISE)]), 422, r"request\.images\[0\]: found \d+,\d+ bytes; at most 60,000"),
    "many pixels": (
        body(images=[encoded(Image.new("RGB", (201, 200)))]),
        422,
        r"request\.images\[0\]: more than 40,000 pixels; scale it down",
    ),
    "PostScript": (body(images=[encoded(Image.new("RGB", (9, 9)), "EPS")]), 422, "not an image that can be read"),
    "a large body": ({"question": "a" * 300_000}, 413, "its body has more than .* bytes"),
    "an unknown spec": (body(spec="trio-12"), 422, r"request\.spec: found 'trio-12'; allowed are .*, trio-11, "),
    "a wrong spec": (body(spec={"version": 1, "stages": [{"after_layer": 1}]}), 422, r"stages\[0\]\.keep: missing"),
    "a spec for another model": (
        body(spec={"version": 1, "stages": [{"after_layer": 99, "keep": 9}]}),
        422,
        r"stages\[0\]\.after_layer",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(running: Running, judge: tuple[Any, Any], name: str) -> None:
    content, status, message = WRONG[name]
    options = {"headers": {"content-type": "application/json"}}
    with httpx.Client(base_url=running.url, timeout=60) as http:
        raw = content if isinstance(content, str) else json.dumps(content)
        response = http.post("/answer", content=raw, **options)
        assert response.status_code == status, response.text
        error = response.json()["error"]
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(error["message"])
        assert error["type"].endswith("Error")
        assert right(http.post("/answer", json=body()), judge)
    assert f'trio_responses_total{{status="{status}"}} 1\n' in running.get("metrics").text
    assert "trio_open_requests 0\n" in running.get("metrics").text


def test_a_body_of_unknown_length_is_not_read_beyond_its_limit(running: Running) -> None:
    sent = []

    def parts() -> Iterator[bytes]:
        for _ in range(4000):
            sent.append(2**16)
            yield b"a" * 2**16

    try:
        response = httpx.post(f"{running.url}/answer", content=parts(), headers={"content-type": "application/json"})
        assert response.status_code == 413
    except httpx.TransportError:  # closed by the service while this end still writes
        pass
    assert len(sent) < 1000
    until(lambda: 'trio_responses_total{status="413"} 1\n' in running.get("metrics").text)


def test_a_page_in_a_browser_cannot_ask(running: Running) -> None:
    """Without a preflight, which nothing answers, a browser sends no JSON to another origin."""
    assert running.ask(headers={"content-type": "text/plain"}).status_code == 422
    assert httpx.options(f"{running.url}/answer").status_code == 405


def test_no_file_is_read_for_a_client(running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("version: 1\nname: secret\nstages: [{after_layer: 1, keep: 9}]\n")
    monkeypatch.chdir(tmp_path)
    for spec in (str(file), "mine.yaml", "./mine.yaml", "../mine", "file://mine.yaml"):
        response = running.ask(body(spec=spec))
        assert response.status_code == 422 and "secret" not in response.text
        assert response.json()["error"]["type"] == "UnknownNameError"
    for place in ("docs", "openapi.json", "redoc", "", "static", "..%2f..%2fetc%2fpasswd", "mine.yaml"):
        assert running.get(place).status_code == 404


def test_only_the_specs_that_are_allowed(loaded: tuple[Any, Any], gate: Gate) -> None:
    running = Running(loaded, allowed={"trio-soft-33": trio.load_spec("trio-soft-33")})
    try:
        assert running.ask(body(spec="trio-soft-33")).json()["spec"] == "trio-soft-33"
        assert running.ask().json()["spec"] == SPEC  # nobody named it
        for spec in ("trio-11", {"version": 1, "compressor": {"name": "divprune", "keep": 9}}):
            response = running.ask(body(spec=spec))
            assert response.status_code == 422
            assert response.json()["error"]["message"].endswith("allowed are trio-soft-33.")
    finally:
        running.stop()


def test_a_full_queue_says_when_to_come_back(running: Running, judge: tuple[Any, Any], gate: Gate) -> None:
    with gate.shut():
        held = running.asks(body())
        held += running.asks(body(1), body(2), body(3))
        for content in (body(), body(stream=True)):
            response = running.ask(content)
            assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["message"].startswith("request: 3 requests wait")
        assert running.get("health").json() == {"healthy": True, "spec": SPEC, "waiting": 3, "running": 1}
    for number, future in enumerate(held):
        assert right(future.result(), judge, number)


def test_no_more_bodies_are_read_than_requests_may_be_open(running: Running, judge: tuple[Any, Any]) -> None:
    """Seven clients that send a head and no body: three may wait, two run, two more are read."""
    host, port = running.url.removeprefix("http://").split(":")
    head = b"POST /answer HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n"
    clients = [socket.create_connection((host, int(port))) for _ in range(7)]
    for client in clients:
        client.sendall(head)
    until(lambda: running.service.open == 7)
    response = running.ask()
    assert response.status_code == 429 and "7 requests are open" in response.json()["error"]["message"]
    for client in clients:
        client.close()
    until(lambda: running.service.open == 0)
    assert right(running.ask(), judge)


def test_a_client_that_goes_while_it_waits_is_not_asked(running: Running, judge: tuple[Any, Any], gate: Gate) -> None:
    with gate.shut():
        held = running.asks(body())
        for content in (body(1), body(1, stream=True)):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{running.url}/answer", json=content, timeout=1)
        until(lambda: running.batcher.stats.outcomes["cancelled"] == 2)
        assert running.batcher.stats.waiting == 0
        held += running.asks(body(2))
    assert all(right(future.result(), judge, number) for number, future in zip((0, 2), held, strict=True))
    assert running.batcher.stats.batches == {1: 2}
    until(lambda: 'trio_responses_total{status="499"} 2\n' in running.get("metrics").text)


def test_a_client_that_goes_in_its_stream_ends_its_part_alone(
    running: Running, loaded: tuple[Any, Any], judge: tuple[Any, Any], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model, _ in (loaded, judge):
        monkeypatch.setattr(model.generation_config, "suppress_tokens", [model.generation_config.eos_token_id])
    slow = loaded[0].register_forward_hook(lambda *_: time.sleep(0.02))
    with gate.shut():
        running.asks(body())[0].add_done_callback(lambda _: None)
        leaving = running.pool.submit(stream, running.url, body(1, max_new_tokens=50), leave=True)
        until(lambda: running.batcher.stats.waiting == 1)
        (staying,) = running.asks(body(2, max_new_tokens=45))
    assert leaving.result()[0][0] == "text"
    until(lambda: running.batcher.stats.outcomes["cancelled"] == 1)
    assert not staying.done()
    response = staying.result()
    slow.remove()
    assert response.json()["batch_size"] == 2 and right(response, judge, 2, 45)
    until(lambda: running.service.open == 0)


def test_a_request_that_is_late_is_told_so(loaded: tuple[Any, Any], judge: tuple[Any, Any], gate: Gate) -> None:
    running = Running(loaded, Limits(seconds=0.5))
    try:
        with gate.shut():
            response = running.ask()
            assert response.status_code == 504
            message = "request: there is no answer within 0.5 seconds; ask for a shorter one, or later."
            assert response.json() == {"error": {"type": "LateError", "message": message}}
            assert stream(running.url, body()) == [("error", response.json())]
            until(lambda: running.batcher.stats.outcomes["cancelled"] == 2)
            with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2]))) as slow:
                slow.sendall(b"POST /answer HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
                slow.sendall(b"content-length: 100\r\n\r\n{")
                assert slow.recv(100).startswith(b"HTTP/1.1 504 ")  # a body that does not come
        assert right(running.ask(body(max_new_tokens=8)), judge, length=8)
    finally:
        gate.remove()
        running.stop()


def test_an_error_of_the_service_keeps_its_text(
    running: Running, loaded: tuple[Any, Any], judge: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**kwargs: Any) -> None:
        raise RuntimeError("/home/somebody/secret")

    monkeypatch.setattr(loaded[0], "generate", fail)
    response, events = running.ask(), stream(running.url, body())
    assert response.status_code == 500 and events == [("error", response.json())]
    assert "secret" not in response.text and "log says why" in response.text
    assert running.get("health").status_code == 503
    monkeypatch.undo()
    assert right(running.ask(), judge)
    assert running.get("health").status_code == 200


def test_requests_in_flight_are_answered_when_the_service_ends(
    loaded: tuple[Any, Any], judge: tuple[Any, Any], gate: Gate
) -> None:
    running = Running(loaded)
    with gate.shut():
        held = running.asks(body(0))
        held += running.asks(body(1), body(2), body(3))
        running.server.should_exit = True
        until(lambda: not running.server.servers or not running.server.servers[0].is_serving())
        with pytest.raises(httpx.TransportError):
            running.ask()
    assert all(right(future.result(), judge, number) for number, future in enumerate(held))
    running.stop()
    assert not running.batcher.healthy
    with pytest.raises(trio.BusyError, match="shutting down"):
        running.batcher.submit(running.service.parse(json.dumps(body()).encode(), lambda _: None)[1])


def test_what_no_client_hears_is_not_the_end_of_the_service(running: Running, judge: tuple[Any, Any]) -> None:
    """Clients that close at once, and those that send no HTTP."""
    host, port = running.url.removeprefix("http://").split(":")
    for raw in (b"", b"nonsense\r\n\r\n", b"POST /answer HTTP/1.1\r\nhost: x\r\ncontent-length: ten\r\n\r\n"):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(raw)
    assert right(running.ask(), judge)
    assert running.service.open == 0


def test_it_listens_on_the_loopback_interface() -> None:
    assert inspect.signature(main).parameters["host"].default == "127.0.0.1"


def test_the_page_shows_what_was_measured() -> None:
    data = json.loads(benchmark.RESULT.read_text())
    assert benchmark.table(data) in benchmark.PAGE.read_text(encoding="utf-8")
    assert data["requests"] == 2000 and data["clients"] == 16
    for found in data["services"].values():
        assert sum(found["outcomes"].values()) == 2000 and not {"wrong", "failed"} & found["outcomes"].keys()
        assert found["service_outcomes"].keys() <= {"answered", "cancelled"}
