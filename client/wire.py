"""Send one HTTP request to an endpoint or a worker. Turn every failure into a sentence. Network."""

from __future__ import annotations

import http.client
import json
import socket
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from client.errors import (
    AnswerUnreadable,
    EndpointUnknown,
    KeyRefused,
    RequestRefused,
    ServiceFailed,
    TooManyRequests,
    Unreachable,
    UsageError,
)
from client.plain import fits_a_header

if TYPE_CHECKING:
    from collections.abc import Mapping

    from client.errors import ServiceError

_REASON_CHARS: Final = 200
_LOCAL: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_UNAUTHORISED: Final = frozenset({401, 403})


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuse redirects. No endpoint sends one, and following it would give the key to its target."""

    def redirect_request(self, *_: object) -> None:  # urllib passes six things, none of use here
        """Follow none."""


@dataclass(frozen=True, slots=True)
class Wire:
    """Requests under one address. The key goes only to that address. A local address is reached without a proxy."""

    base: str
    key: str | None = None

    def __post_init__(self) -> None:
        """Raise `UsageError` if it is no address."""
        if "://" not in self.base and fits_a_header(self.base):
            raise UsageError(f"'{self.base}' is no whole address: write http://{self.base}, or https://")
        try:
            parts = urllib.parse.urlsplit(self.base)
            usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not (usable and fits_a_header(self.base)):
            raise UsageError(f"'{self.base}' is no http:// or https:// address: write one such as http://127.0.0.1:8000")

    @property
    def is_local(self) -> bool:
        """Return whether the address is this machine."""
        return urllib.parse.urlsplit(self.base).hostname in _LOCAL

    def get(self, path: str, timeout_s: float) -> dict[str, Any]:
        """Return the object that GET answers. Raises a `ServiceError`."""
        return self._send(urllib.request.Request(self.base + path, headers=self._headers()), timeout_s)  # noqa: S310 - checked above

    def post(self, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> dict[str, Any]:
        """Return the object that POST answers. Raises a `ServiceError`."""
        data = b"" if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, self._headers(), method="POST")  # noqa: S310 - as above
        return self._send(request, timeout_s)

    def _headers(self) -> dict[str, str]:
        key = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "run-workflow", **key}

    def _send(self, request: urllib.request.Request, timeout_s: float) -> dict[str, Any]:
        proxies = urllib.request.ProxyHandler({} if self.is_local else None)
        try:
            with urllib.request.build_opener(proxies, _NoRedirect).open(request, timeout=timeout_s) as response:
                data = response.read()
        except urllib.error.HTTPError as exc:
            with exc:
                raise self._refusal(exc, len(request.data or b"")) from None  # type: ignore[arg-type]  # bytes, made above
        except urllib.error.URLError as exc:  # urllib's error for every failure before the whole request is sent
            raise self.unreachable(exc.reason) from None
        except (OSError, http.client.HTTPException) as exc:
            raise self.unreachable(exc, was_sent=True) from None
        return self._object(data)

    def _object(self, data: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            raise AnswerUnreadable(self.base, f"{_words(data) or 'nothing'!r}") from None
        if not isinstance(answer, dict):
            raise AnswerUnreadable(self.base, f"the JSON of a {type(answer).__name__}")
        return answer

    def _refusal(self, answer: urllib.error.HTTPError, size_bytes: int) -> ServiceError:
        status = answer.code
        try:
            reason = _words(answer.read(1 << 16)) or str(answer.reason)
        except (OSError, http.client.HTTPException):
            reason = str(answer.reason)
        if status in _UNAUTHORISED:
            return KeyRefused(self.base, status)
        if status == http.HTTPStatus.NOT_FOUND:
            return EndpointUnknown(self.base)
        if status == http.HTTPStatus.TOO_MANY_REQUESTS:
            return TooManyRequests(self.base, 0.0)
        if status >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
            return ServiceFailed(self.base, status, reason)
        if status < http.HTTPStatus.BAD_REQUEST:
            return AnswerUnreadable(self.base, f"a redirect (status {status})")
        return RequestRefused(self.base, status, reason, size_bytes)

    def unreachable(self, reason: object, *, was_sent: bool = False) -> Unreachable:
        """Return the error for a connection that failed with `reason`. `was_sent`: the request had been sent before."""
        text = (reason.strerror or str(reason)) if isinstance(reason, OSError) else str(reason)
        if isinstance(reason, TimeoutError):
            text = "no answer in time"
        if isinstance(reason, socket.gaierror):
            text = "its name cannot be looked up"
        advice = "is the worker running? `make serve` starts one" if self.is_local else "check the address and the network"
        return Unreachable(self.base, text or type(reason).__name__, advice, was_sent)


def _words(data: bytes) -> str:
    """Return an error body on one line: the `error` or `detail` of a JSON object, or the beginning of the text."""
    text = data.decode("utf-8", "replace")
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = None
    if isinstance(body, dict):
        found = next((body[key] for key in ("error", "detail", "message", "title") if body.get(key)), body)
        text = found if isinstance(found, str) else json.dumps(found)
    return " ".join(text.split())[:_REASON_CHARS]
