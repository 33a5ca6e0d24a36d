"""One HTTP GET after another over a kept connection, redirects by hand. Touches the network.

The standard library's client, because nothing else reads a body into a buffer of ours: a third of the processor time, and
three times the rate, of the clients that hand out `bytes`.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import http.client
import re
import socket
import ssl
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

from worker.errors import NotAFile, ProxyUnusable, TokenMalformed, TokenRefused

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from email.message import Message

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_MAX_HOPS: Final = 10
_PORTS: Final = {"http": 80, "https": 443}
_AGENT: Final = "comfyui-volume-worker"
_PRINTABLE: Final = "".join(map(chr, range(0x21, 0x7F)))
_QUERY: Final = re.compile(r"\?\S*")

PROXY_LOGIN: Final = 407
PROXY_WANTS: Final = f"wants another user or password (status {PROXY_LOGIN})"

OK: Final = 200
PARTIAL: Final = 206
UNSATISFIABLE: Final = 416
UNAUTHORISED: Final = frozenset({401, 403})
# Too Early is what a server that saw a replayed TLS request says; the others are timeouts, rate limits and broken back ends.
TRANSIENT: Final = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})


@dataclass(frozen=True, slots=True)
class Credential:
    """A token, the one origin (`https://host[:port]`) that may see it, and the variable it is set with."""

    origin: str
    variable: str
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Network:
    """How addresses are reached. `proxies` is what `urllib.request.getproxies()` returns: scheme to address, and `no`."""

    credentials: Sequence[Credential] = ()
    proxies: Mapping[str, str] = field(default_factory=dict)
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 20.0
    tls: ssl.SSLContext = field(default_factory=ssl.create_default_context, repr=False)

    def credential(self, url: str) -> Credential | None:
        """The credential of the address's origin, whether or not its token is set; raises `TokenMalformed`."""
        found = next((found for found in self.credentials if origin(found.origin) == origin(url)), None)
        if found and found.token and not set(found.token) <= set(_PRINTABLE):
            raise TokenMalformed(found.variable)
        return found

    @property
    def has_other_proxies(self) -> bool:
        """Whether there is a proxy that does not speak HTTP, for whichever addresses."""
        return any(name != "no" and _kind(proxy) != "http" for name, proxy in self.proxies.items())

    def proxy(self, url: str) -> str | None:
        """The HTTP proxy that the address is reached through; raises `ProxyUnusable` for one of another kind.

        One for the address's own scheme comes before `all`.
        """
        parts = urlsplit(url)
        host = f".{(parts.hostname or '').lower()}"
        direct = [name.strip().lower() for name in self.proxies.get("no", "").split(",") if name.strip()]
        bypass = any(name == "*" or host.endswith(f".{name.lstrip('.')}") for name in direct)
        found = None if bypass else self.proxies.get(parts.scheme) or self.proxies.get("all")
        if not found:
            return None
        found = found if "://" in found else f"http://{found}"
        if _kind(found) != "http":
            raise ProxyUnusable(shown(found), f"speaks {_kind(found)}, which is not known here")
        try:
            if urlsplit(found).hostname and urlsplit(found).port != 0:
                return found
        except ValueError:
            pass
        raise ProxyUnusable(shown(found), "has an address that cannot be read")


def _kind(proxy: str) -> str:
    return proxy.partition("://")[0].lower() if "://" in proxy else "http"


def basic(url: str) -> str | None:
    """What `Authorization` is for the user and password in an address; None where there are none."""
    parts = urlsplit(url)
    if parts.username is None:
        return None
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


def origin(url: str) -> str:
    """Scheme, host and port of an address: who may see a token that is meant for it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{(parts.hostname or '').lower()}:{parts.port or _PORTS.get(parts.scheme, 0)}"


def shown(url: str) -> str:
    """An address without its query and user, where tokens and signatures are: fit for logs and errors."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def sendable(url: str) -> str:
    """An address as it goes over the wire: in ASCII, without its fragment.

    In the path and the query only what is no printable ASCII is escaped: a signature may cover the rest as it is, `%` escapes
    included. A host is written by IDNA. Raises ValueError for what is no address.
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
    """The network's error in a few words, for logs and errors: without any address's query, where signatures and tokens are."""
    text = "" if isinstance(exc, http.client.InvalidURL) else without_query(str(exc))
    return f"{type(exc).__name__}: {text}".removesuffix(": ")


def without_query(text: str) -> str:
    """A text without the queries of the addresses in it."""
    return _QUERY.sub("", text)


def bare_etag(etag: str | None) -> str | None:
    """An ETag without its quotes and its mark of weakness, as huggingface_hub has it."""
    return etag.removeprefix("W/").strip('"') if etag else None


def content_coding(headers: Message | Mapping[str, str]) -> str | None:
    """How a body is compressed, though nobody asked for that: its bytes are not the file's."""
    coding = (headers.get("Content-Encoding") or "").strip().lower()
    return coding if coding not in {"", "identity"} else None


def retry_after_s(headers: Message | Mapping[str, str]) -> float | None:
    """What `Retry-After` (seconds or a date) or an exhausted `RateLimit` asks for; None when neither does."""
    text = headers.get("Retry-After")
    if text and text.strip().isdecimal():
        return float(text)
    if text:
        with contextlib.suppress(ValueError):
            return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    limit = re.search(r"\br=0\b.*\bt=(\d+)", headers.get("RateLimit") or "")
    return float(limit.group(1)) if limit else None


