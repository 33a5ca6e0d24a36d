"""Files from addresses: real servers on the loopback, which only an operator's exception lets a request reach."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import ssl
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from devkit.local_worker import free_port
from worker.errors import (
    InputError,
    InputNotServed,
    InputTimedOut,
    InputTooLarge,
    InputUnreachable,
    InputUrlRefused,
    RequestError,
    WorkerError,
)
from worker.media.address_guard import AddressRules
from worker.media.staged_files import StagedFile
from worker.media.url_inputs import (
    JudgingBackend,
    UrlDownload,
    UrlFetcher,
    UrlFetchLimits,
    _PrivateAddressError,
    shown_input_url,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

RunAsync = Callable[[Coroutine[Any, Any, Any]], Any]
Answer = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

FILES = "files.test"
"""The one name that the tests' operator allows; it leads to the loopback."""
RULES = AddressRules(private=(FILES,))
LIMITS = UrlFetchLimits(max_bytes=1_000_000, timeout_s=60, pause_s=0)
SECRET = "0ld-sQueamish"


@dataclass
class Server:
    """What a test's server was asked, and where it is."""

    port: int
    asked: list[web.BaseRequest] = field(default_factory=list)

    def url(self, path: str = "/a.png", host: str = FILES, scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"


@contextlib.asynccontextmanager
async def serving(answer: Answer, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    asked: list[web.BaseRequest] = []

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        asked.append(request)
        return await answer(request)

    runner = web.ServerRunner(web.Server(handle, handler_cancellation=True, access_log=None), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, host, 0, ssl_context=tls)
    await site.start()
    try:
        yield Server(runner.addresses[0][1], asked)
    finally:
        await runner.cleanup()


def saying(*bodies: bytes, **headers: str) -> Answer:
    async def answer(_: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=b"".join(bodies), headers={name.replace("_", "-"): text for name, text in headers.items()})

    return answer


def redirecting(to: str, status: int = 302) -> Answer:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/secret":
            return web.Response(body=b"the worker's own")
        return web.Response(status=status, headers={"Location": to.replace("PORT", str(request.url.port))})

    return answer


async def looking_up(host: str) -> list[str]:
    """As the system does it, save for the one name."""
    if host == FILES:
        return ["127.0.0.1"]
    infos = await asyncio.get_running_loop().getaddrinfo(host.rstrip("."), None, type=socket.SOCK_STREAM)
    return [str(info[4][0]) for info in infos]


async def fetch(
    url: str,
    folder: Path,
    *,
    rules: AddressRules = RULES,
    limits: UrlFetchLimits = LIMITS,
    lookup: Callable[[str], Awaitable[list[str]]] = looking_up,
    tls: ssl.SSLContext | None = None,
) -> bytes:
    path = folder / "0"
    await UrlFetcher(rules, limits, lookup, tls).fetch([UrlDownload(url, StagedFile("a.png", path, limits.max_bytes))])
    return path.read_bytes()


def test_the_file_comes_whole_and_the_address_goes_out_as_it_came(run_async: RunAsync, tmp_path: Path) -> None:
    data = bytes(range(256)) * 3000
    path = "/b%7Eu%2fcket/%C3%A9t\u00e9.png?sig=%2B+a%3D%3d&x=a%2Fb/c:d"

    async def scenario() -> None:
        async with serving(saying(data)) as server:
            assert await fetch(server.url(path), tmp_path) == data
            [request] = server.asked
            assert request.raw_path == "/b%7Eu%2fcket/%C3%A9t%C3%A9.png?sig=%2B+a%3D%3d&x=a%2Fb/c:d"
            assert set(request.headers) == {"Host", "User-Agent", "Accept", "Accept-Encoding"}
            assert request.headers["Host"] == f"{FILES}:{server.port}"

    run_async(scenario())


def test_four_at_a_time(run_async: RunAsync, tmp_path: Path) -> None:
    async def scenario() -> None:
        here, most, four = 0, 0, asyncio.Event()

        async def answer(_: web.BaseRequest) -> web.StreamResponse:
            nonlocal here, most
            here += 1
            most = max(most, here)
            if here == 4:
                four.set()
            await four.wait()
            here -= 1
            return web.Response(body=b"x")

        async with serving(answer) as server:
            files = [StagedFile(f"{at}.png", tmp_path / str(at), 10) for at in range(9)]
            await UrlFetcher(RULES, LIMITS, looking_up).fetch(
                [UrlDownload(server.url(f"/{file.name}"), file) for file in files]
            )
        assert most == 4
        assert {file.path.read_bytes() for file in files} == {b"x"}

    run_async(scenario())


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed_without_cookies(status: int, run_async: RunAsync, tmp_path: Path) -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/end":
            return web.Response(body=b"x")
        return web.Response(status=status, headers={"Location": "end?a=%2f", "Set-Cookie": "a=b"})

    async def scenario() -> None:
        async with serving(answer) as server:
            assert await fetch(server.url(), tmp_path) == b"x"
            assert server.asked[1].raw_path == "/end?a=%2f"
            assert "Cookie" not in server.asked[1].headers

    run_async(scenario())


@pytest.mark.parametrize(
    "host",
    [
        *(
            "127.0.0.1",
            "127.1",
            "0x7f000001",
            "0x7f.1",
            "2130706433",
            "017700000001",
            "0177.0.0.1",
            "0.0.0.0",
            "0",
            "127.0.0.1.",
        ),
        *("[::1]", "[::]", "[::ffff:127.0.0.1]", "[::127.0.0.1]", "[64:ff9b::127.0.0.1]", "[2002:7f00:1::]", "[fe80::1%25lo]"),
        *("localhost", "localhost.", "LOCALHOST", "user@127.0.0.1", "files.test@127.0.0.1", "①②⑦.0.0.1", "%31%32%37.0.0.1"),
        *("169.254.169.254", "[fd00:ec2::254]", "10.0.0.1", "files.test\\@127.0.0.1", "files.test%2f@127.0.0.1"),
    ],
)
@pytest.mark.parametrize("redirected", [False, True])
def test_nothing_leads_into_the_network_of_the_worker(
    host: str,
    redirected: bool,  # noqa: FBT001 - a parameter of the test
    run_async: RunAsync,
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with serving(redirecting(f"http://{host}:PORT/secret")) as server:
            url = server.url() if redirected else server.url("/secret", host)
            with pytest.raises(
                InputUrlRefused, match=r"^Failed to upload one or more input images: 'a\.png' is not downloaded"
            ):
                await fetch(url, tmp_path)
            assert [request.path for request in server.asked] == ["/a.png"] * redirected

    run_async(scenario())


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://files.test/a", "http://[::1", "http://files.test:0/"])
def test_redirects_to_what_is_no_address_of_a_file(target: str, run_async: RunAsync, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(redirecting(target)) as server:
            with pytest.raises(InputUrlRefused, match="it redirects to"):
                await fetch(server.url(), tmp_path)

    run_async(scenario())


def test_a_circle_of_redirects_ends(run_async: RunAsync, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(redirecting("/again")) as server:
            with pytest.raises(InputNotServed, match="redirects more than 5 times"):
                await fetch(server.url(), tmp_path)
            assert len(server.asked) == 6

    run_async(scenario())


def test_a_name_that_changes_its_address_gains_nothing(run_async: RunAsync, tmp_path: Path) -> None:
    """The first look-up passes and the connection goes there; the redirect to itself is looked up anew, and refused."""
    answers = [["127.0.0.2"], ["127.0.0.1"]]

    async def lookup(_: str) -> list[str]:
        return answers.pop(0)

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        assert request.transport is not None
        assert request.transport.get_extra_info("sockname")[0] == "127.0.0.2"
        return web.Response(status=302, headers={"Location": "/again", "Connection": "close"})

    async def scenario() -> None:
        async with serving(answer, "0.0.0.0") as server:
            with pytest.raises(InputUrlRefused, match="private"):
                await fetch(server.url(host="rebind.test"), tmp_path, rules=AddressRules(private=("127.0.0.2",)), lookup=lookup)
            assert answers == []
            assert len(server.asked) == 1

    run_async(scenario())


def test_of_several_addresses_only_those_that_may_be_reached_are_tried(run_async: RunAsync, tmp_path: Path) -> None:
    async def lookup(_: str) -> list[str]:
        return ["127.0.0.1", "::1", "127.0.0.3", "127.0.0.2"]

    async def scenario() -> None:
        rules = AddressRules(private=("127.0.0.2/31",))
        async with serving(saying(b"x"), "127.0.0.2") as server:
            assert await fetch(server.url(host="both.test"), tmp_path, rules=rules, lookup=lookup) == b"x"
        async with serving(saying(b"x"), "127.0.0.1") as server:
            with pytest.raises(InputUnreachable, match="connection refused"):
                await fetch(server.url(host="both.test"), tmp_path, rules=rules, lookup=lookup)
            assert server.asked == []

    run_async(scenario())


def test_a_socket_opens_to_nothing_that_was_not_judged(run_async: RunAsync) -> None:
    async def lookup(host: str) -> list[str]:
        return ["127.0.0.1", "localhost", ""] if host == "name.test" else ["127.0.0.2"]

    async def scenario() -> None:
        backend = JudgingBackend(AddressRules(private=("127.0.0.2",)), lookup)
        async with serving(saying(b"x"), "0.0.0.0") as server:
            for host in ("127.0.0.2", "other.test"):
                stream = await backend.connect_tcp(host, server.port)
                assert stream.get_extra_info("peername")[0] == "127.0.0.2"
                await stream.aclose()
            for host in ("127.0.0.1", "name.test", "::1"):
                with pytest.raises(_PrivateAddressError):
                    await backend.connect_tcp(host, server.port)

    run_async(scenario())


def test_an_address_that_does_not_answer_leaves_time_for_the_next(run_async: RunAsync) -> None:
    async def lookup(_: str) -> list[str]:
        return ["127.0.0.2", "127.0.0.3"]

    async def scenario() -> None:
        backend = JudgingBackend(AddressRules(private=("127.0.0.0/8",)), lookup)
        port = free_port()
        with socket.socket() as silent:
            silent.bind(("127.0.0.2", port))
            silent.listen(0)
            fillers = [socket.socket() for _ in range(4)]  # a full backlog answers nobody
            for filler in fillers:
                filler.settimeout(0)
                filler.connect_ex(("127.0.0.2", port))
            async with await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.3", port):
                stream = await backend.connect_tcp("both.test", port, timeout=4.0)
                assert stream.get_extra_info("peername")[0] == "127.0.0.3"
                await stream.aclose()
            for filler in fillers:
                filler.close()

    run_async(scenario())


class EverythingIsPublic(AddressRules):
    """As for a machine that has a public address of its own."""

    def admits(self, host: str, address: str) -> bool:
        assert host
        assert address
        return True


def test_a_public_address_of_this_machine_is_its_own_network() -> None:
    backend = JudgingBackend(EverythingIsPublic(), looking_up)
    assert not backend.admits("example.test", "127.0.0.1")
    assert backend.admits("example.test", "192.0.2.1")
    assert JudgingBackend(EverythingIsPublic(private=("127.0.0.1",)), looking_up).admits("example.test", "127.0.0.1")


def test_an_address_in_numbers_does_not_end_with_a_dot(run_async: RunAsync, tmp_path: Path) -> None:
    with pytest.raises(InputUrlRefused, match="it is no valid address"):
        run_async(fetch("http://8.8.8.8./a.png", tmp_path))


def test_proxies_of_the_environment_are_not_asked(run_async: RunAsync, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    async def scenario() -> None:
        async with serving(saying(b"x")) as server:
            assert await fetch(server.url(), tmp_path) == b"x"

    run_async(scenario())


@pytest.mark.parametrize("stated", [False, True])
def test_a_body_without_end(stated: bool, run_async: RunAsync, tmp_path: Path) -> None:  # noqa: FBT001 - a parameter of the test
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        if stated:
            response.content_length = LIMITS.max_bytes + 1
            await response.prepare(request)
            await asyncio.Event().wait()
        await response.prepare(request)
        while True:
            await response.write(bytes(100_000))

    async def scenario() -> None:
        async with serving(answer) as server:
            with pytest.raises(InputTooLarge, match=r"more than 1 MB.*INPUT_MAX_MB"):
                await fetch(server.url(), tmp_path)

    run_async(scenario())
    assert (tmp_path / "0").stat().st_size <= LIMITS.max_bytes


def test_what_counts_is_the_size_after_decoding(run_async: RunAsync, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(saying(gzip.compress(bytes(900_000)), Content_Encoding="gzip")) as server:
            assert await fetch(server.url(), tmp_path) == bytes(900_000)
        bomb = gzip.compress(bytes(200_000_000), 1)
        assert len(bomb) < LIMITS.max_bytes
        async with serving(saying(bomb, Content_Encoding="gzip")) as server:
            with pytest.raises(InputTooLarge):
                await fetch(server.url(), tmp_path)

    run_async(scenario())
    assert (tmp_path / "0").stat().st_size <= LIMITS.max_bytes


async def never(request: web.BaseRequest) -> web.StreamResponse:
    """Some bytes, and then silence."""
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"some")
    await asyncio.Event().wait()
    return response


def test_a_server_that_is_too_slow(run_async: RunAsync, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(never) as server:
            files = [StagedFile(name, tmp_path / name, 10) for name in ("a.png", "b.png")]
            fetcher = UrlFetcher(RULES, UrlFetchLimits(timeout_s=0.3), looking_up)
            with pytest.raises(InputTimedOut, match=r"'a.png' and 1 more did not arrive within 0.3 s") as caught:
                await fetcher.fetch([UrlDownload(server.url(), file) for file in files])
            assert caught.value.retryable
            limits = UrlFetchLimits(silence_timeout_s=0.1, attempts=1)
            with pytest.raises(InputUnreachable, match=r"it sent nothing for 0\.1 s"):
                await fetch(server.url(), tmp_path, limits=limits)

    run_async(scenario())


def test_the_time_of_a_freeze_does_not_count(run_async: RunAsync, tmp_path: Path) -> None:
    """The limit of 0.1 s is over by the system's clock long before the server answers, and by the worker's own it is not."""

    async def late(_: web.BaseRequest) -> web.StreamResponse:
        await asyncio.sleep(1)
        return web.Response(body=b"late")

    async def scenario() -> None:
        async with serving(late) as server:
            file = StagedFile("a.png", tmp_path / "0", LIMITS.max_bytes)
            standing = UrlFetcher(RULES, UrlFetchLimits(timeout_s=0.1), looking_up, clock=lambda: 0.0)
            await standing.fetch([UrlDownload(server.url(), file)])
            assert (tmp_path / "0").read_bytes() == b"late"

    run_async(scenario())


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_server_in_trouble_is_asked_again(status: int, run_async: RunAsync, tmp_path: Path) -> None:
    async def scenario() -> None:
        troubles = [status, status]

        async def answer(_: web.BaseRequest) -> web.StreamResponse:
            return web.Response(status=troubles.pop(), body=b"trouble") if troubles else web.Response(body=b"x")

        async with serving(answer) as server:
            assert await fetch(server.url(), tmp_path) == b"x"
            troubles += [status] * 3
            with pytest.raises(InputUnreachable, match=f"status {status}"):
                await fetch(server.url(), tmp_path)
            assert troubles == []

    run_async(scenario())


def test_a_file_that_breaks_off_begins_anew(run_async: RunAsync, tmp_path: Path) -> None:
    async def scenario() -> None:
        cuts = [700_000, 5]

        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            response = web.StreamResponse()
            response.content_length = 800_000
            await response.prepare(request)
            await response.write(b"y" * (cuts[0] if cuts else 800_000))
            if cuts:
                del cuts[0]
                assert request.transport is not None
                request.transport.close()
            return response

        async with serving(answer) as server:
            assert await fetch(server.url(), tmp_path) == b"y" * 800_000
            cuts += [1, 2, 3]
            with pytest.raises(InputUnreachable, match="broke off"):
                await fetch(server.url(), tmp_path)

    run_async(scenario())


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 206, 204])
def test_an_answer_that_will_stay_the_same_is_not_asked_for_again(status: int, run_async: RunAsync, tmp_path: Path) -> None:
    async def answer(_: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=status)

    async def scenario() -> None:
        async with serving(answer) as server:
            with pytest.raises(InputNotServed, match=f"answered with status {status}") as caught:
                await fetch(server.url(), tmp_path)
            assert not caught.value.retryable
            assert len(server.asked) == 1

    run_async(scenario())


def test_a_server_that_asks_for_a_long_pause_is_not_waited_for(run_async: RunAsync, tmp_path: Path) -> None:
    async def answer(_: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=429, headers={"Retry-After": "3600"})

    async def scenario() -> None:
        async with serving(answer) as server:
            with pytest.raises(InputUnreachable, match="status 429"):
                await fetch(server.url(), tmp_path)
            assert len(server.asked) == 1

    run_async(scenario())


def test_an_empty_file_is_no_file(run_async: RunAsync, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(saying(b"")) as server:
            with pytest.raises(InputNotServed, match="empty file"):
                await fetch(server.url(), tmp_path)

    run_async(scenario())


def test_what_speaks_no_http_or_nobody_answers(run_async: RunAsync, tmp_path: Path) -> None:
    async def unknown(_: str) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async def scenario() -> None:
        async def babble(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"220 mail.test ESMTP\r\n\r\n")
            writer.close()

        port = free_port()  # no other process gets it once the server is closed
        async with await asyncio.start_server(babble, "127.0.0.1", port):
            with pytest.raises(InputUnreachable, match="not HTTP"):
                await fetch(f"http://{FILES}:{port}/a", tmp_path)
        with pytest.raises(InputUnreachable, match="connection refused"):
            await fetch(f"http://{FILES}:{port}/a", tmp_path)
        with pytest.raises(InputUnreachable, match="does not resolve"):
            await fetch("http://nowhere.test/a", tmp_path, lookup=unknown)
        for host in ("a..b", "a" * 70 + ".test"):
            with pytest.raises(InputUnreachable, match="does not resolve"):
                await UrlFetcher(limits=LIMITS).fetch([UrlDownload(f"http://{host}/", StagedFile("a", tmp_path / "0", 9))])

    run_async(scenario())


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for the tests' host, signed by itself, with its key."""
    key, now, day = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC), timedelta(days=1)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, FILES)])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - day).not_valid_after(now + day)
    made = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(FILES)]), critical=False).sign(key, hashes.SHA256())
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


