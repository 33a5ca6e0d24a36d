"""What stands between a client and RunPod's volumes, with the manners that people report of it. Loopback network, threads.

    with S3Server() as server, RunPodProxy(server.endpoint_url, keys=["user_devkit"]) as proxy:
        proxy.fault("CompleteMultipartUpload", "524 done")     # it succeeds, and the client is told that it timed out
        proxy.calls                                             # what was asked, in order

Always: DeleteObjects and presigned addresses are refused, keys that it does not know too. Faults come on demand, each for the
next `times` calls of an operation after `after` others:

    "502", "507", "NoSuchUpload"    answered without the server's knowing
    "524 done", "NoSuchUpload done", "cut done"    the server did it, and the answer is lost
    "cut"                           the connection ends in the middle of the body
    "slow"                          the answer comes after `seconds`
    "hold"                          nothing comes until `release`
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Final, Literal, Self, cast
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Collection

FaultKind = Literal["502", "507", "NoSuchUpload", "524 done", "NoSuchUpload done", "cut done", "cut", "slow", "hold"]

_NOT_PASSED_ON: Final = frozenset({"connection", "expect", "transfer-encoding"})
_NO_SUCH_UPLOAD: Final = 404, "NoSuchUpload"
_ANSWERS: Final = {
    "502": (502, "BadGateway"),
    "507": (507, "InsufficientStorage"),
    "NoSuchUpload": _NO_SUCH_UPLOAD,
    "524 done": (524, "A timeout occurred"),
    "NoSuchUpload done": _NO_SUCH_UPLOAD,
}
_WAIT_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a client: what it asked for, and what it was answered (0: nothing)."""

    operation: str
    key: str
    part: int
    size_bytes: int
    status: int
    fault: str | None


@dataclass(slots=True)
class _Fault:
    operation: str
    kind: FaultKind
    times: int
    after: int
    seconds: float
    key: str | None
    volume: str | None


class _Gone(Exception):  # noqa: N818 - never leaves this module
    """The client shall get no answer."""


def operation_of(method: str, path: str, query: dict[str, list[str]]) -> str:
    """Return the S3 operation of a request."""
    has_key = bool(path.strip("/").partition("/")[2])
    marked = next((mark for mark in ("uploads", "uploadId", "partNumber", "delete") if mark in query), "")
    if method == "PUT" and "partNumber" in query:
        return "UploadPart"
    return {
        ("POST", "uploads"): "CreateMultipartUpload",
        ("POST", "uploadId"): "CompleteMultipartUpload",
        ("POST", "delete"): "DeleteObjects",
        ("GET", "uploads"): "ListMultipartUploads",
        ("GET", "uploadId"): "ListParts",
        ("DELETE", "uploadId"): "AbortMultipartUpload",
        ("PUT", ""): "PutObject" if has_key else "CreateBucket",
        ("GET", ""): "GetObject" if has_key else "ListObjectsV2",
        ("HEAD", ""): "HeadObject" if has_key else "HeadBucket",
        ("DELETE", ""): "DeleteObject",
    }.get((method, marked), f"{method} {marked}")


