"""Every request as it went, and who waits where. Pure, shared by threads."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

Origin = Literal["hub", "cdn"]
Outcome = Literal["open", "done", "cut", "gone"]

TICK_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the server saw it.

    `route` is one of resolve, cdn, files, redirect, civitai, civitai-info, whoami, api/info, api/tree, api/paths-info,
    xet/token, xet/reconstruction, xet/piece, unknown.
    `file` is `org/repo/path`, `org/repo`, or a plain source's path under the root. `bytes_sent` counts the file's own bytes
    handed to the kernel: a client that dies leaves a few MiB of them unread in socket buffers. `outcome`: open, done, cut (by a
    fault), gone (the client went away); it follows the last byte by a moment. `faults` are the kinds that were applied. Times
    are of the server's monotonic clock.
    """

    number: int
    connection: int
    origin: Origin
    method: str
    path: str
    query: str
    route: str
    file: str
    range: str | None
    had_auth: bool
    had_query_token: bool
    user_agent: str
    started_s: float
    ended_s: float | None = None
    status: int = 0
    bytes_sent: int = 0
    outcome: Outcome = "open"
    faults: tuple[str, ...] = ()

    def is_about(self, pattern: str) -> bool:
        """Return whether the file matches a glob: as a whole, or its last part if the glob has no slash."""
        return fnmatchcase(self.file if "/" in pattern else self.file.rpartition("/")[2], pattern)


class Ledger:
    """Every request, and who waits where; one condition wakes all who watch."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.closing = threading.Event()
        self.stalled = 0
        self._releases = 0
        self._entries: dict[int, Request] = {}
        self._made = 0
        self._connections = 0

    def connection(self) -> int:
        """Return a number for a new connection."""
        with self.changed:
            self._connections += 1
            return self._connections

    def number(self) -> int:
        """Return a number for a new request."""
        with self.changed:
            self._made += 1
            return self._made

    def open(self, request: Request) -> None:
        """Record a new request."""
        with self.changed:
            self._entries[request.number] = request
            self.changed.notify_all()

    def update(self, request: Request) -> None:
        """Record how far it is; one that was cleared from the log meanwhile stays away."""
        with self.changed:
            if request.number in self._entries:
                self._entries[request.number] = request
            self.changed.notify_all()

    def requests(self) -> list[Request]:
        """Return all of them, oldest first."""
        with self.changed:
            return list(self._entries.values())

    def clear(self) -> None:
        """Forget all requests, those under way included."""
        with self.changed:
            self._entries.clear()

    def release(self) -> None:
        """Continue everything that is held now."""
        with self.changed:
            self._releases += 1
            self.changed.notify_all()

    def hold(self, hold_s: float | None, gone: Callable[[], bool]) -> None:
        """Return when released, when the time is over, when the client has gone or when the hub closes."""
        end_s = None if hold_s is None else time.monotonic() + hold_s
        with self.changed:
            mine = self._releases
            self.stalled += 1
            self.changed.notify_all()
            while self._releases == mine and not self.closing.is_set() and not gone():
                left_s = TICK_S if end_s is None else min(TICK_S, end_s - time.monotonic())
                if left_s <= 0:
                    break
                self.changed.wait(left_s)
            self.stalled -= 1
            self.changed.notify_all()


class Reading:
    """What can be told from the requests, wherever the hub runs."""

    @property
    def requests(self) -> list[Request]:
        """Return every request since the log was last cleared, oldest first, including running ones."""
        raise NotImplementedError

    @property
    def leaks(self) -> list[Request]:
        """Requests that brought a token to the CDN, which is another host: each one is the client's defect.

        Those to Xet's storage bring one of its own, and are refused with any other.
        """
        there = [r for r in self.requests if r.origin == "cdn"]
        return [r for r in there if r.had_query_token or (r.had_auth and r.route != "xet/reconstruction")]

    def bytes_sent(self, file: str = "*") -> int:
        """Return the bytes of matching files' content (a glob as in Request.is_about) that clients got or are getting."""
        return sum(r.bytes_sent for r in self.requests if r.is_about(file))
