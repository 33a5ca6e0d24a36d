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
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import urljoin

import httpcore2
import httpx2

from worker.base.asyncio_transport import AsyncioBackend, AsyncioTransport
from worker.base.clock import within
from worker.base.retry import OK, REDIRECTS, TRANSIENT, pause_s, retry_after_s
from worker.errors import InputNotServed, InputTimedOut, InputUnreachable, InputUrlRefused
from worker.media.address_guard import PRIVATE, AddressRules, bare_host, parse_address

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
    from typing import Any

    from worker.media.staged_files import StagedFile

    Lookup = Callable[[str], Awaitable[Sequence[str]]]
    """From a host's name to its addresses; raises `OSError` when it has none."""

log = logging.getLogger(__name__)

# No Accept-Encoding: the file is wanted as it is stored. No other header that tells who asks.
_HEADERS: Final = {"User-Agent": "comfyui-volume-worker", "Accept": "*/*", "Accept-Encoding": "identity"}
_LAST_PART_CHARACTERS: Final = 60
_INVALID: Final = "it is no valid address"
# What a browser drops from an address that was copied with it.
_DROPPED: Final = re.compile(r"^\s+|[\t\r\n]")


@dataclass(frozen=True, slots=True)
class UrlFetchLimits:
    """Sizes and times. `timeout_s` is for all files of a job, on the fetcher's clock. The others are for one attempt."""

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
class UrlDownload:
    """An address that a request names, and the file for its bytes."""

    url: str
    file: StagedFile


class UrlFetcher:
    """Downloads what requests name, under the operator's rules. Keeps no connection, cookie or address between jobs."""

    def __init__(
        self,
        rules: AddressRules | None = None,
        limits: UrlFetchLimits | None = None,
        lookup: Lookup | None = None,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rules = rules or AddressRules()
        self.limits = limits or UrlFetchLimits()
        # Its own threads: a name server that does not answer blocks a thread longer than the job that asked.
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="input-dns")
        self._lookup = lookup or self._ask_system
        self._tls = tls
        self._clock = clock

    def check(self, name: str, url: str) -> None:
        """Refuse an address if that needs no look-up. Raises `InputUrlRefused`."""
        _checked_url(self._rules, name, url)

    async def fetch(self, downloads: Sequence[UrlDownload]) -> None:
        """Download every file, a few at a time. At the first failure, or on cancellation, all end at once.

        Raises `InputUrlRefused`, `InputTooLarge`, `InputNotServed`, `InputUnreachable`, `InputTimedOut`, `InputNotStored`.
        """
        missing = [download.file.name for download in downloads]
        gate = asyncio.Semaphore(self.limits.parallel)
        try:
            async with (
                within(self.limits.timeout_s, self._clock),
                _JobConnections(self._rules, self.limits, self._lookup, self._tls_context()) as line,
                asyncio.TaskGroup() as tasks,
            ):
                for download in downloads:
                    tasks.create_task(self._fetch_one(line, gate, download, missing))
        except TimeoutError:
            raise InputTimedOut(tuple(missing), self.limits.timeout_s) from None
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _fetch_one(
        self, line: _JobConnections, gate: asyncio.Semaphore, download: UrlDownload, missing: list[str]
    ) -> None:
        async with gate:
            with download.file:
                for attempt in range(1, self.limits.attempts + 1):
                    try:
                        await line.receive(download)
                        break
                    except _TransientError as exc:
                        wait_s = max(pause_s(attempt, self.limits.pause_s), exc.pause_s)
                        if attempt == self.limits.attempts or wait_s > self.limits.longest_pause_s:
                            raise InputUnreachable(download.file.name, shown_input_url(download.url), exc.reason) from exc
                    download.file.restart()
                    await asyncio.sleep(wait_s)
                missing.remove(download.file.name)

    def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()  # 20 ms, and most jobs name no address
        return self._tls

    async def _ask_system(self, host: str) -> list[str]:
        def ask() -> list[str]:
            infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
            return list(dict.fromkeys(str(info[4][0]) for info in infos))

        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, ask)
        except UnicodeError as exc:  # an empty label, or one that is too long
            raise OSError(errno.EINVAL, "no valid host name") from exc


