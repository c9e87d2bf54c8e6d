"""Model cards and the tables of ``docs/zoo.md`` from measured numbers: ``python -m lab.training.card``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from trio import zoo

_FRONT = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# {name}

A very small vision-language model that answers questions about drawn scenes and nothing else. It exists so that methods
of visual-token reduction can be tried and tested without a download. It says nothing about real photographs.

```python
from trio import zoo

model, processor = zoo.load("{name}")
```

or, with transformers alone, `AutoModelForImageTextToText.from_pretrained(FOLDER)` and
`AutoProcessor.from_pretrained(FOLDER)`.

## Accuracy

"""


def _read(name: str, file: str) -> Any:
    return json.loads((zoo.path(name) / file).read_text(encoding="utf-8"))


def accuracy_table(name: str, file: str = "accuracy.json") -> str:
    """Accuracy by type of question, as Markdown, from the result of ``lab.training.evaluate``."""
    result = _read(name, file)
    kind = "scenes of many sizes and aspect ratios" if result.get("varied") else "scenes"
    lines = [
        f"{result['scenes']} {kind} of the split `{result['split']}`, seed {result['seed']}; percent, 95% intervals.",
        "",
        "| type | questions | with the image | blank image | lower end minus blank |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for kind, full in result["full"].items():
        unseen = result["blank"][kind]
        cells = [f"{100 * r['accuracy']:.1f} ({100 * r['low']:.1f} to {100 * r['high']:.1f})" for r in (full, unseen)]
        cells.append(f"{100 * (full['low'] - unseen['accuracy']):+.1f}")
        lines.append(f"| {kind} | {full['questions']:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def curve_table(name: str, rows: int = 12) -> str:
    """The curve of the language phase, as Markdown, thinned to a few rows."""
    curve = _read(name, "training.json")["language"]["curve"]
    columns = [key for key in curve[0] if key not in ("minutes", "loss", "dense")]
    picked = sorted({round(i * (len(curve) - 1) / (rows - 1)) for i in range(rows)})
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---:" for _ in columns) + " |"]
    for i in picked:
        values = [f"{curve[i][key]:.0f}" if key == "step" else f"{100 * curve[i][key]:.0f}" for key in columns]
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


def training_text(name: str) -> str:
    """Amounts and times of training, as Markdown."""
    facts = _read(name, "training.json")
    language = facts["language"]
    start = "" if facts.get("start") is None else f", started from `{facts['start']}`"
    lines = [f"- Vision tower: that of `{facts.get('start')}`, unchanged."]
    if tower := facts.get("tower"):
        read = ", ".join(f"{k} {100 * v:.1f}%" for k, v in tower["accuracy"].items())
        lines = [
            f"- Vision tower{start}: {tower['steps']:,} steps of {tower.get('batch', 48)} images, "
            f"{tower['minutes']:.0f} minutes. Read from its",
            f"  features on fresh scenes: {read}.",
        ]
    lines += [
        f"- Projector and language model{start}: {language['steps']:,} steps of "
        f"{language.get('batch', 16)} images with about 25 questions each,",
        f"  {language['minutes']:.0f} minutes.",
    ]
    return "\n".join(lines)


def sections(name: str) -> dict[str, str]:
    """All generated sections of a model, by name."""
    found = {f"accuracy {name}": accuracy_table(name)}
    if (zoo.path(name) / "novel.json").exists():
        found[f"novel {name}"] = accuracy_table(name, "novel.json")
    if (zoo.path(name) / "training.json").exists():
        found |= {f"training {name}": training_text(name), f"curve {name}": curve_table(name)}
    return found


def card(name: str) -> str:
    """The model card."""
    parts = [_FRONT.format(name=name) + accuracy_table(name)]
    if (zoo.path(name) / "training.json").exists():
        parts.append("## Training\n\n" + training_text(name) + "\n\nThe recipe is in `docs/zoo.md` of the repository.")
    return "\n\n".join(parts) + "\n"


def filled(text: str, generated: dict[str, str]) -> str:
    """A page with its generated sections, which lie between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``."""
    for name, content in generated.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if begin in text:
            before, rest = text.split(begin, 1)
            text = f"{before}{begin}\n{content}\n{end}{rest.split(end, 1)[1]}"
    return text


def main(
    page: Annotated[Path, typer.Argument(help="Page whose generated sections to fill.")] = Path("docs/zoo.md"),
) -> None:
    """Write the model cards and fill the page."""
    generated: dict[str, str] = {}
    for name in zoo.names():
        if (zoo.path(name) / "accuracy.json").exists():
            (zoo.path(name) / "README.md").write_text(card(name), encoding="utf-8")
            generated |= sections(name)
    page.write_text(filled(page.read_text(encoding="utf-8"), generated), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
