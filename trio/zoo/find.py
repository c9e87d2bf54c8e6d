"""Models by name: of the zoo, in a folder, on the hub."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import InputError, did_you_mean


def find_model(name: str) -> str:
    """A zoo model's folder, a local folder, or a hub name, as `from_pretrained` takes it.

    Raises:
        InputError: it is none of these.
    """
    from .. import zoo

    folder = Path(name).expanduser()
    if name in zoo.names() or (name in zoo.SEPARATE and not folder.exists()):
        return str(zoo.path(name))  # or the error that says what to install
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"model {name!r}: the folder has no config.json; give a folder that `save_pretrained` wrote."
            )
        return str(folder)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not folder.exists():
        return name
    raise InputError(
        f"model {name!r}: neither a model of the zoo ({', '.join(zoo.names())}), nor a folder, nor a hub name such as "
        f"llava-hf/llava-1.5-7b-hf. {did_you_mean(name, {*zoo.names(), *zoo.SEPARATE})}".rstrip()
    )
