"""One connection: reads requests, records them, sends answers of every kind. Loopback network."""

from __future__ import annotations

import json
import socket
import struct
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from devkit.hub.answers import CutError, RefusedError
from devkit.hub.log import Request
from devkit.hub.routes import Target, target_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devkit.hub.faults import Fault, FaultKind, Rule
    from devkit.hub.log import Origin, Outcome
    from devkit.hub.state import State


class Wire(BaseHTTPRequestHandler):
    """What every route needs: the request read and recorded, the answer sent, the faults that befall it taken."""

    protocol_version = "HTTP/1.1"
    server_version = "hub"
    disable_nagle_algorithm = True
    hub: State
    origin: Origin
    """Set by the server's own handler, before `setup`."""

    def setup(self) -> None:
        """Number the connection."""
        super().setup()
        self.number = self.hub.ledger.connection()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, ANN401 (the base class's signature)
        """Stay quiet: the ledger has it all."""

    def do_GET(self) -> None:
        """Record the request, answer it, record how that went."""
        url = urlsplit(self.path)
        self.query = dict(parse_qsl(url.query))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        target = target_of(url.path)
        self.entry = self._entry(target, url.path, url.query)
        if target.route == "control":
            self.control(target.path)
            return
        self.hub.ledger.open(self.entry)
        outcome: Outcome = "gone"
        try:
            outcome = self._settle(target)
        except ConnectionError:
            self.close_connection = True
        finally:
            self.note(outcome=outcome, ended_s=time.monotonic())

    def do_HEAD(self) -> None:
        """Answer as GET does, without the body."""
        self.do_GET()

    def do_POST(self) -> None:
        """Answer as GET does: only paths-info and the control commands look at the body."""
        self.do_GET()

    def control(self, command: str) -> None:
        """Answer a control command; not recorded."""
        raise NotImplementedError

    def answer(self, target: Target) -> None:
        """Answer a recorded request, or RefusedError, CutError, ConnectionError."""
        raise NotImplementedError

    def _settle(self, target: Target) -> Outcome:
        try:
            self.answer(target)
        except RefusedError as refused:
            self._refuse(refused)
        except CutError:
            self.close_connection = True
            return "cut"
        return "done"

    def _entry(self, target: Target, path: str, query: str) -> Request:
        return Request(
            number=self.hub.ledger.number(),
            connection=self.number,
            origin=self.origin,
            method=self.command,
            path=path,
            query=query,
            route=target.route,
            file=self._file(target),
            range=self.headers.get("Range"),
            had_auth="Authorization" in self.headers,
            had_query_token="token" in self.query,
            user_agent=self.headers.get("User-Agent", ""),
            started_s=time.monotonic(),
        )

    def _file(self, target: Target) -> str:
        if target.route.startswith("civitai"):
            return self.hub.civitai.get(target.path, target.path)
        if target.route in {"xet/reconstruction", "xet/piece"}:
            return self.hub.xet.file(target.path.partition("/")[0])
        return target.file

    # --- what is known of the request

    def note(self, **changes: Any) -> None:  # noqa: ANN401 (fields of Request)
        """Record how far the answer is."""
        self.entry = replace(self.entry, **changes)
        self.hub.ledger.update(self.entry)

    def token(self) -> str | None:
        """The bearer token that came with it."""
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return token.strip() or None if scheme.lower() == "bearer" else None

    def asks(self, name: str) -> bool:
        """Whether the query has this switch on; httpx writes True as `true`, requests as `True`."""
        return self.query.get(name, "").lower() == "true"

    # --- faults

    def befall(self, *kinds: FaultKind, file: str | None = None) -> list[Rule]:
        """The faults of these kinds that befall this request (as one about `file`), spent and recorded."""
        asked = self.entry if file is None else replace(self.entry, file=file)
        return self.record(self.hub.book.take(asked, kinds, lambda _: True))

    def record(self, rules: list[Rule]) -> list[Rule]:
        """Note in the log which faults were applied."""
        if rules:
            self.note(faults=(*self.entry.faults, *(rule.fault.kind for rule in rules)))
        return rules

    def hold(self, fault: Fault) -> None:
        """Be silent for as long as the fault says; ConnectionAbortedError when there is nobody to go on for."""
        self.hub.ledger.hold(fault.hold_s, self._client_gone)
        if self.hub.ledger.closing.is_set() or self._client_gone():
            raise ConnectionAbortedError

    def abort(self, *, reset: bool) -> None:
        """End the connection here, with FIN or with RST."""
        if reset:
            # Linger 0 makes close() send RST. Closed now, for the server's own shutdown(SHUT_WR) would send FIN before it.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        raise CutError

    def _client_gone(self) -> bool:
        try:
            return not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    # --- answers

    def json(self, value: object, headers: Mapping[str, str] | None = None, status: int = 200) -> None:
        """Answer with JSON."""
        kind = {"Content-Type": "application/json; charset=utf-8"}
        self.send(status, {**kind, **(headers or {})}, json.dumps(value).encode())

    def redirect(self, status: int, signed: str, headers: Mapping[str, str] | None = None) -> None:
        """Send the client to the CDN."""
        location = {"Location": f"{self.hub.cdn_endpoint}{signed}", "Content-Type": "text/plain"}
        self.send(status, {**(headers or {}), **location}, b"Found")

    def send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Answer with a short body."""
        self.head(status, {**headers, "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        """Send the answer's head. Each answer has an id, as the hub's do: the client's errors name it."""
        self.note(status=status)
        self.send_response(status)
        self.send_header("X-Request-Id", f"request-{self.entry.number}")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _refuse(self, refused: RefusedError) -> None:
        if refused.message.startswith("<"):
            self.send(refused.status, {"Content-Type": "application/xml", **refused.headers}, refused.message.encode())
            return
        # A message may quote what was asked for; a header holds no newline and no letter beyond latin-1, JSON escapes both.
        said = {"X-Error-Message": json.dumps(refused.message)[1:-1]} if self.origin == "hub" else {}
        code = {"X-Error-Code": refused.code} if refused.code else {}
        self.json({"error": refused.message}, {**refused.headers, **said, **code}, refused.status)
