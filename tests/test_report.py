"""The report's records: consistency, averages, JSON round trip."""

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trio.core.printable import visible
from trio.errors import InputError
from trio.report import (
    CompressionReport,
    GroupReport,
    ImageReport,
    KVBytes,
    Origins,
    SampleReport,
    StageReport,
)


def group(indices: list[int], tokens_in: int, image: int | None = 0, **extra: Any) -> GroupReport:
    origins = Origins.of_grid(12, 12, image=image or 0).take(indices)
    values: dict[str, Any] = {
        "image": image,
        "tokens_in": tokens_in,
        "asked": len(indices),
        "kept": len(indices),
        "indices": indices,
        "origins": origins,
    }
    return GroupReport(**(values | extra))


def stage(after_layer: int, *groups: GroupReport) -> StageReport:
    return StageReport(after_layer=after_layer, scorer="random", selector="top-k", groups=list(groups))


def report(**extra: Any) -> CompressionReport:
    first = SampleReport(
        sample=0,
        images=[ImageReport(tokens=144, grid=(12, 12), size_px=(96, 96))],
        stages=[stage(2, group([0, 5, 143], 144)), stage(4, group([5], 3))],
    )
    second = SampleReport(sample=1, images=[])
    values: dict[str, Any] = {
        "spec_name": "demo",
        "model": "LlavaForConditionalGeneration",
        "adapter": "llava",
        "num_layers": 6,
        "samples": [first, second],
        "layer_lengths": [154, 154, 13, 13, 11, 11],
        "layer_tokens": [[154, 154, 13, 13, 11, 11], [9] * 6],
        "positions": "compact",
    }
    return CompressionReport(**(values | extra))


def test_averages_by_hand() -> None:
    made = report()
    assert made.samples[0].visual_by_layer(6) == [144, 144, 3, 3, 1, 1]
    assert made.average_kept_by_sample == [pytest.approx(296 / 6), 0.0]
    assert made.average_kept == pytest.approx(296 / 6)
    assert made.visual_tokens == 144
    assert made.retention == pytest.approx(296 / 6 / 144)
    assert made.kept_by_stage == [[3, 1], []]
    assert made.samples[0].stages[0].tokens_in == 144


def test_stage_before_the_first_layer_and_after_the_compressor() -> None:
    sample = SampleReport(
        sample=0,
        images=[ImageReport(tokens=144, entered=20), ImageReport(tokens=144, entered=10)],
        stages=[stage(0, group([1, 2], 20, 0), group([3], 10, 1)), stage(3, group([4, 5], 3, None))],
    )
    assert sample.visual_tokens == 288
    assert sample.visual_by_layer(4) == [3, 3, 3, 2]
    without = SampleReport(sample=0, images=sample.images)
    assert without.visual_by_layer(4) == [30] * 4


def test_no_visual_token_means_nothing_lost() -> None:
    made = report(samples=[SampleReport(sample=0, images=[])], layer_tokens=[[9] * 6])
    assert (made.visual_tokens, made.average_kept, made.retention) == (0, 0.0, 1.0)


def test_json_round_trip_keeps_everything() -> None:
    made = report(
        level="full",
        timing={"prefill": 0.25, "scoring": 0.01},
        kv_bytes=KVBytes(full_equivalent=600, measured=150),
        notes=["the probe fell back to whole layers"],
    )
    text = made.to_json(indent=1)
    assert CompressionReport.from_json(text) == made
    assert json.loads(text)["samples"][0]["stages"][0]["groups"][0]["indices"] == [0, 5, 143]
    assert made.kv_bytes is not None and made.kv_bytes.reduction == 4.0
    assert KVBytes(full_equivalent=0, measured=0).reduction == 1.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "CompressionReport: Invalid JSON"),
        ("[" * 100_000, "CompressionReport: Invalid JSON"),
        (b"\xff", "CompressionReport: Invalid JSON"),
        ("{}", r"CompressionReport, spec_name: Field required and \d+ more; give what `to_json`"),
        ("[]", "CompressionReport: Input should be an object"),
        ('{"samples": [{"sample": "x"}]}', r"CompressionReport, .* more; give what"),
        ('{"\\u001b[2J": 1}', r"CompressionReport, .* more; give what"),
    ],
)
def test_text_that_is_no_report_is_refused(text: str | bytes, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        CompressionReport.from_json(text)
    assert visible(str(caught.value)) == str(caught.value)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=144, max_size=144))
