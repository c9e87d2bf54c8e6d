"""trio: fewer visual tokens for vision-language models, on stock transformers.

The distribution is `trio-vlm`; `trio-vlm-alias` installs the same sources under the import name `trio_vlm`. `import
trio` imports nothing but the standard library: the public names are resolved when they are first used (PEP 562).
Libraries such as HTTP clients try `import trio` to find the async library of the same import name, so importing must be
instant and must never fail.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import cost, encoders, testing, zoo
    from .adapters.base import ADAPTERS, Adapter
    from .core.context import LayerContext, SelectionContext
    from .encoders.compressors.base import COMPRESSORS, Compressor
    from .encoders.towers.base import TOWERS, Tower
    from .errors import (
        AttachError,
        BudgetError,
        BusyError,
        CacheError,
        InputError,
        NonFiniteError,
        PluginError,
        SpecError,
        TrioError,
        UnknownNameError,
        UnsupportedModelError,
    )
    from .pipeline import Pipeline
    from .report import CompressionReport
    from .scorers.base import SCORERS, Scorer
    from .selectors.base import SELECTORS, Selector
    from .spec import Budget, CompressorSpec, Keep, PipelineSpec, StageSpec, load_spec
    from .spec import StageSpec as Stage

__version__ = "0.1.0"
#: What installed this package; each import name has a distribution of its own.
DISTRIBUTION = "trio-vlm" if __name__ == "trio" else "trio-vlm-alias"
#: The shipped spec that the commands use where none is named.
DEFAULT_SPEC = "trio-soft-11"

__all__ = [
    "ADAPTERS",
    "COMPRESSORS",
    "DEFAULT_SPEC",
    "SCORERS",
    "SELECTORS",
    "TOWERS",
    "Adapter",
    "AttachError",
    "Budget",
    "BudgetError",
    "BusyError",
    "CacheError",
    "CompressionReport",
    "Compressor",
    "CompressorSpec",
    "InputError",
    "Keep",
    "LayerContext",
    "NonFiniteError",
    "Pipeline",
    "PipelineSpec",
    "PluginError",
    "Scorer",
    "SelectionContext",
    "Selector",
    "SpecError",
    "Stage",
    "StageSpec",
    "Tower",
    "TrioError",
    "UnknownNameError",
    "UnsupportedModelError",
    "__version__",
    "cost",
    "encoders",
    "load_spec",
    "testing",
    "zoo",
]

# Public name -> "module:attribute"; a module alone is a public submodule.
_LAZY = {
    "Adapter": ".adapters.base:Adapter",
    "Compressor": ".encoders.compressors.base:Compressor",
    "LayerContext": ".core.context:LayerContext",
    "Pipeline": ".pipeline:Pipeline",
    "CompressionReport": ".report:CompressionReport",
    "Scorer": ".scorers.base:Scorer",
    "SelectionContext": ".core.context:SelectionContext",
    "Selector": ".selectors.base:Selector",
    "Stage": ".spec:StageSpec",
    "Tower": ".encoders.towers.base:Tower",
    "ADAPTERS": ".adapters.base:ADAPTERS",
    "COMPRESSORS": ".encoders.compressors.base:COMPRESSORS",
    "SCORERS": ".scorers.base:SCORERS",
    "SELECTORS": ".selectors.base:SELECTORS",
    "TOWERS": ".encoders.towers.base:TOWERS",
    **{
        name: f".spec:{name}" for name in ("Budget", "CompressorSpec", "Keep", "PipelineSpec", "StageSpec", "load_spec")
    },
    **{
        name: f".errors:{name}"
        for name in (
            "AttachError",
            "BudgetError",
            "BusyError",
            "CacheError",
            "InputError",
            "NonFiniteError",
            "PluginError",
            "SpecError",
            "TrioError",
            "UnknownNameError",
            "UnsupportedModelError",
        )
    },
    "cost": ".cost",
    "encoders": ".encoders",
    "testing": ".testing",
    "zoo": ".zoo",
}


_REMEDY = (
    "Make a fresh environment and install there either trio-vlm or trio; for both in one environment install "
    "trio-vlm-alias in place of trio-vlm, and import trio_vlm."
)


def _async_library() -> str | None:
    """The version of the async library `trio` installed in this environment, or None."""
    from importlib import metadata

    try:
        return metadata.version("trio")
    except metadata.PackageNotFoundError:
        return None


def __getattr__(name: str) -> Any:
    """Resolve a public name, or explain which `trio` this is."""
    target = _LAZY.get(name)
    if target is not None:
        module, _, attribute = target.partition(":")
        source = importlib.import_module(module, __name__)
        if not globals().get("_conflict_checked"):
            globals()["_conflict_checked"] = True
            _warn_of_conflict()
        value = getattr(source, attribute) if attribute else source
        globals()[name] = value
        return value
    if name.startswith("__"):  # what the import system and inspect ask every module for
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    raise AttributeError(_unknown_attribute(name))


def _unknown_attribute(name: str) -> str:
    from .errors import did_you_mean

    message = f"module {__name__!r} has no attribute {name!r}. {did_you_mean(name, __all__)}"
    message += "This is trio-vlm (fewer visual tokens for vision-language models), not the async library 'trio'"
    if __name__ != "trio":
        return f"{message}, which is imported as 'trio'."
    version = _async_library()
    if version is None:
        return f"{message}. {_REMEDY}"
    return (
        f"{message}, which is installed in this environment too (version {version}): both own the folder "
        f"site-packages/trio and overwrite each other's files. {_REMEDY}"
    )


def _warn_of_conflict() -> None:
    version = _async_library() if __name__ == "trio" else None  # under another import name both live side by side
    if version is None:
        return
    import warnings

    warnings.warn(
        f"the async library 'trio' {version} is installed in the same environment as trio-vlm; both own the folder "
        f"site-packages/trio and overwrite each other's files, so that either can fail. {_REMEDY}",
        RuntimeWarning,
        stacklevel=3,
    )


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
