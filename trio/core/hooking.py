"""Hooks and method patches on other people's modules that can be found again, and that copies carry without effect."""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from torch import nn

#: Where torch keeps a module's hooks, with what it remembers of each hook beside them.
_FORWARD = ("_forward_pre_hooks", "_forward_hooks")
_BESIDE = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


class _Here(threading.local):
    """What is attached for one thread alone: torch.compile guards it by thread.

    Attributes:
        attached: whether it is.
    """

    attached: bool = False


class Owner:
    """Who puts hooks and patches on a model; they have an effect while it is attached, for all threads or for one."""

    def __init__(self, name: str = "") -> None:
        """An owner that is not attached yet; `name` is for messages."""
        self.name = name
        self.everywhere = False
        self._here = _Here()

    @property
    def attached(self) -> bool:
        """Whether it is attached, as this thread sees it."""
        return self.everywhere or self._here.attached

    @property
    def epoch(self) -> object:
        """An object that is another one after each `detach`, in all threads."""
        return self._here

    def attach(self, *, here: bool = False) -> None:
        """Attaches for all threads, or (`here`) for this one alone."""
        if here:
            self._here.attached = True
        else:
            self.everywhere = True

    def detach(self) -> None:
        """Ends the effect in all threads."""
        self.everywhere = False
        self._here = _Here()


class Hook:
    """A hook function with an owner.

    It holds its function weakly where that is a bound method, so that a hook keeps nobody alive. A copy of the module
    (deepcopy, pickle, torch.save) gets a hook that does nothing.
    """

    def __init__(self, function: Callable[..., Any] | None, *bound: Any, owner: Owner | None = None) -> None:
        """Wraps a function.

        Args:
            function: the hook; None: does nothing.
            bound: arguments in front of those of each call.
            owner: who puts it there.
        """
        self.owner = owner
        self._bound = bound
        method = function if isinstance(function, MethodType) else None
        # Not a WeakMethod, whose call torch.compile cannot trace.
        self._receiver: weakref.ref[Any] | None = None if method is None else weakref.ref(method.__self__)
        self._function: Callable[..., Any] | None = function if method is None else method.__func__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function, where it is still there and its owner attached."""
        if self.owner is None or not self.owner.attached or self._function is None:
            return None
        if self._receiver is None:
            return self._function(*self._bound, *args, **kwargs)
        receiver = self._receiver()
        return None if receiver is None else self._function(receiver, *self._bound, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        """A hook without effect."""
        return Hook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled hook comes back without effect."""
        return Hook, (None,)


def adopt(handle: Any, owner: Owner) -> Any:
    """Wraps a hook that stands on a module already, so that copies of the module carry it without effect.

    Args:
        handle: what torch gave when the hook was registered.
        owner: whose hook it becomes.

    Returns:
        The handle.
    """
    hooks = handle.hooks_dict_ref()
    if hooks is not None and handle.id in hooks and not isinstance(hooks[handle.id], Hook):
        wrapped = Hook(None, owner=owner)
        wrapped._function = hooks[handle.id]  # the tower's own, which nobody else holds: a method of it is not weak
        hooks[handle.id] = wrapped
    return handle


def hook_ids(model: nn.Module) -> set[tuple[int, int]]:
    """Every hook on a model's modules, by module and number."""
    return {(id(module), number) for module in model.modules() for name in _FORWARD for number in getattr(module, name)}


def remove_hooks(model: nn.Module, ours: Callable[[nn.Module, int, Any], bool]) -> None:
    """Takes hooks off a model, found by looking at every module: an interrupt may have come before a handle was kept.

    Args:
        model: the model.
        ours: says of a hook, from its module, its number and its function, whether to remove it.
    """
    for module in model.modules():
        for name in _FORWARD:
            hooks = getattr(module, name)
            for number in [number for number, hook in list(hooks.items()) if ours(module, number, hook)]:
                for beside in _BESIDE:
                    getattr(module, beside, {}).pop(number, None)
                hooks.pop(number, None)


_ABSENT = object()


class MethodPatch:
    """Stands in front of a bound method on one module instance; `remove` brings the method back.

    A copy of the module (deepcopy, pickle, torch.save) gets a patch that calls the copy's own method.
    """

    def __init__(self, module: nn.Module, name: str, *, owner: Owner) -> None:
        """Prepares a patch; nothing changes before `install`."""
        self.owner = owner
        self._module = module
        self._name = name
        self._before: Any = vars(module).get(name, _ABSENT)  # somebody else's patch, or nothing
        functools.update_wrapper(self, self._method, updated=())

    @property
    def _method(self) -> Callable[..., Any]:
        """The method in front of which this stands."""
        if self._before is not _ABSENT:
            before: Callable[..., Any] = self._before
            return before
        bound: Callable[..., Any] = getattr(type(self._module), self._name).__get__(self._module)
        return bound

    def install(self) -> None:
        """Puts the patch on the instance."""
        vars(self._module)[self._name] = self

    def remove(self) -> None:
        """Takes it off again; does nothing where something else stands there."""
        attributes = vars(self._module)
        if attributes.get(self._name) is not self:
            return
        if self._before is _ABSENT:
            del attributes[self._name]
        else:
            attributes[self._name] = self._before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the method."""
        return self._method(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodPatch:
        """A patch without effect on the copy of the module."""
        module = memo.get(id(self._module))
        if module is None:
            module = copy.deepcopy(self._module, memo)
        before = self._before if self._before is _ABSENT else copy.deepcopy(self._before, memo)
        return _inert(module, self._name, None if before is _ABSENT else before)

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled patch comes back without effect."""
        return _inert, (self._module, self._name, None if self._before is _ABSENT else self._before)


def _inert(module: nn.Module, name: str, before: Any) -> MethodPatch:
    patch = MethodPatch.__new__(MethodPatch)
    patch.owner, patch._module, patch._name = Owner(), module, name
    patch._before = _ABSENT if before is None else before
    functools.update_wrapper(patch, patch._method, updated=())
    return patch


def patches_on(model: nn.Module) -> Iterator[MethodPatch]:
    """The patches that stand on a model's modules."""
    for module in model.modules():
        yield from [value for value in list(vars(module).values()) if isinstance(value, MethodPatch)]
