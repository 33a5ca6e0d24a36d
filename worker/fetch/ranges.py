"""The body of a file: parallel byte ranges into a `Sink`, until nothing is missing. Touches the network.

Each thread has a connection and a buffer of its own; `Spans` hands out the ranges. A range that fails goes back to the others
with what is left of it, so whatever the faults are, bytes that came once are not asked for again.
"""

from __future__ import annotations

import http.client
import logging
import re
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NoReturn, Protocol

from worker.errors import ContentMismatch, EnsureCancelled, NotAFile, SourceChanged, SourceRefused, SourceUnreachable
from worker.fetch.http import OK, PARTIAL, TRANSIENT, UNSATISFIABLE, Channel, content_coding, retry_after_s, what_failed
from worker.fetch.hub import Backoff
from worker.fetch.spans import Spans

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.base.progress import CancelToken
    from worker.fetch.http import Response
    from worker.fetch.hub import Hub, Remote
    from worker.fetch.spans import Pull

log = logging.getLogger(__name__)

MIB: Final = 1024 * 1024
_DOUBTS: Final = 3
_TICK_S: Final = 0.2
_IDLE_S: Final = 0.1  # how soon an idle connection looks again for one to take over from
_BATCH_S: Final = 1.0  # how long bytes wait for their buffer to be full
_FULL_S: Final = 0.02  # how soon to look again whether a full sink takes more
_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
# What a signed address answers once it has expired, by the name of the store behind it.
_ADDRESS_IS_OLD: Final = frozenset({400, 401, 403, 404, 410})


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a body is fetched.

    `unsaved_bytes` bounds, for each connection, what is written and not yet journalled: a killed worker costs that much and
    a buffer. `ahead_bytes` bounds the memory for bytes that wait for their turn to be hashed; `request_bytes` for each
    connection is how far ahead they come. `patience_s` is how long less than `slowest_bytes_per_s` may come.

    A partial that another worker began is left alone for `handover_s`, so that whoever still writes into it notices: two hosts
    that write one part of a file keep each other waiting for half a minute on MooseFS. `stuck_s` is how long a write into it
    may take then: what a host was writing when it died stays locked for two minutes.
    """

    connections: int = 8
    request_bytes: int = 16 * MIB
    smallest_bytes: int = 4 * MIB
    buffer_bytes: int = 4 * MIB
    unsaved_bytes: int = 32 * MIB
    ahead_bytes: int = 64 * MIB
    patience_s: float = 120.0
    slowest_bytes_per_s: int = 8 * 1024
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

    @property
    def is_rewritable(self) -> bool:
        """Whether bytes that came may come again, and be others."""
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
        # Where two answers cannot be told apart, one has to give the whole file.
        self._remote = remote if remote.has_validator else replace(remote, has_ranges=False)
        self._sink = sink
        self._tuning = tuning
        self._cancel = cancel
        self._lock = threading.Lock()
        self._renewing = threading.Lock()
        enough_bytes = int(tuning.slowest_bytes_per_s * tuning.patience_s)
        self._backoff = Backoff(remote.where, tuning.patience_s, tuning.connections, enough_bytes=enough_bytes)
        self._doubts = 0
        self._spans = Spans((), 1, 1, 1)
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
        if not self._remote.has_validator:
            self._check_anew(self._sink.done_bytes)
            gaps = [(0, self._sink.size_bytes)]
        tuning = self._tuning
        self._spans = Spans(gaps, tuning.connections, tuning.request_bytes, tuning.smallest_bytes)
        self._stop, self._error = threading.Event(), None
        self._channels = [Channel(self._hub.network) for _ in range(self._width(sum(end - start for start, end in gaps)))]
        threads = [
            threading.Thread(target=self._work, args=(number, channel), name=f"range-{number}", daemon=True)
            for number, channel in enumerate(self._channels)
        ]
        for thread in threads:
            thread.start()
        try:
            self._watch(threads, on_bytes)
        finally:
            self._end(threads)
        if self._error:
            raise self._error

    def _width(self, missing_bytes: int) -> int:
        """One connection for each range of a useful size, and a second one in any case, to take over from a slow first."""
        if not self._remote.has_ranges:
            return 1
        return min(self._tuning.connections, max(2, missing_bytes // self._tuning.smallest_bytes))

    def _watch(self, threads: list[threading.Thread], on_bytes: Callable[[int], None]) -> None:
        for thread in threads:
            while thread.is_alive() and not self._stop.is_set():
                thread.join(_TICK_S)
                on_bytes(self._sink.done_bytes)
                if self._cancel.is_set():
                    raise EnsureCancelled(self._remote.where)
                self._sink.check()
                self._judge()

    def _judge(self) -> None:
        """Give up a source that drips, and the connections that are far slower than the others."""
        if not self._spans.waits:
            self._backoff.pause(_TICK_S)  # the disk, or whoever takes the bytes, is what takes so long
        self._backoff.check()
        for pull in self._spans.laggards(self._tuning.slowest_bytes_per_s, time.monotonic()):
            self._channels[pull.owner].hang_up()

    def _end(self, threads: list[threading.Thread]) -> None:
        self._stop.set()
        for channel in self._channels:
            channel.break_off()
        with self._spans.changed:
            self._spans.changed.notify_all()
        # A thread that is connecting, or that a slow disk holds, ends by itself later: it finds everything stopped.
        until_s = time.monotonic() + _TICK_S
        for thread in threads:
            thread.join(max(0.0, until_s - time.monotonic()))

    # --- in the threads

    def _work(self, number: int, channel: Channel) -> None:
        stop, spans = self._stop, self._spans
        buffer = memoryview(bytearray(self._tuning.buffer_bytes))
        try:
            while not stop.is_set() and not spans.is_done:
                if (pull := self._take(number)) is not None:
                    self._pull(channel, pull, buffer)
                    continue
                with spans.changed:
                    spans.changed.wait(_IDLE_S if self._sink.reach() >= self._sink.size_bytes else _FULL_S)
        except BaseException as exc:  # noqa: BLE001 - handed over to the thread that runs this fetch
            if not stop.is_set():
                self._error = exc
            stop.set()
        finally:
            channel.close()

    def _take(self, number: int) -> Pull | None:
        now_s = time.monotonic()
        if not self._remote.has_ranges:
            return self._spans.take_whole(number, now_s)
        return self._spans.take(number, self._sink.reach(), now_s)

    def _pull(self, channel: Channel, pull: Pull, buffer: memoryview) -> None:
        """Fetch a range, or as much of it as comes; the rest is given back for whoever is next."""
        start = pull.at
        try:
            response = self._open(channel, pull.at, pull.end, buffer)
            while pull.at < pull.end and not pull.cut:
                self._receive(response, pull, buffer)
            if not response.isclosed():
                channel.close()  # more comes than is wanted by now; a kept connection would go on with that
        except (_Retry, http.client.HTTPException, OSError) as exc:
            channel.close()
            if not pull.cut:
                delay_s = self._backoff.failed(what_failed(exc).removeprefix("_Retry: "), getattr(exc, "named_s", None))
                self._stop.wait(delay_s)
            if not self._remote.has_validator:
                self._begin_anew(pull, start)
        finally:
            self._spans.end(pull, time.monotonic())

    def _receive(self, response: Response, pull: Pull, buffer: memoryview) -> None:
        """Read until the buffer is full, the range ends, or a second has passed; then write what came, whatever happened."""
        at, filled, until_s = pull.at, 0, time.monotonic() + _BATCH_S
        try:
            while pull.at < pull.end and filled < len(buffer) and not pull.cut:
                length = response.readinto1(buffer[filled : filled + pull.left])
                if not length:
                    raise _Retry("the connection was closed early")
                now_s = time.monotonic()
                filled += self._spans.came(pull, length, now_s)
                if now_s > until_s:
                    break
        finally:
            if filled:
                self._write(pull, at, buffer[:filled])

    def _write(self, pull: Pull, at: int, view: memoryview) -> None:
        pull.pause(time.monotonic())
        self._sink.write(at, view)
        pull.resume(time.monotonic())
        self._backoff.progressed(len(view))
        with self._lock:
            self._doubts = 0
            self.fetched_bytes += len(view)

    def _begin_anew(self, pull: Pull, start: int) -> None:
        """Fetch the whole file again: nothing tells whether the rest would be of the version that the first bytes are of."""
        self._check_anew(pull.at - start)
        pull.at = start

    def _check_anew(self, done_bytes: int) -> None:
        if done_bytes and not self._sink.is_rewritable:
            raise SourceUnreachable(self._remote.where, "cut off, and it names no version to go on with", 0.0)

    def _open(self, channel: Channel, start: int, end: int, buffer: memoryview) -> Response:
        """An answer whose next byte is the one at `start`."""
        remote = self._remote
        response, _ = channel.get(remote.url, _headers(remote, start, end))
        status = response.status
        if status in {OK, PARTIAL}:
            self._check_version(remote, response)
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

    def _check_version(self, remote: Remote, response: Response) -> None:
        """Without a hash, the only bytes taken are those of the version that was looked up."""
        if not remote.is_version(response.headers):
            raise SourceChanged(remote.where)
        if coding := content_coding(response.headers):
            self._doubt(remote, NotAFile(remote.where, f"sent compressed ({coding})"))

    def _check_range(self, remote: Remote, response: Response, start: int) -> None:
        stated = response.headers.get("Content-Range", "")
        found = _CONTENT_RANGE.fullmatch(stated)
        if found is None or int(found[1]) != start:
            raise _Retry(f"asked for the bytes from {start}, got '{stated}'")
        if found[2] not in {"*", str(remote.size_bytes)}:
            self._doubt(remote, self._wrong_size(stated))

    def _check_whole(self, remote: Remote, response: Response, start: int) -> None:
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
    if not remote.is_verified and (validator := remote.strong_etag or remote.modified):
        asked["If-Range"] = validator
    return asked


def _skip(response: Response, count: int, buffer: memoryview) -> None:
    while count:
        length = response.readinto1(buffer[:count])
        if not length:
            raise _Retry("the connection was closed early")
        count -= length
