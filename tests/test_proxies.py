"""Ways to a source that are not straight: proxies, logins in addresses, mirrors that leave things out, a hub that is off."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import os
import random
import select
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import huggingface_hub
import pytest
from huggingface_hub.utils._http import default_client_factory  # to leave it as it was

from devkit.hub import Hub as StandIn
from devkit.local_worker import PROJECT
from tests.test_hub import certificate, fetch_all, moved, scripted, whole
from worker.errors import NotAFile, ProxyUnusable, SourceRefused, SourceUnreachable, TokenMalformed, TokenRefused
from worker.fetch.http import HttpChannel, Network
from worker.fetch.hub import Hub, credentials
from worker.model_spec import HubFile, UrlSource, parse_source

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from worker.model_spec import Source

__all__ = ["certificate"]

WEIGHTS = random.Random(5).randbytes(300_000)
FILE = HubFile("org/repo", "model.safetensors")
NEVER = threading.Event()
PAIR = "us er:p@ss/wörd"
QUOTED = "us%20er:p%40ss%2Fw%C3%B6rd"
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


class Proxy(http.server.BaseHTTPRequestHandler):
    """An HTTP proxy: whole addresses are asked for, CONNECT is tunnelled; with `pair` only for those who know it."""

    protocol_version = "HTTP/1.1"
    pair: str | None = None
    asked: list[str]

    def do_GET(self) -> None:
        """Ask for it."""
        self.asked.append(f"{self.command} {self.path}")
        if not self._let_in():
            return
        parts = urlsplit(self.path)
        link = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=30)
        with contextlib.closing(link):
            headers = {name: value for name, value in self.headers.items() if not name.lower().startswith("proxy-")}
            link.request(self.command, f"{parts.path}?{parts.query}".rstrip("?"), headers=headers)
            answer = link.getresponse()
            body = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in {"connection", "server", "date", "transfer-encoding"}:
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 - BaseHTTPRequestHandler's name

    def do_CONNECT(self) -> None:
        """Tunnel."""
        self.asked.append(f"CONNECT {self.path}")
        if not self._let_in():
            return
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=30) as there:
            self.send_response(200)
            self.end_headers()
            tunnel(self.connection, there)
            self.close_connection = True

    def _let_in(self) -> bool:
        wanted = self.pair and f"Basic {base64.b64encode(self.pair.encode()).decode()}"
        if wanted in {None, self.headers.get("Proxy-Authorization")}:
            return True
        self.send_response(407)
        self.send_header("Proxy-Authenticate", 'Basic realm="x"')
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False

    def log_message(self, *_: object) -> None:
        """Quiet."""


def tunnel(one: socket.socket, other: socket.socket) -> None:
    """Pass on what comes from either side, until one ends."""
    ends = {one: other, other: one}
    while True:
        for end in select.select(list(ends), [], [], 30)[0]:
            if not (data := end.recv(1 << 16)):
                return
            ends[end].sendall(data)


class Socks(socketserver.StreamRequestHandler):
    """A SOCKS5 proxy (RFC 1928, 1929) that resolves every name to this machine; with `pair` only for those who know it."""

    pair: str | None
    asked: list[str]

    def handle(self) -> None:
        """Agree on a login, connect, tunnel."""
        methods = self.rfile.read(self.rfile.read(2)[1])
        method = b"\x00" if self.pair is None else b"\x02"
        if method not in methods:
            self.wfile.write(b"\x05\xff")
            return
        self.wfile.write(b"\x05" + method)
        if self.pair is not None:
            user = self.rfile.read(self.rfile.read(2)[1])
            right = b":".join((user, self.rfile.read(self.rfile.read(1)[0]))) == self.pair.encode()
            self.wfile.write(b"\x01\x00" if right else b"\x01\x01")
            if not right:
                return
        kind = self.rfile.read(4)[3]
        assert kind == 3, "an address where a name was named"
        host, port = self.rfile.read(self.rfile.read(1)[0]).decode(), int.from_bytes(self.rfile.read(2))
        self.asked.append(host)
        try:
            there = socket.create_connection(("127.0.0.1", port), timeout=30)
        except OSError:
            self.wfile.write(b"\x05\x05\x00\x01" + bytes(6))
            return
        with there:
            self.wfile.write(b"\x05\x00\x00\x01" + bytes(6))
            tunnel(self.connection, there)


class NoSocks(Socks):
    """What answers in another protocol."""

    def handle(self) -> None:
        """Refuse."""
        self.connection.recv(1)
        self.wfile.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")


@contextlib.contextmanager
def answering(
    server: type[socketserver.ThreadingTCPServer | http.server.ThreadingHTTPServer],
    kind: type[socketserver.StreamRequestHandler],
    pair: str | None,
) -> Iterator[tuple[str, list[str]]]:
    """Where a proxy of this kind listens, and what it was asked for."""
    asked: list[str] = []
    handler = type("Answers", (kind,), {"pair": pair, "asked": asked})
    with server(("127.0.0.1", 0), handler) as listening:
        listening.daemon_threads = True
        threading.Thread(target=listening.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"127.0.0.1:{listening.server_address[1]}", asked
        finally:
            listening.shutdown()


@contextlib.contextmanager
def socks(pair: str | None = None, kind: type[Socks] = Socks) -> Iterator[tuple[str, list[str]]]:
    """Where it listens, and the hosts that it was asked for."""
    with answering(socketserver.ThreadingTCPServer, kind, pair) as found:
        yield found


@contextlib.contextmanager
def proxy(pair: str | None = None) -> Iterator[tuple[str, list[str]]]:
    """Where it listens, and what it was asked for."""
    with answering(http.server.ThreadingHTTPServer, Proxy, pair) as found:
        yield found


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[StandIn]:
    (tmp_path / "root/org/repo").mkdir(parents=True)
    (tmp_path / "root/org/repo/model.safetensors").write_bytes(WEIGHTS)
    with StandIn(tmp_path / "root") as hub:
        yield hub


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No proxies but the test's own, and a huggingface_hub that looks again whether there are any."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    huggingface_hub.close_session()
    yield
    huggingface_hub.set_client_factory(default_client_factory)


def hub_of(endpoint: str, *, patience_s: float = 20.0, **network: Any) -> Hub:
    """As the worker builds it, from the environment's proxies."""
    return Hub(endpoint, Network(credentials(endpoint, None, None), urllib.request.getproxies(), **network), patience_s)


