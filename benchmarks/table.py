"""``docs/retention.md`` from results; every sentence with a number in it is made from the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import METHODS, PLACEMENTS, SHARES, Placement, key
from benchmarks.statistics import Answers

DEFAULT, TOP_K, ATTENTION, UNIFORM = (method.name for method in METHODS)
NAMES = (DEFAULT, TOP_K, ATTENTION, UNIFORM, "random")

HEAD = """# What is kept: accuracy by retention

<!-- Written by `python -m benchmarks.retention --table`; do not edit. -->

How many questions the small models of the zoo still answer when fewer visual tokens are kept. It shows that the code
works and how the methods compare **on these small models and drawn scenes**; it ranks nothing else. No checkpoint of
the hub was run (see [limits](limits.md)).

- **accuracy**: percent of questions answered word for word, with a 95% interval from a bootstrap that draws whole
  scenes (where all answers are right: Wilson's interval, each scene counted once). Differences are between answers to
  the same questions, bootstrapped the same way. The intervals are not corrected for the number of comparisons: of
  twenty true zeros, one is expected to look like a difference.
- **random**: the mean of five draws; the lowest and the highest draw stand below each table.
- **uniform grid**: tokens spread evenly in farthest-point order from the middle; a later stage keeps a part of what an
  earlier one kept, as with random.
- **nothing kept**: all visual tokens dropped at the place of the first stage. What is answered then was read from the
  text tokens, and the choice of tokens cannot matter for it.
- Every row answers the same questions about scenes that no training has seen, through `model.generate`, greedily, in
  batches. Nothing about the models or the methods was chosen by these numbers.
"""


def write_table(files: Sequence[dict[str, Any]], target: Path) -> None:
    """Writes the page.

    Args:
        files: results of `benchmarks.retention`, one a model.
        target: the page.
    """
    lines = [HEAD]
    for results in files:
        lines += _model(results)
    target.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


BEGIN, END = "<!-- retention: python -m benchmarks.retention --table -->", "<!-- end of retention -->"


def with_summary(readme: str, results: dict[str, Any]) -> str:
    """The README with its short table renewed: one stage at the input, where every layer runs on the kept tokens alone.

    Args:
        readme: its text, with the lines `BEGIN` and `END`.
        results: of the model that it shows.
    """
    answers, placement = Answers(results), PLACEMENTS[0]
    block = [
        BEGIN,
        "",
        f"Questions that the zoo's trained `{results['model']}` answers right about {results['scenes']} drawn scenes",
        f"that it has never seen ({len(answers.kind)} questions, percent, 95% intervals clustered by scene), one stage",
        "at the input. It shows how the methods compare on a small model, and ranks nothing else",
        "([all tables and controls](docs/retention.md)).",
        "",
        _header(["kept", *SHARES]),
    ]
    methods = [(name, list(_cells(answers, placement, name))) for name in NAMES]
    block += [_row([name, *cells]) for name, cells in methods if "cannot" not in cells]
    block += [
        _row([name, *([str(answers.accuracy(row))] * len(SHARES))])
        for name, row in (("nothing", "none/0"), ("no picture", "blank"), ("everything", "full"))
    ]
    return readme[: readme.index(BEGIN)] + "\n".join([*block, "", END]) + readme[readme.index(END) + len(END) :]


def _model(results: dict[str, Any]) -> Iterator[str]:
    answers = Answers(results)
    full, blank = answers.accuracy("full"), answers.accuracy("blank")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    yield f"## {results['model']}\n"
    yield (
        f"{results['scenes']} held-out scenes (split {results['split']}, seed {results['seed']}), {len(answers.kind)} "
        f"questions; {results['visual_tokens']} visual tokens{_mean(results)}, {results['layers']} layers, "
        f"{results['dtype']}; "
        f"{versions}; weights `{results['weights'][:12]}`.\n"
    )
    yield f"Full: **{full}**. With a blank picture: **{blank}**.\n"
    yield f"    python -m benchmarks.retention {results['model']} --scenes {results['scenes']}\n"
    for placement in PLACEMENTS:
        yield from _placement(answers, placement)
    yield from _nothing(answers)
    yield from _findings(answers)
    yield from _by_type(answers)


def _mean(results: dict[str, Any]) -> str:
    """Whether the tokens are a mean; files without the field are of pictures of one size."""
    return " on average over pictures of many sizes" if results.get("varied") else ""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _header(cells: Sequence[str]) -> str:
    return f"{_row(cells)}\n{_row(['---'] + ['---:'] * (len(cells) - 1))}"


def _placement(answers: Answers, placement: Placement) -> Iterator[str]:
    yield f"### {placement.title}\n"
    yield f"{placement.text}\n"
    averages = {share: answers.results["average"][key(placement, share, DEFAULT)] for share in SHARES}
    tokens = answers.results["visual_tokens"]
    yield _header(
        [
            "accuracy (95% interval)",
            *(f"{share}: {averages[share]:.1f} of {tokens} tokens on average" for share in SHARES),
        ]
    )
    for name in NAMES:
        yield _row([name, *_cells(answers, placement, name)])
    none = _nothing_row(answers, placement)
    yield _row(["nothing kept", *([str(answers.accuracy(none))] * len(SHARES))])
    yield ""
    spreads = [answers.spread(key(placement, share, "random")) for share in SHARES]
    yield "Random draws: " + ", ".join(f"{low:.1f} to {high:.1f}" for low, high in spreads) + ".\n"
    lost = answers.difference("full", key(placement, SHARES[-1], "random")).signed()
    yield (
        f"How much there is to win: full minus random at {SHARES[-1]} {lost}, full minus nothing kept "
        f"{answers.difference('full', none).signed()}.\n"
    )
    yield _header(["difference to random, points (95% interval)", *SHARES])
    for name in NAMES[:-1]:
        yield _row([name, *_cells(answers, placement, name, other="random")])
    yield ""
    refused = answers.results["refused"].get(key(placement, SHARES[0], ATTENTION))
    if refused:
        yield f"`last-token-attention` cannot stand here, and the package says so: “{refused}”.\n"


def _cells(answers: Answers, placement: Placement, name: str, other: str | None = None) -> Iterator[str]:
    for share in SHARES:
        row = key(placement, share, name)
        if name != "random" and row not in answers:
            yield "cannot"
        elif other is None:
            yield str(answers.accuracy(row))
        else:
            yield answers.difference(row, key(placement, share, other)).signed()


def _nothing_row(answers: Answers, placement: Placement) -> str:
    first = 1 if placement.name == "after-1" else 0
    return f"none/{first}"


def _nothing(answers: Answers) -> Iterator[str]:
    layers = answers.results["layers"]
    yield "### Control: all visual tokens dropped\n"
    yield (
        "After how many layers the picture is no longer needed. A stage placed where this row is near the full model "
        "proves nothing about the choice of tokens.\n"
    )
    yield _header(["dropped after layer", "overall", *answers.kinds])
    rows = [("never (full)", "full"), *((str(depth), f"none/{depth}") for depth in reversed(range(layers)))]
    for label, row in [*rows, ("blank picture", "blank")]:
        yield _row(
            [label, str(answers.accuracy(row)), *(f"{answers.accuracy(row, k).mean:.1f}" for k in answers.kinds)]
        )
    yield ""


def _findings(answers: Answers) -> Iterator[str]:
    yield "### What the intervals say\n"
    yield (
        f"`{DEFAULT}` (the default) against the others on the same questions, in points: **above** or **below** where "
        "the whole 95% interval of the difference lies on that side of zero.\n"
    )
    yield _header(["place, kept", *(f"against {name}" for name in NAMES[1:]), "against nothing kept"])
    for placement in PLACEMENTS:
        for share in SHARES:
            cells = []
            own = key(placement, share, DEFAULT)
            for other in (*(key(placement, share, name) for name in NAMES[1:]), _nothing_row(answers, placement)):
                if other.endswith("/random") or other in answers:
                    found = answers.difference(own, other)
                    cells.append(f"{found.verdict} {found.mean:+.1f}")
                else:
                    cells.append("cannot")
            yield _row([f"{placement.name}, {share}", *cells])
    yield ""
    yield from _same_average(answers)
    for placement in PLACEMENTS:
        row = key(placement, SHARES[-1], DEFAULT)
        losses = {kind: answers.difference(row, "full", kind) for kind in answers.kinds}
        worst = sorted(losses, key=lambda kind: losses[kind].mean)[:2]
        said = " and ".join(f"{kind} {losses[kind].signed()}" for kind in worst)
        yield f"Where the default loses most against the full model ({placement.name}, {SHARES[-1]}): {said}.\n"


def _same_average(answers: Answers) -> Iterator[str]:
    """Last-token attention, which must let a layer run on all tokens, against the default at the same average."""
    average, after = answers.results["average"], PLACEMENTS[-1]
    for share in SHARES:
        theirs = key(after, share, ATTENTION)
        found = []
        for placement in PLACEMENTS[:-1]:
            for other in SHARES:
                ours = key(placement, other, DEFAULT)
                if abs(average[ours] - average[theirs]) <= 0.5:
                    gain = answers.difference(ours, theirs).signed()
                    found.append(f"{placement.name}, {other}: {answers.accuracy(ours).mean:.1f}, difference {gain}")
        if found:
            yield (
                f"At the same average over the layers, {average[theirs]:.1f} tokens: `{ATTENTION}` ({after.name}, "
                f"{share}) {answers.accuracy(theirs).mean:.1f}; `{DEFAULT}` {'; '.join(found)}.\n"
            )


def _by_type(answers: Answers) -> Iterator[str]:
    yield "### By type of question\n"
    counts = ", ".join(f"{kind} {int((answers.kind == kind).sum())}" for kind in answers.kinds)
    yield f"Accuracy in percent, with 95% intervals (Wilson's; for random, bootstrapped). Questions: {counts}.\n"
    for placement in PLACEMENTS:
        for share in SHARES:
            yield f"**{placement.title}, {share}**\n"
            yield _header(["", *answers.kinds])
            names = [name for name in NAMES if name == "random" or key(placement, share, name) in answers]
            rows = [("full", "full"), *((name, key(placement, share, name)) for name in names)]
            for label, row in [*rows, ("nothing kept", _nothing_row(answers, placement)), ("blank picture", "blank")]:
                found = (answers.accuracy(row, kind) for kind in answers.kinds)
                yield _row([label, *(f"{e.mean:.0f} ({e.low:.0f} to {e.high:.0f})" for e in found)])
            yield ""
