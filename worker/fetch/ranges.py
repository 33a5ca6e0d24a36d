"""Download a file's body: parallel byte ranges into a `Sink`, until nothing is missing. Touches the network.

Each thread has its own connection and buffer. `Spans` hands out the ranges. The rest of a failed range goes back to the others,
so bytes that arrived once are not requested again.
"""

from __future__ import annotations

import http.client
import logging
import re
import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final, NoReturn, Protocol

from worker.base.retry import OK, PARTIAL, TRANSIENT, UNSATISFIABLE, Backoff, retry_after_s
from worker.errors import ContentMismatch, EnsureCancelled, NotAFile, SourceChanged, SourceRefused, SourceUnreachable
from worker.fetch.http import HttpChannel, content_coding, what_failed
from worker.fetch.spans import Spans

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.base.progress import CancelToken
    from worker.fetch.http import HttpResponse
    from worker.fetch.hub import Hub, RemoteFile
    from worker.fetch.spans import Pull

log = logging.getLogger(__name__)

MIB: Final = 1024 * 1024
_DOUBTS: Final = 3
_TICK_S: Final = 0.2
_IDLE_S: Final = 0.1  # how soon an idle connection checks again for a range to take over
_BATCH_S: Final = 1.0  # how long bytes wait for a full buffer
_FULL_S: Final = 0.02  # how soon to check again whether a full sink accepts more
_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
# What an expired signed address answers, depending on the store behind it.
_ADDRESS_IS_OLD: Final = frozenset({400, 401, 403, 404, 410})


@dataclass(frozen=True, slots=True)
class RangeTuning:
    """Parameters of a download by range requests.

    `unsaved_bytes` limits, for each connection, the bytes that are written but not yet journalled: a killed worker loses those
    and a buffer. `reorder_bytes` limits the memory for bytes that wait to be hashed; `request_bytes` for each connection is how
    far ahead they arrive. `patience_s` is how long less than `slowest_bytes_per_s` may arrive.

    A partial that another worker began is left alone for `handover_s`, so that its writer notices the change: on MooseFS two
    hosts that write one part of a file block each other for half a minute. `stuck_s` is how long a write to it may then take:
    MooseFS keeps what a host was writing when it died locked for two minutes.
    """

    connections: int = 8
    request_bytes: int = 16 * MIB
    smallest_bytes: int = 4 * MIB
    buffer_bytes: int = 4 * MIB
    unsaved_bytes: int = 32 * MIB
    reorder_bytes: int = 64 * MIB
    patience_s: float = 120.0
    slowest_bytes_per_s: int = 8 * 1024
    handover_s: float = 1.5
    stuck_s: float = 8.0


class Sink(Protocol):
    """The destination of ranges of a file's bytes. Any thread writes, in any order. Without range support some arrive twice.

    An in-order sink limits its buffer with `reach()`. The lowest missing range is always fetched first, so such a sink cannot
    deadlock.
    """

    @property
    def size_bytes(self) -> int:
        """Return the file's length."""
        ...

    @property
    def done_bytes(self) -> int:
        """Return the number of bytes that are there, for the progress."""
        ...

    @property
    def is_rewritable(self) -> bool:
        """Return whether bytes may arrive again with other values."""
        ...

    def gaps(self) -> list[tuple[int, int]]:
        """Return the missing ranges, half open and in order. Called once, before the first byte."""
        ...

    def reach(self) -> int:
        """Return the offset up to which bytes may arrive now. `size_bytes` if any order is fine."""
        ...

    def write(self, offset: int, view: memoryview) -> None:
        """Accept bytes. The caller reuses the memory afterwards. It may wait for a slower consumer, not for other bytes.

        An exception ends the download. Wrap an `OSError`, because it would be taken for the network's.
        """
        ...

    def check(self) -> None:
        """Raise if writes do not get through. Called a few times a second during the download."""
        ...


