"""Download files from addresses that a request names, but never from the worker's own network. Touches the network.

A name is resolved once, each of its addresses is judged, and a socket opens only to one that passed. So a name that resolves to
something else a moment later gains nothing. Each redirect is judged again. Proxies of the environment are not used: they would
resolve the name themselves, behind the guard.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import quote, urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from worker.errors import InputNotServed, InputTimedOut, InputUnreachable, InputUrlRefused
from worker.media.address_guard import PRIVATE, UrlRules, bare_host, parse_address

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable, Iterator, Sequence
    from typing import Any

    from worker.media.staging import StagedFile

    Lookup = Callable[[str], Awaitable[Sequence[str]]]
    """From a host's name to its addresses; raises `OSError` when it has none."""

log = logging.getLogger(__name__)

# No Accept-Encoding: the file is wanted as it is stored. No other header that tells who asks.
_HEADERS: Final = {"User-Agent": "comfyui-volume-worker", "Accept": "*/*", "Accept-Encoding": "identity"}
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_TRANSIENT: Final = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
_OK: Final = 200
_READ_BYTES: Final = 1 << 18
_LAST_PART_CHARACTERS: Final = 60
# Characters that may stay in a path or a query. The rest is percent-encoded, above all what would end the request line.
_AS_IT_IS: Final = "!$%&'()*+,/:;=?@[]~"
# The order matters: each is a subclass of a later one.
_REASONS: Final = (
    (aiohttp.ClientConnectorDNSError, "its host name does not resolve"),
    (aiohttp.ClientSSLError, "no TLS connection could be made"),
    (aiohttp.ClientConnectorError, "no connection could be made"),
    (aiohttp.ClientPayloadError, "the file broke off"),
    (aiohttp.ClientConnectionError, "the connection was cut"),
    (Exception, "what it answered is not HTTP"),
)


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Sizes and times. `timeout_s` is for all files of a job together, the others are for one attempt."""

    max_bytes: int = 512_000_000
    timeout_s: float = 120.0
    connect_timeout_s: float = 10.0
    silence_timeout_s: float = 20.0
    attempts: int = 3
    pause_s: float = 0.5
    longest_pause_s: float = 15.0
    redirects: int = 5
    parallel: int = 4


@dataclass(frozen=True, slots=True)
class Download:
    """An address, and the file for its bytes."""

    url: str
    file: StagedFile


class Fetcher:
    """Downloads what requests name, under the operator's rules. Keeps no connection, cookie or address between jobs."""

    def __init__(
        self,
        rules: UrlRules | None = None,
        limits: FetchLimits | None = None,
        lookup: Lookup | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._rules = rules or UrlRules()
        self.limits = limits or FetchLimits()
        # Its own threads: a name server that does not answer blocks a thread longer than the job that asked.
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="input-dns")
        self._lookup = lookup or self._ask_system
        self._tls = tls

    def check(self, name: str, url: str) -> None:
        """Refuse an address if that needs no look-up. Raises `InputUrlRefused`."""
        _checked(self._rules, name, url)

    async def fetch(self, downloads: Sequence[Download]) -> None:
        """Download every file, a few at a time. At the first failure, or on cancellation, all end at once.

        Raises `InputUrlRefused`, `InputTooLarge`, `InputNotServed`, `InputUnreachable`, `InputTimedOut`, `InputNotStored`.
        """
        missing = [download.file.name for download in downloads]
        gate = asyncio.Semaphore(self.limits.parallel)
        try:
            async with (
                asyncio.timeout(self.limits.timeout_s),
                _Line(self._rules, self.limits, self._lookup, self._tls) as line,
                asyncio.TaskGroup() as tasks,
            ):
                for download in downloads:
                    tasks.create_task(self._fetch_one(line, gate, download, missing))
        except TimeoutError:
            raise InputTimedOut(tuple(missing), self.limits.timeout_s) from None
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _fetch_one(self, line: _Line, gate: asyncio.Semaphore, download: Download, missing: list[str]) -> None:
        async with gate:
            with download.file:
                for attempt in range(1, self.limits.attempts + 1):
                    try:
                        await line.receive(download)
                        break
                    except _TransientError as exc:
                        pause_s = max(self.limits.pause_s * attempt, exc.pause_s)
                        if attempt == self.limits.attempts or pause_s > self.limits.longest_pause_s:
                            raise InputUnreachable(download.file.name, shown(download.url), exc.reason) from exc
                    download.file.restart()
                    await asyncio.sleep(pause_s)
                missing.remove(download.file.name)

    async def _ask_system(self, host: str) -> list[str]:
        def ask() -> list[str]:
            infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
            return list(dict.fromkeys(str(info[4][0]) for info in infos))

        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, ask)
        except UnicodeError as exc:  # an empty label, or one that is too long
            raise OSError(errno.EINVAL, "no valid host name") from exc