class RunPodProxy:
    """Passes everything on to `target` ("http://host:port") until told otherwise; a context manager."""

    def __init__(self, target: str, *, keys: Collection[str] = ()) -> None:
        self.target = urlsplit(target).netloc
        self.keys = frozenset(keys)
        self.endpoint_url = ""
        self._calls: list[Call] = []
        self._faults: list[_Fault] = []
        self._changed = threading.Condition()
        self._holding = 0
        self._released = threading.Event()
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> Self:
        self._server = _Server(self)
        self.endpoint_url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        if self._server:
            self._server.shutdown()
            self._server.server_close()

    def fault(
        self,
        operation: str,
        kind: FaultKind,
        *,
        times: int = 1,
        after: int = 0,
        seconds: float = 0.0,
        key: str | None = None,
        volume: str | None = None,
    ) -> None:
        """Let the next `times` calls of an operation ("*": of any) go wrong, after `after` that do not.

        `key` and `volume` choose among them: keys that contain it, one volume.
        """
        self._released.clear()
        with self._changed:
            self._faults.append(_Fault(operation, kind, times, after, seconds, key, volume))

    def release(self) -> None:
        """Let what is held go on; returns when it does."""
        self._released.set()
        with self._changed:
            self._changed.wait_for(lambda: not self._holding, _WAIT_S)

    def clear_faults(self) -> None:
        """Remove all faults, and continue what is held."""
        with self._changed:
            self._faults = []
        self.release()

    def reset(self) -> None:
        """Remove all faults and calls."""
        self.release()
        with self._changed:
            self._faults, self._calls = [], []

    @property
    def calls(self) -> list[Call]:
        """Return every finished call, in order."""
        with self._changed:
            return list(self._calls)

    def count(self, operation: str, *, answered: bool = True) -> int:
        """Return how many calls of an operation there were; with `answered` only those that the server carried out."""
        return sum(call.operation == operation and (not answered or 200 <= call.status < 300) for call in self.calls)  # noqa: PLR2004 - success

    def wait_for(self, operation: str, count: int, timeout_s: float = 60.0) -> None:
        """Return once an operation was done this often; TimeoutError."""

        def done() -> bool:
            return sum(call.operation == operation for call in self._calls) >= count

        with self._changed:
            if not self._changed.wait_for(done, timeout_s):
                raise TimeoutError(f"{operation} did not come {count} times within {timeout_s} s")

    def wait_held(self, count: int = 1, timeout_s: float = 60.0) -> None:
        """Return once this many calls are held; TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._holding >= count, timeout_s):
                raise TimeoutError(f"{self._holding} calls are held, not {count}")

    # --- for the handlers

    def _due(self, operation: str, volume: str, key: str) -> _Fault | None:
        with self._changed:
            for fault in self._faults:
                if fault.operation not in {operation, "*"} or (fault.key and fault.key not in key):
                    continue
                if fault.volume not in {None, volume}:
                    continue
                if fault.after:
                    fault.after -= 1
                    continue
                if fault.times:
                    fault.times -= 1
                    return fault
        return None

    def _hold(self) -> None:
        with self._changed:
            self._holding += 1
            self._changed.notify_all()
        self._released.wait(_WAIT_S)
        with self._changed:
            self._holding -= 1
            self._changed.notify_all()

    def _called(self, call: Call) -> None:
        with self._changed:
            self._calls.append(call)
            self._changed.notify_all()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, proxy: RunPodProxy) -> None:
        self.proxy = proxy
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that disconnect, because that is tested here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def handle_expect_100(self) -> bool:
        """Say it at once: botocore waits a second for it before it sends a body."""
        self.send_response_only(100)
        self.end_headers()
        self.wfile.flush()
        return True

    def log_message(self, *_: object) -> None:
        """Do nothing: the calls are recorded."""

    def _handle(self) -> None:
        proxy = cast("_Server", self.server).proxy
        parts = urlsplit(self.path)
        query = parse_qs(parts.query, keep_blank_values=True)
        operation = operation_of(self.command, parts.path, query)
        volume, _, key = unquote(parts.path.strip("/")).partition("/")
        part, length = int(query.get("partNumber", ["0"])[0]), int(self.headers.get("Content-Length") or 0)
        fault = proxy._due(operation, volume, key)  # noqa: SLF001 - of this module
        status = 0
        try:
            status = self._answer(proxy, operation, query, length, fault)
        except (_Gone, OSError):
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
        finally:
            proxy._called(Call(operation, key, part, length, status, fault.kind if fault else None))  # noqa: SLF001 - as above

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle  # noqa: N815 - BaseHTTPRequestHandler's names

    def _answer(
        self, proxy: RunPodProxy, operation: str, query: dict[str, list[str]], length: int, fault: _Fault | None
    ) -> int:
        if fault and fault.kind == "cut":
            self.rfile.read(length // 2)
            raise _Gone
        body = self.rfile.read(length)
        if len(body) < length:
            raise _Gone
        if refusal := self._refusal(proxy, operation, query):
            return self._say(*refusal)
        if fault is None:
            return self._pass_on(proxy, body)
        return self._go_wrong(proxy, fault, body)

    def _go_wrong(self, proxy: RunPodProxy, fault: _Fault, body: bytes) -> int:
        if fault.kind == "hold":
            proxy._hold()  # noqa: SLF001 - of this module
            return self._pass_on(proxy, body)
        if fault.kind == "slow":
            proxy._released.wait(fault.seconds)  # noqa: SLF001 - of this module
            return self._pass_on(proxy, body)
        if fault.kind.endswith("done"):
            self._fetch(proxy, body)
        if fault.kind == "cut done":
            raise _Gone
        return self._say(*_ANSWERS[fault.kind])

    def _refusal(self, proxy: RunPodProxy, operation: str, query: dict[str, list[str]]) -> tuple[int, str] | None:
        if operation == "DeleteObjects":
            return 501, "NotImplemented"
        if "X-Amz-Signature" in query:
            return 403, "AccessDenied"
        credential = self.headers.get("Authorization", "").partition("Credential=")[2].partition("/")[0]
        if proxy.keys and credential not in proxy.keys:
            return 403, "InvalidAccessKeyId"
        return None

    def _fetch(self, proxy: RunPodProxy, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        link = http.client.HTTPConnection(proxy.target, timeout=_WAIT_S)
        with contextlib.closing(link):
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _NOT_PASSED_ON}
            link.request(self.command, self.path, body, headers)
            answer = link.getresponse()
            return answer.status, answer.getheaders(), answer.read()

    def _pass_on(self, proxy: RunPodProxy, body: bytes) -> int:
        status, headers, data = self._fetch(proxy, body)
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in {*_NOT_PASSED_ON, "content-length", "server", "date"}:
                self.send_header(name, value)
        length = next((value for name, value in headers if name.lower() == "content-length"), str(len(data)))
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.wfile.flush()
        return status

    def _say(self, status: int, code: str) -> int:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        self.send_response(status, code)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)
        self.wfile.flush()
        return status
