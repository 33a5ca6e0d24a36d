"""What goes wrong, with which requests, and how often. Pure, shared by threads."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from devkit.hub.log import Origin, Request

FaultKind = Literal[
    "hang", "status", "drop", "expired", "cut", "short", "stall", "flip", "truncate", "ignore_range", "ignore_if_range", "slow",
    "size", "sha256", "without", "header", "weak",
]  # fmt: skip

MIB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong with `count` requests (None: all) after `skip` others that match passed unharmed.

    Matching: `file` is a glob over Request.file (one without a slash: over the last part), `route` a glob over Request.route,
    `origin` and `method` as they are. A fault about the body is spent only on an answer whose body it can reach: a flip outside
    the range asked for waits for the range that holds the byte.

    hang: nothing is answered for `hold_s` (None: until released). status: `status`, with Retry-After when `retry_after_s` is
    given. drop: the connection closes with no answer. expired: the CDN's 403 for an old signature.
    cut: the connection closes after `after_bytes` of the body (`reset`: with RST). short: it closes `missing_bytes` before the
    end. stall: silence after `after_bytes`, for `hold_s` (None: until released), then the rest. flip: the byte at `at_byte` of
    the file is wrong. truncate: the file seems `missing_bytes` shorter, headers included. ignore_range: 200 and the whole file.
    ignore_if_range: the range comes, whatever version If-Range asks for.
    slow: `bytes_per_s`, over all connections together, or each (`shared=False`). `sticky`: a connection that was struck once
    stays so for whatever it asks, and `count` counts connections.
    size, sha256: metadata names `value` instead of the truth. without: a file's answer lacks the header `value`. header: it has
    this one more (`Name: value`). weak: its ETag is weak.
    """

    kind: FaultKind
    file: str = "*"
    route: str = "*"
    origin: Origin | None = None
    method: str | None = None
    skip: int = 0
    count: int | None = 1
    status: int = 503
    retry_after_s: int | None = None
    after_bytes: int = 0
    at_byte: int = 0
    missing_bytes: int = 1
    hold_s: float | None = None
    bytes_per_s: int = MIB
    shared: bool = True
    sticky: bool = False
    reset: bool = False
    value: str | int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(FaultKind):
            raise ValueError(f"unknown fault {self.kind!r}: one of {', '.join(get_args(FaultKind))}")
        if self.kind in {"size", "sha256", "without", "header"} and self.value is None:
            raise ValueError(f"a {self.kind} fault needs the value that shall be named")
        if self.bytes_per_s < 1:
            raise ValueError("bytes_per_s must be at least 1")

    def mark(self, part: range, size: int) -> int | None:
        """Return where a body fault strikes in a file of `size` bytes when `part` is sent, or None."""
        match self.kind:
            case "slow":
                return part.start
            case "flip":
                at = self.at_byte + (size if self.at_byte < 0 else 0)
                return at if at in part else None
            case "short":
                return part.stop - self.missing_bytes if self.missing_bytes <= len(part) else None
            case _:
                return part.start + self.after_bytes if self.after_bytes < len(part) else None


class Pace:
    """Hands out permission to send so that no more than `bytes_per_s` leave."""

    def __init__(self, bytes_per_s: int) -> None:
        self.slice_bytes = max(1, min(MIB // 4, bytes_per_s // 20))
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at_s = 0.0

    def delay_s(self, size_bytes: int) -> float:
        """Return how long to wait before these bytes may be sent."""
        with self._lock:
            now_s = time.monotonic()
            start_s = max(now_s, self._free_at_s)
            self._free_at_s = start_s + size_bytes / self._bytes_per_s
            return start_s - now_s


class Rule:
    """A fault and how often it has met a request."""

    def __init__(self, number: int, fault: Fault) -> None:
        self.number = number
        self.fault = fault
        self.seen = 0
        self.fired = 0
        self._struck: set[int] = set()
        self._pace = Pace(fault.bytes_per_s)

    def pace(self) -> Pace:
        """Return the pace of one body: its own, or the one that all bodies under this fault share."""
        return self._pace if self.fault.shared else Pace(self.fault.bytes_per_s)

    def matches(self, request: Request) -> bool:
        """Return whether the fault applies to this request."""
        fault = self.fault
        return (
            request.is_about(fault.file)
            and fnmatchcase(request.route, fault.route)
            and fault.origin in {None, request.origin}
            and fault.method in {None, request.method}
        )

    def spend(self, request: Request) -> bool:
        """Count one matching request; whether the fault befalls it."""
        if self.fault.sticky and request.connection in self._struck:
            return True
        self.seen += 1
        if self.seen <= self.fault.skip or (self.fault.count is not None and self.fired >= self.fault.count):
            return False
        self.fired += 1
        self._struck.add(request.connection)
        return True


class Book:
    """The faults asked for, in order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._made = 0

    def add(self, fault: Fault) -> int:
        """Ask for a fault; returns its number."""
        with self._lock:
            self._made += 1
            self._rules.append(Rule(self._made, fault))
            return self._made

    def clear(self) -> None:
        """Remove all faults."""
        with self._lock:
            self._rules.clear()

    def state(self) -> list[dict[str, Any]]:
        """Return each fault's fields, and how many requests it has `seen` and `fired` at."""
        with self._lock:
            return [{"id": r.number, "seen": r.seen, "fired": r.fired, **asdict(r.fault)} for r in self._rules]

    def take(self, request: Request, kinds: Iterable[FaultKind], reaches: Callable[[Fault], bool]) -> list[Rule]:
        """Return every fault of these kinds that applies to the request, and use them up."""
        wanted = set(kinds)
        with self._lock:
            met = (r for r in self._rules if r.fault.kind in wanted and r.matches(request) and reaches(r.fault))
            return [rule for rule in met if rule.spend(request)]

    def take_first(self, request: Request, kinds: Iterable[FaultKind]) -> Rule | None:
        """Return the first of these kinds that applies to the request. The others are not used up."""
        wanted = set(kinds)
        with self._lock:
            met = (r for r in self._rules if r.fault.kind in wanted and r.matches(request))
            return next((rule for rule in met if rule.spend(request)), None)
