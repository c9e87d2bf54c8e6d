"""What a call costs an accelerator besides arithmetic: operators, copies from and to the host, and looks at values.

A model on the ``meta`` device stands for one on an accelerator: it has true shapes, but no memory and no values.
Operators are counted exactly. Where the host looks at values, it gets those that follow from the inputs (ids, masks,
grids of images: they are worked out beside the call), and stand-ins for all others.

    model = meta_model("llava-next-7b")
    inputs = meta_inputs("llava-next-7b", model)
    pipeline = answered(lambda: trio.Pipeline.from_spec("trio-soft-11", model))
    with torch.no_grad():
        stock = count(model, inputs)
        with pipeline:
            ours = count(model, inputs)
    print(ours.operators - stock.operators, ours.ours.waits)
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from ..core import transfer
from ..errors import InputError

#: Whose work an operator is; "model": the stock model's own.
Part = Literal["scoring", "selecting", "encoder", "bookkeeping", "model"]

ROOT = Path(transfer.__file__).resolve().parents[1]
#: Parts by the files that an operator comes from, the first that fits. Others of the package belong to their caller.
PARTS: Mapping[str, Part] = {
    "scorers/": "scoring",
    "selectors/": "selecting",
    "encoders/": "encoder",
    "runtime/encode": "encoder",
    "runtime/": "bookkeeping",
}
#: These stand between the stock model and the package, or pass calls on to the stock model.
BORDERS = ("runtime/methods.py", "core/hooking.py")
#: Folders whose lines are named as places.
PLACES = ("core/", "scorers/", "selectors/", "encoders/", "runtime/", "adapters/")

Made = TypeVar("Made")
META, CPU = torch.device("meta"), torch.device("cpu")
aten = torch.ops.aten
#: No kernel runs for these, though they are no views by their schemas.
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
#: Give the host a value, or a tensor of which the shape depends on values: the host waits.
LOOKS = {
    *("_local_scalar_dense", "equal", "allclose", "is_nonzero", "nonzero", "masked_select", "bincount"),
    *("_unique2", "unique_dim", "unique_consecutive"),
}
#: Results that are indices, by their number; where the values are not known, they keep the order, or are the first.
ORDERS = {"sort": 1, "topk": 1}
FIRSTS = {"argmax": 0, "argmin": 0, "max": 1, "min": 1}
#: Make a tensor of values on the host.
FROM_HOST = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
SOFTMAXES = (torch.softmax, torch.Tensor.softmax, torch.nn.functional.softmax)
#: Values of tensors with more elements are not worked out.
MOST_VALUES = 2**21
#: A loop that ends by values would never end on stand-ins.
MOST_LOOKS = 5_000


class Place(NamedTuple):
    """Where an operator comes from.

    Attributes:
        part: whose work it is.
        line: file and line of this package, such as ``trio/runtime/state.py:120``; empty for the stock model.
    """

    part: Part
    line: str


@dataclass(frozen=True)
class Counts:
    """Numbers of one call, or of one place in it.

    Attributes:
        operators: operators that run a kernel on the device, copies included; views and allocations do not.
        uploads: copies from the host to the device.
        waiting_uploads: those among them for which the host waits: all but those of `trio.core.transfer.upload`.
        downloads: copies from the device to the host.
        looks: operators that give the host a value (`item`, `equal`) or a shape that depends on values (`nonzero`).
    """

    operators: int = 0
    uploads: int = 0
    waiting_uploads: int = 0
    downloads: int = 0
    looks: int = 0

    @property
    def waits(self) -> int:
        """How often the host waits for the device."""
        return self.waiting_uploads + self.downloads + self.looks

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.operators + other.operators,
            self.uploads + other.uploads,
            self.waiting_uploads + other.waiting_uploads,
            self.downloads + other.downloads,
            self.looks + other.looks,
        )


@dataclass(frozen=True)
class Launches(Counts):
    """Numbers of one call, and the places where they arise.

    Attributes:
        by_place: the same numbers for each place, the sum of which they are.
    """

    by_place: Mapping[Place, Counts] = field(default_factory=dict)

    def of(self, part: Part) -> Counts:
        """The numbers of one part."""
        return sum((counts for place, counts in self.by_place.items() if place.part == part), Counts())

    @property
    def ours(self) -> Counts:
        """The numbers of all parts but the stock model."""
        return sum((counts for place, counts in self.by_place.items() if place.part != "model"), Counts())

    def lines(self, waits_only: bool = False) -> list[str]:
        """The lines of this package with their numbers, the most frequent first.

        Args:
            waits_only: name only lines at which the host waits.
        """
        rows = [
            (place, n) for place, n in self.by_place.items() if place.part != "model" and (n.waits or not waits_only)
        ]
        rows.sort(key=lambda row: (-row[1].waits, row[0].line) if waits_only else (-row[1].operators, row[0].line))
        return [f"{place.line} ({place.part}): {n.operators} operators, {n.waits} waits" for place, n in rows]


def count(
    call: Callable[..., object], inputs: Mapping[str, torch.Tensor] | None = None, *, warm_up: int = 0
) -> Launches:
    """Counts what a call would ask of an accelerator.

    Args:
        call: works on tensors of the ``meta`` device, and may work on the host besides. Scaled-dot-product attention
            counts as one operator, as its kernels on an accelerator do, where no gradient goes through it.
        inputs: what it is called with by name, on the host: it gets them on ``meta``, their values can be looked at.
            Bringing them there is not counted.
        warm_up: calls that are made before, and not counted: what is tried or kept at the first one is left out.

    Returns:
        The numbers of one call.

    Raises:
        InputError: the call looks at values so often that it waits for one that a stand-in never has.
    """
    with _Counter() as counter:
        there = {name: value.to(META) for name, value in (inputs or {}).items()}
        for _ in range(warm_up):
            call(**there)
        counter.begin()
        call(**there)
        return counter.launches()


def answered(call: Callable[[], Made]) -> Made:
    """The result of a call that looks at values on ``meta``: a pipeline is built so, since it tries its probes."""
    with _Counter():
        return call()


class _Counter:
    """Both modes at work: operators as torch dispatches them, and functions that dispatch nothing on ``meta``."""

    def __init__(self) -> None:
        self._found: dict[Place, list[int]] = defaultdict(lambda: [0] * 5)
        self._files: dict[CodeType, tuple[bool, Part | None, bool]] = {}
        self.values = _Values()
        self._modes = ExitStack()

    def __enter__(self) -> _Counter:
        self._modes.enter_context(_Operators(self))
        self._modes.enter_context(_Functions(self))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._modes.close()

    def begin(self) -> None:
        """Forgets what was counted so far."""
        self._found.clear()

    def launches(self) -> Launches:
        """What was counted."""
        by_place = {place: Counts(*numbers) for place, numbers in self._found.items()}
        total = sum(by_place.values(), Counts())
        return Launches(**vars(total), by_place=by_place)

    def note(self, *, operator: bool = True, uploads: int = 0, download: bool = False, look: bool = False) -> None:
        """Counts one operator at the place from which it was called."""
        place, helped = self._place(bool(uploads))
        numbers = self._found[place]
        for index, more in enumerate((operator, uploads, 0 if helped else uploads, download, look)):
            numbers[index] += int(more)
        if numbers[4] > MOST_LOOKS:
            raise InputError(
                f"counting launches: {place.line or 'the model'} looked at values {MOST_LOOKS} times; it waits for a "
                "value that stand-ins never have: bound its loop by a number that the host knows"
            )

    def _place(self, upload: bool) -> tuple[Place, bool]:
        """The place, and whether the helper for uploads is at work."""
        line, part, helped = "", None, False
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            named, owner, border = self._file(frame.f_code)
            if border and part is not None:
                break
            helped = helped or (upload and frame.f_code is transfer.upload.__code__)
            if border:
                line = ""
            elif not line and named:
                path = Path(frame.f_code.co_filename).resolve().relative_to(ROOT).as_posix()
                line = f"{ROOT.name}/{path}:{frame.f_lineno}"
            if not border and (part is None or owner == "encoder"):  # it calls selectors, and drops tokens
                part = owner
            frame = frame.f_back
        return Place(part or "model", line if part else ""), helped

    def _file(self, code: CodeType) -> tuple[bool, Part | None, bool]:
        """Whether a function's lines are named, whose work they are, and whether it is one of `BORDERS`."""
        known = self._files.get(code)
        if known is None:
            file = Path(code.co_filename)
            path = file.resolve().relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else ""
            part = next((part for prefix, part in PARTS.items() if path.startswith(prefix)), None)
            named = path.startswith(PLACES) and code is not transfer.upload.__code__
            known = self._files[code] = (named, part, path in BORDERS)
        return known


