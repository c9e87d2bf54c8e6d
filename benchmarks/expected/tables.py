"""The paper's tables, row by row: the spec that is to reproduce a row, what was published of it, and how it is asked.

Source: arXiv 2602.04657 (abstract and tables) and the README of ocy1/TRIO at ``ec85d99``. Numbers that stand in neither
place as we could read them are left open; none was measured here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.expected import HERE, MORE, SOURCES, published
from trio.errors import UnknownNameError, did_you_mean

#: LLaVA's own sentence in front of a conversation.
SYSTEM_PROMPT = f"system_prompt={HERE / 'llava-system-prompt.txt'}"


@dataclass(frozen=True)
class PaperCost:
    """How many times less a row is said to take than the full model; the FLOPs are FastV's formula.

    That formula counts multiply-adds of visual tokens alone, without the gate projection, so that no whole model saves
    as much.
    """

    prefill: float
    total: float
    flops: float
    kv: float


@dataclass(frozen=True)
class PaperRow:
    """A row.

    Attributes:
        spec: shipped, or ``none``.
        key: setting and method in the table's file; None where nothing is published.
        cost: as published.
    """

    spec: str
    key: tuple[str, str] | None = None
    cost: PaperCost | None = None


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper, or one that it might have.

    Attributes:
        name: on the command line.
        checkpoint: that it is about.
        rows: by name; ``full`` is the untouched model.
        columns: benchmarks, see `benchmarks.expected.ALL_SOURCES`.
        file: of published scores below this folder; empty where none could be read.
        arguments: of ``--model_args`` beside checkpoint and spec.
        remark: what is not known.
    """

    name: str
    checkpoint: str
    rows: Mapping[str, PaperRow]
    columns: tuple[str, ...]
    file: str = ""
    arguments: tuple[str, ...] = ()
    remark: str = ""

    def scores(self, row: PaperRow) -> dict[str, float]:
        """The published scores of a row by column, as far as they are known."""
        return published(self.file)[row.key] if row.key is not None else {}


_15 = (192, 128, 64)
_NEXT = (640, 320, 160)
_QWEN = (33, 22, 11)

TABLES: dict[str, PaperTable] = {
    table.name: table
    for table in (
        PaperTable(
            name="llava-next",
            checkpoint="llava-hf/llava-v1.6-vicuna-7b-hf",
            rows={
                # The headline of the paper: 97.2% kept at 11.1%.
                "trio-320": PaperRow(
                    "trio-llava-next-320", ("320 tokens, without encoder", "TRIO"), PaperCost(2.75, 2.14, 6.22, 6.05)
                ),
                "full": PaperRow("none", ("2880 tokens, no reduction", "Vanilla")),
                **{f"trio-{n}": PaperRow(f"trio-llava-next-{n}") for n in _NEXT if n != 320},
                **{f"trio-{n}-paper": PaperRow(f"trio-llava-next-{n}-paper") for n in _NEXT},
                **{f"visionzip-{n}": PaperRow(f"visionzip-llava-next-{n}") for n in _NEXT},
            },
            columns=(*SOURCES, *MORE),
            file="llava-next-7b.csv",
            arguments=(SYSTEM_PROMPT,),
            remark="of this table only the average at 11.1%, POPE and the costs could be read (abstract, README)",
        ),
        PaperTable(
            name="llava-1.5",
            checkpoint="llava-hf/llava-1.5-7b-hf",
            rows={
                "full": PaperRow("none", ("576 tokens, no reduction", "Vanilla")),
                **{
                    f"trio-{n}": PaperRow(
                        f"trio-llava-1.5-{n}",
                        (f"{n} tokens, without encoder", "TRIO"),
                        PaperCost(1.27, 1.13, 6.62, 5.13) if n == 64 else None,
                    )
                    for n in _15
                },
                **{
                    f"{row}-{n}{suffix}": PaperRow(
                        f"{row}-llava-1.5-{n}{suffix}", (f"{n} tokens, {side} encoder", method)
                    )
                    for row, suffix, side, method in (
                        ("trio", "-paper", "without", "TRIO"),
                        ("trio-scan", "", "with", "TRIO"),
                        ("visionzip", "", "with", "VisionZip"),
                    )
                    for n in _15
                },
            },
            columns=(*SOURCES, *MORE),
            file="llava-1.5-7b.csv",
            arguments=("pad_to_square=True", SYSTEM_PROMPT),
        ),
        PaperTable(
            name="qwen2.5-vl",
            checkpoint="Qwen/Qwen2.5-VL-7B-Instruct",
            rows={
                "full": PaperRow("none"),
                **{f"trio-{n}": PaperRow(f"trio-qwen2.5-vl-{n}") for n in _QWEN},
                "trio-11-paper": PaperRow("trio-qwen2.5-vl-11-paper"),
            },
            columns=("gqa", "mmb", "mme", "pope", "sqa", "textvqa", *MORE),
            remark="the paper's scores for this model could not be read",
        ),
        PaperTable(
            name="qwen3-vl",
            checkpoint="Qwen/Qwen3-VL-8B-Instruct",
            rows={
                "full": PaperRow("none"),
                **{f"trio-soft-{n}": PaperRow(f"trio-soft-{n}") for n in _QWEN},
                "trio-11": PaperRow("trio-11"),
            },
            columns=("mme", "pope", "textvqa", *MORE),
            remark="not in the paper: the model and the benchmarks that people use now",
        ),
    )
}


def table_of(name: str) -> PaperTable:
    """A table by name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in TABLES:
        raise UnknownNameError(f"table: found {name!r}. {did_you_mean(name, TABLES)}Allowed: {', '.join(TABLES)}.")
    return TABLES[name]
