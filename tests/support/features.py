"""What checks say about the features that users ask for."""

from __future__ import annotations

from collections.abc import Iterable

from trio.testing import Check

PARTS = {
    "stages": ("decode", ""),
    "batch": ("batch", ""),
    "several images": ("decode", "two images"),
    "eager": ("attention", "eager"),
    "sdpa": ("attention", "sdpa"),
    "flex_attention": ("attention", "flex_attention"),
    "flash convention": ("attention", "flash-attention"),
    "beams": ("generation", "beams"),
    "no cache": ("generation", "use_cache=False"),
    "second turn": ("generation", "second turn, "),
    "new image in a later turn": ("generation", "new image"),
}


def features_of(results: Iterable[Check]) -> dict[str, str]:
    """ "yes" for each feature whose checks ran and passed, "stock" where the stock model itself cannot do all of it."""
    found = {}
    for feature, (promise, name) in PARTS.items():
        checks = [check for check in results if check.promise == promise and name in check.name]
        if checks and all(check.passed for check in checks):
            found[feature] = "stock" if any("not promised" in check.detail for check in checks) else "yes"
    return found
