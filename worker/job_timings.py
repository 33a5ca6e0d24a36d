"""Where a job's time goes, for clients that ask. Pure but for the clock."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from worker.job import Request, Result


class JobTimings:
    """A job's clock: seconds by step, summed over its turns."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._steps: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Add the body's time to a step."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._steps[name] = self._steps.get(name, 0.0) + time.monotonic() - began

    def total_s(self) -> float:
        """Return the seconds since the job began."""
        return time.monotonic() - self._began

    def to_dict(self, queued_s: float, node_s: Mapping[str, float]) -> dict[str, Any]:
        """Return the times for `return_timings`: seconds, to the millisecond.

        The time in ComfyUI's queue (`queued_s`) counts as queueing, not as running.
        """
        steps = {"models": 0.0, "inputs": 0.0, "queueing": 0.0, "running": 0.0, "delivering": 0.0, **self._steps}
        steps["queueing"] += queued_s
        steps["running"] -= queued_s
        return {
            **{f"{name}_s": round(value, 3) for name, value in steps.items()},
            "total_s": round(self.total_s(), 3),
            "nodes_s": {node_id: round(value, 3) for node_id, value in node_s.items()},
        }


def with_timings(
    result: Result, request: Request, timings: JobTimings, queued_s: float = 0.0, node_s: Mapping[str, float] | None = None
) -> Result:
    """Return a job's result with its timings, if the client asked for them."""
    return replace(result, timings=timings.to_dict(queued_s, node_s or {})) if request.return_timings else result