class _TransientError(Exception):
    """A failed attempt to fetch an input file from its URL that may be retried. `pause_s` is what the server asked for."""

    def __init__(self, reason: str, pause_s: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.pause_s = pause_s


class _PrivateAddressError(Exception):
    """The host in an input file's URL has no address that may be reached."""


class _JobConnections:
    """The connections that fetch one job's input files by URL, which open only to judged addresses."""

    def __init__(self, rules: AddressRules, limits: UrlFetchLimits, lookup: Lookup, tls: ssl.SSLContext) -> None:
        self._rules = rules
        self._limits = limits
        # The transport itself: no cookie is kept, no redirect is followed and no address is logged.
        self._transport = AsyncioTransport(JudgingBackend(rules, lookup), tls=tls)
        waits = httpx2.Timeout(None, connect=limits.connect_timeout_s, read=limits.silence_timeout_s)
        self._extensions = {"timeout": waits.as_dict()}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._transport.aclose()

    async def receive(self, download: UrlDownload) -> None:
        """Make one attempt, including redirects. Raises `_TransientError` if a retry may help."""
        name, start, text = download.file.name, shown_input_url(download.url), download.url
        for hop in range(self._limits.redirects + 1):
            url = _checked_url(self._rules, name, text, start if hop else "")
            request = httpx2.Request("GET", url, headers=_HEADERS, extensions=self._extensions)
            with self._faults(name, start, url if hop else None):
                response = await self._transport.handle_async_request(request)
                async with contextlib.aclosing(response):
                    target = response.headers.get("Location")
                    if response.status_code not in REDIRECTS or not target:
                        await self._save(response, download)
                        return
            text = _joined(url, target)
            if url.scheme == "https" and not text.lower().startswith("https:"):
                raise InputUrlRefused(name, start, f"it redirects away from https, to {shown_input_url(text)}")
        raise InputNotServed(name, start, f"it redirects more than {self._limits.redirects} times")

    async def _save(self, response: httpx2.Response, download: UrlDownload) -> None:
        file, status = download.file, response.status_code
        if status in TRANSIENT:
            raise _TransientError(f"status {status}", retry_after_s(response.headers) or 0.0)
        if status != OK:
            expired = ", which is also how an expired signature looks" if status == 403 else ""  # noqa: PLR2004 - HTTP's
            raise InputNotServed(file.name, shown_input_url(download.url), f"it answered with status {status}{expired}")
        stated = response.headers.get("Content-Length", "")
        file.check_size(int(stated) if re.fullmatch(r"\d{1,18}", stated) else 0)
        try:
            # httpx2 inflates an encoded body in limited steps, so the bytes counted are the bytes written.
            async with contextlib.aclosing(response.aiter_bytes()) as chunks:
                async for chunk in chunks:
                    file.add(chunk)
                    if file.full:
                        await asyncio.to_thread(file.flush)
        except httpx2.TimeoutException:
            raise
        except httpx2.RequestError:
            raise _TransientError("the file broke off") from None
        if not file.size_bytes:
            raise InputNotServed(file.name, shown_input_url(download.url), "it sent an empty file")
        file.flush()

    @contextlib.contextmanager
    def _faults(self, name: str, start: str, redirected_to: httpx2.URL | None) -> Iterator[None]:
        """Turn a connection's errors into ours. Their own texts contain whole addresses, including signatures."""
        try:
            yield
        except _PrivateAddressError:
            raise InputUrlRefused(name, start, _through(redirected_to, PRIVATE)) from None
        except ssl.SSLCertVerificationError:
            raise InputNotServed(name, start, _through(redirected_to, "its certificate is not valid")) from None
        except _TransientError as exc:
            raise _TransientError(_through(redirected_to, exc.reason), exc.pause_s) from None
        except (httpx2.RequestError, ssl.SSLError) as exc:
            raise _TransientError(_through(redirected_to, self._reason(exc))) from None

    def _reason(self, exc: Exception) -> str:
        match exc:
            case httpx2.ConnectTimeout():
                return f"no connection within {self._limits.connect_timeout_s:g} s"
            case httpx2.TimeoutException():
                return f"it sent nothing for {self._limits.silence_timeout_s:g} s"
            case ssl.SSLError():
                return "no TLS connection could be made"
            case httpx2.ConnectError():
                return "no connection could be made"
            case httpx2.ProtocolError() if "disconnected" not in str(exc):
                return "what it answered is not HTTP"
        return "the connection was cut"


class JudgingBackend(AsyncioBackend):
    """Opens connections for URLs of input files, to addresses that a request may reach: the one place that opens any."""

    def __init__(self, rules: AddressRules, lookup: Lookup) -> None:
        self._rules = rules
        self._lookup = lookup

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore2's interface
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Look a host up once, judge each of its addresses, and connect to the first that passes and accepts.

        Raises `_PrivateAddressError` if none passes, `_TransientError`, and `httpcore2.ConnectTimeout`.
        """
        try:
            async with asyncio.timeout(timeout):
                admitted = await self._judged(host)
        except TimeoutError:
            raise httpcore2.ConnectTimeout from None
        # Each address has its share of the time, so that a silent one leaves some for the next.
        share_s = None if timeout is None else timeout / len(admitted)
        for address in admitted:
            try:
                return await super().connect_tcp(address, port, share_s, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as exc:
                failure = exc
        number = getattr(failure.__cause__, "errno", None) or 0
        if isinstance(failure, httpcore2.ConnectError) and number > 0:
            raise _TransientError(os.strerror(number).lower())
        raise failure

    async def _judged(self, host: str) -> list[str]:
        if parse_address(host) is not None:
            addresses: Sequence[str] = [host]
        else:
            try:
                addresses = await self._lookup(host)
            except OSError:
                addresses = ()
            if not addresses:
                raise _TransientError("its host name does not resolve")
        admitted = [address for address in addresses if self.admits(host, address)]
        if not admitted:
            log.warning("a request names %s, which is %s: not downloaded", host, ", ".join(addresses))
            raise _PrivateAddressError
        return admitted

    def admits(self, host: str, address: str) -> bool:
        """Return whether a connection may go to this address of `host`."""
        parsed = parse_address(address)
        if parsed is None or not self._rules.admits(host, address):
            return False
        return self._rules.excepts(host, parsed) or not _is_this_machine(address)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _is_this_machine(address: str) -> bool:
    """Return whether an input file's URL names this machine's own public address, behind which services may lack a firewall."""
    try:
        with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _checked_url(rules: AddressRules, name: str, text: str, start: str = "") -> httpx2.URL:
    """Return the URL to fetch an input file from, if the rules allow it. `start` is the URL that redirected to it.

    httpx2 keeps escapes as they are, which some signatures need.
    """
    try:
        url = httpx2.URL(_DROPPED.sub("", text)).copy_with(fragment=None)
        refusal = rules.refusal(url)
        if refusal is None and parse_address(bare_host(url)) and url.raw_host.endswith(b"."):
            refusal = _INVALID
    except (httpx2.InvalidURL, ValueError):
        refusal = _INVALID
    if refusal is None:
        return url
    raise InputUrlRefused(
        name, start or shown_input_url(text), f"it redirects to {shown_input_url(text)}: {refusal}" if start else refusal
    )


def _joined(url: httpx2.URL, target: str) -> str:
    try:
        return urljoin(str(url), target)
    except ValueError:
        return target


def _through(redirected_to: httpx2.URL | None, reason: str) -> str:
    return f"it redirects to {shown_input_url(str(redirected_to))}: {reason}" if redirected_to is not None else reason


def shown_input_url(url: str) -> str:
    """Return scheme, host and the last part of an input file's address, for logs and errors. The rest may contain tokens."""
    try:
        parsed = httpx2.URL(_DROPPED.sub("", url))
        host, port = parsed.host, f":{parsed.port}" if parsed.port else ""
    except (httpx2.InvalidURL, ValueError):
        return "an address that cannot be read"
    if not host:
        return f"a {parsed.scheme or 'relative'} address"
    folder, _, last = parsed.raw_path.decode().partition("?")[0].rpartition("/")
    last = last if len(last) <= _LAST_PART_CHARACTERS else f"{last[:_LAST_PART_CHARACTERS]}..."
    return f"{parsed.scheme}://{f'[{host}]' if ':' in host else host}{port}{'/...' if folder else ''}/{last}"