def sources_of(stand_in: StandIn) -> tuple[Source, ...]:
    return FILE, UrlSource(f"{stand_in.endpoint}/files/org/repo/model.safetensors")


# --- proxies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
@pytest.mark.parametrize("pair", [None, PAIR])
def test_look_ups_and_weights_go_through_a_socks_proxy_which_resolves_the_names(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, pair: str | None
) -> None:
    endpoint = stand_in.endpoint.replace("127.0.0.1", "hub.invalid")
    with socks(pair) as (address, asked):
        monkeypatch.setenv("all_proxy", f"{scheme}://{QUOTED + '@' if pair else ''}{address}")
        hub = hub_of(endpoint)
        remote = hub.look_up(FILE, NEVER)
        assert (remote.size_bytes, remote.sha256) == (len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())
        assert set(asked) == {"hub.invalid"}
        assert fetch_all(hub, tmp_path, UrlSource(f"{endpoint}/files/org/repo/model.safetensors")) == WEIGHTS
    assert set(asked) == {"hub.invalid"}
    assert len(asked) >= 3


def test_tls_reaches_through_a_socks_proxy(certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)
    with socks() as (address, asked), scripted({"/file": whole(WEIGHTS)}, server) as (origin, requests):
        monkeypatch.setenv("https_proxy", f"socks5://{address}")
        hub = hub_of(origin, tls=ssl.create_default_context(cafile=str(certificate)))
        assert fetch_all(hub, tmp_path, UrlSource(f"{origin}/file")) == WEIGHTS
        with pytest.raises(SourceUnreachable, match="CERTIFICATE_VERIFY_FAILED"):
            hub_of(origin, patience_s=0.0).look_up(UrlSource(f"{origin}/file"), NEVER)
        with contextlib.closing(HttpChannel(hub_of(origin).network)) as channel, pytest.raises(ssl.SSLCertVerificationError):
            channel.get(f"{origin}/file", {})
    assert set(asked) == {"localhost"}
    assert {headers.get("Host") for _, headers in requests} == {urlsplit(origin).netloc}


@pytest.mark.parametrize("login", ["", "user:secret@"])
def test_a_socks_proxy_that_wants_another_login_is_one_sentence_at_once(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, login: str
) -> None:
    with socks(PAIR) as (address, asked):
        monkeypatch.setenv("all_proxy", f"socks5://{login}{address}")
        hub = hub_of(stand_in.endpoint)
        for source in sources_of(stand_in):
            with pytest.raises(ProxyUnusable, match="requires another user or password") as caught:
                hub.look_up(source, NEVER)
            assert address in str(caught.value)
            assert "secret" not in str(caught.value)
        with (
            contextlib.closing(HttpChannel(hub.network)) as channel,
            pytest.raises(ProxyUnusable, match="requires another user"),
        ):
            channel.get(f"{stand_in.endpoint}/files/org/repo/model.safetensors", {})
    assert asked == []


