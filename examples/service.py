"""An HTTP service over one model: a spec for each request, answered in batches, as JSON or as a stream of events.

    python examples/service.py --model tiny-llava --spec trio-soft-11 --port 8000

`POST /answer` takes `{"question": ..., "images": [BASE64, ...], "spec": ..., "max_new_tokens": ..., "stream": ...}`;
`GET /health` and `GET /metrics` are for whoever runs it. There is no authentication and no TLS: it listens on the
loopback interface, behind a proxy that has both. docs/serving.md says more.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect

import trio
from trio import batch
from trio.batch.stats import by_label, metric
from trio.core.images import WEB_FORMATS, decode_image
from trio.errors import (
    BudgetError,
    BusyError,
    InputError,
    SpecError,
    TrioError,
    UnknownNameError,
    UnsupportedModelError,
)
from trio.spec import PipelineSpec, shipped_specs
from trio.zoo.checkpoint import load_model

LOG = logging.getLogger("uvicorn.error")


class TooLargeError(TrioError):
    """The body of a request is larger than it may be."""


class LateError(TrioError):
    """There is no answer in the time that a request has."""


#: The status of an error, by the first class that it is of; everything else is 500.
STATUS: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], int], ...] = (
    (TooLargeError, 413),
    (batch.QueueFullError, 429),
    (BusyError, 503),
    (LateError, 504),
    ((InputError, SpecError, UnknownNameError, UnsupportedModelError, BudgetError), 422),
)
CLIENT_GONE = 499  # nobody reads it; it is counted


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. Memory is at most open requests x images x pixels x 3 bytes, and the bodies.

    Attributes:
        images: number of images.
        image_bytes: of one image file.
        pixels: width times height of one image.
        question: characters.
        new_tokens: longest answer.
        seconds: from the first byte of the request to the last of the answer.
    """

    images: int = 4
    image_bytes: int = 8 * 2**20
    pixels: int = 8_000_000
    question: int = 4_000
    new_tokens: int = 512
    seconds: float = 60.0

    @property
    def body(self) -> int:
        """Bytes of a body: the images in base64, the question in JSON escapes, and 64 KiB for the rest."""
        return self.images * (self.image_bytes * 4 // 3 + 4) + 12 * self.question + 2**16


class Body(BaseModel):
    """What a client sends. A description says what is allowed."""

    model_config = ConfigDict(extra="forbid", strict=True)

    question: str = Field(description="text")
    images: list[str] = Field(default=[], description="a list of PNG, JPEG or WebP files in base64")
    spec: str | dict[str, Any] | None = Field(default=None, description="the name of a spec, or a spec as an object")
    max_new_tokens: int | None = Field(default=None, description="a whole number")
    stream: bool = Field(default=False, description="true or false")
    places: bool = Field(default=False, description="true or false")

    @classmethod
    def read(cls, data: bytes) -> Body:
        """Reads JSON; the first thing that is wrong with it is an `InputError`."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            field = str(first["loc"][0]) if first["loc"] else ""
            known = cls.model_fields.get(field)
            allowed = known.description if known else f"a JSON object with {', '.join(cls.model_fields)}"
            place = f"request.{field[:40]}" if field else "request"
            raise InputError(f"{place}: {first['msg']}; give {allowed}.") from None


@dataclass(frozen=True)
class Call:
    """A request that is answered.

    Attributes:
        future: of its answer.
        pieces: text of the answer as it comes, and None at its end.
        deadline: by the loop's clock.
        gone: done when the client has closed the connection, which cancels the future.
    """

    future: Future[batch.PromptAnswer]
    pieces: asyncio.Queue[str | None]
    deadline: float
    gone: asyncio.Task[None]


class Service:
    """A batcher behind HTTP: reads requests within limits, waits for answers, and gives up those nobody waits for."""

    def __init__(
        self, batcher: batch.DynamicBatcher, limits: Limits, allowed: Mapping[str, PipelineSpec] | None = None
    ) -> None:
        """Binds a batcher.

        Args:
            batcher: closed when the service ends.
            limits: of a request.
            allowed: the specs that clients may name; None: those that are shipped, and any that a client writes out.
        """
        self.batcher, self.limits = batcher, limits
        self.own_specs = allowed is None
        self.specs = {name: trio.load_spec(name) for name in shipped_specs()} if allowed is None else dict(allowed)
        self.max_open = batcher.max_queue + 2 * batcher.max_batch
        self.open = 0  # requests that are read, wait or run
        self.statuses: Counter[int] = Counter()

    # One request

    async def answer(self, http: Request) -> Response:
        """Answers a request as JSON or as events.

        Raises:
            TrioError: what is wrong with the request, or why it cannot be answered now.
        """
        loop = asyncio.get_running_loop()
        deadline, coming = loop.time() + self.limits.seconds, asyncio.Queue[str | None]()

        def tell(piece: str | None) -> None:  # in the batcher's thread
            loop.call_soon_threadsafe(coming.put_nowait, piece)

        if self.open >= self.max_open:
            raise batch.QueueFullError(
                f"request: {self.max_open} requests are open, and no more may be; send it again later."
            )
        self.open += 1
        try:
            async with asyncio.timeout_at(deadline):
                body, asked = await asyncio.to_thread(self.parse, await self.read(http), tell)
            future = self.batcher.submit(asked)
        except BaseException as error:
            self.open -= 1
            if isinstance(error, TimeoutError) and not isinstance(error, TrioError):
                raise self.late() from None
            raise
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self.leave))
        future.add_done_callback(lambda _: tell(None))
        gone = asyncio.create_task(until_gone(http))
        gone.add_done_callback(lambda _: future.cancel())
        call = Call(future, coming, deadline, gone)
        if body.stream:
            return StreamingResponse(self.events(call, body), media_type="text/event-stream")
        async with aclosing(self.pieces(call)) as pieces:
            async for _ in pieces:
                pass
        if future.cancelled():
            return self.count(Response(status_code=CLIENT_GONE))
        return self.count(JSONResponse(content_of(future.result(), body)))

    async def read(self, http: Request) -> bytes:
        """The body, of which not more is read than it may have."""
        if http.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise InputError("request: its content type is another; send application/json.")
        too_large = TooLargeError(f"request: its body has more than {self.limits.body:,} bytes; send smaller images.")
        if int(http.headers.get("content-length", 0)) > self.limits.body:
            raise too_large
        data = bytearray()
        async for part in http.stream():
            data += part
            if len(data) > self.limits.body:
                raise too_large
        return bytes(data)

    def parse(self, data: bytes, tell: Callable[[str], None]) -> tuple[Body, batch.PromptRequest]:
        """A request within the limits, with its images decoded."""
        body, limits = Body.read(data), self.limits
        for name, found, most, unit in (
            ("images", len(body.images), limits.images, "images"),
            ("question", len(body.question), limits.question, "characters"),
            ("max_new_tokens", body.max_new_tokens or 0, limits.new_tokens, "tokens"),
        ):
            if found > most:
                raise InputError(f"request.{name}: found {found:,} {unit}; at most {most:,} are allowed, ask for less.")
        images = []
        for number, text in enumerate(body.images):
            place = f"request.images[{number}]"
            try:
                file = base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError):
                raise InputError(
                    f"{place}: this is not base64; encode the bytes of the file, and nothing else."
                ) from None
            if len(file) > limits.image_bytes:
                raise InputError(f"{place}: found {len(file):,} bytes; at most {limits.image_bytes:,} are allowed.")
            images.append(decode_image(file, place, max_pixels=limits.pixels, formats=WEB_FORMATS))
        longest = min(64, limits.new_tokens) if body.max_new_tokens is None else body.max_new_tokens
        told = tell if body.stream else None
        asked = batch.PromptRequest(body.question, images, self.spec(body.spec), longest, on_text=told)
        self.batcher.check(asked)
        return body, asked

    def spec(self, given: str | dict[str, Any] | None) -> PipelineSpec | None:
        """The spec of a request. Text is a name and never a path: no file is read for a client."""
        if given is None or (isinstance(given, dict) and self.own_specs):
            return given if given is None else trio.load_spec(given)
        if isinstance(given, dict) or given not in self.specs:
            also = ", or a spec written out" if self.own_specs else ""
            found = "a spec written out" if isinstance(given, dict) else repr(given[:60])
            raise UnknownNameError(f"request.spec: found {found}; allowed are {', '.join(self.specs)}{also}.")
        return self.specs[given]

    async def pieces(self, call: Call) -> AsyncGenerator[str, None]:
        """Text of the answer as it comes; cancels what is late, and what nobody waits for.

        Raises:
            LateError: there is no answer in time.
        """
        try:
            while True:
                async with asyncio.timeout_at(call.deadline):
                    piece = await call.pieces.get()
                if piece is None:
                    return
                yield piece
        except TimeoutError:
            raise self.late() from None
        finally:
            call.gone.cancel()
            call.future.cancel()

    async def events(self, call: Call, body: Body) -> AsyncIterator[str]:
        """The answer as server-sent events: `text` for each piece, then `answer` or `error`."""
        status = CLIENT_GONE
        try:
            async with aclosing(self.pieces(call)) as pieces:
                async for piece in pieces:
                    yield event("text", {"text": piece})
            if not call.future.cancelled():
                last = event("answer", content_of(call.future.result(), body))
                status = 200
                yield last
        except Exception as error:
            status = status_of(error)
            yield event("error", error_content(error))
        finally:
            self.statuses[status] += 1

    # Around it

    def leave(self) -> None:
        """A request is over."""
        self.open -= 1

    def late(self) -> LateError:
        """There was no answer in time."""
        return LateError(
            f"request: there is no answer within {self.limits.seconds:g} seconds; ask for a shorter one, or later."
        )

    def count(self, response: Response) -> Response:
        """The same response, counted."""
        self.statuses[response.status_code] += 1
        return response

    async def failed(self, http: Request, error: Exception) -> Response:
        """An error as JSON; one that nobody raised on purpose is logged, and its text stays here."""
        status = CLIENT_GONE if isinstance(error, ClientDisconnect) else status_of(error)
        headers = {}
        if status in (429, 503):
            headers["Retry-After"] = str(max(1, math.ceil(self.batcher.stats.retry_after(self.batcher.max_batch))))
        elif status in (413, 504):
            headers["Connection"] = "close"  # the rest of a body is not read
        return self.count(JSONResponse(error_content(error), status, headers))

    async def health(self) -> Response:
        """200 while it can answer, else 503."""
        healthy, stats = self.batcher.healthy, self.batcher.stats
        content = {
            "healthy": healthy,
            "spec": self.batcher.spec.name,
            "waiting": stats.waiting,
            "running": stats.running,
        }
        return JSONResponse(content, 200 if healthy else 503)

    async def metrics(self) -> Response:
        """Counters in Prometheus' text format."""
        text = self.batcher.stats.prometheus() + metric("open_requests", "gauge", {"": self.open})
        text += metric("responses_total", "counter", by_label("status", self.statuses))
        text += f"# TYPE process_cpu_seconds_total counter\nprocess_cpu_seconds_total {time.process_time():.6g}\n"
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def until_gone(http: Request) -> None:
    """Until the client has closed the connection; its request was read before."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def content_of(answer: batch.PromptAnswer, body: Body) -> dict[str, Any]:
    """An answer as JSON; `places` only where the client asks for them."""
    content = asdict(answer)
    places = content.pop("kept_places")
    return {**content, "places": places} if body.places else content


def error_content(error: BaseException) -> dict[str, Any]:
    """An error as JSON."""
    if isinstance(error, TrioError):
        return {"error": {"type": type(error).__name__, "message": str(error)}}
    LOG.error("request: an error that nobody raised on purpose", exc_info=error)
    return {"error": {"type": "InternalError", "message": "request: the service failed; its log says why."}}


def status_of(error: BaseException) -> int:
    """The HTTP status of an error."""
    return next((status for kind, status in STATUS if isinstance(error, kind)), 500)


def event(name: str, content: Mapping[str, Any]) -> str:
    """A server-sent event."""
    return f"event: {name}\ndata: {json.dumps(content)}\n\n"


def make_app(service: Service) -> FastAPI:
    """The routes of a service; its batcher is closed when the app ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.batcher.close, service.limits.seconds)

    app = FastAPI(title="trio", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_api_route("/answer", service.answer, methods=["POST"])
    app.add_api_route("/health", service.health, methods=["GET"])
    app.add_api_route("/metrics", service.metrics, methods=["GET"])
    for kind in (TrioError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, service.failed)
    return app


def main(
    model: Annotated[str, typer.Option(help="Zoo model, folder or hub name.")] = "tiny-llava",
    spec: Annotated[
        str, typer.Option(help="Of requests that name none: a shipped spec or a YAML file.")
    ] = "trio-soft-11",
    allow: Annotated[list[str] | None, typer.Option(help="Spec that clients may name; no others, if given.")] = None,
    host: Annotated[str, typer.Option(help="Interface; other machines reach only another one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    max_batch: Annotated[int, typer.Option(min=1, help="Most requests in a batch.")] = 8,
    max_wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for others with the same spec.")] = 0.01,
    max_queue: Annotated[int, typer.Option(min=1, help="Most requests that wait.")] = 64,
    images: Annotated[int, typer.Option(min=0, help="Images of a request.")] = Limits.images,
    image_bytes: Annotated[int, typer.Option(min=1, help="Bytes of an image file.")] = Limits.image_bytes,
    pixels: Annotated[int, typer.Option(min=1, help="Pixels of an image.")] = Limits.pixels,
    question: Annotated[int, typer.Option(min=1, help="Characters of a question.")] = Limits.question,
    new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = Limits.new_tokens,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time of a request.")] = Limits.seconds,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> None:
    """Serves one model until it is interrupted."""
    default = trio.load_spec(spec)
    allowed = {one.name: one for one in map(trio.load_spec, allow)} if allow else None
    network, processor = load_model(model, dtype=dtype, device=device)
    batcher = batch.DynamicBatcher(
        network, processor, default, max_batch=max_batch, max_wait=max_wait, max_queue=max_queue
    )
    limits = Limits(images, image_bytes, pixels, question, new_tokens, seconds)
    app = make_app(Service(batcher, limits, allowed))
    uvicorn.run(
        app, host=host, port=port, access_log=False, server_header=False, timeout_graceful_shutdown=math.ceil(seconds)
    )


if __name__ == "__main__":
    typer.run(main)
