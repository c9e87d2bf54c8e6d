"""`check_adapter`: the promises of the runtime, on any model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..adapters import adapter_for
from ..adapters.base import Adapter
from ..core.prompts import InputsFactory
from ..encoders.compressors.base import COMPRESSORS
from ..errors import InputError, did_you_mean
from ..spec import CompressorSpec
from .bench import AT_INPUT, TWO_STAGES, Bench, Setting
from .inputs import as_factory
from .promises import PROMISES
from .results import Check, CheckResults, run_cases

#: Largest difference of logits, relative to the largest logit.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def check_adapter(
    model: nn.Module,
    inputs: InputsFactory | Any,
    *,
    tolerance: float | None = None,
    promises: Sequence[str] | None = None,
    stages: Sequence[Any] | None = None,
    compressor: Mapping[str, Any] | str | None = None,
    attention: Sequence[str] = ("eager", "sdpa"),
    adapter: Adapter | None = None,
    raise_on_failure: bool = True,
    on_check: Callable[[Check], None] | None = None,
) -> CheckResults:
    """Checks the promises of the runtime on a model, and so the adapter that serves it.

    The model is run a few hundred times on prompts of a few words with up to two images. It is as before afterwards.

    Args:
        model: a vision-language model in evaluation mode, on any device and in any dtype.
        inputs: the model's processor, or an `InputsFactory`.
        tolerance: largest difference of logits, relative to the largest; by default `TOLERANCES` of the model's dtype.
        promises: names out of `trio.testing.PROMISES`; all by default.
        stages: what to compress with, in place of two stages of the default scorer and selector.
        compressor: a compressor to check the promises with, alone and with these stages behind it: a spec's mapping, or
            a name, which then keeps 60%. One that draws at random cannot be compared with one pass and is refused.
        attention: transformers' names of the implementations that must agree with the model's own; those that the model
            does not take are reported as such. On a GPU add "flex_attention".
        adapter: in place of the one found for the model.
        raise_on_failure: whether to raise where a promise does not hold.
        on_check: called with each check as soon as it is known, for progress.

    Returns:
        Every check with its numbers.

    Raises:
        AssertionError: a promise does not hold; the message names it with the numbers.
        InputError: a promise of that name does not exist, or `inputs` is neither a processor nor a factory.
        UnsupportedModelError: no adapter takes the model.
    """
    promise_names = list(PROMISES if promises is None else promises)
    for name in promise_names:
        if name not in PROMISES:
            raise InputError(
                f"promises: there is no {name!r}. {did_you_mean(name, PROMISES)}Allowed: {', '.join(PROMISES)}."
            )
    model_adapter = adapter_for(model) if adapter is None else adapter
    dtype: torch.dtype = model_adapter.model.dtype  # type: ignore[assignment]  # a property of transformers models
    bench = Bench(
        model=model,
        factory=as_factory(inputs),
        adapter=model_adapter,
        tolerance=TOLERANCES[dtype] if tolerance is None else tolerance,
        exact=dtype in (torch.float32, torch.float64),
        settings=_settings(model_adapter, stages) if compressor is None else _compressed(compressor, stages),
        attention=_offered(model_adapter.model, attention),
    )
    checks: list[Check] = []
    for name in promise_names:
        for case in PROMISES[name](bench):
            (check,) = run_cases(name, [case])
            checks.append(check)
            if on_check is not None:
                on_check(check)
    results = CheckResults(f"{type(model_adapter.model).__name__} ({type(model_adapter).__name__})", tuple(checks))
    return results.raise_if_failed() if raise_on_failure else results


def _settings(adapter: Adapter, stages: Sequence[Any] | None) -> tuple[Setting, ...]:
    if stages is not None:
        own = [Setting("the given stages", stages)]
        return tuple(own)
    settings = [Setting("two stages", TWO_STAGES), Setting("a stage at the input", AT_INPUT)]
    other = adapter.allowed_positions - {"original"}
    settings += [Setting(f"positions {name}", TWO_STAGES, name) for name in sorted(other)]
    return tuple(settings)


def _compressed(compressor: Mapping[str, Any] | str, stages: Sequence[Any] | None) -> tuple[Setting, ...]:
    given = {"name": compressor, "keep": "60%"} if isinstance(compressor, str) else dict(compressor)
    if COMPRESSORS.build(CompressorSpec.parse(given)).draws:
        raise InputError(
            f"compressor: {given['name']!r} draws by the prompt, and a prompt with its answer is another one; give "
            "another method"
        )
    behind = TWO_STAGES if stages is None else stages
    return (
        Setting(f"{given['name']} and two stages", behind, compressor=given),
        Setting(f"{given['name']} alone", (), compressor=given),
    )


def _offered(model: nn.Module, attention: Sequence[str]) -> tuple[str, ...]:
    """The implementations that the model itself takes."""
    return tuple(name for name in attention if _takes(model, name))


def _takes(model: nn.Module, name: str) -> bool:
    from .bench import attention_of

    try:
        with attention_of(model, name):
            return True
    except (ValueError, ImportError):
        return False