def token_refused(url: str, status: int, credential: Credential | None) -> TokenRefused:
    """What to tell the person whose token was missing or not good enough."""
    if credential is None:
        return TokenRefused(shown(url), status, None, has_token=False)
    return TokenRefused(shown(url), status, credential.variable, has_token=bool(credential.token))


class Response(http.client.HTTPResponse):
    """An answer whose body can be read as it comes. `linked_etag`: what the hub calls the file, also before a redirect."""

    linked_etag: str | None = None

    def readinto1(self, buffer: memoryview) -> int:  # type: ignore[override] # the base class takes any buffer
        """Read what one receive gives, without waiting until `buffer` is full; 0 at the end of the body."""
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
    own = basic(proxy) if proxy else None
    return {"Proxy-Authorization": own} if own else {}


class Channel:
    """A connection that is kept from one request to the next; one thread uses it, any thread may break it off."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._origin = ""
        self._connection: http.client.HTTPConnection | None = None
        self._socket: socket.socket | None = None
        self._broken_off = False

    def get(self, url: str, headers: Mapping[str, str]) -> tuple[Response, str]:
        """The answer to a GET, and the address it came from after redirects.

        A token goes to its own origin only, whatever the redirects are. Raises `OSError`, `http.client.HTTPException`, and
        `TokenRefused` or `NotAFile` for redirects that lead nowhere.
        """
        start = url
        try:
            url = sendable(url)
        except ValueError:
            raise NotAFile(shown(start), "no address that can be asked") from None
        linked_etag = None
        for _ in range(_MAX_HOPS):
            response = self._request(url, headers)
            response.linked_etag = linked_etag = response.getheader("X-Linked-Etag") or linked_etag
            target = response.getheader("Location")
            if response.status not in _REDIRECTS or not target:
                return response, url
            self.close()
            url = self._next(start, url, target, response.status)
        raise NotAFile(shown(start), "a circle of redirects")

    def _next(self, start: str, url: str, location: str, status: int) -> str:
        try:
            # Headers come as latin-1, and what servers write there is UTF-8, if it is not ASCII.
            target = sendable(urljoin(url, location.encode("latin-1").decode("utf-8", "surrogateescape")))
        except ValueError:
            raise NotAFile(shown(start), "a redirect to what is no address") from None
        parts, own = urlsplit(target), urlsplit(url)
        if parts.username is None and own.username is not None and origin(target) == origin(url):
            parts = parts._replace(netloc=f"{own.netloc.rpartition('@')[0]}@{parts.netloc}")
            target = urlunsplit(parts)
        if parts.path.rstrip("/") == "/login":
            # Civitai sends those who need a token to a page for people.
            credential = self._network.credential(start)
            raise token_refused(start, status, credential)
        if parts.scheme not in _PORTS or (urlsplit(url).scheme == "https" and parts.scheme != "https"):
            raise NotAFile(shown(start), "a redirect away from https")
        return target

    def _request(self, url: str, headers: Mapping[str, str]) -> Response:
        if self._connection is None or self._origin != origin(url):
            self.close()
            self._connect(url)
        connection = self._connection
        if connection is None or self._broken_off:
            raise ConnectionAbortedError("broken off")
        parts = urlsplit(url)
        path = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        proxy = self._network.proxy(url) if parts.scheme == "http" else None
        credential = self._network.credential(url)
        own = f"Bearer {credential.token}" if credential and credential.token else basic(url)
        sent = {"User-Agent": _AGENT, "Accept-Encoding": "identity", **headers}
        sent |= ({"Authorization": own} if own else {}) | _proxy_headers(proxy)
        whole = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        connection.request("GET", whole if proxy else path, headers=sent)
        response = connection.getresponse()
        if not isinstance(response, Response):
            raise TypeError("the connection was made for another kind of answer")
        if proxy and response.status == PROXY_LOGIN:
            raise ProxyUnusable(shown(proxy), PROXY_WANTS)
        return response

    def _connect(self, url: str) -> None:
        parts = urlsplit(url)
        proxy = self._network.proxy(url)
        at = urlsplit(proxy) if proxy else parts
        host, port, timeout_s = at.hostname or "", at.port or _PORTS[at.scheme], self._network.connect_timeout_s
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            connection = http.client.HTTPSConnection(host, port, timeout=timeout_s, context=self._network.tls)
            if proxy:
                connection.set_tunnel(parts.hostname or "", parts.port or _PORTS["https"], _proxy_headers(proxy))
        else:
            connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
        connection.response_class = Response
        try:
            connection.connect()
        except OSError as exc:
            if proxy and f"Tunnel connection failed: {PROXY_LOGIN}" in str(exc):
                raise ProxyUnusable(shown(proxy), PROXY_WANTS) from exc
            raise
        connection.sock.settimeout(self._network.read_timeout_s)
        self._connection, self._socket, self._origin = connection, connection.sock, origin(url)

    def break_off(self) -> None:
        """End whatever the using thread waits for, now and from here on."""
        self._broken_off = True
        self.hang_up()

    def hang_up(self) -> None:
        """End the request under way; the using thread's next one makes a new connection."""
        if (found := self._socket) is not None:
            with contextlib.suppress(OSError):
                found.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Forget the connection; the next request makes a new one."""
        connection, self._connection, self._socket = self._connection, None, None
        if connection is not None:
            connection.close()
