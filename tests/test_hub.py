"""Addresses and their bytes: every answer a source can give, over real HTTP from a stand-in that the real client talks to."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import http.client
import http.server
import json
import os
import random
import ssl
import threading
import time
from dataclasses import replace
from email.utils import format_datetime
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from devkit.hub import Hub as StandIn
from devkit.hub.shelf import git_oid
from worker.base.retry import Backoff, retry_after_s
from worker.errors import (
    ContentMismatch,
    EnsureCancelled,
    FileNotInRepo,
    NotAFile,
    RepoGated,
    RepoNotFound,
    RevisionNotFound,
    SourceChanged,
    SourceRefused,
    SourceUnreachable,
    TokenRefused,
)
from worker.fetch.http import Credential, Network, origin, sendable_address, shown_address, what_failed
from worker.fetch.hub import Hub, RemoteFile, credentials
from worker.fetch.ranges import RangeFetch, RangeTuning
from worker.model_spec import HubFile, Source, UrlSource
from worker.store.partial import Partial, PartialTaken

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MIB = 1024 * 1024
WEIGHTS = random.Random(1).randbytes(3 * MIB)
NEWER = random.Random(2).randbytes(3 * MIB)
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
FILE = HubFile("org/repo", "sub/model.safetensors", "main")
# Many small ranges on few connections, so that a small file meets what a large one does.
SMALL = RangeTuning(
    connections=3, request_bytes=MIB // 2, smallest_bytes=MIB // 4, buffer_bytes=64 * 1024, unsaved_bytes=MIB, patience_s=20
)
NEVER = threading.Event()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("repo", "private", "gated"):
        folder = tmp_path / "root/org" / name / "sub"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(WEIGHTS)
        (folder / "config.json").write_bytes(b"{}\n")
    return tmp_path / "root"


@pytest.fixture
def stand_in(root: Path) -> Iterator[StandIn]:
    tokens = {"hf_good": ["*"], "hf_weak": []}
    with StandIn(
        root,
        private=["org/private"],
        gated=["org/gated"],
        tokens=tokens,
        civitai={"77": "org/repo/sub/model.safetensors"},
        civitai_token="civ",
    ) as made:
        yield made


def hub_of(stand_in: StandIn, token: str | None = None, patience_s: float = 5, **network: Any) -> Hub:
    options = {"read_timeout_s": 5.0, **network}
    return Hub(stand_in.endpoint, Network(credentials(stand_in.endpoint, token, None), **options), patience_s)


def fetch(
    hub: Hub, remote: RemoteFile, folder: Path, tuning: RangeTuning = SMALL, cancel: threading.Event = NEVER
) -> tuple[Partial, RangeFetch]:
    partial = Partial.claim(folder, remote.size_bytes)
    partial.keep_journal(tuning.unsaved_bytes * tuning.connections)
    work = RangeFetch(hub, remote, partial, tuning, cancel)
    try:
        work.run()
        partial.settle()
    finally:
        partial.close()
    return partial, work


def fetch_all(hub: Hub, folder: Path, source: Source = FILE, tuning: RangeTuning = SMALL) -> bytes:
    partial, _ = fetch(hub, hub.look_up(source, NEVER), folder, tuning)
    return partial.path.read_bytes()


def cancel_when_stalled(stand_in: StandIn, count: int, cancel: threading.Event) -> threading.Thread:
    def run() -> None:
        stand_in.wait_stalled(count)
        cancel.set()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


# --- what is behind an address ------------------------------------------------------------------


def test_weights_have_their_sha256_and_a_pinned_commit(stand_in: StandIn) -> None:
    found = hub_of(stand_in).look_up(FILE, NEVER)
    assert (found.size_bytes, found.sha256, found.key) == (len(WEIGHTS), SHA256, SHA256)
    assert found.commit
    assert len(found.commit) == 40
    assert found.url.startswith(stand_in.cdn_endpoint)
    assert "Signature" not in repr(found)


def test_a_small_file_has_no_sha256_and_is_keyed_by_address_etag_and_size(stand_in: StandIn) -> None:
    found = hub_of(stand_in).look_up(HubFile("org/repo", "sub/config.json"), NEVER)
    assert (found.size_bytes, found.sha256) == (3, None)
    assert found.key.startswith("url-")


@pytest.mark.parametrize(
    ("source", "token", "expected", "said"),
    [
        (HubFile("org/nothing", "a.safetensors"), None, RepoNotFound, "HF_TOKEN"),
        (HubFile("org/private", "sub/model.safetensors"), None, RepoNotFound, "set HF_TOKEN"),
        (HubFile("org/private", "sub/model.safetensors"), "hf_weak", RepoNotFound, "the account of HF_TOKEN"),
        (HubFile("org/gated", "sub/model.safetensors"), None, RepoGated, "HF_TOKEN"),
        (HubFile("org/gated", "sub/model.safetensors"), "hf_weak", RepoGated, "HF_TOKEN"),
        (HubFile("org/repo", "sub/model.safetensors", "v9"), None, RevisionNotFound, "'v9'"),
        (HubFile("org/repo", "sub/other.safetensors"), None, FileNotInRepo, "'sub/other.safetensors'"),
        (HubFile("org/repo", "sub/model.safetensors"), "hf_wrong", TokenRefused, "the token in HF_TOKEN"),
        (HubFile("a--b/..", "x"), None, RepoNotFound, "a--b/.."),
    ],
)
def test_what_cannot_get_better_is_said_at_once(
    stand_in: StandIn, source: HubFile, token: str | None, expected: type[Exception], said: str
) -> None:
    with pytest.raises(expected) as caught:
        hub_of(stand_in, token, patience_s=0).look_up(source, NEVER)
    assert said in str(caught.value)
    assert source.repo in str(caught.value)
    assert "hf_w" not in str(caught.value)
    assert len([request for request in stand_in.requests if request.route == "resolve"]) <= 1


def test_a_token_opens_what_it_may_and_reaches_nobody_else(stand_in: StandIn, tmp_path: Path) -> None:
    hub = hub_of(stand_in, "hf_good")
    for repo in ("org/private", "org/gated"):
        assert fetch_all(hub, tmp_path / repo, HubFile(repo, "sub/model.safetensors")) == WEIGHTS
    assert not stand_in.leaks


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "status": 429, "retry_after_s": 1, "count": 1},
        {"kind": "status", "status": 503},
        {"kind": "status", "status": 408},
        {"kind": "drop"},
        {"kind": "drop", "reset": True},
    ],
)
@pytest.mark.parametrize("source", [FILE, "files/org/repo/sub/model.safetensors"])
def test_metadata_is_asked_for_again(stand_in: StandIn, fault: dict[str, Any], source: HubFile | str) -> None:
    stand_in.fault(**{"count": 2, **fault})
    began = time.monotonic()
    found = hub_of(stand_in).look_up(
        source if isinstance(source, HubFile) else UrlSource(f"{stand_in.endpoint}/{source}"), NEVER
    )
    assert found.size_bytes == len(WEIGHTS)
    if fault.get("retry_after_s"):
        assert time.monotonic() - began >= fault["retry_after_s"], "the server named a time and was not given it"


def test_a_hub_that_stays_away_is_given_up(stand_in: StandIn) -> None:
    stand_in.fault("status", status=502, count=None)
    with pytest.raises(SourceUnreachable, match="status 502") as caught:
        hub_of(stand_in, patience_s=0.5).look_up(FILE, NEVER)
    assert caught.value.retryable


def test_a_hanging_look_up_can_be_cancelled(stand_in: StandIn) -> None:
    stand_in.fault("hang", count=None)
    cancel = threading.Event()
    canceller = cancel_when_stalled(stand_in, 1, cancel)
    with pytest.raises(EnsureCancelled):
        hub_of(stand_in).look_up(FILE, cancel)
    canceller.join()


# --- plain addresses ----------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["files", "redirect"])
def test_a_plain_address_gives_size_and_etag(stand_in: StandIn, tmp_path: Path, route: str) -> None:
    source = UrlSource(f"{stand_in.endpoint}/{route}/org/repo/sub/model.safetensors")
    found = hub_of(stand_in).look_up(source, NEVER)
    assert (found.size_bytes, found.sha256) == (len(WEIGHTS), None)
    assert found.etag
    assert fetch_all(hub_of(stand_in), tmp_path, source) == WEIGHTS


def test_civitais_token_is_a_header_to_civitai_and_to_nobody_else(stand_in: StandIn, tmp_path: Path) -> None:
    network = Network((Credential(stand_in.endpoint, "CIVITAI_TOKEN", "civ"),))
    source = UrlSource(f"{stand_in.endpoint}/api/download/models/77")
    assert fetch_all(Hub(stand_in.endpoint, network), tmp_path, source) == WEIGHTS
    assert [request.had_auth for request in stand_in.requests if request.route == "civitai"] == [True]
    assert not any(request.had_query_token for request in stand_in.requests)
    assert not stand_in.leaks


def test_without_its_token_civitai_is_named(stand_in: StandIn) -> None:
    network = Network((Credential(stand_in.endpoint, "CIVITAI_TOKEN", None),))
    with pytest.raises(TokenRefused, match="set CIVITAI_TOKEN"):
        Hub(stand_in.endpoint, network).look_up(UrlSource(f"{stand_in.endpoint}/api/download/models/77"), NEVER)


@pytest.mark.parametrize(("path", "expected"), [("files/nothing", SourceRefused), ("api/download/models/1", SourceRefused)])
def test_an_address_that_leads_nowhere_is_said_at_once(stand_in: StandIn, path: str, expected: type[Exception]) -> None:
    with pytest.raises(expected, match=r"status 404.*correct the model's address"):
        hub_of(stand_in, patience_s=0).look_up(UrlSource(f"{stand_in.endpoint}/{path}?token=secret"), NEVER)


class Scripted(http.server.BaseHTTPRequestHandler):
    """Answers as the test says: path -> (status, headers, body)."""

    answers: dict[str, tuple[int, dict[str, str], bytes]]
    asked: list[tuple[str, dict[str, str]]]

    def do_GET(self) -> None:
        self.asked.append((self.path, dict(self.headers)))
        status, headers, body = self.answers[self.path]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextlib.contextmanager
def scripted(
    answers: dict[str, tuple[int, dict[str, str], bytes]], tls: ssl.SSLContext | None = None
) -> Iterator[tuple[str, list[tuple[str, dict[str, str]]]]]:
    asked: list[tuple[str, dict[str, str]]] = []
    handler = type("Answers", (Scripted,), {"answers": answers, "asked": asked, "protocol_version": "HTTP/1.1"})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"{'https' if tls else 'http'}://localhost:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def whole(body: bytes, **headers: str) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Length": str(len(body)), "ETag": '"e"', **headers}, body


def moved(to: str, status: int = 302) -> tuple[int, dict[str, str], bytes]:
    return status, {"Location": to, "Content-Length": "0"}, b""


def plain_hub(address: str, **network: Any) -> Hub:
    return Hub(address, Network(**network), patience_s=0)


def test_a_page_is_no_file() -> None:
    with (
        scripted({"/page": whole(b"<html>", **{"Content-Type": "text/html; charset=utf-8"})}) as (address, _),
        pytest.raises(NotAFile, match="web page"),
    ):
        plain_hub(address).look_up(UrlSource(f"{address}/page"), NEVER)


def test_a_file_of_unknown_length_is_refused() -> None:
    answer = (200, {"Transfer-Encoding": "chunked"}, b"2\r\nab\r\n0\r\n\r\n")
    with scripted({"/chunked": answer}) as (address, _), pytest.raises(NotAFile, match="unknown length"):
        plain_hub(address).look_up(UrlSource(f"{address}/chunked"), NEVER)


def test_a_login_page_asks_for_the_token() -> None:
    answers = {"/api/download/models/1": moved("/login?returnUrl=x", 307)}
    with scripted(answers) as (address, _), pytest.raises(TokenRefused, match="set CIVITAI_TOKEN"):
        plain_hub(address, credentials=(Credential(address, "CIVITAI_TOKEN", None),)).look_up(
            UrlSource(f"{address}/api/download/models/1"), NEVER
        )


def test_redirects_end(tmp_path: Path) -> None:
    with scripted({"/a": moved("/b"), "/b": moved("/a")}) as (address, asked):
        with pytest.raises(NotAFile, match="circle"):
            plain_hub(address).look_up(UrlSource(f"{address}/a"), NEVER)
        assert len(asked) == 10
    assert tmp_path.exists()


def test_a_token_does_not_travel_to_another_host_port_or_scheme() -> None:
    with scripted({"/file": whole(b"abc")}) as (other, asked_other):
        elsewhere = other.replace("localhost", "127.0.0.1")
        with scripted({"/a": moved("/b"), "/b": moved(f"{elsewhere}/file", 307)}) as (address, asked):
            network = {"credentials": (Credential(address, "X_TOKEN", "secret"),)}
            assert plain_hub(address, **network).look_up(UrlSource(f"{address}/a"), NEVER).size_bytes == 3
            assert [headers.get("Authorization") for _, headers in asked] == ["Bearer secret", "Bearer secret"]
        assert [headers.get("Authorization") for _, headers in asked_other] == [None]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "pair.pem"
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


def test_https_works_and_an_unknown_certificate_does_not(certificate: Path, tmp_path: Path) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)
    body = random.Random(3).randbytes(200_000)
    with scripted({"/file": whole(body)}, server) as (address, _):
        trusting = plain_hub(address, tls=ssl.create_default_context(cafile=str(certificate)))
        assert fetch_all(trusting, tmp_path, UrlSource(f"{address}/file")) == body
        with pytest.raises(SourceUnreachable, match="CERTIFICATE_VERIFY_FAILED"):
            plain_hub(address).look_up(UrlSource(f"{address}/file"), NEVER)


def test_a_redirect_away_from_https_is_not_followed(certificate: Path) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)
    with (
        scripted({"/file": whole(b"abc")}) as (insecure, asked),
        scripted({"/a": moved(f"{insecure}/file")}, server) as (address, _),
    ):
        hub = plain_hub(address, tls=ssl.create_default_context(cafile=str(certificate)))
        with pytest.raises(NotAFile, match="away from https"):
            hub.look_up(UrlSource(f"{address}/a"), NEVER)
        assert not asked


def test_a_proxy_is_used_but_not_where_it_is_excepted() -> None:
    with scripted({"http://files.example/file": whole(b"abc")}) as (proxy, asked):
        network = {"proxies": {"http": proxy, "no": ".internal, localhost"}}
        assert plain_hub(proxy, **network).look_up(UrlSource("http://files.example/file"), NEVER).size_bytes == 3
        assert [path for path, _ in asked] == ["http://files.example/file"]
        with scripted({"/file": whole(b"abcd")}) as (direct, _):
            assert plain_hub(proxy, **network).look_up(UrlSource(f"{direct}/file"), NEVER).size_bytes == 4
    assert Network(proxies={"https": "http://p:1", "no": "*"}).proxy("https://a.b/") is None


def test_addresses_are_shown_without_their_secrets() -> None:
    assert shown_address("https://user:pw@host/a/b?token=x#y") == "https://host/a/b"
    assert origin("https://Host/x") == origin("https://host:443/y") != origin("http://host/x")


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("https://h/моё.safetensors", "https://h/%D0%BC%D0%BE%D1%91.safetensors"),
        ("https://h/a b?q=ü ß", "https://h/a%20b?q=%C3%BC%20%C3%9F"),
        ("https://h/%D0%BC/a%20b%2Fc?X=a%2Bb+c/d~e|f", "https://h/%D0%BC/a%20b%2Fc?X=a%2Bb+c/d~e|f"),
        ("https://h:8/100%/[x]{y}?a='b'#part", "https://h:8/100%/[x]{y}?a='b'"),
        ("https://h/\udce9", "https://h/%E9"),
        ("http://пример.example:8080/x", "http://xn--e1afmkfd.example:8080/x"),
        ("http://[::1]:80/ы", "http://[::1]:80/%D1%8B"),
    ],
)
def test_what_may_not_be_sent_is_escaped_and_nothing_else_is_touched(written: str, sent: str) -> None:
    assert sendable_address(written) == sent
    assert sendable_address(sent) == sent


@pytest.mark.parametrize(
    "written", ["https:///x", "https://h:port/x", "https://[::1/x", "https://a b/x", f"https://{'ы' * 70}/"]
)
def test_what_is_no_address_is_not_sent(written: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - three modules of Python's own say it, each in its way
        sendable_address(written)


def test_an_address_in_any_script_is_fetched(root: Path, tmp_path: Path, stand_in: StandIn) -> None:
    (root / "моё имя.safetensors").write_bytes(WEIGHTS)
    for route in ("files", "redirect"):
        source = UrlSource(f"{stand_in.endpoint}/{route}/моё имя.safetensors")
        assert fetch_all(hub_of(stand_in, patience_s=0), tmp_path / route, source) == WEIGHTS


@pytest.mark.parametrize("name", ["a b", "моё".encode().decode("latin-1"), "a%20b", "\xe9"])
def test_a_redirect_is_followed_as_it_is_written(name: str, tmp_path: Path) -> None:
    seen = "/" + {"a b": "a%20b", "a%20b": "a%20b", "\xe9": "%E9"}.get(name, "%D0%BC%D0%BE%D1%91")
    answers = {"/file": moved(f"/{name}?X-Signature=a+b%2Fc"), f"{seen}?X-Signature=a+b%2Fc": whole(b"abc")}
    with scripted(answers) as (address, _):
        assert fetch_all(plain_hub(address), tmp_path, UrlSource(f"{address}/file")) == b"abc"


@pytest.mark.parametrize("target", ["http://[::1/x?X-Signature=secret", "http://h:port/?X-Signature=secret"])
def test_a_redirect_to_what_is_no_address_is_said_at_once(target: str) -> None:
    with scripted({"/file": moved(target)}) as (address, asked):
        with pytest.raises(NotAFile, match="a redirect to what is no address") as caught:
            Hub(address, Network(), patience_s=60).look_up(UrlSource(f"{address}/file"), NEVER)
        assert "secret" not in str(caught.value)
        assert len(asked) == 1


def test_an_address_whose_host_cannot_be_written_is_said_at_once() -> None:
    with pytest.raises(NotAFile, match="no address that can be asked"):
        plain_hub("http://h").look_up(UrlSource(f"https://{'ы' * 70}/file.safetensors"), NEVER)


def test_what_failed_is_said_without_the_address_s_query() -> None:
    with contextlib.closing(http.client.HTTPConnection("h")) as connection, pytest.raises(http.client.InvalidURL) as caught:
        connection.putrequest("GET", "/a b?X-Signature=secret more")
    assert what_failed(caught.value) == "InvalidURL"
    assert what_failed(OSError("no route to http://h/a?X-Signature=secret at all")) == "OSError: no route to http://h/a at all"


def test_a_server_may_name_a_time_in_three_ways() -> None:
    later = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=30)
    assert retry_after_s({"Retry-After": "7"}) == 7
    assert 25 < (retry_after_s({"Retry-After": format_datetime(later, usegmt=True)}) or 0) <= 30
    assert retry_after_s({"RateLimit": '"api";r=0;t=55'}) == 55
    assert retry_after_s({"RateLimit": '"api";r=3;t=55'}) is None
    assert retry_after_s({"Retry-After": "soon"}) is None


# --- when to give up ----------------------------------------------------------------------------


class Clock:
    """A time that the test moves."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_waiting_grows_with_failures_and_starts_anew_with_a_byte() -> None:
    backoff = Backoff(partial(SourceUnreachable, "x"), 1e6, clock=Clock())
    waits = [backoff.failed("r") for _ in range(12)]
    assert waits[0] <= 0.25
    assert 10 <= waits[-1] <= 20
    backoff.progressed()
    assert backoff.failed("r") <= 0.25


