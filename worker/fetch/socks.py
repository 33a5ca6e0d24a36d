"""Connect through a SOCKS5 proxy for `http.client`. httpx2 does so for itself, with the same library. Touches the network."""

from __future__ import annotations

import socket
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from socksio import (
    ProtocolError,
    SOCKS5AuthMethod,
    SOCKS5AuthMethodsRequest,
    SOCKS5Command,
    SOCKS5CommandRequest,
    SOCKS5Connection,
    SOCKS5ReplyCode,
    SOCKS5UsernamePasswordRequest,
)

_PORT: Final = 1080
_REPLY_BYTES: Final = 4096


class LoginRefusedError(OSError):
    """The SOCKS proxy wants another user or password."""


def connect_by_socks(proxy: str, host: str, port: int, timeout_s: float) -> socket.socket:
    """Connect to a host through a SOCKS proxy, which resolves its name. Raises `LoginRefusedError`, and `OSError` otherwise."""
    at = urlsplit(proxy)
    pair = None if at.username is None else (unquote(at.username), unquote(at.password or ""))
    found = socket.create_connection((at.hostname, at.port or _PORT), timeout_s)
    try:
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _open(found, pair, host, port)
    except BaseException:
        found.close()
        raise
    return found


def _open(link: socket.socket, pair: tuple[str, str] | None, host: str, port: int) -> None:
    protocol = SOCKS5Connection()

    def ask(request: object) -> Any:  # noqa: ANN401 - the reply that belongs to the request
        protocol.send(request)
        link.sendall(protocol.data_to_send())
        return protocol.receive_data(link.recv(_REPLY_BYTES))

    method = SOCKS5AuthMethod.NO_AUTH_REQUIRED if pair is None else SOCKS5AuthMethod.USERNAME_PASSWORD
    try:
        if ask(SOCKS5AuthMethodsRequest([method])).method is not method:
            raise LoginRefusedError
        if pair and not ask(SOCKS5UsernamePasswordRequest(*(text.encode() for text in pair))).success:
            raise LoginRefusedError
        code = ask(SOCKS5CommandRequest.from_address(SOCKS5Command.CONNECT, (host, port))).reply_code
    except ProtocolError as exc:
        raise ConnectionError("the proxy's answer is not SOCKS") from exc
    if code is not SOCKS5ReplyCode.SUCCEEDED:
        raise ConnectionError(f"the proxy could not connect: {code.name.lower().replace('_', ' ')}")