class _TransientError(Exception):
    """A failed attempt that may be retried. `pause_s` is what the server asked for."""

    def __init__(self, reason: str, pause_s: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.pause_s = pause_s


class _PrivateAddressError(Exception):
    """A host has no address that may be reached. No `OSError`: aiohttp would report it as a failed look-up."""


class _Line:
    """The connections of one job: an aiohttp session that opens sockets only to judged addresses."""

    def __init__(self, rules: UrlRules, limits: FetchLimits, lookup: Lookup, tls: ssl.SSLContext | None) -> None:
        self._rules = rules
        self._limits = limits
        self._resolver = _JudgingResolver(rules, lookup)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                # aiohttp does not resolve numeric addresses. Every connection opens a socket.
                resolver=self._resolver,
                socket_factory=self._resolver.open_socket,
                use_dns_cache=False,
                ssl=tls or True,
                limit=0,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=_HEADERS,
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=limits.connect_timeout_s, sock_read=limits.silence_timeout_s
            ),
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def receive(self, download: Download) -> None:
        """Make one attempt, including redirects. Raises `_TransientError` if a retry may help."""
        name, start, text = download.file.name, shown(download.url), download.url
        for hop in range(self._limits.redirects + 1):
            url = _checked(self._rules, name, text, start if hop else "")
            with self._faults(name, start, url if hop else None):
                self._resolver.admit_number(bare_host(url))
                async with self._session.get(url, allow_redirects=False) as response:
                    target = response.headers.get("Location")
                    if response.status not in _REDIRECTS or not target:
                        await self._save(response, download)
                        return
            text = _joined(url, target)
            if url.scheme == "https" and not text.lower().startswith("https:"):
                raise InputUrlRefused(name, start, f"it redirects away from https, to {shown(text)}")
        raise InputNotServed(name, start, f"it redirects more than {self._limits.redirects} times")

    async def _save(self, response: aiohttp.ClientResponse, download: Download) -> None:
        file = download.file
        if response.status in _TRANSIENT:
            asked = response.headers.get("Retry-After", "")
            raise _TransientError(f"status {response.status}", float(asked) if re.fullmatch(r"\d{1,9}", asked) else 0.0)
        if response.status != _OK:
            expired = ", which is also how an expired signature looks" if response.status == 403 else ""  # noqa: PLR2004 - HTTP's
            raise InputNotServed(file.name, shown(download.url), f"it answered with status {response.status}{expired}")
        file.check_size(response.content_length or 0)
        # aiohttp inflates an encoded body in limited steps, so the bytes counted are the bytes written.
        async for chunk in response.content.iter_chunked(_READ_BYTES):
            file.add(chunk)
            if file.full:
                await asyncio.to_thread(file.flush)
        if not file.size_bytes:
            raise InputNotServed(file.name, shown(download.url), "it sent an empty file")
        file.flush()

    @contextlib.contextmanager
    def _faults(self, name: str, start: str, redirected_to: URL | None) -> Iterator[None]:
        """Turn aiohttp's errors into ours. Their own texts contain whole addresses, including signatures."""
        try:
            yield
        except _PrivateAddressError:
            raise InputUrlRefused(name, start, _through(redirected_to, PRIVATE)) from None
        except aiohttp.InvalidURL:
            raise InputUrlRefused(name, start, _through(redirected_to, "it is no valid address")) from None
        except aiohttp.ClientConnectorCertificateError:
            raise InputNotServed(name, start, _through(redirected_to, "its certificate is not valid")) from None
        except (aiohttp.ClientError, TimeoutError) as exc:
            raise _TransientError(_through(redirected_to, self._reason(exc))) from None

    def _reason(self, exc: Exception) -> str:
        if isinstance(exc, aiohttp.ConnectionTimeoutError):
            return f"no connection within {self._limits.connect_timeout_s:g} s"
        if isinstance(exc, TimeoutError):
            return f"it sent nothing for {self._limits.silence_timeout_s:g} s"
        if type(exc) is aiohttp.ClientConnectorError and (number := exc.os_error.errno) and number > 0:
            return os.strerror(number).lower()
        return next(reason for kind, reason in _REASONS if isinstance(exc, kind))


