"""Quantised weights: answers, kept tokens and promises against the model as it is, for every kind that runs here.

``make quantised`` makes an environment with torchao and bitsandbytes; there ``python -m benchmarks.quantised`` writes
``benchmarks/results/quantised.json``, and ``python -m benchmarks.support`` puts the table into docs/support.md.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import trio
from benchmarks.half import one_of_each
from trio import DEFAULT_SPEC, zoo
from trio.adapters import adapter_for
from trio.core.images import batch_for
from trio.core.upstream import quantisation, silenced
from trio.measure.answering import decode, generate
from trio.measure.evaluation import LabelledSample
from trio.testing import check_adapter

RESULT = Path(__file__).parent / "results" / "quantised.json"
MODEL = "tiny-llava"
PROMPTS = 60
NEW_TOKENS = 6
#: What is promised of a layer's own arithmetic; the others do not hang on how weights are kept.
CHECKED = ("identity", "reversibility", "decode", "batch")
#: What the table's readers have to know besides.
NOT_BUILT = (
    "GPTQ and AWQ are run by gptqmodel, which is not among the built packages of the index for this Python; building "
    "it was given up after four minutes. fp8 activations have kernels on GPUs alone."
)
HALF = (
    "bitsandbytes int8 rounds activations, in float16 whatever the model's dtype: as in half precision, a batch does "
    "not keep every token that its samples keep alone."
)
PACKED = (
    "On CPUs with AVX512-BF16 bitsandbytes 0.50 packs 4-bit weights anew at the first call, for a kernel without a "
    "backward, which also fails where a layer's input width is no multiple of 64 (tiny-llava has 160). A pipeline that "
    "needs gradients is then refused by name. `layer.support_avx512bf16_for_cpu = False` on the linear layers before "
    "they are used keeps the other kernel; the row above was measured so."
)
console = Console()


def torchao(kind: str, **options: Any) -> Any:
    """A configuration of torchao."""
    from torchao import quantization
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(quantization, kind)(**options))


def bitsandbytes(**options: Any) -> Any:
    """A configuration of bitsandbytes."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


def fp8_blocks() -> Any:
    """transformers' own fp8 weights with a scale for each block."""
    from transformers import FineGrainedFP8Config

    return FineGrainedFP8Config()


def gptq() -> Any:
    """GPTQ, calibrated by the library that runs it."""
    from transformers import GPTQConfig

    return GPTQConfig(bits=4, dataset=["how many shapes ?"])


def awq() -> Any:
    """AWQ."""
    from transformers import AwqConfig

    return AwqConfig(bits=4)


@dataclass(frozen=True)
class Kind:
    """One kind of quantised weights.

    Attributes:
        name: in the table.
        make: gives the configuration that transformers loads the model with.
        tolerance: of logits in the promises; None: as for the model's dtype. Activations that are quantised as they
            come round differently where a batch or a cache changes them in their last bits.
    """

    name: str
    make: Callable[[], Any]
    tolerance: float | None = None