class _Functions(TorchFunctionMode):
    """What shows no operator on ``meta``, or other ones than on an accelerator."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
            needs_gradient = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
            if query.device == META and not needs_gradient:
                self._counter.note()
                batch, heads, length = query.shape[:3]
                # As kernels lay it out: heads side by side, so that joining them copies nothing.
                return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        if func in SOFTMAXES and kwargs.get("dtype") == torch.float32 and args[0].device == META:
            dim = kwargs["dim"] if "dim" in kwargs else args[1]
            if args[0].dtype in (torch.float16, torch.bfloat16):  # elsewhere copied in float32 first
                return torch._softmax(args[0], dim, True)
        if func in FROM_HOST:
            return self._from_host(func, args, kwargs)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].device == META:
            args = (args[0], _listless(args[1], args[0].device), *args[2:])
        return func(*args, **kwargs)

    def _from_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A tensor of values is made on the host and then copied."""
        source = args[1] if func is torch.Tensor.new_tensor else args[0]
        like = args[0] if func is torch.Tensor.new_tensor else None
        device = torch.device(kwargs.get("device") or (torch.get_default_device() if like is None else like.device))
        if device != META or isinstance(source, torch.Tensor):
            return func(*args, **kwargs)
        if like is not None:
            kwargs = {"dtype": like.dtype, **kwargs}
        source = tree_map(lambda one: one.item() if isinstance(one, torch.Tensor) else one, source)
        return torch.tensor(source, **{**kwargs, "device": CPU}).to(device)