class _JudgingResolver(AbstractResolver):
    """Resolves names to the addresses that may be reached, and opens sockets to nothing else."""

    def __init__(self, rules: UrlRules, lookup: Lookup) -> None:
        self._rules = rules
        self._lookup = lookup
        self._admitted: set[str] = set()

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_UNSPEC,  # noqa: ARG002 - aiohttp's interface
    ) -> list[ResolveResult]:
        """Return the host's addresses without refused ones. Raises if none is left."""
        addresses = await self._lookup(host)
        if not addresses:
            raise OSError(errno.EADDRNOTAVAIL, "no address")
        admitted = [address for address in addresses if self.admit(host, address)]
        if not admitted:
            log.warning("a request names %s, which is %s: not downloaded", host, ", ".join(addresses))
            raise _PrivateAddressError
        return [
            ResolveResult(hostname=host, host=address, port=port, family=_family(address), proto=0, flags=socket.AI_NUMERICHOST)
            for address in admitted
        ]

    def admit(self, host: str, address: str) -> bool:
        """Judge an address of `host`. Sockets open only to addresses that passed."""
        parsed = parse_address(address)
        if parsed is None or not self._rules.admits(host, address):
            return False
        if not self._rules.excepts(host, parsed) and _is_this_machine(address):
            return False
        self._admitted.add(address)
        return True

    def admit_number(self, host: str) -> None:
        """Judge a host that is already an IP address, which aiohttp does not resolve."""
        if parse_address(host) is not None and not self.admit(host, host):
            raise _PrivateAddressError

    def open_socket(self, info: tuple[Any, ...]) -> socket.socket:
        """Return a socket for a connection to `info`, which comes from this resolver or from a numeric address."""
        family, kind, protocol, _, address = info
        if address[0] not in self._admitted:
            raise PermissionError(errno.EACCES, "an address that was not judged")
        return socket.socket(family, kind, protocol)

    async def close(self) -> None:
        """Do nothing: there is nothing to close."""


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _is_this_machine(address: str) -> bool:
    """Return whether a public address is this machine's own. Services here may rely on a firewall towards the outside."""
    try:
        with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _checked(rules: UrlRules, name: str, text: str, start: str = "") -> URL:
    """Return the address to send if the rules allow it. `start` is the address that redirected to it."""
    try:
        url = URL(text)
        refusal = rules.refusal(url)
        if refusal is None:
            return _verbatim(url, text)
    except ValueError:
        refusal = "it is no valid address"
    raise InputUrlRefused(name, start or shown(text), f"it redirects to {shown(text)}: {refusal}" if start else refusal)


def _verbatim(url: URL, text: str) -> URL:
    """Return the address with path and query as given: yarl decodes some escapes, which breaks some signatures."""
    parts, host = urlsplit(text), url.raw_host or ""
    return URL.build(
        scheme=url.scheme,
        host=f"[{host}]" if ":" in host else host,
        port=url.explicit_port,
        path=quote(parts.path, safe=_AS_IT_IS) or "/",
        query_string=quote(parts.query, safe=_AS_IT_IS),
        encoded=True,
    )


def _joined(url: URL, target: str) -> str:
    try:
        return urljoin(str(url), target)
    except ValueError:
        return target


def _through(redirected_to: URL | None, reason: str) -> str:
    return f"it redirects to {shown(str(redirected_to))}: {reason}" if redirected_to is not None else reason


def shown(url: str) -> str:
    """Return scheme, host and the path's last part, for logs and errors. Queries, users and sometimes paths contain tokens."""
    try:
        parsed = URL(url)
        host, port = parsed.host, f":{parsed.explicit_port}" if parsed.explicit_port else ""
    except ValueError:
        return "an address that cannot be read"
    if not host:
        return f"a {parsed.scheme or 'relative'} address"
    folder, _, last = parsed.raw_path.rpartition("/")
    last = last if len(last) <= _LAST_PART_CHARACTERS else f"{last[:_LAST_PART_CHARACTERS]}..."
    return f"{parsed.scheme}://{f'[{host}]' if ':' in host else host}{port}{'/...' if folder else ''}/{last}"