def test_certificates_are_checked_and_redirects_stay_on_https(run_async: RunAsync, tmp_path: Path, certificate: Path) -> None:
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_side.load_cert_chain(certificate)
    trusting = ssl.create_default_context(cafile=certificate)

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/down":
            return web.Response(status=302, headers={"Location": f"http://{FILES}:{request.url.port}/a.png"})
        return web.Response(body=b"x")

    async def scenario() -> None:
        async with serving(answer, tls=server_side) as server:
            assert await fetch(server.url(scheme="https"), tmp_path, tls=trusting) == b"x"
            with pytest.raises(InputNotServed, match="certificate is not valid"):
                await fetch(server.url(scheme="https"), tmp_path)
            with pytest.raises(InputUrlRefused, match="away from https"):
                await fetch(server.url("/down", scheme="https"), tmp_path, tls=trusting)
            assert len(server.asked) == 2

    run_async(scenario())


def test_no_error_and_no_log_shows_a_query_or_a_folder(
    run_async: RunAsync, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    query = f"/{SECRET}/a.png?X-Amz-Signature={SECRET}"
    told: list[WorkerError] = []

    async def attempt(url: str, limits: UrlFetchLimits = LIMITS) -> None:
        with pytest.raises((InputError, RequestError)) as caught:
            await fetch(url, tmp_path, limits=limits)
        told.append(caught.value)
        assert SECRET not in "".join(traceback.format_exception(caught.value)) + repr(caught.value)

    async def scenario() -> None:
        async with serving(redirecting(f"http://localhost:PORT{query}")) as server:
            await attempt(server.url(query))
        async with serving(redirecting(f"http://10.0.0.1{query}")) as server:
            await attempt(server.url(query))
        async with serving(never) as server:
            await attempt(server.url(query), UrlFetchLimits(timeout_s=0.1))
            await attempt(server.url(query), UrlFetchLimits(silence_timeout_s=0.05, attempts=1))
        async with serving(saying(b"\0", Content_Encoding="gzip")) as server:
            await attempt(server.url(query))
        await attempt(server.url(query))
        await attempt(f"http://{SECRET}:{SECRET}@example.com{query}")
        await attempt(f"http://127.1{query}")
        await attempt(f"http://[{query}")
        await attempt(f"data:image/png;base64,{SECRET}")

    with caplog.at_level("DEBUG"):
        run_async(scenario())
    assert SECRET not in caplog.text
    assert all(str(error).startswith("Failed to upload one or more input images: 'a.png'") for error in told)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("https://user:pw@Host.example:8443/a/b/c.png?sig=1#x", "https://host.example:8443/.../c.png"),
        ("https://host.example", "https://host.example/"),
        ("http://[::1]/a.png", "http://[::1]/a.png"),
        ("http://host.example/" + "a" * 99, "http://host.example/" + "a" * 60 + "..."),
        ("data:text/plain,secret", "a data address"),
        ("secret", "a relative address"),
        ("http://[::1", "an address that cannot be read"),
        ("http://\ud800/", "an address that cannot be read"),
    ],
)
def test_how_an_address_is_shown(url: str, text: str) -> None:
    assert shown_input_url(url) == text


def test_the_address_on_the_wire_is_that_of_the_judged_host() -> None:
    """Two readers of one address may differ about its host; there is one reader."""
    from worker.media.url_inputs import _checked_url  # noqa: PLC0415 - private, for this one test

    checked = _checked_url(AddressRules(), "a", "http://example.com:81\t/a b\n?c d#e")
    assert checked == httpx2.URL("http://example.com:81/a%20b?c%20d")
    assert (checked.raw_host, checked.port, checked.raw_path) == (b"example.com", 81, b"/a%20b?c%20d")