def test_threads_that_fail_together_wait_like_one() -> None:
    backoff = Backoff(partial(SourceUnreachable, "x"), 1e6, width=8, clock=Clock())
    assert max(backoff.failed("r") for _ in range(8)) <= 0.25
    assert backoff.failed("r") > 0.2


def test_a_download_that_moves_never_runs_out_of_attempts() -> None:
    clock = Clock()
    backoff = Backoff(partial(SourceUnreachable, "x"), 10, clock=clock)
    for _ in range(1000):
        clock.now_s += 9
        backoff.failed("r")
        backoff.progressed()
    clock.now_s += 10
    with pytest.raises(SourceUnreachable, match="10 s"):
        backoff.failed("r")


def test_a_named_time_is_given_but_not_for_ever() -> None:
    clock = Clock()
    backoff = Backoff(partial(SourceUnreachable, "x"), 10, clock=clock)
    assert backoff.failed("r", 60) == 60
    for _ in range(100):
        clock.now_s += 60
        if clock.now_s >= 900:
            break
        assert backoff.failed("r", 60) <= 60
    with pytest.raises(SourceUnreachable):
        backoff.failed("r", 60)


# --- the body -----------------------------------------------------------------------------------


def test_the_body_comes_in_ranges_over_several_connections(stand_in: StandIn, tmp_path: Path) -> None:
    assert fetch_all(hub_of(stand_in), tmp_path) == WEIGHTS
    asked = [request for request in stand_in.requests if request.origin == "cdn"]
    assert 1 < len({request.connection for request in asked}) <= 3
    assert all(request.status == 206 for request in asked)
    assert stand_in.bytes_sent() == len(WEIGHTS), "no byte twice"


