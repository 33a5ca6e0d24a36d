"""Download a file that plain HTTP refuses, with hf_xet in a separate process, into a `Sink`. Touches processes, network.

The bytes arrive in order through a pipe and go into the partial, its journal and the hash, like all others. So any worker can
continue a download by Xet, by either way.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from worker.base.retry import UNAUTHORISED, Backoff
from worker.errors import EnsureCancelled, SourceRefused, SourceUnreachable
from worker.fetch.http import without_queries

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.base.progress import CancelToken
    from worker.fetch.hub import Hub, RemoteFile, XetAccess
    from worker.fetch.ranges import RangeTuning, Sink

log = logging.getLogger(__name__)

# With its defaults hf_xet takes gigabytes; with these values it stays below 400 MB. The time-outs are shorter than its own,
# because the caller has its own patience and resumes from the bytes that arrived.
SETTINGS: Final[dict[str, str | int]] = {
    "reconstruction.download_buffer_size": "256mb",
    "reconstruction.download_buffer_perfile_size": "0",
    "reconstruction.download_buffer_limit": "256mb",
    "reconstruction.min_reconstruction_fetch_size": "64mb",
    "reconstruction.max_reconstruction_fetch_size": "256mb",
    "reconstruction.min_prefetch_buffer": "64mb",
    "client.connect_timeout": "10s",
    "client.read_timeout": "30s",
    "client.retry_base_delay": "1s",
    "telemetry.enabled": False,
}
"""Settings of hf_xet, by the names of its `XetConfig`."""

_PUMP: Final = Path(__file__).with_name("xet_process.py")
_DOUBTS: Final = 3
_REFUSALS: Final = UNAUTHORISED | {404, 410}
_STATUS: Final = re.compile(r"\((\d{3}) [A-Z]")
_TICK_S: Final = 0.2
_FULL_S: Final = 0.02
_PIPE_BYTES: Final = 1024 * 1024
_SAID_CHARS: Final = 300


class _XetBrokenOff(Exception):  # noqa: N818 - never leaves this module
    """The process that speaks Xet ended before all bytes arrived."""

    def __init__(self, reason: str, status: int | None) -> None:
        super().__init__(reason)
        self.status = status


class XetFetch:
    """The download of one file's missing bytes by Xet. Call `run`."""

    def __init__(self, hub: Hub, remote: RemoteFile, sink: Sink, tuning: RangeTuning, cancel: CancelToken) -> None:
        self._hub = hub
        self._remote = remote
        self._sink = sink
        self._tuning = tuning
        self._cancel = cancel
        enough_bytes = int(tuning.slowest_bytes_per_s * tuning.patience_s)
        self._backoff = Backoff(
            partial(SourceUnreachable, remote.where), tuning.patience_s, clock=hub.clock, enough_bytes=enough_bytes
        )
        self._todo = sink.gaps()
        self._doubts = 0
        self._reason = "Xet ended early"
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._waits_since_s: float | None = None
        self._error: BaseException | None = None
        self.fetched_bytes = 0

    def run(self, on_bytes: Callable[[int], None] = lambda _: None) -> None:
        """Return when every byte is in the sink.

        Raises `EnsureCancelled` within a second, `SourceUnreachable`, `SourceRefused`, `TokenRefused`, and what the sink
        raises. The process has ended by then.
        """
        worker = threading.Thread(target=self._work, name="xet", daemon=True)
        worker.start()
        try:
            while worker.is_alive():
                worker.join(_TICK_S)
                on_bytes(self._sink.done_bytes)
                if self._cancel.is_set():
                    raise EnsureCancelled(self._remote.where)
                self._sink.check()
                self._end_silence()
        finally:
            self._stop.set()
            self._kill()
            worker.join(_TICK_S)
        if self._error:
            raise self._error

    def _end_silence(self) -> None:
        since_s = self._waits_since_s
        if since_s is None:
            self._backoff.pause(_TICK_S)
        elif self._hub.clock() - since_s > self._tuning.patience_s or self._backoff.is_over:
            self._kill()

    def _kill(self) -> None:
        with self._lock:
            if self._process:
                self._process.kill()

    # --- in the thread

    def _work(self) -> None:
        try:
            while self._todo and not self._stop.is_set():
                self._try()
        except BaseException as exc:  # noqa: BLE001 - handed over to the thread that runs this fetch
            self._error = exc

    def _try(self) -> None:
        """Run until the download is complete or breaks off. Each attempt gets a new token, because an old one is refused."""
        try:
            self._pump(self._hub.xet_access(self._remote, self._cancel))
        except _XetBrokenOff as exc:
            if exc.status in _REFUSALS:
                self._doubts += 1
                if self._doubts == _DOUBTS:
                    raise SourceRefused(self._remote.where, exc.status) from exc
            if not self._stop.is_set():
                log.debug("%s broke off: %s", self._remote.where, exc)
                self._stop.wait(self._backoff.failed(str(exc)))

    def _pump(self, access: XetAccess) -> None:
        with self._start() as process:
            try:
                self._ask(process, access)
                self._drain(process)
            finally:
                process.kill()
            if self._todo:
                raise self._why(process)

    def _start(self) -> subprocess.Popen[bytes]:
        with self._lock:
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter, on a file of this package
                [sys.executable, "-P", str(_PUMP)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
            )
            if self._stop.is_set():
                self._process.kill()
            return self._process

    def _ask(self, process: subprocess.Popen[bytes], access: XetAccess) -> None:
        wanted = {
            "hash": self._remote.xet.file_hash,
            "size_bytes": self._remote.size_bytes,
            "spans": self._todo,
            "settings": SETTINGS,
            "endpoint": access.endpoint,
            "token": access.token,
            "expires_s": access.expires_s,
            "refresh_url": access.refresh_url,
            "refresh_headers": access.refresh_headers,
        }
        left = memoryview(json.dumps(wanted).encode() + b"\n")
        with contextlib.suppress(BrokenPipeError):  # it has ended already, and says why
            while left:
                left = left[_stream(process.stdin).write(left) :]

    def _drain(self, process: subprocess.Popen[bytes]) -> None:
        stream = _stream(process.stdout)
        with contextlib.suppress(ImportError, AttributeError, OSError):  # a small pipe is slower, but works
            import fcntl  # noqa: PLC0415 - not on Windows, where the seeder imports this module

            fcntl.fcntl(stream, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        buffer = memoryview(bytearray(self._tuning.buffer_bytes))
        while self._todo and not self._stop.is_set():
            at, end = self._todo[0]
            length = self._read(stream, buffer[: min(end, self._sink.reach()) - at]) if at < self._sink.reach() else None
            if length is None:
                self._stop.wait(_FULL_S)
                continue
            if not length:
                return
            self._sink.write(at, buffer[:length])
            self._todo[0:1] = [(at + length, end)] if at + length < end else []
            self._doubts = 0
            self._backoff.progressed(length)
            self.fetched_bytes += length

    def _read(self, stream: IO[bytes], into: memoryview) -> int:
        """Fill the buffer. A pipe gives little at a time, and a network volume wants large writes. Less only at the end."""
        done = 0
        while done < len(into):
            self._waits_since_s = self._hub.clock()
            try:
                length = stream.readinto(into[done:])  # type: ignore[attr-defined] # unbuffered: it is a FileIO
            finally:
                self._waits_since_s = None
            if not length:
                break
            done += length
        return done

    def _why(self, process: subprocess.Popen[bytes]) -> _XetBrokenOff:
        """Return the process's last words. hf_xet does not always give a reason, so an earlier one is kept."""
        said = _stream(process.stderr).read().decode(errors="replace").strip().rpartition("\n")[2]
        with contextlib.suppress(ValueError, KeyError, TypeError):
            said = str(json.loads(said)["text"])
        found = _STATUS.search(said)
        status = int(found[1]) if found else None
        if said:
            self._reason = f"Xet: status {status}" if status else f"Xet: {without_queries(said)[:_SAID_CHARS]}"
        return _XetBrokenOff(self._reason, status)


def _stream(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise RuntimeError("the process was started without its pipes")
    return stream
