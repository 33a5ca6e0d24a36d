"""One origin: listens, and gives each request to its route. Loopback network, threads."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import sys
import threading
from typing import TYPE_CHECKING, Any, Final

from devkit.hub.answers import RefusedError, expired, not_found
from devkit.hub.control import answer_control
from devkit.hub.repos import answer_repo, answer_whoami
from devkit.hub.sources import answer_cdn, answer_civitai, answer_plain
from devkit.hub.wire import Wire
from devkit.hub.xet import answer_xet

if TYPE_CHECKING:
    from devkit.hub.faults import Fault
    from devkit.hub.log import Origin
    from devkit.hub.routes import Target
    from devkit.hub.state import State

_POLL_S: Final = 0.01
_STOP_TIMEOUT_S: Final = 5.0
_TOO_MANY_REQUESTS: Final = 429


class Server(socketserver.ThreadingTCPServer):
    """A listener that runs from construction until `stop`, and knows its live connections."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, hub: State, origin: Origin, port: int) -> None:
        self.hub = hub
        self.origin = origin
        self._live: set[socket.socket] = set()
        self._left = threading.Condition()
        super().__init__(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(_POLL_S,), name=f"hub-{origin}", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Return the port it listens on."""
        return int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 (socketserver's own types)
        """Serve a connection; noted in the listener's thread, so that `stop` sees every one that was accepted."""
        with self._left:
            self._live.add(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 (socketserver's own types)
        """Serve a connection until it ends."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._left:
                self._live.discard(request)
                self._left.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 (socketserver's own types)
        """Report what is a defect of this package; a client that goes away between two requests is none."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def stop(self, keep: socket.socket | None = None) -> None:
        """Refuse new connections and end the live ones, except `keep`, over which this was asked for."""
        self.shutdown()
        self._thread.join(_STOP_TIMEOUT_S)
        self.server_close()
        with self._left:
            for live in self._live - {keep}:
                with contextlib.suppress(OSError):
                    live.shutdown(socket.SHUT_RDWR)
            self._left.wait_for(lambda: not self._live - {keep}, _STOP_TIMEOUT_S)


class Handler(Wire):
    """The order of things: faults that stop a request, then its route."""

    server: Server

    def setup(self) -> None:
        """Take the hub and the origin from the server."""
        self.hub, self.origin = self.server.hub, self.server.origin
        super().setup()

    def control(self, command: str) -> None:
        """Answer a control command; not recorded."""
        answer_control(self, command)

    def answer(self, target: Target) -> None:
        """Answer a recorded request, or RefusedError, CutError, ConnectionError."""
        for rule in self.befall("hang"):
            self.hold(rule.fault)
        if stop := self.hub.book.take_first(self.entry, ("status", "drop", "expired")):
            self.record([stop])
            self._stop(stop.fault)
        match target.route, self.origin:
            case "cdn", "cdn":
                answer_cdn(self, target)
            case (("xet/reconstruction" | "xet/piece"), "cdn"):
                answer_xet(self, target)
            case "files", _:
                answer_plain(self, target)
            case ("unknown", _) | (_, "cdn") | (("cdn" | "xet/reconstruction" | "xet/piece"), _):
                raise not_found()
            case "redirect", _:
                answer_plain(self, target)
            case (("civitai" | "civitai-info"), _):
                answer_civitai(self, target)
            case "whoami", _:
                answer_whoami(self)
            case _:
                answer_repo(self, target)

    def _stop(self, fault: Fault) -> None:
        if fault.kind == "drop":
            self.abort(reset=fault.reset)
        if fault.kind == "expired":
            raise expired()
        wait = {} if fault.retry_after_s is None else {"Retry-After": str(fault.retry_after_s)}
        if fault.status == _TOO_MANY_REQUESTS:
            wait["RateLimit"] = f'"api";r=0;t={1 if fault.retry_after_s is None else fault.retry_after_s}'
            wait["RateLimit-Policy"] = '"fixed window";"api";q=500;w=300'
        raise RefusedError(fault.status, "A fault that was asked for", headers=wait)
