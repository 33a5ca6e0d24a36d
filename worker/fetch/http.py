"""HTTP GET requests for bodies, over a kept connection; redirects and tokens of every request. Touches the network.

Bodies come through the standard library's client, which reads what each receive gives into the caller's buffer. For a GB that
takes 0.2 s of the processor, urllib3 0.3 s, and httpx2 1.0 s (`make bench BENCH=bodies`). ComfyUI wants the processor
meanwhile.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import re
import socket
import ssl
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

from worker.base.retry import PROXY_LOGIN, REDIRECTS
from worker.errors import NotAFile, ProxyUnusable, TokenMalformed, TokenRefused
from worker.fetch import socks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from email.message import Message

    import httpx2

_MAX_HOPS: Final = 10
_PORTS: Final = {"http": 80, "https": 443}
_AGENT: Final = "comfyui-volume-worker"
_PRINTABLE: Final = "".join(map(chr, range(0x21, 0x7F)))
_QUERY: Final = re.compile(r"\?\S*")


@dataclass(frozen=True, slots=True)
class Credential:
    """A token, the one origin (`https://host[:port]`) that may see it, and the variable that sets it."""

    origin: str
    variable: str
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Network:
    """How HTTP reaches addresses. `proxies` is what `urllib.request.getproxies()` returns: scheme to address, and `no`."""

    credentials: Sequence[Credential] = ()
    proxies: Mapping[str, str] = field(default_factory=dict)
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 20.0
    tls: ssl.SSLContext = field(default_factory=ssl.create_default_context, repr=False)

    def credential(self, url: str) -> Credential | None:
        """Return the credential of the address's origin, even if its token is not set. Raises `TokenMalformed`."""
        found = next((found for found in self.credentials if origin(found.origin) == origin(url)), None)
        if found and found.token and not set(found.token) <= set(_PRINTABLE):
            raise TokenMalformed(found.variable)
        return found

    def proxy(self, url: str) -> str | None:
        """Return the HTTP or SOCKS5 proxy for the address. Raises `ProxyUnusable` for a proxy of another kind.

        A proxy for the address's own scheme comes before `all`.
        """
        parts = urlsplit(url)
        host = f".{(parts.hostname or '').lower()}"
        direct = [name.strip().lower() for name in self.proxies.get("no", "").split(",") if name.strip()]
        bypass = any(name == "*" or host.endswith(f".{name.lstrip('.')}") for name in direct)
        found = None if bypass else self.proxies.get(parts.scheme) or self.proxies.get("all")
        if not found:
            return None
        found = found if "://" in found else f"http://{found}"
        if (kind := found.partition("://")[0].lower()) != "http" and not _is_socks(found):
            raise ProxyUnusable(shown_address(found), f"speaks {kind}, which is not known here")
        try:
            if urlsplit(found).hostname and urlsplit(found).port != 0:
                return found
        except ValueError:
            pass
        raise ProxyUnusable(shown_address(found), "has an address that cannot be read")


def _is_socks(proxy: str) -> bool:
    return proxy.partition("://")[0].lower() in {"socks5", "socks5h"}


def login_refused(proxy: str) -> ProxyUnusable:
    """Return the error of an HTTP request's proxy that wants another user or password."""
    status = "" if _is_socks(proxy) else f" (status {PROXY_LOGIN})"
    return ProxyUnusable(shown_address(proxy), f"requires another user or password{status}")


def basic_authorization(url: str) -> str | None:
    """Return the HTTP `Authorization` value for the user and password in an address, or None."""
    parts = urlsplit(url)
    if parts.username is None:
        return None
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


def origin(url: str) -> str:
    """Return scheme, host and port of an HTTP address. They decide who may see a token."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{(parts.hostname or '').lower()}:{parts.port or _PORTS.get(parts.scheme, 0)}"


def shown_address(url: str) -> str:
    """Return an HTTP address without its query and user, which may contain tokens and signatures. For logs and errors."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def sendable_address(url: str) -> str:
    """Return an address as an HTTP request sends it: in ASCII, without its fragment.

    In path and query only characters outside printable ASCII are escaped, because a signature may cover the rest, including `%`
    escapes. A host is encoded with IDNA. Raises ValueError for an invalid address.
    """
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port
    if not host or not host.isprintable() or " " in host:
        raise ValueError("an address without a host")
    netloc = parts.netloc
    if not netloc.isascii():
        netloc = host.encode("idna").decode() + (f":{port}" if port else "")
    path, query = (quote(text, _PRINTABLE, errors="surrogateescape") for text in (parts.path, parts.query))
    return urlunsplit((parts.scheme, netloc, path, query, ""))