FAULTS: list[dict[str, Any]] = [
    {"kind": "status", "status": 429, "retry_after_s": 1, "count": 2},
    {"kind": "status", "status": 503, "count": 5},
    {"kind": "status", "status": 500},
    {"kind": "drop", "count": 3},
    {"kind": "drop", "reset": True, "count": 3},
    {"kind": "cut", "after_bytes": 100_000, "count": 6},
    {"kind": "cut", "after_bytes": 100_000, "count": 3, "reset": True},
    {"kind": "cut", "after_bytes": 0, "count": 2},
    {"kind": "short", "missing_bytes": 1, "count": 4},
    {"kind": "truncate", "missing_bytes": 1000, "count": 1},
    {"kind": "stall", "after_bytes": 50_000, "count": 2},
    {"kind": "hang", "count": 1},
    {"kind": "expired", "count": 1},
    {"kind": "ignore_range", "count": 1},
    {"kind": "slow", "bytes_per_s": 8 * MIB, "count": None},
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: "-".join(str(value) for value in fault.values()))
@pytest.mark.parametrize("has_hash", [True, False], ids=["hub", "plain"])
def test_what_goes_wrong_with_the_body_is_recovered(
    stand_in: StandIn, tmp_path: Path, fault: dict[str, Any], *, has_hash: bool
) -> None:
    source = FILE if has_hash else UrlSource(f"{stand_in.endpoint}/redirect/org/repo/sub/model.safetensors")
    hub = hub_of(stand_in, read_timeout_s=0.4)
    remote = hub.look_up(source, NEVER)
    stand_in.clear_log()
    stand_in.fault(**{"route": "cdn", **fault})
    partial, work = fetch(hub, remote, tmp_path)
    assert partial.path.read_bytes() == WEIGHTS
    assert work.fetched_bytes == len(WEIGHTS), "bytes that came once were fetched again"
    assert any(request.faults for request in stand_in.requests), "the fault never struck"
    assert not stand_in.leaks


