"""Parts by name: one generic registry; those that the package uses stand beside the base classes of their parts.

A part is found by name in this order: what was registered with the decorator in this process, the built-in modules
(imported at the first look-up), the entry points of third-party distributions (loaded only when asked for by name).
This module imports neither torch nor pydantic.
"""

from __future__ import annotations

import fnmatch
import importlib
import pkgutil
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Generic, TypeVar, cast

from .errors import InputError, PluginError, SpecError, UnknownNameError, did_you_mean

__all__ = ["Parameter", "PartInfo", "Registry", "registry_of"]

#: Where the registry of each kind of part stands: beside its base class, which is imported when it is first needed.
HOMES = {
    "scorer": (".scorers.base", "SCORERS"),
    "selector": (".selectors.base", "SELECTORS"),
    "compressor": (".encoders.compressors.base", "COMPRESSORS"),
    "tower": (".encoders.towers.base", "TOWERS"),
    "adapter": (".adapters.base", "ADAPTERS"),
}

T = TypeVar("T")
S = TypeVar("S")

_NAME = re.compile(r"[a-z0-9]+(?:[.-][a-z0-9]+)*")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a part: its name, type as text, default as text (None: required) and description."""

    name: str
    type: str
    default: str | None
    description: str


@dataclass(frozen=True)
class PartInfo:
    """What a listing shows of a part.

    Attributes:
        name: the registered name.
        kind: "scorer", "selector", "compressor", "adapter" or "tower".
        aliases: other names that find it.
        source: "trio", the distribution and version of a plugin, or the module that registered it.
        summary: first line of its docstring.
        parameters: its parameters, in the order of the class.
        broken: why a plugin could not be loaded; empty for a part that works.
    """

    name: str
    kind: str
    aliases: tuple[str, ...] = ()
    source: str = "trio"
    summary: str = ""
    parameters: tuple[Parameter, ...] = field(default=())
    broken: str = ""


class Registry(Generic[T]):
    """The parts of one kind, by name.

    Args:
        kind: what the parts are called in messages, for example "scorer".
        base: the class that every part of this kind derives from.
        builtin: package whose modules (those without a leading underscore) hold the built-in parts; by default that of
            the base class.
        group: entry-point group through which third-party distributions offer parts; by default "trio." and the kind's
            plural.
    """

    def __init__(self, kind: str, base: Any, *, builtin: str | None = None, group: str | None = None) -> None:
        """Store where the parts are to be found; nothing is imported."""
        self.kind = kind
        self.group = f"trio.{kind}s" if group is None else group
        self.base: Any = base
        self._builtin: str = base.__module__.rpartition(".")[0] if builtin is None else builtin
        self._parts: dict[str, type[T]] = {}
        self._aliases: dict[str, str] = {}
        self._sources: dict[str, str] = {}
        self._loaded = False
        self._loading_plugin: str | None = None
        self._lock = threading.RLock()

    @property
    def _base_name(self) -> str:
        return f"{self.base.__module__}.{self.base.__qualname__}"

    def register(self, name: str, *, aliases: Sequence[str] = ()) -> Callable[[type[S]], type[S]]:
        """Class decorator that registers a part under `name` and `aliases` and returns the class unchanged.

        Raises:
            InputError: the name is malformed, is taken by another class, or the class has the wrong base.
        """

        def decorate(cls: type[S]) -> type[S]:
            self._add(name, aliases, cast("type[T]", cls))
            return cls

        return decorate

    def _add(self, name: str, aliases: Sequence[str], cls: type[T]) -> None:
        if not isinstance(cls, type) or not issubclass(cls, self.base):
            raise InputError(
                f"{self.kind} {name!r}: {cls!r} is not a subclass of {self._base_name}; derive it from "
                "that class before registering it."
            )
        with self._lock:
            for one in (name, *aliases):
                if not _NAME.fullmatch(one):
                    raise InputError(
                        f"{self.kind} name {one!r}: only lower-case letters, digits, '-' and '.' are allowed, as in "
                        "'last-token-attention'; rename it."
                    )
                holder = self._parts.get(self._aliases.get(one, one))
                if holder is not None and holder is not cls and not _same_definition(holder, cls):
                    raise InputError(
                        f"{self.kind} name {one!r} is taken by {holder.__module__}.{holder.__qualname__}; register "
                        f"{cls.__module__}.{cls.__qualname__} under another name."
                    )
            self._parts[name] = cls
            self._aliases.update(dict.fromkeys(aliases, name))
            own = cls.__module__.startswith(f"{__package__}.")
            self._sources[name] = self._loading_plugin or ("trio" if own else cls.__module__)

    def _load_builtins(self) -> None:
        with self._lock:
            if self._loaded:
                return
            self._loaded = True  # before the imports: a module may look a name up while it is imported
            try:
                package = importlib.import_module(self._builtin)
                for module in pkgutil.iter_modules(package.__path__):
                    if not module.name.startswith("_"):
                        importlib.import_module(f"{self._builtin}.{module.name}")
            except BaseException:
                self._loaded = False
                raise

    def _entry_points(self) -> dict[str, list[metadata.EntryPoint]]:
        by_name: dict[str, list[metadata.EntryPoint]] = {}
        for point in metadata.entry_points(group=self.group):
            offers = by_name.setdefault(point.name, [])
            if all((point.value, _distribution(point)) != (other.value, _distribution(other)) for other in offers):
                offers.append(point)
        return by_name

    def get(self, name: str) -> type[T]:
        """The class registered under `name` or one of its aliases.

        Raises:
            UnknownNameError: nobody offers the name; the message suggests the nearest ones.
            PluginError: the name is a plugin's, and the plugin is broken.
        """
        with self._lock:
            part = self._parts.get(self._aliases.get(name, name))
            if part is None:
                self._load_builtins()
                part = self._parts.get(self._aliases.get(name, name))
            if part is not None:
                return part
            offers = self._entry_points().get(name)
            if offers:
                return self._load_plugin(name, offers)
        known = [*self.names(), *self._aliases]
        raise UnknownNameError(
            f"there is no {self.kind} {name!r}. {did_you_mean(str(name), known)}Known: {', '.join(self.names())}. "
            f"`trio list` shows them all; a plugin offers more through the entry-point group {self.group!r}."
        )

    def _load_plugin(self, name: str, offers: list[metadata.EntryPoint]) -> type[T]:
        if len(offers) > 1:
            distributions = " and ".join(_distribution(point) for point in offers)
            raise PluginError(f"{self.kind} {name!r} is offered by {distributions}; uninstall all but one of them.")
        (point,) = offers
        distribution = _distribution(point)
        self._loading_plugin = distribution
        try:
            loaded = point.load()
            if self._parts.get(name) is None:
                self._add(name, (), loaded)
        except Exception as error:
            raise PluginError(
                f"the plugin {distribution} offers the {self.kind} {name!r} as {point.value}, but loading it "
                f"failed with {type(error).__name__}: {error}. Update or uninstall {distribution}; everything else "
                "works without it."
            ) from error
        finally:
            self._loading_plugin = None
        return self._parts[name]

    def names(self, pattern: str = "*") -> list[str]:
        """The sorted names that match a shell-style pattern such as `"*visionzip*"`; plugins are not loaded for it."""
        with self._lock:
            self._load_builtins()
            return sorted(fnmatch.filter({*self._parts, *self._entry_points()}, pattern))

    def name_of(self, cls: type[Any]) -> str | None:
        """The name under which a class is registered, or None."""
        with self._lock:
            return next((name for name, known in self._parts.items() if known is cls), None)

    def describe(self, name: str) -> PartInfo:
        """Name, aliases, source, summary and parameters of a part; a broken plugin is described by its error.

        Raises:
            UnknownNameError: nobody offers the name.
        """
        try:
            cls = self.get(name)
        except PluginError as error:
            owners = ", ".join(_distribution(point) for point in self._entry_points().get(name, []))
            return PartInfo(name=name, kind=self.kind, source=owners, broken=str(error))
        name = self._aliases.get(name, name)
        return PartInfo(
            name=name,
            kind=self.kind,
            aliases=tuple(alias for alias, target in self._aliases.items() if target == name),
            source=self._sources[name],
            summary=(cls.__doc__ or "").strip().partition("\n")[0],
            parameters=tuple(_parameters(cls)),
        )

    def build(self, part: str | Mapping[str, Any] | Any | type[T] | T, **params: Any) -> T:
        """Make a part from a name, a mapping with `name` and parameters, a `PartSpec`, a class or a ready object.

        Args:
            part: what to make it from.
            params: parameters; they may not repeat those that a mapping holds, nor change a ready object.

        Raises:
            UnknownNameError: the name is not registered.
            SpecError: a parameter is unknown, missing or wrong.
            InputError: `part` is nothing that a part can be made from.
        """
        obj = getattr(part, "obj", None)  # a PartSpec that carries an object or a class instead of a name
        if obj is not None and not isinstance(part, self.base):
            return self.build(obj, **{**getattr(part, "params", {}), **params})
        if isinstance(part, str):
            return self._make(self.get(part), part, params)
        as_mapping = getattr(part, "as_mapping", None)  # a PartSpec that carries a name
        if as_mapping is not None and not isinstance(part, self.base):
            part = cast("Mapping[str, Any]", as_mapping())
        if isinstance(part, Mapping):
            given = dict(part)
            name = given.pop("name", None)
            if not isinstance(name, str):
                raise SpecError(f"{self.kind}: the name is missing; write for example {{name: {self._example()}}}.")
            for twice in given.keys() & params.keys():
                raise SpecError(f"{self.kind} {name!r}: the parameter {twice!r} is given twice; give it once.")
            return self._make(self.get(name), name, {**given, **params})
        if isinstance(part, type) and issubclass(part, self.base):
            return self._make(part, self.name_of(part) or part.__name__, params)
        if isinstance(part, self.base):
            if params:
                raise InputError(
                    f"{self.kind} {part!r} is a ready object and has its parameters; {', '.join(params)} cannot be "
                    "changed. Give the class, or make the object with them."
                )
            return cast("T", part)
        raise InputError(
            f"{self.kind}: found {part!r}; allowed are a registered name, a mapping with 'name', or a subclass or an "
            f"object of {self._base_name}."
        )

    def _example(self) -> str:
        return next(iter(self.names()), "...")

    def _make(self, cls: type[T], name: str, params: dict[str, Any]) -> T:
        from pydantic import ValidationError

        from .core.part import explain

        try:
            return cls(**params)
        except (SpecError, ValidationError) as error:
            cause = error if isinstance(error, ValidationError) else error.__cause__
            if not isinstance(cause, ValidationError):
                raise
            raise SpecError(explain(f"{self.kind} {name!r}", cls, cause)) from error


def _same_definition(old: type[Any], new: type[Any]) -> bool:
    """Whether a notebook cell (or a script's own module) was run again: same place, a new class object."""
    return old.__module__ == new.__module__ == "__main__" and old.__qualname__ == new.__qualname__


def _distribution(point: metadata.EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value.partition(":")[0]


def _parameters(cls: type[Any]) -> list[Parameter]:
    from .core.part import type_name

    return [
        Parameter(
            name,
            type_name(info.annotation),
            None if info.is_required() else repr(info.get_default(call_default_factory=True)),
            info.description or "",
        )
        for name, info in getattr(cls, "model_fields", {}).items()
    ]


def registry_of(kind: str) -> Registry[Any]:
    """The registry of a kind of part ("scorer", "selector", "compressor", "tower" or "adapter").

    Raises:
        InputError: there is no such kind.
    """
    if kind not in HOMES:
        raise InputError(f"registry: there is no kind {kind!r} of parts; the kinds are {', '.join(HOMES)}.")
    module, name = HOMES[kind]
    registry: Registry[Any] = getattr(importlib.import_module(module, __package__), name)
    return registry