def test_what_a_socks_proxy_cannot_reach_is_named_after_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"http://hub.invalid:{closed.getsockname()[1]}"
    with socks() as (proxy_address, _):
        monkeypatch.setenv("all_proxy", f"socks5://{proxy_address}")
        hub = hub_of(address, patience_s=0.0)
        for source in (FILE, UrlSource(f"{address}/file")):
            with pytest.raises(SourceUnreachable, match="ould not connect: Connection refused"):
                hub.look_up(source, NEVER)
        with (
            contextlib.closing(HttpChannel(hub.network)) as channel,
            pytest.raises(ConnectionError, match="connection refused"),
        ):
            channel.get(f"{address}/file", {})


def test_a_proxy_that_does_not_speak_socks_is_named_after_the_patience(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socks(kind=NoSocks) as (address, _):
        monkeypatch.setenv("all_proxy", f"socks5://{address}")
        hub = hub_of(stand_in.endpoint, patience_s=0.0)
        for source in sources_of(stand_in):
            with pytest.raises(SourceUnreachable, match="the proxy's answer is not SOCKS"):
                hub.look_up(source, NEVER)
        with contextlib.closing(HttpChannel(hub.network)) as channel, pytest.raises(ConnectionError, match="is not SOCKS"):
            channel.get(f"{stand_in.endpoint}/files/org/repo/model.safetensors", {})


@pytest.mark.parametrize("prefix", ["http://", ""])
def test_a_proxy_gets_its_user_and_password(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    with proxy(PAIR) as (address, asked):
        monkeypatch.setenv("http_proxy", f"{prefix}{QUOTED}@{address}")
        for number, source in enumerate(sources_of(stand_in)):
            (tmp_path / str(number)).mkdir()
            assert fetch_all(hub_of(stand_in.endpoint), tmp_path / str(number), source) == WEIGHTS
    assert len(asked) >= 4
    assert all(QUOTED not in line for line in asked)


def test_a_tunnel_gets_them_too(certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)
    with proxy(PAIR) as (address, asked), scripted({"/file": whole(WEIGHTS)}, server) as (origin, _):
        monkeypatch.setenv("https_proxy", f"http://{QUOTED}@{address}")
        hub = hub_of(origin, tls=ssl.create_default_context(cafile=str(certificate)))
        assert fetch_all(hub, tmp_path, UrlSource(f"{origin}/file")) == WEIGHTS
    assert {line.partition(" ")[0] for line in asked} == {"CONNECT"}


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_wants_another_password_is_one_sentence_at_once(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    endpoint = stand_in.endpoint.replace("http:", f"{scheme}:")
    with proxy(PAIR) as (address, _):
        monkeypatch.setenv(f"{scheme}_proxy", f"http://user:secret@{address}")
        for source in (FILE, UrlSource(f"{endpoint}/files/org/repo/model.safetensors")):
            began_s = time.monotonic()
            with pytest.raises(ProxyUnusable, match=r"status 407") as caught:
                hub_of(endpoint).look_up(source, NEVER)
            assert time.monotonic() - began_s < 10
            assert address in str(caught.value)
            assert "secret" not in str(caught.value)


@pytest.mark.parametrize("written", ["socks4://user:secret@127.0.0.1:9", "https://127.0.0.1:9", "http://127.0.0.1:port"])
def test_a_proxy_of_another_kind_is_one_sentence_at_once(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    monkeypatch.setenv("http_proxy" if "port" in written else "all_proxy", written)
    for source in sources_of(stand_in):
        with pytest.raises(ProxyUnusable, match="set HTTPS_PROXY and HTTP_PROXY to an HTTP proxy") as caught:
            hub_of(stand_in.endpoint).look_up(source, NEVER)
        assert "secret" not in str(caught.value)


def test_one_of_another_kind_beside_an_http_proxy_is_passed_over(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with proxy(PAIR) as (address, asked):
        monkeypatch.setenv("http_proxy", f"http://{QUOTED}@{address}")
        monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:9")
        for number, source in enumerate(sources_of(stand_in)):
            (tmp_path / str(number)).mkdir()
            assert fetch_all(hub_of(stand_in.endpoint), tmp_path / str(number), source) == WEIGHTS
        assert asked
        monkeypatch.delenv("http_proxy")
        monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")
        asked.clear()
        for source in sources_of(stand_in):
            assert hub_of(stand_in.endpoint).look_up(source, NEVER).size_bytes == len(WEIGHTS)
        assert asked == []


# --- logins -------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["hf_töken", "hf_a b", "hf_“quoted”"])
def test_a_token_that_no_header_can_carry_is_one_sentence(stand_in: StandIn, token: str) -> None:
    hub = Hub(stand_in.endpoint, Network(credentials(stand_in.endpoint, token, None)), patience_s=20)
    for source in sources_of(stand_in):
        with pytest.raises(TokenMalformed, match="HF_TOKEN contains characters that no token has") as caught:
            hub.look_up(source, NEVER)
        assert token not in str(caught.value)


def test_a_user_and_password_in_an_address_are_sent_to_its_origin_alone(tmp_path: Path) -> None:
    wanted = f"Basic {base64.b64encode(PAIR.encode()).decode()}"
    with scripted({"/there": whole(WEIGHTS)}) as (other, strangers):
        answers = {"/far": moved(f"{other}/there"), "/near": moved("/file"), "/file": whole(WEIGHTS)}
        with scripted(answers) as (address, asked):
            answers["/absolute"] = moved(f"{address}/file")
            for path in ("file", "near", "absolute", "far"):
                source = parse_source(f"http://{QUOTED}@{urlsplit(address).netloc}/{path}")
                (tmp_path / path).mkdir()
                assert fetch_all(hub_of(address), tmp_path / path, source) == WEIGHTS
                assert "p%40ss" not in f"{source} {source!r}"
            assert {headers.get("Authorization") for _, headers in asked} == {wanted}
        assert {headers.get("Authorization") for _, headers in strangers} == {None}
        assert len(strangers) >= 2


def test_a_wrong_one_is_no_riddle() -> None:
    with scripted({"/file": (401, {"Content-Length": "0"}, b"")}) as (address, _), pytest.raises(TokenRefused):
        hub_of(address).look_up(UrlSource(f"http://user:secret@{urlsplit(address).netloc}/file"), NEVER)


# --- hubs that are off, and mirrors that leave things out -----------------------------------------


def test_a_hub_that_is_switched_off_is_one_sentence_at_once(stand_in: StandIn, tmp_path: Path) -> None:
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": stand_in.endpoint}
    for command in (
        ["scripts/seed_volume.py", "vae=hf://org/repo/model.safetensors", "--volume", str(tmp_path)],
        ["scripts/seed_volume.py", "hf://org/repo/*.safetensors", "--folder", "vae", "--volume", str(tmp_path)],
    ):
        began_s = time.monotonic()
        done = subprocess.run(
            [sys.executable, *command], env=environ, cwd=PROJECT, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 1
        assert "HF_HUB_OFFLINE is set: unset it" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert time.monotonic() - began_s < 45
    assert stand_in.requests == []


class Mirror(http.server.BaseHTTPRequestHandler):
    """A mirror that sends on to where the file is, with what `headers` says of it."""

    headers_sent: dict[str, str]

    def do_HEAD(self) -> None:
        """Send on."""
        self.send_response(302)
        for name, value in self.headers_sent.items():
            self.send_header(name, value)
        self.end_headers()

    do_GET = do_HEAD  # noqa: N815 - as above

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.mark.parametrize("linked", [{}, {"X-Linked-Etag": f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'}])
def test_a_mirror_that_sends_on_without_a_length_is_followed(tmp_path: Path, linked: dict[str, str]) -> None:
    with scripted({"/there": whole(WEIGHTS), "/gone": (404, {"Content-Length": "0"}, b"")}) as (store, _):
        said = {"Location": f"{store}/there", "X-Repo-Commit": "c" * 40, "Content-Length": "0", **linked}
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (Mirror,), {"headers_sent": said})) as server:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            endpoint = f"http://127.0.0.1:{server.server_port}"
            remote = hub_of(endpoint).look_up(FILE, NEVER)
            assert (remote.size_bytes, remote.commit, str(remote.source)) == (len(WEIGHTS), "c" * 40, str(FILE))
            assert remote.sha256 == (hashlib.sha256(WEIGHTS).hexdigest() if linked else None)
            assert fetch_all(hub_of(endpoint), tmp_path, FILE) == WEIGHTS
            said["Location"] = f"{store}/gone"
            with pytest.raises((SourceRefused, NotAFile)):
                hub_of(endpoint).look_up(FILE, NEVER)
            server.shutdown()
