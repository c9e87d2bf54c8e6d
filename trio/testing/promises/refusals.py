"""Promise 6, second part: what cannot work is refused by name, and the model is as before."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from ...core.upstream import (
    ASSISTANT,
    CACHE_KIND,
    CHUNK,
    EMBEDDINGS,
    LOOKUP,
    MASK,
    DynamicCache,
    Role,
    StaticCache,
    keywords,
)
from ...errors import AttachError, CacheError, InputError, TrioError
from ..bench import ONE, TEXT, Bench
from ..results import Case, require
from .identity import bitwise


def cases(bench: Bench) -> Iterator[Case]:
    """Ways of calling and of generating that cannot work with dropped tokens."""
    inputs = bench.inputs(ONE)

    def generate(**more: Any) -> Callable[[], object]:
        return lambda: bench.generate(inputs, **more)

    def forward(given: dict[str, Any], **more: Any) -> Callable[[], object]:
        return lambda: bench.forward({**given, **more})

    table: list[tuple[str, type[TrioError], str, Callable[[], object]]] = [
        ("chunked prefill", InputError, CHUNK, generate(**{CHUNK: 4})),
        ("static cache by name", InputError, "static", generate(**{CACHE_KIND: "static"})),
        ("static cache by object", CacheError, DynamicCache.__name__, lambda: _static(bench, inputs)),
        ("assisted decoding", InputError, ASSISTANT, generate(**{ASSISTANT: bench.inner})),
        ("prompt lookup", InputError, "prompt_lookup", generate(**{LOOKUP: 2})),
        ("labels", InputError, "labels", forward(inputs, labels=inputs["input_ids"])),
        ("pre-merged embeddings", InputError, EMBEDDINGS, lambda: _embeds(bench, inputs)),
        ("a second thread", InputError, "thread", lambda: _two_threads(bench, inputs)),
        ("attaching twice", AttachError, "attached", lambda: bench.pipeline().attach()),
        ("training mode", InputError, "train", lambda: _training(bench, inputs)),
    ]
    for name, error, says, action in table:
        yield name, partial(_refused, bench, error, says, action)
    yield "attaching in training mode", partial(_training_attach, bench)


def _refused(bench: Bench, error: type[TrioError], says: str, action: Callable[[], object]) -> str:
    inputs = bench.inputs(ONE)
    stock = bench.forward(inputs)
    with bench.pipeline():
        message = refusal(error, says, action)
    bitwise(bench.forward(inputs), stock)
    return message


def refusal(error: type[BaseException], says: str, action: Callable[[], object]) -> str:
    """The message of the error that an action raises.

    Raises:
        AssertionError: it raises another one or none, or the message does not name `says`.
    """
    try:
        action()
    except error as raised:
        message = str(raised)
        require(says in message, f"{type(raised).__name__} does not name {says!r}: {message}")
        return f"{type(raised).__name__}: {message}"
    except Exception as raised:
        raise AssertionError(f"expected {error.__name__}, found {type(raised).__name__}: {raised}") from raised
    raise AssertionError(f"expected {error.__name__}, but nothing was refused")


def _static(bench: Bench, inputs: dict[str, torch.Tensor]) -> None:
    cache = StaticCache(config=bench.adapter.text_config, max_cache_len=inputs["input_ids"].shape[1] + 8)
    with torch.no_grad():
        bench.model(**inputs, **keywords({Role.CACHE: cache, Role.USE_CACHE: True}))


def _embeds(bench: Bench, inputs: dict[str, torch.Tensor]) -> None:
    text = bench.inputs(TEXT)
    embeddings = bench.inner.get_input_embeddings()(text["input_ids"])  # type: ignore[operator]
    bench.forward({EMBEDDINGS: embeddings.detach(), MASK: text[MASK]})


def _training(bench: Bench, inputs: dict[str, torch.Tensor]) -> None:
    bench.inner.train()
    try:
        bench.forward(inputs)
    finally:
        bench.inner.eval()


def _training_attach(bench: Bench) -> str:
    pipeline = bench.pipeline()
    bench.inner.train()
    try:
        return refusal(AttachError, "eval()", pipeline.attach)
    finally:
        pipeline.detach()
        bench.inner.eval()


def _two_threads(bench: Bench, inputs: dict[str, torch.Tensor]) -> None:
    """Runs a forward here while another thread stands in the middle of one."""
    inside, done = threading.Event(), threading.Event()
    here = threading.get_ident()
    failed: list[BaseException] = []

    def waiting(module: nn.Module, args: Any) -> None:
        if threading.get_ident() != here:
            inside.set()
            done.wait(60)

    def other() -> None:
        try:
            bench.forward(inputs)
        except BaseException as error:  # told to the main thread
            failed.append(error)

    handle = bench.adapter.layers[-1].register_forward_pre_hook(waiting)
    thread = threading.Thread(target=other)
    try:
        thread.start()
        require(inside.wait(60), "the other thread did not come to the last layer")
        bench.forward(inputs)
    finally:
        done.set()
        thread.join()
        handle.remove()
        require(not failed, f"the first thread failed as well: {failed}")
