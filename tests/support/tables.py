"""Tables of rows for jobs: questions about drawn scenes, with one image that is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trio.measure.shapesvqa.examples import examples

#: The row whose image is damaged.
BAD = 5


def write_table(folder: Path, rows: int) -> list[dict[str, Any]]:
    """Images and `rows.jsonl` in a folder; the rows as written."""
    found = examples("test", scenes=rows // 6 + 4)[:rows]
    assert len(found) == rows
    made = []
    for number, one in enumerate(found):
        file = folder / f"scene{one.scene}.png"
        if not file.exists():
            one.image.save(file)
        made.append({"id": f"row-{number}", "image": file.name, "question": one.question, "answer": one.answer})
    made[BAD]["image"] = "bad.png"
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nbut nothing more")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return made