def what_failed(exc: Exception) -> str:
    """Return what failed in an HTTP request in a few words, for logs and errors, without any address's query."""
    text = "" if isinstance(exc, http.client.InvalidURL) else without_queries(str(exc))
    return f"{type(exc).__name__}: {text}".removesuffix(": ")


def without_queries(text: str) -> str:
    """Return what a failed request said, without the queries of HTTP addresses in it, which may contain tokens."""
    return _QUERY.sub("", text)


def bare_etag(etag: str | None) -> str | None:
    """Return the ETag of an HTTP answer without its quotes and its weakness mark, as huggingface_hub does."""
    return etag.removeprefix("W/").strip('"') if etag else None


def content_coding(headers: Message | Mapping[str, str]) -> str | None:
    """Return how an HTTP body is compressed although nobody asked for that, so that its bytes are not the file's."""
    coding = (headers.get("Content-Encoding") or "").strip().lower()
    return coding if coding not in {"", "identity"} else None


def token_refused(url: str, status: int, credential: Credential | None) -> TokenRefused:
    """Return the error for an HTTP status that means a missing or refused token."""
    if credential is None:
        return TokenRefused(shown_address(url), status, None, has_token=False)
    return TokenRefused(shown_address(url), status, credential.variable, has_token=bool(credential.token))


def _next(network: Network, start: str, url: str, location: str, status: int) -> str:
    try:
        # Headers arrive as latin-1. Servers write UTF-8 there if it is not ASCII.
        target = sendable_address(urljoin(url, location.encode("latin-1").decode("utf-8", "surrogateescape")))
    except ValueError:
        raise NotAFile(shown_address(start), "a redirect to what is no address") from None
    parts, own = urlsplit(target), urlsplit(url)
    if parts.username is None and own.username is not None and origin(target) == origin(url):
        parts = parts._replace(netloc=f"{own.netloc.rpartition('@')[0]}@{parts.netloc}")
        target = urlunsplit(parts)
    if parts.path.rstrip("/") == "/login":
        # Civitai redirects to a page for people if a token is needed.
        credential = network.credential(start)
        raise token_refused(start, status, credential)
    if parts.scheme not in _PORTS or (urlsplit(url).scheme == "https" and parts.scheme != "https"):
        raise NotAFile(shown_address(start), "a redirect away from https")
    return target


class HttpAnswer(Protocol):
    """What is alike in the answers of http.client and of httpx2, whose headers are to be read as latin-1."""

    @property
    def status_code(self) -> int:
        """Return the status."""

    @property
    def headers(self) -> Message | httpx2.Headers:
        """Return the headers."""


A = TypeVar("A", bound=HttpAnswer)


@dataclass(frozen=True, slots=True)
class FollowedAnswer(Generic[A]):
    """An answer after redirects, and the address it came from. `linked_etag` is the hub's name of the file, also before one."""

    answer: A
    url: str
    linked_etag: str | None


def follow_redirects(network: Network, start: str, send: Callable[[str], A]) -> FollowedAnswer[A]:
    """Send a GET and those that its redirects ask for. `send` ends the request before.

    Both clients share this. httpx2's own redirects do not take its place: it reads a redirect's body to the end, however long
    that is, and a redirect to a page for people, away from https or in a circle has a sentence of its own here. Each address
    gets the token of its origin. Raises `TokenRefused` or `NotAFile` for redirects that lead nowhere.
    """
    try:
        url = sendable_address(start)
    except ValueError:
        raise NotAFile(shown_address(start), "no address that can be asked") from None
    linked_etag = None
    for _ in range(_MAX_HOPS):
        answer = send(url)
        linked_etag = answer.headers.get("X-Linked-Etag") or linked_etag
        target = answer.headers.get("Location")
        if answer.status_code not in REDIRECTS or not target:
            return FollowedAnswer(answer, url, linked_etag)
        url = _next(network, start, url, target, answer.status_code)
    raise NotAFile(shown_address(start), "a circle of redirects")


