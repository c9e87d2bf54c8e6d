"""Small trained models, so that everything can be tried without a download.

They answer questions about drawn scenes and nothing else; ``docs/zoo.md`` says how they were trained and how well they
do. ``tiny-llava`` comes with this package, the others with the distribution ``trio-vlm-zoo``.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

__all__ = ["SEPARATE", "demo_image", "demo_question", "load", "names", "path"]

_HERE = Path(__file__).parent
_DISTRIBUTION = "trio-vlm-zoo"
#: Models of the distribution `trio-vlm-zoo`.
SEPARATE = ("tiny-llava-early", "tiny-llava-late", "tiny-llava-next", "tiny-llava-seed1", "tiny-qwen2.5-vl")


def _folders() -> dict[str, Path]:
    """The folder of every installed model, by name."""
    homes = [_HERE / "models"]
    package = _DISTRIBUTION.replace("-", "_")
    try:
        homes.append(importlib.import_module(package).models())
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
    return {file.parent.name: file.parent for home in homes for file in sorted(home.glob("*/config.json"))}


def names() -> list[str]:
    """Names of the installed models."""
    return sorted(_folders())


def path(name: str) -> Path:
    """Folder of a model, loadable by ``AutoModelForImageTextToText`` and ``AutoProcessor``.

    Args:
        name: One of ``names()``.

    Raises:
        UnknownNameError: There is no model of this name, or it is in a distribution that is not installed.
    """
    folders = _folders()
    if name in folders:
        return folders[name]
    from ..errors import UnknownNameError, did_you_mean

    installed = ", ".join(sorted(folders)) or "none"
    if name in SEPARATE:
        raise UnknownNameError(
            f"zoo: the model {name!r} is in the distribution {_DISTRIBUTION}, which is not installed; installed are: "
            f"{installed}. Install it with `pip install {_DISTRIBUTION}`, in a checkout with `pip install -e ./zoo`."
        )
    raise UnknownNameError(
        f"zoo: there is no model {name!r}. {did_you_mean(name, {*folders, *SEPARATE})}Installed are: {installed}; the "
        f"distribution {_DISTRIBUTION} has {', '.join(SEPARATE)}. Give one of these names."
    )


def load(name: str = "tiny-llava", **options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model, ready to answer, and its processor; without a network.

    Args:
        name: One of ``names()``.
        options: Passed to ``AutoModelForImageTextToText.from_pretrained``, for example ``dtype``.

    Raises:
        UnknownNameError: There is no model of this name, or it is in a distribution that is not installed.
    """
    return load_folder(path(name), **options)


def load_folder(folder: Path, **options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
    """As ``load``, for a model in any folder."""
    import transformers

    auto: Any = transformers  # its typing changes from version to version
    model = auto.AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, **options)
    return model.eval(), auto.AutoProcessor.from_pretrained(folder, local_files_only=True)


def demo_image() -> Path:
    """The image that the demo asks about."""
    return _HERE / "data" / "demo.png"


def demo_question() -> str:
    """A question about the demo image that needs the question to be known before the right tokens can be found."""
    return (_HERE / "data" / "demo.txt").read_text(encoding="utf-8").strip()