class _RetryRange(Exception):  # noqa: N818 - never leaves this module
    """This answer to a range request was unusable; the next one may be good."""

    def __init__(self, reason: str, named_s: float | None = None) -> None:
        super().__init__(reason)
        self.named_s = named_s


class _NoRanges(Exception):  # noqa: N818 - never leaves this module
    """The server ignores ranges and always sends the whole file."""


class RangeFetch:
    """The download of one file's body by range requests. Call `run`."""

    def __init__(self, hub: Hub, remote: RemoteFile, sink: Sink, tuning: RangeTuning, cancel: CancelToken) -> None:
        self._hub = hub
        # Where two answers cannot be told apart, one has to give the whole file.
        self._remote = remote if remote.has_validator else replace(remote, has_ranges=False)
        self._sink = sink
        self._tuning = tuning
        self._cancel = cancel
        self._lock = threading.Lock()
        self._renewing = threading.Lock()
        enough_bytes = int(tuning.slowest_bytes_per_s * tuning.patience_s)
        self._backoff = Backoff(
            partial(SourceUnreachable, remote.where),
            tuning.patience_s,
            tuning.connections,
            hub.clock,
            enough_bytes=enough_bytes,
        )
        self._doubts = 0
        self._spans = Spans((), 1, 1, 1)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._channels: list[HttpChannel] = []
        self.fetched_bytes = 0

    def run(self, on_bytes: Callable[[int], None] = lambda _: None) -> None:
        """Return when every byte is in the sink.

        Raises `EnsureCancelled` within a second, `SourceUnreachable`, `SourceChanged`, `ContentMismatch` (of the length),
        `SourceRefused`, what `Hub.look_up` raises, and what the sink raises.
        """
        try:
            self._run(on_bytes)
        except _NoRanges:
            log.warning("%s ignores range requests: it uses one connection and cannot resume", self._remote.where)
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
        self._channels = [HttpChannel(self._hub.network) for _ in range(self._width(sum(end - start for start, end in gaps)))]
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
        """Return the number of connections: one for each range of a useful size, but at least two for takeovers."""
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
        """Give up a source that is too slow, and connections that are far slower than the others."""
        if not self._spans.waits:
            self._backoff.pause(_TICK_S)  # the disk, or the consumer of the bytes, is slow
        self._backoff.check()
        for pull in self._spans.laggards(self._tuning.slowest_bytes_per_s, time.monotonic()):
            self._channels[pull.owner].hang_up()

    def _end(self, threads: list[threading.Thread]) -> None:
        self._stop.set()
        for channel in self._channels:
            channel.break_off()
        with self._spans.changed:
            self._spans.changed.notify_all()
        # A thread that is connecting, or that a slow disk holds, ends by itself later, when it sees that everything stopped.
        until_s = time.monotonic() + _TICK_S
        for thread in threads:
            thread.join(max(0.0, until_s - time.monotonic()))

    # --- in the threads

    def _work(self, number: int, channel: HttpChannel) -> None:
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

    def _pull(self, channel: HttpChannel, pull: Pull, buffer: memoryview) -> None:
        """Fetch a range, or as much of it as arrives. The rest goes back for another connection."""
        start = pull.at
        try:
            response = self._open(channel, pull.at, pull.end, buffer)
            while pull.at < pull.end and not pull.cut:
                self._receive(response, pull, buffer)
            if not response.isclosed():
                channel.close()  # the server sends more than is wanted now, and would continue with that on a kept connection
        except (_RetryRange, http.client.HTTPException, OSError) as exc:
            channel.close()
            if not pull.cut:
                delay_s = self._backoff.failed(what_failed(exc).removeprefix("_Retry: "), getattr(exc, "named_s", None))
                self._stop.wait(delay_s)
            if not self._remote.has_validator:
                self._begin_anew(pull, start)
        finally:
            self._spans.end(pull, time.monotonic())

    def _receive(self, response: HttpResponse, pull: Pull, buffer: memoryview) -> None:
        """Read until the buffer is full, the range ends, or a second has passed.

        Then write what arrived, even after an error.
        """
        at, filled, until_s = pull.at, 0, time.monotonic() + _BATCH_S
        try:
            while pull.at < pull.end and filled < len(buffer) and not pull.cut:
                length = response.readinto1(buffer[filled : filled + pull.left])
                if not length:
                    raise _RetryRange("the connection was closed early")
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
        """Fetch the whole file again, because nothing shows that the rest is of the same version as the first bytes."""
        self._check_anew(pull.at - start)
        pull.at = start

    def _check_anew(self, done_bytes: int) -> None:
        if done_bytes and not self._sink.is_rewritable:
            raise SourceUnreachable(self._remote.where, "cut off, and it names no version to go on with", 0.0)

    def _open(self, channel: HttpChannel, start: int, end: int, buffer: memoryview) -> HttpResponse:
        """Return an answer whose next byte is the one at `start`."""
        remote = self._remote
        response = channel.get(remote.url, _headers(remote, start, end))
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
            raise _RetryRange(f"status {status}", retry_after_s(response.headers))
        elif status == UNSATISFIABLE:
            self._doubt(remote, self._wrong_size(response.headers.get("Content-Range", "")))
        elif status in _ADDRESS_IS_OLD:
            self._doubt(remote, SourceRefused(remote.where, status))
        else:
            raise SourceRefused(remote.where, status)
        return response

    def _check_version(self, remote: RemoteFile, response: HttpResponse) -> None:
        """Without a hash, accept only bytes of the version that was looked up."""
        if not remote.is_version(response.headers):
            raise SourceChanged(remote.where)
        if coding := content_coding(response.headers):
            self._doubt(remote, NotAFile(remote.where, f"sent compressed ({coding})"))

    def _check_range(self, remote: RemoteFile, response: HttpResponse, start: int) -> None:
        stated = response.headers.get("Content-Range", "")
        found = _CONTENT_RANGE.fullmatch(stated)
        if found is None or int(found[1]) != start:
            raise _RetryRange(f"asked for the bytes from {start}, got '{stated}'")
        if found[2] not in {"*", str(remote.size_bytes)}:
            self._doubt(remote, self._wrong_size(stated))

    def _check_whole(self, remote: RemoteFile, response: HttpResponse, start: int) -> None:
        length = response.headers.get("Content-Length")
        if length not in {None, str(remote.size_bytes)}:
            self._doubt(remote, self._wrong_size(f"/{length}"))
        if start and remote.has_ranges:
            self._doubt(remote, _NoRanges())

    def _wrong_size(self, stated: str) -> ContentMismatch:
        return ContentMismatch(self._remote.where, "size", str(self._remote.size_bytes), stated.rpartition("/")[2] or "another")

    def _doubt(self, remote: RemoteFile, meaning: Exception) -> NoReturn:
        """Get a fresh address after an error. Raise the error if a fresh address does not help."""
        with self._renewing:
            # Another thread with the same old address has renewed it already: only retry.
            if self._remote is remote:
                with self._lock:
                    self._doubts += 1
                    if self._doubts >= _DOUBTS:
                        raise meaning
                fresh = self._hub.renew(remote, self._cancel)
                if not fresh.same_content(remote):
                    raise SourceChanged(remote.where)
                self._remote = replace(fresh, has_ranges=remote.has_ranges)
        raise _RetryRange(str(meaning) or "ranges were ignored")


def _headers(remote: RemoteFile, start: int, end: int) -> dict[str, str]:
    if not remote.has_ranges:
        return {}
    asked = {"Range": f"bytes={start}-{end - 1}"}
    # Without a hash to detect it later, bytes of a changed file must not arrive: the server sends the whole new file instead.
    if not remote.is_verified and (validator := remote.strong_etag or remote.modified):
        asked["If-Range"] = validator
    return asked


def _skip(response: HttpResponse, count: int, buffer: memoryview) -> None:
    while count:
        length = response.readinto1(buffer[:count])
        if not length:
            raise _RetryRange("the connection was closed early")
        count -= length
