"""Copy a file from its source to several volumes at once, without a disk. Touches the network.

The parts go through memory in order: each is hashed, then sent to every volume that lacks it. What an earlier run sent is found
by asking the server (ListMultipartUploads, ListParts); there is no state file that could be lost or wrong. A sha256 cannot be
resumed, so a run that continues downloads the whole file again, and sends only the parts whose MD5 differs from the server's.
So nothing is published that this run did not read and hash.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import queue
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from worker.errors import EnsureCancelled, NotAFile, SourceRefused, SourceUnreachable
from worker.fetch.ranges import RangeFetch, RangeTuning
from worker.seed.errors import S3Failed, S3Unreachable, SeedError
from worker.seed.s3_api import UploadGone
from worker.seed.window import Window, WindowClosed
from worker.store.file_formats import HEAD_BYTES, check_unhashed, is_safetensors, misfit, stated_in

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from worker.base.progress import CancelToken
    from worker.fetch.hub import Hub, RemoteFile
    from worker.seed.s3_api import S3Api, S3Head, SentPart
    from worker.seed.sibling import SiblingCopy
    from worker.seed.window import WindowPart

log = logging.getLogger(__name__)

MIB: Final = 1024 * 1024
_MOST_PARTS: Final = 9_500  # S3 allows 10,000
_TICK_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class RelayLoad:
    """How much a relay does at a time. `memory_bytes` is for the parts; Python and its libraries need memory besides."""

    downloads: int = 4
    uploads: int = 4
    part_bytes: int = 8 * MIB
    memory_bytes: int = 80 * MIB
    patience_s: float = 120.0
    judge_s: float = 60.0
    judge_bytes_per_s: float = 50e6
    """HeadObject is asked whether a file was created, for `judge_s` plus the time that this rate needs."""
    poll_s: float = 2.0

    def part_bytes_of(self, size_bytes: int) -> int:
        """Return the part size. It is the same for the same file in every run, so that a run can continue another's upload."""
        least = -(-size_bytes // _MOST_PARTS)
        return self.part_bytes if least <= self.part_bytes else -(-least // MIB) * MIB

    def width_of(self, size_bytes: int) -> int:
        """Return how many parts may be in memory."""
        return max(3, self.memory_bytes // self.part_bytes_of(size_bytes))

    def tuning(self) -> RangeTuning:
        """Return the parameters of the download: small requests in order, because early bytes have to wait."""
        return RangeTuning(
            connections=self.downloads,
            request_bytes=self.part_bytes,
            smallest_bytes=self.part_bytes,
            buffer_bytes=MIB,
            patience_s=self.patience_s,
        )


@dataclass(eq=False, slots=True)
class RelayUpload:
    """One file's upload to one volume in a relay. `error` ends it, and does not affect the others."""

    bucket: S3Api
    key: str
    upload_id: str = ""
    there: dict[int, SentPart] = field(default_factory=dict)
    etags: dict[int, str] = field(default_factory=dict)
    sent_bytes: int = 0
    sent_before_bytes: int = 0
    """In earlier attempts."""
    kept_bytes: int = 0
    error: SeedError | UploadGone | None = None
    others: list[str] = field(default_factory=list)
    before: S3Head | None = None
    """The file that this one replaces."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self, size_bytes: int, part_bytes: int) -> None:
        """Continue the fullest upload of this key with the same part size, or begin one."""
        best: tuple[int, str, dict[int, SentPart]] = (-1, "", {})
        for upload_id in self.bucket.uploads(self.key):
            with contextlib.suppress(UploadGone):
                parts = self.bucket.parts(self.key, upload_id)
                if all(found.size_bytes == _length(number, size_bytes, part_bytes) for number, found in parts.items()):
                    best = max(best, (len(parts), upload_id, parts), key=lambda found: found[0])
            self.others.append(upload_id)
        _, self.upload_id, self.there = best
        if self.upload_id:
            self.others.remove(self.upload_id)
            log.info("%s: resuming, %d parts are there", self.key, len(self.there))
        else:
            self.upload_id = self.bucket.begin(self.key)
        self.before = self.bucket.head(self.key)

    def take(self, part: WindowPart, md5: bytes) -> None:
        """Put this part on the server."""
        there = self.there.get(part.number)
        if there and there.etag == md5.hex() and there.size_bytes == len(part.buffer):
            kept, sent = len(part.buffer), 0
        else:
            self.bucket.send(self.key, self.upload_id, part.number, part.buffer, md5)
            kept, sent = 0, len(part.buffer)
        with self.lock:
            self.kept_bytes += kept
            self.sent_bytes += sent
            self.etags[part.number] = md5.hex()

    def renewed(self) -> RelayUpload:
        """Return the same upload, to be begun again."""
        return RelayUpload(self.bucket, self.key, sent_before_bytes=self.all_sent_bytes)

    @property
    def all_sent_bytes(self) -> int:
        """Return the bytes sent in all attempts."""
        return self.sent_before_bytes + self.sent_bytes

    @property
    def done_bytes(self) -> int:
        """Return how many bytes the server has."""
        return self.sent_bytes + self.kept_bytes

    def abort(self) -> None:
        """Abort it, so that the server frees its parts."""
        if self.upload_id:
            with contextlib.suppress(SeedError):
                self.bucket.abort(self.key, self.upload_id)

    def complete(self, size_bytes: int, load: RelayLoad, cancel: CancelToken) -> None:
        """Return when HeadObject shows the file with its length. Complete's own answer is not trusted either way.

        Raises `UploadGone` if neither a file nor an upload exists any longer, `EnsureCancelled`, or what HeadObject raises.
        """
        etags = [self.etags[number] for number in sorted(self.etags)]
        until_s = time.monotonic() + load.judge_s + size_bytes / load.judge_bytes_per_s
        reason = "the file does not appear"
        while True:
            gone = False
            try:
                self.bucket.complete(self.key, self.upload_id, etags)
            except UploadGone:
                gone = True
            except (S3Unreachable, S3Failed) as exc:
                reason = exc.reason
                log.info("%s: Complete answered '%s'; checking whether it succeeded", self.key, reason)
            if self._appears(size_bytes, load, cancel, until_s):
                return
            if gone:
                raise UploadGone(self.key)
            if time.monotonic() >= until_s:
                raise S3Failed(self.bucket.place.title, f"CompleteMultipartUpload of {self.key}", reason)
            if cancel.wait(load.poll_s):
                raise EnsureCancelled(self.key)

    def _appears(self, size_bytes: int, load: RelayLoad, cancel: CancelToken, until_s: float) -> bool:
        """Return whether the file exists. Look again while the server may still assemble it: upload gone, file late."""
        while True:
            with contextlib.suppress(S3Unreachable):
                found = self.bucket.head(self.key)
                if found and found.size_bytes == size_bytes and found != self.before:
                    return True
                if self._is_open():
                    return False  # it did not begin: ask again
            if time.monotonic() >= until_s:
                return False
            if cancel.wait(load.poll_s):
                raise EnsureCancelled(self.key)

    def _is_open(self) -> bool:
        try:
            self.bucket.parts(self.key, self.upload_id)
        except UploadGone:
            return False
        return True

    def sweep(self) -> None:
        """Abort the other uploads of this key: the file exists, so they are useless."""
        for upload_id in self.others:
            with contextlib.suppress(SeedError):
                self.bucket.abort(self.key, upload_id)


def _length(number: int, size_bytes: int, part_bytes: int) -> int:
    return max(0, min(part_bytes, size_bytes - (number - 1) * part_bytes))


class _CancelledOrNoTarget:
    """A relay's cancel token, set if the caller's is, or if no volume is left to send to."""

    def __init__(self, cancel: CancelToken) -> None:
        self._cancel = cancel
        self.ended = threading.Event()

    def is_set(self) -> bool:
        return self._cancel.is_set() or self.ended.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        return self._cancel.wait(timeout) or self.ended.is_set()


class Relay:
    """One file, from its source's metadata into the uploads. Call `run`."""

    def __init__(
        self,
        hub: Hub,
        remote: RemoteFile,
        uploads: Sequence[RelayUpload],
        load: RelayLoad,
        cancel: CancelToken,
        *,
        spare: list[bytearray] | None = None,
        begin: Callable[[Window, RangeTuning, CancelToken], RangeFetch | SiblingCopy] | None = None,
    ) -> None:
        """Set the file. `begin` begins a fetch of its bytes. Without it they come from the source itself."""
        self._begin = begin or (lambda window, tuning, cancel: RangeFetch(hub, remote, window, tuning, cancel))
        self._remote = remote
        self._load = load
        self._cancel = cancel
        self._either = _CancelledOrNoTarget(cancel)
        self._uploads = uploads
        self._digest = hashlib.sha256()
        self._hashed = object()
        part_bytes, width = load.part_bytes_of(remote.size_bytes), load.width_of(remote.size_bytes)
        self._window = Window(remote.size_bytes, part_bytes, width, [self._hashed, *uploads], spare)
        self._queues: dict[RelayUpload, queue.Queue[tuple[WindowPart, bytes] | None]] = {
            upload: queue.Queue() for upload in uploads
        }
        self._stated_bytes: int | None = remote.size_bytes
        self._foreign: str | None = None
        self._defect: BaseException | None = None
        self.fetched_bytes = 0

    @property
    def done_bytes(self) -> int:
        """Return how many bytes every remaining volume has."""
        return min((upload.done_bytes for upload in self._uploads if upload.error is None), default=0)

    def run(self, on_bytes: Callable[[int], None] = lambda _: None) -> str:
        """Return the sha256 of the file when all its parts are on every volume. An upload with an `error` is left out.

        Raises what `RangeFetch.run` raises, `ContentMismatch` if the source gives no sha256 and a header contradicts the
        length, and the error of the only or last volume if none is left.
        """
        threads = [threading.Thread(target=self._hash, name="sha256", daemon=True)]
        for upload in self._uploads:
            threads += [
                threading.Thread(target=self._send, args=(upload,), name=f"upload-{n}", daemon=True)
                for n in range(self._load.uploads)
            ]
        for thread in threads:
            thread.start()
        try:
            self._fetch(lambda _: on_bytes(self.done_bytes))
            self._join(threads, on_bytes)
        except (EnsureCancelled, WindowClosed):
            if not self._cancel.is_set():
                self._raise_last()
            raise EnsureCancelled(self._remote.where) from None
        finally:
            self._end()
        self._raise_last()
        check_unhashed(self._remote, self._foreign, lambda: self._stated_bytes)
        return self._digest.hexdigest()

    def _fetch(self, on_bytes: Callable[[int], None]) -> None:
        while True:
            fetch = self._begin(self._window, self._load.tuning(), self._either)
            try:
                fetch.run(on_bytes)
            except SourceUnreachable:
                # A server closes the connection of a client that does not read. The uploads are the reason that we did not
                # read.
                if not self._window.held_within(self._load.patience_s):
                    raise
                log.info("%s: requested again because its uploads were slow", self._remote.where)
            except SourceRefused as exc:
                if self._remote.xet is None:
                    raise
                raise NotAFile(self._remote.where, "only served through Xet; seed it in a Pod with --volume") from exc
            else:
                return
            finally:
                self.fetched_bytes += fetch.fetched_bytes

    def _join(self, threads: Sequence[threading.Thread], on_bytes: Callable[[int], None]) -> None:
        for thread in threads:
            while thread.is_alive():
                thread.join(_TICK_S)
                on_bytes(self.done_bytes)
                if self._either.is_set():
                    raise EnsureCancelled(self._remote.where)

    def _end(self) -> None:
        self._either.ended.set()
        self._window.close()
        for waiting in self._queues.values():
            for _ in range(self._load.uploads):
                waiting.put(None)

    def _raise_last(self) -> None:
        if self._defect:
            raise self._defect
        if all(upload.error for upload in self._uploads) and (error := self._uploads[-1].error):
            raise error

    # --- in the threads

    def _hash(self) -> None:
        """Hash the parts in order, and hand each to every upload."""
        try:
            for part in self._window.in_order():
                self._digest.update(part.buffer)
                md5 = hashlib.md5(part.buffer, usedforsecurity=False).digest()
                if part.number == 1:
                    self._look_at_header(part)
                for waiting in self._queues.values():
                    waiting.put((part, md5))
                self._window.release(part, self._hashed)
        except WindowClosed:
            return
        except BaseException as exc:  # noqa: BLE001 - handed over to the thread that runs this
            self._defect = exc
            self._either.ended.set()
        for waiting in self._queues.values():
            for _ in range(self._load.uploads):
                waiting.put(None)

    def _look_at_header(self, part: WindowPart) -> None:
        """Check the length that a safetensors file states, if its header is in the first part."""
        head, size = memoryview(part.buffer), self._remote.size_bytes
        first, is_verified = head[:HEAD_BYTES].tobytes(), self._remote.is_verified
        found = (misfit(upload.key, first, size, is_verified=is_verified) for upload in self._uploads)
        self._foreign = next(filter(None, found), None)
        if self._named_safetensors() and 8 + int.from_bytes(head[:8], "little") <= len(head):
            self._stated_bytes = stated_in(io.BytesIO(head), self._remote.size_bytes)

    def _named_safetensors(self) -> bool:
        return any(is_safetensors(upload.key) for upload in self._uploads)

    def _send(self, upload: RelayUpload) -> None:
        waiting = self._queues[upload]
        while (item := waiting.get()) is not None:
            part, md5 = item
            if upload.error is None:
                try:
                    upload.take(part, md5)
                except (SeedError, UploadGone) as exc:
                    self._failed(upload, exc)
                except BaseException as exc:  # noqa: BLE001 - as in _hash
                    self._defect = exc
                    self._either.ended.set()
            self._window.release(part, upload)

    def _failed(self, upload: RelayUpload, error: SeedError | UploadGone) -> None:
        upload.error = error
        if all(other.error for other in self._uploads):
            self._either.ended.set()
