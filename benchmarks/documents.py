"""The drawn examples of docs/documents.md: `python -m benchmarks.documents`."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from trio.measure.documents.task import SEED, document

FOLDER = Path(__file__).parents[1] / "docs"
#: File, and number of the document in the split ``test``.
EXAMPLES = {"documents-invoice.png": 0, "documents-table.png": 2}
COLOURS = 16


def main() -> None:
    for name, index in EXAMPLES.items():
        page, _ = document("test", SEED, index)
        few = page.image.convert("P", palette=Image.Palette.ADAPTIVE, colors=COLOURS)
        few.save(FOLDER / name, optimize=True)


if __name__ == "__main__":
    main()
