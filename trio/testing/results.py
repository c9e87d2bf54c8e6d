"""What a conformance suite found, check by check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

#: One thing to check: its name, and a function that returns what it measured or raises.
Case = tuple[str, Callable[[], str]]


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        promise: the group that it belongs to, for example "batch".
        name: what is checked, in a few words.
        passed: whether it holds.
        detail: the numbers that were measured, or why it does not hold.
        seconds: how long it took.
    """

    promise: str
    name: str
    passed: bool
    detail: str
    seconds: float = 0.0

    def __str__(self) -> str:
        """One line."""
        return f"[{'ok' if self.passed else 'FAILED'}] {self.promise}: {self.name}: {self.detail}"


@dataclass(frozen=True)
class CheckResults:
    """The checks of a suite, in order.

    Attributes:
        subject: what was checked.
        checks: every check, passed or not.
    """

    subject: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    def raise_if_failed(self) -> CheckResults:
        """The results themselves.

        Raises:
            AssertionError: a check did not pass; the message names each such one with its numbers.
        """
        if self.failures:
            lines = "\n".join(f"  {check}" for check in self.failures)
            raise AssertionError(
                f"{self.subject}: {len(self.failures)} of {len(self.checks)} checks do not hold:\n{lines}"
            )
        return self

    def __iter__(self) -> Iterator[Check]:
        """Over the checks."""
        return iter(self.checks)

    def __len__(self) -> int:
        """How many checks ran."""
        return len(self.checks)

    def __str__(self) -> str:
        """One line a check."""
        return "\n".join(map(str, self.checks))


def run_cases(promise: str, cases: Iterable[Case]) -> list[Check]:
    """Runs every case of a group; one that fails does not keep the others from running."""
    import time

    checks = []
    for name, case in cases:
        begin = time.perf_counter()
        try:
            passed, detail = True, case()
        except AssertionError as error:
            passed, detail = False, str(error) or "an assertion failed"
        except Exception as error:  # whatever a new part raises is a finding about it, not the end of the suite
            passed, detail = False, f"{type(error).__name__}: {error}"
        checks.append(Check(promise, name, passed, detail, time.perf_counter() - begin))
    return checks


def require(condition: bool, message: str) -> None:
    """Like `assert`, but not taken out by ``python -O``."""
    if not condition:
        raise AssertionError(message)
