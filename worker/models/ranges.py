"""The body of a file: parallel byte ranges into a `Sink`, until nothing is missing. Touches the network.

Each thread has a connection and a buffer of its own. Ranges are handed out from the front of the file, and none beyond what
the sink can take now. A range that fails goes back to the others with what is left of it, so whatever the faults are, bytes
that came once are not asked for again.
"""

from __future__ import annotations

import bisect
import http.client
import logging
import re
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NoReturn, Protocol

from worker.errors import ContentMismatch, EnsureCancelled, SourceChanged, SourceRefused
from worker.models.hub import Backoff
from worker.models.wire import OK, PARTIAL, TRANSIENT, UNSATISFIABLE, Channel, bare_etag, retry_after_s, what_failed

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.models.hub import Hub, Remote
    from worker.models.progress import CancelToken

log = logging.getLogger(__name__)

MIB: Final = 1024 * 1024
_DOUBTS: Final = 3
_TICK_S: Final = 0.2
_FULL_S: Final = 0.02  # how soon to look again whether a full sink takes more
_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
# What a signed address answers once it has expired, by the name of the store behind it.
_ADDRESS_IS_OLD: Final = frozenset({400, 401, 403, 404, 410})


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a body is fetched.

    `unsaved_bytes` bounds, for each connection, what is written and not yet journalled: a killed worker costs that much and
    a buffer. `ahead_bytes` bounds the memory for bytes that wait for their turn to be hashed; `request_bytes` for each
    connection is how far ahead they come. `patience_s` is how long no byte at all may come. A partial that another worker began
    is left alone for `handover_s`, so that whoever still writes into it notices: two hosts that write one part of a file keep
    each other waiting for half a minute on MooseFS. `stuck_s` is how long a write into it may take then: what a host was
    writing when it died stays locked for two minutes.
    """

    connections: int = 8
    request_bytes: int = 16 * MIB
    smallest_bytes: int = 4 * MIB
    buffer_bytes: int = 4 * MIB
    unsaved_bytes: int = 32 * MIB
    ahead_bytes: int = 64 * MIB
    patience_s: float = 120.0
    handover_s: float = 1.5
    stuck_s: float = 8.0


class Sink(Protocol):
    """Where a body's bytes go. Any thread writes, in any order; after a fault without ranges a byte may come a second time.

    A sink that keeps bytes until it can pass them on in order bounds what it keeps with `reach`: the first missing byte is
    always being fetched or the next to be, so a sink that raises its reach as that byte comes never waits in vain.
    """

    @property
    def size_bytes(self) -> int:
        """The whole file's length."""
        ...

    @property
    def done_bytes(self) -> int:
        """How many bytes are there, for the progress."""
        ...

    def gaps(self) -> list[tuple[int, int]]:
        """What is missing, half open and in order; asked once, before the first byte."""
        ...

    def reach(self) -> int:
        """The offset up to which bytes may come now, beyond the first missing one; `size_bytes` where any order will do."""
        ...

    def write(self, offset: int, view: memoryview) -> None:
        """Take bytes; the memory is used again after the return. It may wait for a slower consumer, not for other bytes.

        What it raises ends the fetch. `OSError` would be taken for the network's: wrap it.
        """
        ...

    def check(self) -> None:
        """Raise when what was written does not get through; asked a few times a second while the fetch goes on."""
        ...


class _Retry(Exception):  # noqa: N818 - never leaves this module
    """This answer was no good; the next one may be."""

    def __init__(self, reason: str, named_s: float | None = None) -> None:
        super().__init__(reason)
        self.named_s = named_s


class _NoRanges(Exception):  # noqa: N818 - never leaves this module
    """The server gives the whole file whatever it is asked for."""


class Fetch:
    """One file's body on its way; `run` does it all."""

    def __init__(self, hub: Hub, remote: Remote, sink: Sink, tuning: Tuning, cancel: CancelToken) -> None:
        self._hub = hub
        self._remote = remote
        self._sink = sink
        self._tuning = tuning
        self._cancel = cancel
        self._lock = threading.Lock()
        self._renewing = threading.Lock()
        self._backoff = Backoff(remote.where, tuning.patience_s, tuning.connections)
        self._doubts = 0
        self._todo: list[tuple[int, int]] = []
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._channels: list[Channel] = []
        self.fetched_bytes = 0

    def run(self, on_bytes: Callable[[int], None] = lambda _: None) -> None:
        """Return when every byte is in the sink.

        Raises `EnsureCancelled` within a second, `SourceUnreachable`, `SourceChanged`, `ContentMismatch` (of the length),
        `SourceRefused`, what `Hub.look_up` raises, and what the sink does.
        """
        try:
            self._run(on_bytes)
        except _NoRanges:
            log.warning("%s ignores ranges: one connection, and no resuming", self._remote.where)
            self._remote = replace(self._remote, has_ranges=False)
            self._run(on_bytes)

    def _run(self, on_bytes: Callable[[int], None]) -> None:
        gaps = self._sink.gaps()
        if not gaps:
            return
        self._todo = gaps if self._remote.has_ranges else [(gaps[0][0], self._sink.size_bytes)]
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
                on_bytes(self._sink.done_bytes)
                if self._cancel.is_set():
                    raise EnsureCancelled(self._remote.where)
                self._sink.check()

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
        while (span := self._try_take()) == (0, 0):
            self._stop.wait(_FULL_S)
        return span

    def _try_take(self) -> tuple[int, int] | None:
        """As `_take`; an empty range when the sink is full for now."""
        with self._lock:
            if not self._todo or self._stop.is_set():
                return None
            start, end = self._todo[0]
            reach = self._sink.reach() if self._remote.has_ranges else end
            if start >= reach:
                return 0, 0
            left = sum(stop - begin for begin, stop in self._todo)
            share = left // (2 * self._tuning.connections)
            length = max(self._tuning.smallest_bytes, min(share, self._tuning.request_bytes))
            stop = min(end, reach, start + length) if self._remote.has_ranges else end
            self._todo[0:1] = [(stop, end)] if stop < end else []
            return start, stop

    def _give_back(self, start: int, end: int) -> None:
        """In its place: a full sink waits for the first missing byte, so what is nearest to the front has to go first."""
        if start < end:
            with self._lock:
                bisect.insort(self._todo, (start, end))

    def _pull(self, channel: Channel, span: tuple[int, int], buffer: memoryview) -> None:
        """Fetch a range, or as much of it as comes; the rest is given back for whoever is next."""
        at, end = span
        try:
            response = self._open(channel, at, end, buffer)
            while at < end:
                length = _read(response, buffer[: end - at])
                self._sink.write(at, buffer[:length])
                at += length
                self._came(length)
            if not response.isclosed():
                channel.close()  # the server sends more than was asked for; a kept connection would go on with that
        except (_Retry, http.client.HTTPException, OSError) as exc:
            channel.close()
            delay_s = self._backoff.failed(what_failed(exc).removeprefix("_Retry: "), getattr(exc, "named_s", None))
            self._stop.wait(delay_s)
        finally:
            self._give_back(at, end)

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
