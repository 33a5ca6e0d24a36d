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
from worker.errors import NotAFile, ProxyUnusable, SourceRefused, TokenMalformed, TokenRefused
from worker.fetch.http import Network
from worker.fetch.hub import Hub, credentials
from worker.spec import HubFile, Url, parse_source

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from worker.spec import Source

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
            ends = {self.connection: there, there: self.connection}
            while True:
                for end in select.select(list(ends), [], [], 30)[0]:
                    if not (data := end.recv(1 << 16)):
                        self.close_connection = True
                        return
                    ends[end].sendall(data)

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


@contextlib.contextmanager
def proxy(pair: str | None = None) -> Iterator[tuple[str, list[str]]]:
    """Where it listens, and what it was asked for."""
    asked: list[str] = []
    handler = type("Answers", (Proxy,), {"pair": pair, "asked": asked})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()


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


def hub_of(endpoint: str, **network: Any) -> Hub:
    """As the worker builds it, from the environment's proxies."""
    return Hub(endpoint, Network(credentials(endpoint, None, None), urllib.request.getproxies(), **network), patience_s=20)


def sources_of(stand_in: StandIn) -> tuple[Source, ...]:
    return FILE, Url(f"{stand_in.endpoint}/files/org/repo/model.safetensors")


# --- proxies ------------------------------------------------------------------------------------


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
        assert fetch_all(hub, tmp_path, Url(f"{origin}/file")) == WEIGHTS
    assert {line.partition(" ")[0] for line in asked} == {"CONNECT"}


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_wants_another_password_is_one_sentence_at_once(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    endpoint = stand_in.endpoint.replace("http:", f"{scheme}:")
    with proxy(PAIR) as (address, _):
        monkeypatch.setenv(f"{scheme}_proxy", f"http://user:secret@{address}")
        for source in (FILE, Url(f"{endpoint}/files/org/repo/model.safetensors")):
            began_s = time.monotonic()
            with pytest.raises(ProxyUnusable, match=r"status 407") as caught:
                hub_of(endpoint).look_up(source, NEVER)
            assert time.monotonic() - began_s < 10
            assert address in str(caught.value)
            assert "secret" not in str(caught.value)


@pytest.mark.parametrize("written", ["socks5://user:secret@127.0.0.1:9", "socks5h://127.0.0.1:9", "http://127.0.0.1:port"])
def test_a_proxy_of_another_kind_is_one_sentence_at_once(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    monkeypatch.setenv("all_proxy" if "socks" in written else "http_proxy", written)
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
        with pytest.raises(TokenMalformed, match="HF_TOKEN holds characters that no token has") as caught:
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
        hub_of(address).look_up(Url(f"http://user:secret@{urlsplit(address).netloc}/file"), NEVER)


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
