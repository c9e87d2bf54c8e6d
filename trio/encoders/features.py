"""`compress_features`: fewer of the visual tokens that somebody else encoded, without a tower and a language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch

from ..core.token_batch import TokenBatch, batches
from ..core.tokens import ImageTokens, Signal, VisualTokens
from ..errors import InputError, UnknownNameError
from ..spec.rules import parse_share
from .compressors.base import COMPRESSORS, Compressor

#: Rows of features as the language model takes them, ``(n, D) -> (n, D')``, each row by itself.
Projector = Callable[[torch.Tensor], torch.Tensor]


def compress_features(
    features: Sequence[torch.Tensor] | torch.Tensor,
    origins: Sequence[ImageTokens] | ImageTokens,
    compressor: str | Mapping[str, Any] | type[Compressor] | Compressor = "divprune-64",
    *,
    keep: int | str | Sequence[int] | None = None,
    signals: Sequence[Mapping[Signal, torch.Tensor]] | None = None,
    class_tokens: Sequence[torch.Tensor] | None = None,
    seeds: Sequence[int] | None = None,
    project: Projector | None = None,
) -> list[VisualTokens]:
    """Compresses given features on given grids, all inputs together: features in, features out.

    Args:
        features: of each input ``(n, D)``, or one tensor ``(G, n, D)``; in the language model's space for compressors
            that compare tokens there (`Compressor.space`) where `project` is None, else as they leave the tower.
        origins: of each input's tokens, or one for all inputs; `ImageTokens.from_grid` makes them of a grid.
        compressor: a name with the number of tokens (``"divprune-64"``), a name, a mapping with `name`, `keep` and
            parameters, a class or an object.
        keep: tokens to keep of each input, a percentage such as ``"11.1%"``, or a number (0 or more) for each input;
            not for compressors that decide.
        signals: of each input what `Compressor.reads` asks for; first dimension n (``cls``: ``(D,)``).
        class_tokens: of each input ``(D,)``, as `features`; for compressors that keep the class token.
        seeds: of each input, for compressors that draw; the same seed draws the same tokens.
        project: the projector.

    Returns:
        For each input the tokens left: features (projected where `project` is given), origins, sizes, `token_index`
        (the input's token that each stands in for) and `merge_map` (for each of the input's tokens the one that it went
        into, -1 where it was dropped). An input that loses no token comes back as it is, projected.

    Raises:
        UnknownNameError: no compressor of that name.
        InputError: the number is missing or wrong, lengths do not fit, or a signal is missing.
    """
    rows = list(features)
    places = [origins] * len(rows) if isinstance(origins, ImageTokens) else list(origins)
    if keep is None or isinstance(keep, int | str):
        counts, (part, number) = None, named_compressor(compressor, keep)
    else:
        counts, (part, number) = [int(n) for n in keep], named_compressor(compressor, None, counted=True)
    _check_lengths(rows, places, counts, signals, class_tokens, seeds)
    tokens = [
        VisualTokens.start(
            row,
            place,
            None if signals is None else signals[at],
            class_token=None if class_tokens is None else class_tokens[at],
            seed=0 if seeds is None else seeds[at],
        )
        for at, (row, place) in enumerate(zip(rows, places, strict=True))
    ]
    if counts is None:
        counts = [kept_of(number, one.tokens) for one in tokens]
    _check_signals(part, tokens, counts)
    return compress_tokens(part, tokens, counts, project)


def compress_tokens(
    compressor: Compressor, tokens: Sequence[VisualTokens], counts: Sequence[int], project: Projector | None = None
) -> list[VisualTokens]:
    """Compresses inputs together, each to what it is alone.

    Args:
        compressor: drops or merges.
        tokens: of each input at the start.
        counts: tokens to leave of each, 0 to its number; where that is its number an input stays as it is (unless the
            compressor decides).
        project: the projector; used in front of compressors that compare tokens as the language model sees them.
    """
    done = list(tokens)
    early = project is not None and compressor.space == "language"
    if project is not None and early:
        done = _projected(done, project)
    losing = [
        at
        for at, (one, count) in enumerate(zip(done, counts, strict=True))
        if count and (count < one.tokens or compressor.decides_count)
    ]
    for at, count in enumerate(counts):
        if not count:
            done[at] = _none_of(done[at])
    if losing:
        for members in batches([done[at].tokens for at in losing], done[losing[0]].features.shape[-1]):
            group = [losing[member] for member in members]
            batch = TokenBatch.stack([done[at] for at in group])
            out = compressor.compress_batch(batch, [counts[at] for at in group])
            for at, one in zip(group, out.unstack(), strict=True):
                done[at] = one
    return done if project is None or early else _projected(done, project)


def _projected(tokens: Sequence[VisualTokens], project: Projector) -> list[VisualTokens]:
    """The same with projected features, in one call."""
    if not tokens:
        return []
    rows = [one.features for one in tokens]
    rows += [one.cls[None] for one in tokens if one.cls is not None]
    projected = iter(torch.split(project(torch.cat(rows)), [len(row) for row in rows]))
    features = [next(projected) for _ in tokens]
    return [
        replace(one, features=row, cls=None if one.cls is None else next(projected)[0])
        for one, row in zip(tokens, features, strict=True)
    ]


def _none_of(tokens: VisualTokens) -> VisualTokens:
    """An input of which no token is left."""
    none = torch.zeros(0, dtype=torch.int64)
    return replace(
        tokens,
        features=tokens.features[:0],
        origins=tokens.origins.select(none),
        sizes=tokens.sizes[:0],
        token_index=tokens.token_index[:0],
        merge_map=torch.full_like(tokens.merge_map, -1),
        signals={one: value if one.kind == "cls" else value[:0] for one, value in tokens.signals.items()},
    )


def _check_lengths(
    rows: Sequence[torch.Tensor],
    places: Sequence[ImageTokens],
    counts: Sequence[int] | None,
    signals: Sequence[Any] | None,
    class_tokens: Sequence[Any] | None,
    seeds: Sequence[int] | None,
) -> None:
    beside = {"origins": places, "keep": counts, "signals": signals, "class_tokens": class_tokens, "seeds": seeds}
    for name, given in beside.items():
        if given is not None and len(given) != len(rows):
            raise InputError(f"{name}: found {len(given)} for {len(rows)} inputs; give one for each input")
    for at, (row, place) in enumerate(zip(rows, places, strict=True)):
        if row.ndim != 2 or len(row) != place.tokens:
            raise InputError(
                f"features[{at}]: found shape {tuple(row.shape)} for origins of {place.tokens} tokens; give "
                "(tokens, width), one row for each token of the grid"
            )
        if counts is not None and not 0 <= counts[at] <= len(row):
            raise InputError(f"keep[{at}]: found {counts[at]}; input {at} has {len(row)} tokens: give 0 to {len(row)}")


def _check_signals(part: Compressor, tokens: Sequence[VisualTokens], counts: Sequence[int]) -> None:
    for at, (one, count) in enumerate(zip(tokens, counts, strict=True)):
        if not count or (count == one.tokens and not part.decides_count):
            continue
        for signal in part.reads():
            if signal not in one.signals:
                name = COMPRESSORS.name_of(type(part)) or type(part).__name__
                raise InputError(
                    f"signals[{at}]: {name!r} reads {signal.kind} of block {signal.layer}, which is missing; give "
                    f"{{{signal!r}: tensor}} for each input, or a compressor that reads nothing off the tower"
                )


def kept_of(keep: int | Fraction | None, tokens: int) -> int:
    """The number to keep of so many; all where the compressor decides."""
    if keep is None:
        return tokens
    return min(tokens, keep if isinstance(keep, int) else max(1, int(keep * tokens + Fraction(1, 2))))


def named_compressor(
    given: str | Mapping[str, Any] | type[Compressor] | Compressor,
    keep: int | str | None,
    *,
    counted: bool = False,
) -> tuple[Compressor, int | Fraction | None]:
    """A compressor in any of the forms that `compress_features` takes, and how many tokens it keeps.

    Args:
        given: the compressor.
        keep: as `compress_features` takes it.
        counted: the number of each input is given elsewhere.

    Returns:
        The compressor, and a count or a share; None where it decides, or `counted`.

    Raises:
        UnknownNameError: no compressor of that name.
        InputError: the number is missing, wrong or given twice.
    """
    if isinstance(given, Mapping) and "keep" in given:
        if keep is not None or counted:
            raise InputError("keep is given twice, in the compressor's mapping and beside it; give it once")
        keep = given["keep"]
        given = {name: value for name, value in given.items() if name != "keep"}
    if isinstance(given, str) and keep is None and not counted:
        name, _, count = given.rpartition("-")
        if count.isdigit() and name in COMPRESSORS.names():
            given, keep = name, int(count)
    try:
        part: Compressor = COMPRESSORS.build(given)
    except UnknownNameError as error:
        raise UnknownNameError(f"{error} A count behind the name is the number of tokens: 'visionzip-64'.") from error
    if counted and not part.decides_count:
        return part, None
    return part, _number(part, keep)


def _number(part: Compressor, keep: int | str | None) -> int | Fraction | None:
    name = COMPRESSORS.name_of(type(part)) or type(part).__name__
    if part.decides_count:
        if keep is not None:
            raise InputError(f"keep: found {keep!r}, but {name!r} decides its own count; leave it out")
        return None
    if keep is None:
        raise InputError(f"keep: missing; say how many tokens {name!r} leaves, as in '{name}-64' or keep='11.1%'")
    if isinstance(keep, str):
        try:
            share = parse_share(keep)
        except ValueError as error:
            raise InputError(f"keep: found {keep!r}; give a count, or a percentage such as '11.1%'") from error
        if 0 < share <= 1:
            return share
    elif isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1:
        return keep
    raise InputError(f"keep: found {keep!r}; give a count of 1 or more, or a percentage above 0% and up to 100%")


__all__ = ["compress_features"]
