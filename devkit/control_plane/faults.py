"""What goes wrong, with which requests of workers, and how often. Pure, shared by threads."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

FaultKind = Literal["status", "slow", "drop", "lose", "silent", "garble"]
FaultRoute = Literal["take", "stop", "progress", "result", "stream", "ping"]


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong with `count` requests (None: all) of a route, after `skip` others that match passed unharmed.

    `pod` and `job` are globs; only posts are about a job. A poll that is already held when a fault is asked for goes unharmed.

    status: nothing is done, the answer is `status`, with `body` if there is one. drop: nothing is done, the connection closes.
    lose: all is done, then the connection closes without an answer. slow: all is done, then the answer takes another `delay_s`.
    silent: nothing is done, and no answer comes. garble: all is done, and the answer is `body`, with the job's id for `$ID`.
    """

    kind: FaultKind
    route: FaultRoute
    pod: str = "*"
    job: str = "*"
    skip: int = 0
    count: int | None = 1
    status: int = 500
    delay_s: float = 1.0
    body: str = ""
    content_type: str = "application/json"

    def __post_init__(self) -> None:
        for value, allowed in ((self.kind, get_args(FaultKind)), (self.route, get_args(FaultRoute))):
            if value not in allowed:
                raise ValueError(f"unknown {value!r}: one of {', '.join(allowed)}")


class Rule:
    """A fault, how many requests matched it (`seen`) and how many it befell (`fired`)."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.seen = 0
        self.fired = 0

    def matches(self, route: FaultRoute, pod_id: str, job_id: str) -> bool:
        """Return whether the fault applies to this request."""
        return self.fault.route == route and fnmatchcase(pod_id, self.fault.pod) and fnmatchcase(job_id, self.fault.job)

    def spend(self) -> bool:
        """Count one matching request; whether the fault befalls it."""
        self.seen += 1
        if self.seen <= self.fault.skip or (self.fault.count is not None and self.fired >= self.fault.count):
            return False
        self.fired += 1
        return True


class Book:
    """The faults asked for, in order; a request meets the first that is still to be spent."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: list[Rule] = []

    def add(self, fault: Fault) -> Rule:
        """Ask for a fault."""
        with self._lock:
            self._rules.append(rule := Rule(fault))
            return rule

    def clear(self) -> None:
        """Remove all faults."""
        with self._lock:
            self._rules.clear()

    def take(self, route: FaultRoute, pod_id: str, job_id: str = "") -> Fault | None:
        """Return the fault that applies to this request, and use it up."""
        with self._lock:
            met = (rule for rule in self._rules if rule.matches(route, pod_id, job_id))
            return next((rule.fault for rule in met if rule.spend()), None)