def test_all_addresses_expire_in_the_middle_and_are_renewed_once(stand_in: StandIn, tmp_path: Path) -> None:
    hub = hub_of(stand_in)
    remote = hub.look_up(FILE, NEVER)
    stand_in.clear_log()
    stand_in.expire_urls()
    partial, _ = fetch(hub, remote, tmp_path)
    assert partial.path.read_bytes() == WEIGHTS
    renewals = [request for request in stand_in.requests if request.route == "resolve"]
    assert len(renewals) == 1
    assert f"/resolve/{remote.commit}/" in renewals[0].path, "what is fetched is what was looked up, whatever main is now"


def test_a_branch_that_moves_on_changes_nothing(stand_in: StandIn, tmp_path: Path) -> None:
    hub = hub_of(stand_in)
    remote = hub.look_up(FILE, NEVER)
    stand_in.commit("org/repo", {"sub/model.safetensors": NEWER})
    stand_in.expire_urls()
    partial, _ = fetch(hub, remote, tmp_path)
    assert partial.path.read_bytes() == WEIGHTS


def test_a_plain_file_that_changes_is_noticed(stand_in: StandIn, root: Path, tmp_path: Path) -> None:
    source = UrlSource(f"{stand_in.endpoint}/files/org/repo/sub/model.safetensors")
    hub = hub_of(stand_in)
    remote = hub.look_up(source, NEVER)
    (root / "org/repo/sub/model.safetensors").write_bytes(NEWER)
    with pytest.raises(SourceChanged):
        fetch(hub, remote, tmp_path)


