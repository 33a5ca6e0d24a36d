"""The body of a file: parallel byte ranges into a partial, until nothing is missing. Touches the network.

Each thread has a connection and a buffer of its own. A range that fails goes back to the others with what is left of it, so
whatever the faults are, bytes that came once are not asked for again.
"""

from __future__ import annotations

import errno
import http.client
import logging
import re
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NoReturn

from worker.errors import ContentMismatch, EnsureCancelled, SourceChanged, SourceRefused
from worker.models.hub import Backoff
from worker.models.partial import DiskFailed, Stuck
from worker.models.wire import OK, PARTIAL, TRANSIENT, UNSATISFIABLE, Channel, bare_etag, retry_after_s

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.models.hub import Hub, Remote
    from worker.models.partial import Partial
    from worker.models.progress import CancelToken

log = logging.getLogger(__name__)

MIB: Final = 1024 * 1024
_DOUBTS: Final = 3
_TICK_S: Final = 0.2
_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
# What a signed address answers once it has expired, by the name of the store behind it.
_ADDRESS_IS_OLD: Final = frozenset({400, 401, 403, 404, 410})


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a body is fetched.

    `unsaved_bytes` bounds, for each connection, what is written and not yet journalled: a killed worker costs that much and
    a buffer. `patience_s` is how long no byte at all may come. A partial that another worker began
    is left alone for `handover_s`, so that whoever still writes into it notices: two hosts that write one part of a file keep
    each other waiting for half a minute on MooseFS. `stuck_s` is how long a write into it may take then: what a host was
    writing when it died stays locked for two minutes.
    """

    connections: int = 8
    request_bytes: int = 64 * MIB
    smallest_bytes: int = 4 * MIB
    buffer_bytes: int = 2 * MIB
    unsaved_bytes: int = 32 * MIB
    patience_s: float = 120.0
    handover_s: float = 1.5
    stuck_s: float = 8.0


class _Retry(Exception):  # noqa: N818 - never leaves this module
    """This answer was no good; the next one may be."""

    def __init__(self, reason: str, named_s: float | None = None) -> None:
        super().__init__(reason)
        self.named_s = named_s


class _NoRanges(Exception):  # noqa: N818 - never leaves this module
    """The server gives the whole file whatever it is asked for."""


class Fetch:
    """One file's body on its way; `run` does it all."""

    def __init__(self, hub: Hub, remote: Remote, partial: Partial, tuning: Tuning, cancel: CancelToken) -> None:
        self._hub = hub
        self._remote = remote
        self._partial = partial
        self._tuning = tuning
        self._cancel = cancel
        self._lock = threading.Lock()
        self._renewing = threading.Lock()
        self._backoff = Backoff(remote.where, tuning.patience_s, tuning.connections)
        self._doubts = 0
        self._todo: deque[tuple[int, int]] = deque()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._channels: list[Channel] = []
        self.fetched_bytes = 0

    def run(self, on_bytes: Callable[[int], None] = lambda _: None) -> None:
        """Return when every byte is in the partial.

        Raises `EnsureCancelled` within a second, `Taken` when the partial is no longer ours, `SourceUnreachable`,
        `SourceChanged`, `ContentMismatch` (of the length), `SourceRefused`, what `Hub.look_up` raises, and `DiskFailed`.
        """
        try:
            self._run(on_bytes)
        except _NoRanges:
            log.warning("%s ignores ranges: one connection, and no resuming", self._remote.where)
            self._remote = replace(self._remote, has_ranges=False)
            self._run(on_bytes)

    def _run(self, on_bytes: Callable[[int], None]) -> None:
        gaps = self._partial.gaps()
        if not gaps:
            return
        self._todo = deque(gaps) if self._remote.has_ranges else deque([(gaps[0][0], self._partial.size_bytes)])
        self._stop, self._error, self._channels = threading.Event(), None, []
        threads = [threading.Thread(target=self._work, name=f"range-{n}", daemon=True) for n in range(self._width())]
        for thread in threads:
            thread.start()
        try:
            self._watch(threads, on_bytes)
        finally:
            self._end(threads)
        if self._error:
            raise self._error

    def _width(self) -> int:
        missing = sum(end - start for start, end in self._todo)
        return max(1, min(self._tuning.connections, missing // self._tuning.smallest_bytes)) if self._remote.has_ranges else 1

    def _watch(self, threads: list[threading.Thread], on_bytes: Callable[[int], None]) -> None:
        for thread in threads:
            while thread.is_alive() and not self._stop.is_set():
                thread.join(_TICK_S)
                on_bytes(self._partial.done_bytes)
                if self._cancel.is_set():
                    raise EnsureCancelled(self._remote.where)
                self._check_stuck()

    def _check_stuck(self) -> None:
        """Whether the disk hangs: connections end by their own timeouts, a write on a network volume may not end at all."""
        stuck_s = self._partial.stuck_s
        if not stuck_s:
            return
        if self._partial.inherited and stuck_s > self._tuning.stuck_s:
            raise Stuck
        if stuck_s > self._tuning.patience_s:
            raise DiskFailed(TimeoutError(errno.ETIMEDOUT, f"it took no byte for {self._tuning.patience_s:.0f} s"))

    def _end(self, threads: list[threading.Thread]) -> None:
        self._stop.set()
        with self._lock:
            for channel in self._channels:
                channel.break_off()
        # A thread that is connecting, or that a slow disk holds, ends by itself later: it finds everything stopped.
        until_s = time.monotonic() + _TICK_S
        for thread in threads:
            thread.join(max(0.0, until_s - time.monotonic()))

    # --- in the threads

    def _work(self) -> None:
        stop = self._stop
        channel = Channel(self._hub.network)
        buffer = memoryview(bytearray(self._tuning.buffer_bytes))
        with self._lock:
            self._channels.append(channel)
        try:
            while not stop.is_set() and (span := self._take()) is not None:
                self._pull(channel, span, buffer)
        except BaseException as exc:  # noqa: BLE001 - handed over to the thread that runs this fetch
            with self._lock:
                if not stop.is_set():
                    self._error = exc
                stop.set()
        finally:
            channel.close()

    def _take(self) -> tuple[int, int] | None:
        """The next range to ask for: large ones first, small ones at the end, so that all connections finish together."""
        with self._lock:
            if not self._todo:
                return None
            start, end = self._todo.popleft()
            if not self._remote.has_ranges:
                return start, end
            left = sum(stop - begin for begin, stop in self._todo) + end - start
            share = left // (2 * self._tuning.connections)
            length = min(end - start, max(self._tuning.smallest_bytes, min(share, self._tuning.request_bytes)))
            if start + length < end:
                self._todo.appendleft((start + length, end))
            return start, start + length

    def _pull(self, channel: Channel, span: tuple[int, int], buffer: memoryview) -> None:
        """Fetch a range, or as much of it as comes; the rest is given back for whoever is next."""
        at, end = span
        try:
            response = self._open(channel, at, end, buffer)
            while at < end:
                length = _read(response, buffer[: end - at])
                self._partial.write(at, buffer[:length])
                at += length
                self._came(length)
            if not response.isclosed():
                channel.close()  # the server sends more than was asked for; a kept connection would go on with that
        except (_Retry, http.client.HTTPException, OSError) as exc:
            channel.close()
            delay_s = self._backoff.failed(
                f"{type(exc).__name__}: {exc}".removeprefix("_Retry: "), getattr(exc, "named_s", None)
            )
            self._stop.wait(delay_s)
        finally:
            if at < end:
                with self._lock:
                    self._todo.appendleft((at, end))

    def _came(self, length: int) -> None:
        self._backoff.progressed()
        with self._lock:
            self._doubts = 0
            self.fetched_bytes += length

    def _open(self, channel: Channel, start: int, end: int, buffer: memoryview) -> http.client.HTTPResponse:
        """An answer whose next byte is the one at `start`."""
        remote = self._remote
        response, _ = channel.get(remote.url, _headers(remote, start, end))
        status = response.status
        if status == PARTIAL:
            self._check_range(remote, response, start)
        elif status == OK:
            self._check_whole(remote, response, start)
            if start:
                _skip(response, start, buffer)
        elif status in TRANSIENT:
            raise _Retry(f"status {status}", retry_after_s(response.headers))
        elif status == UNSATISFIABLE:
            self._doubt(remote, self._wrong_size(response.headers.get("Content-Range", "")))
        elif status in _ADDRESS_IS_OLD:
            self._doubt(remote, SourceRefused(remote.where, status))
        else:
            raise SourceRefused(remote.where, status)
        return response

    def _check_range(self, remote: Remote, response: http.client.HTTPResponse, start: int) -> None:
        stated = response.headers.get("Content-Range", "")
        found = _CONTENT_RANGE.fullmatch(stated)
        if found is None or int(found[1]) != start:
            raise _Retry(f"asked for the bytes from {start}, got '{stated}'")
        if found[2] not in {"*", str(remote.size_bytes)}:
            self._doubt(remote, self._wrong_size(stated))

    def _check_whole(self, remote: Remote, response: http.client.HTTPResponse, start: int) -> None:
        if remote.sha256 is None and bare_etag(response.headers.get("ETag")) != bare_etag(remote.etag):
            raise SourceChanged(remote.where)
        length = response.headers.get("Content-Length")
        if length not in {None, str(remote.size_bytes)}:
            self._doubt(remote, self._wrong_size(f"/{length}"))
        if start and remote.has_ranges:
            self._doubt(remote, _NoRanges())

    def _wrong_size(self, stated: str) -> ContentMismatch:
        return ContentMismatch(self._remote.where, "size", str(self._remote.size_bytes), stated.rpartition("/")[2] or "another")

    def _doubt(self, remote: Remote, meaning: Exception) -> NoReturn:
        """Something is wrong with this address: ask for a fresh one, and believe what is wrong when that does not help."""
        with self._renewing:
            # Whoever comes second with the same old address finds it renewed already, and only tries again.
            if self._remote is remote:
                with self._lock:
                    self._doubts += 1
                    if self._doubts >= _DOUBTS:
                        raise meaning
                fresh = self._hub.renew(remote, self._cancel)
                if not fresh.same_content(remote):
                    raise SourceChanged(remote.where)
                self._remote = replace(fresh, has_ranges=remote.has_ranges)
        raise _Retry(str(meaning) or "ranges were ignored")


def _headers(remote: Remote, start: int, end: int) -> dict[str, str]:
    if not remote.has_ranges:
        return {}
    asked = {"Range": f"bytes={start}-{end - 1}"}
    # With no hash to find it later, bytes of a changed file must not come in: the server sends the whole new one instead.
    if remote.sha256 is None and remote.etag and not remote.etag.startswith("W/"):
        asked["If-Range"] = f'"{bare_etag(remote.etag)}"'
    return asked


def _skip(response: http.client.HTTPResponse, count: int, buffer: memoryview) -> None:
    while count:
        count -= _read(response, buffer[:count])


def _read(response: http.client.HTTPResponse, into: memoryview) -> int:
    length = response.readinto(into)
    if not length:
        raise _Retry("the connection was closed early")
    return length