def test_saliencies_survive_json_to_the_last_bit(values: list[float]) -> None:
    made = group([1], 144, saliency=values)
    assert GroupReport.model_validate_json(made.model_dump_json()).saliency == values


def test_selection_counts_within_each_image_also_where_a_sample_shares_its_count() -> None:
    images = [ImageReport(tokens=4, grid=(2, 2)), ImageReport(tokens=4, grid=(2, 2))]
    first, second = Origins.of_grid(2, 2).take([1]), Origins.of_grid(2, 2, image=1).take([0, 3])
    both = Origins(**{name: getattr(first, name) + getattr(second, name) for name in Origins.model_fields})
    shared = group([1, 4, 7], 8, None, origins=both)
    single = [group([1], 1, 0, origins=first), group([3], 2, 1, origins=second.take([1]))]
    samples = [
        SampleReport(sample=0, images=images, stages=[stage(1, shared), stage(2, *single)]),
        SampleReport(sample=1, images=[]),
    ]
    made = report(samples=samples, layer_tokens=[[9] * 6, [9] * 6])
    assert made.selection() == [[[[1], [0, 3]], []], [[[1], [3]], []]]


def test_summary_names_counts_and_notes() -> None:
    noted = group([0, 1], 2, notes=["kept all: fewer tokens than the count"])
    made = report(
        samples=[SampleReport(sample=0, images=[ImageReport(tokens=2)], stages=[stage(2, noted)])],
        layer_tokens=[[9] * 6],
        kv_bytes=KVBytes(full_equivalent=600, measured=150),
        timing={"prefill": 0.25},
        notes=["a [note]"],
    )
    text = made.summary()
    for piece in ("demo", "after layer 2: 2 of 2", "image 0: kept all", "4.00x", "prefill 0.2500", "a [note]"):
        assert piece in text
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as shown:
        console.print(made)
    assert "a [note]" in shown.get()


def test_frozen_and_no_unknown_fields() -> None:
    made = report()
    with pytest.raises(ValidationError, match="frozen"):
        made.spec_name = "other"  # type: ignore[misc]  # the point of the test
    with pytest.raises(ValidationError, match="layer_lenghts"):
        report(layer_lenghts=[1])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: group([3, 1], 144), "rise strictly"),
        (lambda: group([1, 1], 144), "rise strictly"),
        (lambda: group([1, 2], 1), "cannot add tokens"),
        (lambda: group([1, 2], 144, kept=1), "kept 1 tokens, but 2 indices"),
        (lambda: group([1], 144, saliency=[1.0]), "1 saliencies were given for 144"),
        (lambda: group([1], 1, saliency=[float("nan")]), "finite"),
        (lambda: group([1], -1), "greater than or equal to 0"),
        (lambda: Origins(image=[0], kind=["patch"], frame=[0], row=[0], column=[], size=[1]), "one length"),
        (lambda: Origins(image=[0], kind=["pach"], frame=[0], row=[0], column=[0], size=[1]), "'patch', 'cls'"),
        (lambda: report(layer_lengths=[1, 2]), "2 entries for 6 layers"),
        (lambda: report(layer_tokens=[[9] * 6]), "1 rows for 2 samples"),
        (lambda: report(layer_tokens=[[9] * 6, [9]]), r"layer_tokens\[1\] has 1 entries"),
        (lambda: SampleReport(sample=0, images=[], stages=[stage(4), stage(2)]), r"found \[4, 2\]"),
        (lambda: report(timing={"prefill": -1.0}), "greater than or equal to 0"),
        (lambda: report(positions="auto"), "'compact' or 'original'"),
    ],
)
def test_inconsistent_records_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build()


def test_importing_the_report_imports_no_torch() -> None:
    code = "import sys, trio.report; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