@pytest.mark.parametrize("delta", [-1000, 1000])
def test_a_length_that_is_a_lie_is_refused(stand_in: StandIn, tmp_path: Path, delta: int) -> None:
    stand_in.fault("size", value=len(WEIGHTS) + delta, count=None)
    hub = hub_of(stand_in)
    with pytest.raises(ContentMismatch, match="size") as caught:
        fetch(hub, hub.look_up(FILE, NEVER), tmp_path)
    assert caught.value.actual == str(len(WEIGHTS))


def test_addresses_that_are_always_refused_are_believed_in_the_end(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.fault("expired", count=None, route="cdn")
    hub = hub_of(stand_in)
    with pytest.raises(SourceRefused, match="status 403"):
        fetch(hub, hub.look_up(FILE, NEVER), tmp_path)


@pytest.mark.parametrize("more", [{}, {"kind": "cut", "after_bytes": 2 * MIB, "count": 1}])
def test_a_server_without_ranges_gives_the_whole_file(stand_in: StandIn, tmp_path: Path, more: dict[str, Any]) -> None:
    stand_in.fault("ignore_range", count=None)
    hub = hub_of(stand_in)
    remote = hub.look_up(FILE, NEVER)
    if more:
        stand_in.fault(**more, skip=6)
    partial, work = fetch(hub, remote, tmp_path)
    assert partial.path.read_bytes() == WEIGHTS
    assert work.fetched_bytes <= 2 * len(WEIGHTS)


def test_a_plain_source_that_says_so_first_is_fetched_whole_at_once(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.fault("ignore_range", count=None)
    hub = hub_of(stand_in)
    remote = hub.look_up(UrlSource(f"{stand_in.endpoint}/files/org/repo/sub/model.safetensors"), NEVER)
    assert not remote.has_ranges
    stand_in.clear_log()
    partial, _ = fetch(hub, remote, tmp_path)
    assert partial.path.read_bytes() == WEIGHTS
    assert len(stand_in.requests) == 1


def test_no_byte_for_too_long_ends_it_and_keeps_what_came(stand_in: StandIn, tmp_path: Path) -> None:
    hub = hub_of(stand_in, read_timeout_s=0.2)
    remote = hub.look_up(FILE, NEVER)
    stand_in.fault("stall", after_bytes=300_000, count=None, route="cdn")
    with pytest.raises(SourceUnreachable) as caught:
        fetch(
            hub,
            remote,
            tmp_path,
            RangeTuning(connections=1, request_bytes=4 * MIB, smallest_bytes=4 * MIB, buffer_bytes=1000, patience_s=0.1),
        )
    assert caught.value.retryable
    assert Partial.claim(tmp_path, len(WEIGHTS)).done_bytes >= 290_000


def test_a_cancelled_fetch_ends_at_once_and_is_continued(stand_in: StandIn, tmp_path: Path) -> None:
    hub = hub_of(stand_in, read_timeout_s=60)
    remote = hub.look_up(FILE, NEVER)
    stand_in.fault("stall", after_bytes=200_000, count=3, route="cdn")
    cancel = threading.Event()
    canceller = cancel_when_stalled(stand_in, 3, cancel)
    with pytest.raises(EnsureCancelled):
        fetch(hub, remote, tmp_path, cancel=cancel)
    canceller.join()
    stand_in.release()
    stand_in.wait_idle()
    partial, work = fetch(hub, remote, tmp_path)
    assert partial.path.read_bytes() == WEIGHTS
    assert work.fetched_bytes < len(WEIGHTS)


def test_one_slow_connection_is_relieved_by_the_others(stand_in: StandIn, tmp_path: Path) -> None:
    """At 2 KB/s its range alone would take four minutes."""
    hub = hub_of(stand_in)
    remote = hub.look_up(FILE, NEVER)
    stand_in.fault("slow", bytes_per_s=2_000, shared=False, sticky=True, count=1, route="cdn")
    partial, work = fetch(hub, remote, tmp_path)
    assert sum(request.bytes_sent for request in stand_in.requests if request.faults) < MIB // 4
    assert partial.path.read_bytes() == WEIGHTS
    assert work.fetched_bytes == len(WEIGHTS)
    assert not partial.rewritten, "no byte came twice"


@pytest.mark.parametrize("fault", [{"kind": "stall", "after_bytes": 10}, {"kind": "hang"}])
def test_a_connection_that_says_nothing_is_relieved_too(stand_in: StandIn, tmp_path: Path, fault: dict[str, Any]) -> None:
    hub = hub_of(stand_in, read_timeout_s=60)
    remote = hub.look_up(FILE, NEVER)
    stand_in.fault(**fault, count=1, route="cdn")
    partial, _ = fetch(hub, remote, tmp_path)
    assert partial.path.read_bytes() == WEIGHTS


def test_a_source_that_drips_is_given_up_after_the_patience_with_what_came(stand_in: StandIn, tmp_path: Path) -> None:
    hub = hub_of(stand_in, read_timeout_s=60)
    remote = hub.look_up(FILE, NEVER)
    stand_in.fault("slow", bytes_per_s=20, shared=False, count=None, route="cdn")
    began_s = time.monotonic()
    with pytest.raises(SourceUnreachable, match="bytes in") as caught:
        fetch(hub, remote, tmp_path, replace(SMALL, patience_s=3))
    assert time.monotonic() - began_s > 2
    assert caught.value.retryable


# --- versions that no hash tells apart ----------------------------------------------------------


def put(root: Path, content: bytes, modified_s: int) -> None:
    """Another version under the same name: whoever reads the old one goes on with it."""
    path = root / "org/repo/sub/model.safetensors"
    new = path.with_suffix(".new")
    new.write_bytes(content)
    os.utime(new, (modified_s, modified_s))
    new.replace(path)


@contextlib.contextmanager
def changed_under_way(root: Path) -> Iterator[None]:
    """Put the newer version there when the first bytes have come, before any is written."""
    real, lock, changed = Partial.write, threading.Lock(), threading.Event()

    def write(partial: Partial, offset: int, view: memoryview) -> None:
        with lock:
            if not changed.is_set():
                put(root, NEWER, 1_700_000_009)
                changed.set()
        real(partial, offset, view)

    with mock.patch.object(Partial, "write", write):
        yield


VALIDATORS: dict[str, list[dict[str, Any]]] = {
    "etag": [],
    "etag-ignored": [{"kind": "ignore_if_range"}],
    "weak": [{"kind": "without", "value": "Last-Modified"}, {"kind": "weak"}],
    "modified": [{"kind": "without", "value": "ETag"}],
    "modified-ignored": [{"kind": "without", "value": "ETag"}, {"kind": "ignore_if_range"}],
}


@pytest.mark.parametrize("faults", VALIDATORS.values(), ids=VALIDATORS)
def test_bytes_of_two_versions_are_never_in_one_file(
    stand_in: StandIn, root: Path, tmp_path: Path, faults: list[dict[str, Any]]
) -> None:
    put(root, WEIGHTS, 1_700_000_000)
    for fault in faults:
        stand_in.fault(**fault, count=None)
    hub = hub_of(stand_in)
    remote = hub.look_up(UrlSource(f"{stand_in.endpoint}/files/org/repo/sub/model.safetensors"), NEVER)
    assert remote.has_ranges
    with changed_under_way(root), pytest.raises(SourceChanged):
        fetch(hub, remote, tmp_path)


@pytest.mark.parametrize("cut", [False, True])
def test_a_source_that_tells_no_version_is_fetched_with_one_answer(
    stand_in: StandIn, root: Path, tmp_path: Path, *, cut: bool
) -> None:
    for name in ("ETag", "Last-Modified"):
        stand_in.fault("without", value=name, count=None)
    hub = hub_of(stand_in)
    remote = hub.look_up(UrlSource(f"{stand_in.endpoint}/files/org/repo/sub/model.safetensors"), NEVER)
    if cut:
        stand_in.fault("cut", after_bytes=2 * MIB, count=1)
    with changed_under_way(root):
        partial, _ = fetch(hub, remote, tmp_path)
    assert partial.path.read_bytes() == (NEWER if cut else WEIGHTS)


def test_a_file_that_changed_a_moment_ago_is_not_known_by_its_second(stand_in: StandIn, root: Path) -> None:
    stand_in.fault("without", value="ETag", count=None)
    put(root, WEIGHTS, int(time.time()))
    source = UrlSource(f"{stand_in.endpoint}/files/org/repo/sub/model.safetensors")
    assert not hub_of(stand_in).look_up(source, NEVER).has_validator
    put(root, WEIGHTS, int(time.time()) - 60)
    assert hub_of(stand_in).look_up(source, NEVER).has_validator


def test_what_a_mirror_says_of_the_hubs_file_is_used(stand_in: StandIn) -> None:
    mirror = hub_of(stand_in).look_up(UrlSource(f"{stand_in.endpoint}/org/repo/resolve/main/sub/model.safetensors"), NEVER)
    assert mirror.sha256 == SHA256
    small = hub_of(stand_in).look_up(HubFile("org/repo", "sub/config.json"), NEVER)
    assert small.git_sha1 == git_oid(b"{}\n")


def test_a_compressed_answer_is_not_the_file(stand_in: StandIn) -> None:
    stand_in.fault("header", value="Content-Encoding: gzip", count=None)
    with pytest.raises(NotAFile, match="compressed"):
        hub_of(stand_in).look_up(UrlSource(f"{stand_in.endpoint}/files/org/repo/sub/model.safetensors"), NEVER)


def test_a_partial_that_was_taken_ends_the_fetch(stand_in: StandIn, tmp_path: Path) -> None:
    hub = hub_of(stand_in)
    remote = hub.look_up(FILE, NEVER)
    partial = Partial.claim(tmp_path, remote.size_bytes)
    partial.path.rename(tmp_path / "heir.part")
    with pytest.raises(PartialTaken):
        RangeFetch(hub, remote, partial, SMALL, NEVER).run()


def test_nothing_missing_asks_nothing(stand_in: StandIn, tmp_path: Path) -> None:
    hub = hub_of(stand_in)
    remote = hub.look_up(FILE, NEVER)
    partial, _ = fetch(hub, remote, tmp_path)
    stand_in.clear_log()
    _, work = fetch(hub, remote, tmp_path)
    assert (work.fetched_bytes, stand_in.requests) == (0, [])
    assert not partial.is_ours()


def test_memory_and_disk_errors_are_not_taken_for_the_networks(stand_in: StandIn, tmp_path: Path) -> None:
    hub = hub_of(stand_in)
    remote = hub.look_up(FILE, NEVER)
    failures: list[Callable[..., Any]] = [mock.Mock(side_effect=MemoryError)]
    with mock.patch("os.pwrite", failures[0]), pytest.raises(MemoryError):
        fetch(hub, remote, tmp_path)


@contextlib.contextmanager
def modelscope(content: bytes, listed: object) -> Iterator[tuple[Hub, list[str]]]:
    """A hub whose way to modelscope.cn is a proxy that stands for it: one file, and what its API lists."""
    asked: list[str] = []

    class Site(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            listing = "/api/v1/" in self.path
            body = json.dumps(listed).encode() if listing else content[:1]
            self.send_response(200 if listing else 206)
            if not listing:
                self.send_header("Content-Range", f"bytes 0-0/{len(content)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as site:
        threading.Thread(target=site.serve_forever, args=(0.01,), daemon=True).start()
        network = Network(proxies={"http": f"http://127.0.0.1:{site.server_port}"})
        yield Hub("https://huggingface.co", network, patience_s=5.0), asked
        site.shutdown()


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"Path": "deep/x.safetensors", "Size": 3, "Sha256": "AB" * 32}, "ab" * 32),
        ({"Path": "deep/x.safetensors", "Size": 4, "Sha256": "ab" * 32}, None),  # of another version
        ({"Path": "other", "Size": 3, "Sha256": "ab" * 32}, None),
        ({"Path": "deep/x.safetensors", "Size": 3}, None),
    ],
)
def test_modelscope_tells_its_sha256_by_its_api(entry: dict[str, Any], told: str | None) -> None:
    with modelscope(b"abc", {"Code": 200, "Data": {"Files": [entry]}}) as (hub, asked):
        found = hub.look_up(
            UrlSource("http://modelscope.cn/models/org/name/resolve/master/deep/x.safetensors"), threading.Event()
        )
    assert (found.size_bytes, found.sha256) == (3, told)
    assert [address.partition("?")[0] for address in asked] == [
        "http://modelscope.cn/models/org/name/resolve/master/deep/x.safetensors",
        "http://modelscope.cn/api/v1/models/org/name/repo/files",
    ]