KINDS = (
    Kind("torchao int8 weight-only", lambda: torchao("Int8WeightOnlyConfig")),
    Kind("torchao fp8 weight-only", lambda: torchao("Float8WeightOnlyConfig")),
    Kind("bitsandbytes nf4", lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    Kind("bitsandbytes int8", lambda: bitsandbytes(load_in_8bit=True), tolerance=5e-2),
    Kind(
        "torchao int8, dynamic activations",
        lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
        tolerance=5e-2,
    ),
    Kind("torchao fp8, dynamic activations", lambda: torchao("Float8DynamicActivationFloat8WeightConfig")),
    Kind("transformers fp8 by blocks", fp8_blocks),
    Kind("GPTQ", gptq),
    Kind("AWQ", awq),
)


def load(kind: Kind | None) -> tuple[Any, Any]:
    """The zoo's model in float32, quantised or as it is, and its processor."""
    given = {} if kind is None else {"quantization_config": kind.make()}
    with warnings.catch_warnings(), silenced():
        warnings.simplefilter("ignore")
        model, processor = zoo.load(MODEL, dtype=torch.float32, **given)
    for module in model.modules():  # see docs/support.md
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model, processor


@dataclass(frozen=True)
class Said:
    """What a model said to every prompt, whole and compressed.

    Attributes:
        full: answers of the whole model.
        compressed: answers with the spec; empty where it is refused.
        kept: for each prompt and stage, the tokens that were kept.
        refused: why the spec is.
    """

    full: list[str]
    compressed: list[str]
    kept: list[list[set[int]]]
    refused: str = ""


def ask(model: Any, processor: Any, samples: Sequence[LabelledSample]) -> Said:
    """Asks one prompt after the other."""
    inputs = [batch_for(processor, [([one.load()], one.question)]) for one in samples]
    full = [_answer(model, processor, each) for each in inputs]
    try:
        pipeline = trio.Pipeline.from_spec(DEFAULT_SPEC, model)
    except trio.UnsupportedModelError as error:
        return Said(full, [], [], str(error))
    compressed, kept = [], []
    for each in inputs:
        compressed.append(_answer(model, processor, each, pipeline))
        kept.append([set(images[0]) for (images,) in pipeline.report.selection()])
    return Said(full, compressed, kept)


def _answer(model: Any, processor: Any, inputs: Any, pipeline: trio.Pipeline | None = None) -> str:
    given = inputs.to(model.device, dtype=model.dtype)
    return decode(processor, generate(model, given, pipeline, max_new_tokens=NEW_TOKENS))[0]


def same(found: Sequence[Any], expected: Sequence[Any]) -> int:
    """How many are the same."""
    return sum(a == b for a, b in zip(found, expected, strict=True))


def right(answers: Sequence[str], samples: Sequence[LabelledSample]) -> int:
    """How many are right."""
    return sum(sample.is_right(text) for text, sample in zip(answers, samples, strict=True))


def promises(kind: Kind, model: Any, processor: Any) -> dict[str, Any]:
    """Checks by promise, as how many hold of how many, and what those that do not say."""
    with warnings.catch_warnings(), silenced():
        warnings.simplefilter("ignore")
        found = check_adapter(model, processor, tolerance=kind.tolerance, promises=CHECKED, raise_on_failure=False)
    by_promise = {name: [check for check in found if check.promise == name] for name in CHECKED}
    held = {name: [sum(check.passed for check in checks), len(checks)] for name, checks in by_promise.items()}
    return {"checks": held, "broken": [str(check) for check in found.failures]}


def measure(kind: Kind, base: Said, samples: Sequence[LabelledSample]) -> dict[str, Any]:
    """One row; where the kind does not load or run here, the reason."""
    try:
        model, processor = load(kind)
        asked = ask(model, processor, samples)
    except trio.TrioError:
        raise
    except Exception as error:  # whatever a library raises that has no kernel for this machine
        return {"kind": kind.name, "not_run": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    row = {
        "kind": kind.name,
        "configuration": quantisation(model.config),
        "prompts": len(samples),
        "right_full": right(asked.full, samples),
        "same_full": same(asked.full, base.full),
        "refused": asked.refused,
        "probe": adapter_for(model).probe_kind(2),
        "tolerance": kind.tolerance,
    }
    if not asked.refused:
        pairs = [
            (a, b)
            for ours, theirs in zip(asked.kept, base.kept, strict=True)
            for a, b in zip(ours, theirs, strict=True)
        ]
        row |= {
            **promises(kind, model, processor),
            "right_compressed": right(asked.compressed, samples),
            "same_compressed": same(asked.compressed, base.compressed),
            "compressed_as_full": same(asked.compressed, base.full),
            "same_tokens": round(sum(len(a & b) for a, b in pairs) / sum(len(b) for _, b in pairs), 4),
        }
    return row


def main(
    prompts: Annotated[int, typer.Option(help="Scenes of the test split; each gives one question.")] = PROMPTS,
    kind: Annotated[
        list[str] | None, typer.Option(help="Only this kind; the other rows stay. May be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="File for the result.")] = RESULT,
) -> None:
    """Measure every kind and write the result."""
    torch.set_num_threads(1)
    model, processor = load(None)
    samples = one_of_each(model, prompts)
    base = ask(model, processor, samples)
    found = {
        "model": MODEL,
        "spec": DEFAULT_SPEC,
        "dtype": "float32",
        "device": "cpu",
        "prompts": len(samples),
        "promises": list(CHECKED),
        "unquantised": {
            "right_full": right(base.full, samples),
            "right_compressed": right(base.compressed, samples),
            "compressed_as_full": same(base.compressed, base.full),
        },
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "torchao", "bitsandbytes")},
    }
    rows = {}
    if out.exists():
        before = json.loads(out.read_text(encoding="utf-8"))
        if {**before, "rows": None} == {**found, "rows": None}:
            rows = {row["kind"]: row for row in before["rows"]}
        elif kind:
            raise SystemExit(f"{out}: measured in another way; measure all kinds anew")
    for one in KINDS:
        if not kind or one.name in kind:
            rows[one.name] = measure(one, base, samples)
            console.print(rows[one.name])
            ordered = [rows[known.name] for known in KINDS if known.name in rows]
            out.write_text(json.dumps({**found, "rows": ordered}, indent=1) + "\n", encoding="utf-8")


def table(found: Mapping[str, Any]) -> str:
    """The result as the page shows it, in Markdown."""
    total, base = found["prompts"], found["unquantised"]
    lines = [
        "| weights | full: answers as unquantised | compressed: answers as unquantised and compressed | "
        "right, full and compressed | same tokens kept | layers probed | promises |",
        "| --- | ---: | ---: | ---: | ---: | --- | --- |",
        f"| not quantised |  |  | {base['right_full']}, {base['right_compressed']} |  | by rows |  |",
    ]
    for row in found["rows"]:
        if "not_run" in row:
            continue
        cells = ["refused¹", f"{row['right_full']}, refused", "", "", ""]
        if not row["refused"]:
            held, made = (sum(pair[n] for pair in row["checks"].values()) for n in (0, 1))
            cells = [
                f"{row['same_compressed']} of {total}",
                f"{row['right_full']}, {row['right_compressed']}",
                f"{row['same_tokens']:.1%}",
                "by rows" if row["probe"] == "rows" else "whole",
                f"{held} of {made}" if held == made else f"**{held} of {made}**",
            ]
        lines.append("| " + " | ".join([row["kind"], f"{row['same_full']} of {total}", *cells]) + " |")
    return "\n".join(lines)


def page(found: Mapping[str, Any]) -> str:
    """The section of docs/support.md."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    parts = [
        "## Quantised weights",
        f"`{found['model']}` in {found['dtype']} on a CPU, {found['prompts']} prompts one by one, spec "
        f"`{found['spec']}` ({versions}; `make quantised`, then `python -m benchmarks.quantised` in its environment). "
        f"Promises: checks of {', '.join(found['promises'])} that hold. The unquantised model, compressed, answers "
        f"{found['unquantised']['compressed_as_full']} of them as it does whole.",
        table(found),
    ]
    refused = [row for row in found["rows"] if row.get("refused")]
    parts += [f'¹ {row["kind"]}: "{row["refused"]}"' for row in refused]
    broken = [f"- {row['kind']}: {line}" for row in found["rows"] for line in row.get("broken", [])]
    parts += ["Checks that do not hold:", "\n".join(broken), HALF] if broken else []
    left = [f"- {row['kind']}: {row['not_run']}" for row in found["rows"] if "not_run" in row]
    parts += ["Not run here, with what the libraries say:", "\n".join(left), NOT_BUILT] if left else []
    parts.append(PACKED)
    return "\n\n".join(parts)


if __name__ == "__main__":
    typer.run(main)
