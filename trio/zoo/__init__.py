"""Small trained models that ship with the package, so that everything can be tried without a download.

They answer questions about drawn scenes and nothing else; ``docs/zoo.md`` says how they were trained and how well they
do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

__all__ = ["demo_picture", "demo_question", "load", "names", "path"]

_HERE = Path(__file__).parent
_MODELS = _HERE / "models"


def names() -> list[str]:
    """Names of the models."""
    return (
        sorted(folder.name for folder in _MODELS.iterdir() if (folder / "config.json").is_file())
        if _MODELS.is_dir()
        else []
    )


def path(name: str) -> Path:
    """Folder of a model, loadable by ``AutoModelForImageTextToText`` and ``AutoProcessor``.

    Args:
        name: One of ``names()``.

    Raises:
        UnknownNameError: There is no model of this name.
    """
    if name not in names():
        from ..errors import UnknownNameError, did_you_mean

        listed = ", ".join(names()) or "none"
        raise UnknownNameError(f"The zoo has no model {name!r}. {did_you_mean(name, names())}It has: {listed}.")
    return _MODELS / name


def load(name: str = "tiny-llava", **options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model, ready to answer, and its processor; without a network.

    Args:
        name: One of ``names()``.
        options: Passed to ``AutoModelForImageTextToText.from_pretrained``, for example ``dtype``.

    Raises:
        UnknownNameError: There is no model of this name.
    """
    return load_folder(path(name), **options)


def load_folder(folder: Path, **options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
    """As ``load``, for a model in any folder."""
    import transformers

    auto: Any = transformers  # its typing changes from version to version
    model = auto.AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, **options)
    return model.eval(), auto.AutoProcessor.from_pretrained(folder, local_files_only=True)


def demo_picture() -> Path:
    """The picture that the demo asks about."""
    return _HERE / "data" / "demo.png"


def demo_question() -> str:
    """A question about the demo picture that needs the question to be known before the right tokens can be found."""
    return (_HERE / "data" / "demo.txt").read_text(encoding="utf-8").strip()
