"""The outcome of seeding one model on one volume. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from worker.seed.errors import ModelUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from worker.errors import WorkerError

How = Literal["ready", "by_hand", "adopted", "sent", "failed", "cancelled"]

GOOD: frozenset[How] = frozenset({"ready", "by_hand", "adopted", "sent"})
"""A worker can use it."""

WORDS: dict[How, str] = {
    "ready": "was there",
    "by_hand": "there, put by hand",
    "adopted": "there, now sealed",
    "sent": "seeded",
    "failed": "FAILED",
    "cancelled": "not finished",
}
"""The words for people."""


NEWER: Final = "its source has a newer one, which needs another name or a pin to be downloaded"
"""About an existing file that its list does not pin."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of seeding one model on one volume. `moved_bytes` were sent to the volume in this run."""

    model: str
    volume: str
    how: How
    size_bytes: int = 0
    moved_bytes: int = 0
    seconds: float = 0.0
    error: WorkerError | None = None
    note: str | None = None

    @property
    def good(self) -> bool:
        """Return whether a worker can use it."""
        return self.how in GOOD

    def _code(self) -> str | None:
        if isinstance(self.error, ModelUnavailable) and self.error.cause:
            return self.error.cause
        return self.error.code if self.error else None

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome for `--json`."""
        return {
            "model": self.model,
            "volume": self.volume,
            "how": self.how,
            "size_bytes": self.size_bytes,
            "moved_bytes": self.moved_bytes,
            "seconds": round(self.seconds, 3),
            "error": str(self.error) if self.error else None,
            "code": self._code(),
            "note": self.note,
        }


def grouped_outcomes(outcomes: Iterable[Outcome]) -> list[tuple[Outcome, str]]:
    """Join equal outcomes of several volumes for the screen, and name these volumes unless they are all."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.how, str(outcome.error)), []).append(outcome)
    alone = len(groups) == 1
    slowest = {key: max(group, key=lambda outcome: outcome.seconds) for key, group in groups.items()}
    return [
        (slowest[key], "" if alone else " on " + ", ".join(outcome.volume for outcome in group))
        for key, group in groups.items()
    ]