def _listless(index: Any, device: torch.device) -> Any:
    """An index whose lists are tensors on the device: indexing makes and copies them."""
    if isinstance(index, tuple):
        return tuple(_listless(one, device) for one in index)
    return torch.tensor(index).to(device) if isinstance(index, list) else index


class _Operators(TorchDispatchMode):
    """Counts operators, and answers those that need values."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's constructor has no annotations
        self._counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, values = kwargs or {}, self._counter.values
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        there = [tensor for tensor in tensors if tensor.device == META]
        name = func._schema.name.removeprefix("aten::")
        if name == "copy_" and there:
            return self._copied(args[0], args[1])
        if name == "_to_copy" and tensors:
            target = torch.device(kwargs.get("device") or tensors[0].device)
            if there and target == CPU:
                self._counter.note(operator=True, download=True)
                return values.read(tensors[0]).to(kwargs.get("dtype") or tensors[0].dtype)
            if target == META and not there:
                if tensors[0].numel():  # of an empty tensor nothing is copied
                    self._counter.note(uploads=1)
                return values.keep(func(*args, **kwargs), tensors[0].to(kwargs.get("dtype") or tensors[0].dtype))
        if not there:
            out = func(*args, **kwargs)
            made = isinstance(out, torch.Tensor) and out.device == META
            if made and name not in ALLOCATIONS:
                self._counter.note()
                values.follow(func, args, kwargs, out, tensors)
            return out
        if name in LOOKS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self._counter.note(look=True)
            return values.answer(func, args, kwargs)
        if name == "index":
            args = (args[0], values.places(args[1], self._counter))
        if _is_view(func) or name in ALLOCATIONS:
            out = func(*args, **kwargs)
        else:
            # A tensor of the host among the arguments is copied first; a single number is passed on as it is.
            self._counter.note(uploads=sum(t.device == CPU and t.ndim > 0 for t in tensors))
            out = func(*tree_map(_on_meta, args), **tree_map(_on_meta, kwargs))
        if name not in ALLOCATIONS or name == "_unsafe_view":
            values.follow(func, args, kwargs, out, tensors)
        return out

    def _copied(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """`copy_`, between devices or within the one."""
        values = self._counter.values
        if target.device == CPU:
            self._counter.note(download=True)
            return target.copy_(values.read(source))
        self._counter.note(uploads=int(source.device == CPU and source.ndim > 0))
        known = source if source.device == CPU else values.known(source)
        own = values.known(target)
        if own is not None and known is not None:
            own.copy_(known)
        else:
            values.forget(target)
        return target


def _on_meta(leaf: Any) -> Any:
    """Tensors of the host with a dimension, as the device has them."""
    return leaf.to(META) if isinstance(leaf, torch.Tensor) and leaf.device == CPU and leaf.ndim else leaf


def _is_view(func: Any) -> bool:
    """Whether an output shares memory with an argument that is not written to."""
    return any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)


class _Values:
    """Values on the host of tensors on ``meta``, where they follow from values that were known."""

    def __init__(self) -> None:
        self._known: Any = WeakIdKeyDictionary()
        self._forgotten: dict[int, Any] = {}

    def known(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """A tensor's values, or None."""
        found: torch.Tensor | None = self._known.get(tensor)
        if found is None or found.untyped_storage().data_ptr() in self._forgotten:
            return None
        return found

    def keep(self, tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Keeps a tensor's values; returns the tensor."""
        if tensor.numel() <= MOST_VALUES:
            self._known[tensor] = values
        return tensor

    def forget(self, tensor: torch.Tensor) -> None:
        """Forgets the values of a tensor and of all that share its memory."""
        found = self._known.get(tensor)
        if found is not None:
            storage = found.untyped_storage()
            self._forgotten[storage.data_ptr()] = storage  # held, so that no other gets its address

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor's values, or stand-ins: True, 0.0, a single integer 1, of several each 0: a place that exists."""
        found = self.known(tensor)
        if found is not None:
            return found.clone()
        if tensor.dtype == torch.bool or (not tensor.ndim and not tensor.is_floating_point()):
            return torch.ones(tensor.shape, dtype=tensor.dtype)
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operator that needs values."""

        def on_host(leaf: Any) -> Any:
            return self.read(leaf) if isinstance(leaf, torch.Tensor) and leaf.device == META else leaf

        def on_device(leaf: Any) -> Any:
            return self.keep(leaf.to(META), leaf) if isinstance(leaf, torch.Tensor) else leaf

        return tree_map(on_device, func(*tree_map(on_host, args), **tree_map(on_host, kwargs)))

    def places(self, index: Sequence[torch.Tensor | None], counter: _Counter) -> list[torch.Tensor | None]:
        """An index with the places of what is True instead of masks: their number has to be looked at."""
        out: list[torch.Tensor | None] = []
        for one in index:
            if one is None or one.dtype not in (torch.bool, torch.uint8) or one.device != META:
                out.append(one)
                continue
            counter.note(look=True)
            out += [self.keep(place.to(META), place) for place in self.read(one).nonzero(as_tuple=True)]
        return out

    def follow(self, func: Any, args: Any, kwargs: Any, out: Any, tensors: list[torch.Tensor]) -> None:
        """Works out the values of a result where all arguments' are known."""
        written = [args[n] for n, one in enumerate(func._schema.arguments[: len(args)]) if _written(one)]
        outs = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, torch.Tensor) and leaf.device == META]
        if torch.Tag.nondeterministic_seeded in func.tags or not self._follows(tensors, outs):
            for tensor in written:
                self.forget(tensor)
            self._stand_in(func._schema.name.removeprefix("aten::"), args, kwargs, outs)
            return

        def on_host(leaf: Any) -> Any:
            return self._known[leaf] if isinstance(leaf, torch.Tensor) and leaf.device == META else leaf

        host = dict(tree_map(on_host, kwargs))
        if "device" in host:
            host["device"] = CPU
        result = None
        with suppress(RuntimeError, IndexError):  # there, the values are stand-ins that fit nothing
            result = func(*tree_map(on_host, args), **host)
        if result is None:
            for tensor in written:
                self.forget(tensor)
            return
        found = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, torch.Tensor)]
        for tensor, values in zip(outs, found, strict=True):
            self.keep(tensor, values)

    def _stand_in(self, name: str, args: Any, kwargs: Any, outs: list[torch.Tensor]) -> None:
        """Indices into tensors whose values nobody knows: such that are there."""
        number = ORDERS.get(name, FIRSTS.get(name))
        if number is None or len(outs) <= number or outs[number].is_floating_point():
            return
        index = outs[number]
        values = torch.zeros(index.shape, dtype=index.dtype)
        if name in ORDERS and index.ndim:
            place = 2 if name == "topk" else 1
            dim = kwargs.get("dim", args[place] if len(args) > place and not isinstance(args[place], bool) else -1)
            values = values.transpose(dim, -1) + torch.arange(index.shape[dim])
            values = values.transpose(dim, -1).contiguous()
        self.keep(index, values)

    def _follows(self, tensors: list[torch.Tensor], outs: list[torch.Tensor]) -> bool:
        if not outs or any(tensor.numel() > MOST_VALUES for tensor in outs):
            return False
        return all(tensor.device == CPU or self.known(tensor) is not None for tensor in tensors)


def _written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write