def request_headers(network: Network, url: str, headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers of a request to this address, with its origin's token, or the user and password in it."""
    credential = network.credential(url)
    own = f"Bearer {credential.token}" if credential and credential.token else basic_authorization(url)
    sent = {"User-Agent": _AGENT, "Accept-Encoding": "identity", **headers}
    return sent | ({"Authorization": own} if own else {})


def request_target(url: str) -> str:
    """Return path and query of an address, as a request's first line names them."""
    parts = urlsplit(url)
    return f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"


class HttpResponse(http.client.HTTPResponse):
    """An HTTP answer whose body can be read as it arrives."""

    @property
    def status_code(self) -> int:
        """Return the status, by the name that it has in httpx2."""
        return self.status

    def readinto1(self, buffer: memoryview) -> int:  # type: ignore[override] # the base class takes any buffer
        """Read the result of one receive without waiting for a full `buffer`. Return 0 at the end of the body."""
        if self.fp is None or not buffer:
            return 0
        if self.chunked:
            data = self.read1(len(buffer))
            buffer[: len(data)] = data
            return len(data)
        if self.length is not None:
            buffer = buffer[: self.length]
        length: int = self.fp.readinto1(buffer)
        if self.length is not None:
            self.length -= length
        if not length or self.length == 0:
            self.close()
        return length


def _proxy_headers(proxy: str | None) -> dict[str, str]:
    own = basic_authorization(proxy) if proxy else None
    return {"Proxy-Authorization": own} if own else {}


class HttpChannel:
    """An HTTP connection that is kept between requests. One thread uses it; any thread may break it off."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._origin = ""
        self._connection: http.client.HTTPConnection | None = None
        self._socket: socket.socket | None = None
        self._response: HttpResponse | None = None
        self._broken_off = False

    def get(self, url: str, headers: Mapping[str, str]) -> HttpResponse:
        """Send a GET. Return the answer after redirects. Raises `OSError`, `HTTPException`, and as `follow_redirects`."""
        return follow_redirects(self._network, url, partial(self._request, headers)).answer

    def _request(self, headers: Mapping[str, str], url: str) -> HttpResponse:
        is_read = self._response is None or self._response.isclosed()  # not that of a redirect
        if self._connection is None or self._origin != origin(url) or not is_read:
            self.close()
            self._connect(url)
        connection = self._connection
        if connection is None or self._broken_off:
            raise ConnectionAbortedError("broken off")
        parts = urlsplit(url)
        proxy = self._network.proxy(url) if parts.scheme == "http" else None
        proxy = None if proxy and _is_socks(proxy) else proxy
        sent = request_headers(self._network, url, headers) | _proxy_headers(proxy)
        whole = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        connection.request("GET", whole if proxy else request_target(url), headers=sent)
        response = connection.getresponse()
        if not isinstance(response, HttpResponse):
            raise TypeError("the connection was made for another kind of answer")
        if proxy and response.status == PROXY_LOGIN:
            raise login_refused(proxy)
        self._response = response
        return response

    def _connect(self, url: str) -> None:
        parts, proxy, timeout_s = urlsplit(url), self._network.proxy(url), self._network.connect_timeout_s
        is_tls, by_socks = parts.scheme == "https", bool(proxy and _is_socks(proxy))
        at = urlsplit(proxy) if proxy and not by_socks else parts
        host, port = at.hostname or "", at.port or _PORTS[at.scheme]
        connection: http.client.HTTPConnection
        if is_tls:
            connection = http.client.HTTPSConnection(host, port, timeout=timeout_s, context=self._network.tls)
            if proxy and not by_socks:
                connection.set_tunnel(parts.hostname or "", parts.port or _PORTS["https"], _proxy_headers(proxy))
        else:
            connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
        connection.response_class = HttpResponse
        try:
            if proxy and by_socks:
                link = socks.connect_by_socks(proxy, host, port, timeout_s)
                connection.sock = self._network.tls.wrap_socket(link, server_hostname=host) if is_tls else link
            else:
                connection.connect()
        except OSError as exc:
            if proxy and (isinstance(exc, socks.LoginRefusedError) or f"Tunnel connection failed: {PROXY_LOGIN}" in str(exc)):
                raise login_refused(proxy) from exc
            raise
        connection.sock.settimeout(self._network.read_timeout_s)
        self._connection, self._socket, self._origin = connection, connection.sock, origin(url)

    def break_off(self) -> None:
        """End the current wait of the using thread, and all later ones."""
        self._broken_off = True
        self.hang_up()

    def hang_up(self) -> None:
        """End the current request. The using thread's next request opens a new connection."""
        if (found := self._socket) is not None:
            with contextlib.suppress(OSError):
                found.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection. The next request opens a new one."""
        connection, self._connection, self._socket, self._response = self._connection, None, None, None
        if connection is not None:
            connection.close()
