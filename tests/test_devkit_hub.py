"""The stand-in of the hub: what the real client makes of it, and each fault as it looks on the wire."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import http.client
import json
import os
import random
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from devkit.hub import Fault, Hub, RemoteHub, hub_process

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

WEIGHTS = random.Random(1).randbytes(300_000)
NEWER = random.Random(2).randbytes(300_000)
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
CONFIG = b'{"a": 1}\n'
LICENCE = b"be kind\n"
TOKENS = {"hf_all": ["*"], "hf_none": [], "hf_one": ["org/private"]}
WEIGHTS_ADDRESS = "/org/repo/resolve/main/sub/model.safetensors"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("org/repo", "org/private", "org/gated"):
        folder = tmp_path / "root" / name / "sub"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(WEIGHTS)
        (folder / "licence.txt").write_bytes(LICENCE)
        (folder.parent / "config.json").write_bytes(CONFIG)
    tagged = tmp_path / "root/org/repo@v2/sub"
    tagged.mkdir(parents=True)
    (tagged / "model.safetensors").write_bytes(NEWER)
    return tmp_path / "root"


@pytest.fixture
def hub(root: Path) -> Iterator[Hub]:
    civitai = {"77": "org/repo/sub/model.safetensors"}
    with Hub(
        root, private=["org/private"], gated=["org/gated"], tokens=TOKENS, civitai=civitai, civitai_token="c1", page_size=2
    ) as made:
        yield made


# --- as the real client sees it -----------------------------------------------------------------


def client(hub: Hub | RemoteHub, folder: Path, code: str, **environ: str) -> Any:
    """What a program says that uses huggingface_hub and has HF_ENDPOINT set; it prints JSON."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    said = subprocess.run(
        [sys.executable, "-c", "import json\nfrom huggingface_hub import *\n" + textwrap.dedent(code)],
        env={**inherited, **own, **environ},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout)


def test_the_client_reads_a_files_metadata(hub: Hub, tmp_path: Path) -> None:
    said = client(
        hub,
        tmp_path,
        """
        def look(path, revision="main"):
            m = get_hf_file_metadata(hf_hub_url("org/repo", path, revision=revision))
            return [m.etag, m.size, m.location, m.commit_hash, m.xet_file_data]
        print(json.dumps([look("sub/model.safetensors"), look("config.json"), look("sub/model.safetensors", "v2")]))
        """,
    )
    (etag, size, location, commit, xet), small, tagged = said
    assert (etag, size, xet) == (SHA256, len(WEIGHTS), None)
    assert location.startswith(f"{hub.cdn_endpoint}/cdn/")
    git = hashlib.sha1(b"blob 9\0" + CONFIG).hexdigest()
    assert small == [git, len(CONFIG), f"{hub.endpoint}/org/repo/resolve/main/config.json", commit, None]
    assert tagged[0] == hashlib.sha256(NEWER).hexdigest()
    assert tagged[3] != commit


def test_the_client_describes_a_repo(hub: Hub, tmp_path: Path) -> None:
    said = client(
        hub,
        tmp_path,
        """
        from huggingface_hub.hf_api import RepoFile
        api = HfApi()
        info = api.model_info("org/repo", files_metadata=True)
        def about(f):
            size, lfs = (f.size, f.lfs) if isinstance(f, RepoFile) else (None, None)
            return [f.path, size, lfs and lfs.sha256, f.last_commit and f.last_commit.oid]
        print(json.dumps({
            "info": [info.id, info.sha, info.private, info.gated],
            "siblings": [[s.rfilename, s.size, s.lfs and s.lfs.sha256] for s in info.siblings],
            "at": api.model_info("org/repo", revision=info.sha).sha,
            "paths": [about(f) for f in api.get_paths_info("org/repo", ["sub", "sub/model.safetensors", "no"], expand=True)],
            "tree": [about(f) for f in api.list_repo_tree("org/repo", recursive=True)],
            "top": [about(f)[0] for f in api.list_repo_tree("org/repo")],
            "sub": [about(f)[0] for f in api.list_repo_tree("org/repo", "sub", revision="v2")],
            "who": api.whoami(token="hf_all")["name"],
            "gated": [api.model_info("org/gated").gated, len(list(api.list_repo_tree("org/gated")))],
        }))
        """,
    )
    sha = said["info"][1]
    assert said["info"] == ["org/repo", sha, False, False]
    assert said["at"] == sha
    assert said["siblings"] == [
        ["config.json", len(CONFIG), None],
        ["sub/licence.txt", len(LICENCE), None],
        ["sub/model.safetensors", len(WEIGHTS), SHA256],
    ]
    assert said["paths"] == [["sub", None, None, sha], ["sub/model.safetensors", len(WEIGHTS), SHA256, sha]]
    assert [about[0] for about in said["tree"]] == ["config.json", "sub", "sub/licence.txt", "sub/model.safetensors"]
    assert said["top"] == ["config.json", "sub"]
    assert said["sub"] == ["sub/model.safetensors"]
    assert said["gated"] == ["auto", 2]
    assert said["who"] == "stand-in"


def test_the_real_hf_xet_downloads_what_is_on_xet(root: Path, tmp_path: Path) -> None:
    weights = random.Random(3).randbytes(3_000_001)
    (root / "org/repo/sub/model.safetensors").write_bytes(weights)
    code = """
        import hashlib
        path = hf_hub_download("org/repo", "sub/model.safetensors", token="hf_all")
        print(json.dumps(hashlib.sha256(open(path, "rb").read()).hexdigest()))
        """
    with hub_process(root, "--xet", "org/*", "--token", "hf_all") as hub:
        assert client(hub, tmp_path, code, HF_XET_TELEMETRY_ENABLED="false") == hashlib.sha256(weights).hexdigest()
        asked, leaks = hub.requests, hub.leaks
    by_route = {route: [request for request in asked if request.route == route] for route in {one.route for one in asked}}
    assert {"resolve", "xet/token", "xet/reconstruction", "xet/piece"} <= set(by_route)
    assert "cdn" not in by_route
    assert sum(request.bytes_sent for request in by_route["xet/piece"]) >= len(weights)
    assert {request.file for request in by_route["xet/piece"]} == {"org/repo/sub/model.safetensors"}
    assert all(request.had_auth for request in by_route["xet/token"])
    assert not leaks


def test_the_client_downloads_files_and_snapshots(hub: Hub, tmp_path: Path) -> None:
    said = client(
        hub,
        tmp_path,
        """
        import hashlib, os
        one = hf_hub_download("org/repo", "sub/model.safetensors")
        some = snapshot_download("org/private", allow_patterns=["*.txt", "*.safetensors"], ignore_patterns=["config*"])
        found = sorted(os.path.relpath(os.path.join(at, f), some) for at, _, files in os.walk(some) for f in files)
        print(json.dumps([hashlib.sha256(open(one, "rb").read()).hexdigest(), found]))
        """,
        HF_TOKEN="hf_one",
    )
    assert said == [SHA256, ["sub/licence.txt", "sub/model.safetensors"]]
    assert hub.bytes_sent("org/repo/*") == len(WEIGHTS)
    assert hub.bytes_sent("org/private/*") == len(WEIGHTS) + len(LICENCE)
    # The client brings its token to the hub, and knows better than to bring it to the CDN.
    assert {r.had_auth for r in hub.requests if r.route == "resolve"} == {True}
    assert [r.route for r in hub.requests if r.origin == "cdn"] == ["cdn", "cdn"]
    assert hub.leaks == []


def test_the_clients_errors_are_those_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    cases = {
        ("org/none", "a", "main", None): "RepositoryNotFoundError 401",
        ("org/none", "a", "main", "hf_all"): "RepositoryNotFoundError 404",
        ("org/private", "config.json", "main", None): "RepositoryNotFoundError 401",
        ("org/private", "config.json", "main", "hf_none"): "RepositoryNotFoundError 404",
        ("org/private", "config.json", "main", "hf_one"): "ok",
        ("org/gated", "config.json", "main", None): "GatedRepoError 401",
        ("org/gated", "config.json", "main", "hf_one"): "GatedRepoError 403",
        ("org/gated", "config.json", "main", "hf_all"): "ok",
        ("org/repo", "none", "main", None): "RemoteEntryNotFoundError 404",
        ("org/repo", "config.json", "v9", None): "RevisionNotFoundError 404",
        ("org/repo", "config.json", "main", "hf_wrong"): "HfHubHTTPError 401",
    }
    said = client(
        hub,
        tmp_path,
        f"""
        from huggingface_hub.errors import HfHubHTTPError
        said = []
        for repo, file, revision, token in {list(cases)!r}:
            try:
                get_hf_file_metadata(hf_hub_url(repo, file, revision=revision), token=token or False)
                said.append("ok")
            except HfHubHTTPError as error:
                said.append(f"{{type(error).__name__}} {{error.response.status_code}}")
        print(json.dumps(said))
        """,
    )
    assert dict(zip(cases, said, strict=True)) == cases


def test_the_client_gets_over_a_cut_and_waits_out_a_429(hub: Hub, tmp_path: Path) -> None:
    hub.fault("cut", route="cdn", after_bytes=100_000)
    hub.fault("status", route="cdn", status=429, retry_after_s=0)
    said = client(
        hub,
        tmp_path,
        """
        import hashlib
        path = hf_hub_download("org/repo", "sub/model.safetensors")
        print(json.dumps(hashlib.sha256(open(path, "rb").read()).hexdigest()))
        """,
    )
    assert said == SHA256
    # It reads in chunks of 10 MB and loses the one that was cut: it goes on from the last whole one, here from nothing.
    assert [(r.status, r.faults) for r in hub.requests if r.route == "cdn"] == [(429, ("status",)), (200, ("cut",)), (200, ())]


# --- on the wire --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


def connect(address: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(address).netloc, timeout=20)


def ask(address: str, method: str = "GET", **headers: str) -> Answer:
    """One request over a connection of its own; header names have underscores for dashes. IncompleteRead, ConnectionError."""
    parts = urlsplit(address)
    with contextlib.closing(connect(address)) as link:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        link.request(method, f"{parts.path}?{parts.query}" if parts.query else parts.path, headers=named)
        answer = link.getresponse()
        return Answer(answer.status, dict(answer.headers), answer.read())


@pytest.fixture
def signed(hub: Hub) -> str:
    """The CDN's address of the weights."""
    address = ask(hub.endpoint + WEIGHTS_ADDRESS, "HEAD").headers["Location"]
    hub.clear_log()
    return address


def test_no_answer_speaks_of_xet(hub: Hub, signed: str) -> None:
    for address in (hub.endpoint + WEIGHTS_ADDRESS, hub.endpoint + "/api/models/org/repo", signed):
        answer = ask(address)
        assert not any("xet" in f"{name}: {value}".lower() for name, value in answer.headers.items())
        assert b"xet" not in answer.body[:1000] or answer.body == WEIGHTS


def test_xet_s_storage_takes_its_own_token_only(root: Path) -> None:
    with Hub(root, xet=["org/repo"], gated=["org/gated"]) as hub:
        name = ask(hub.endpoint + WEIGHTS_ADDRESS).headers["X-Xet-Hash"]
        assert "X-Xet-Hash" not in ask(f"{hub.endpoint}/org/gated/resolve/main/config.json").headers
        access = ask(f"{hub.endpoint}/api/models/org/repo/xet-read-token/main").headers
        address, token = f"{access['X-Xet-Cas-Url']}/v2/reconstructions/{name}", access["X-Xet-Access-Token"]
        assert ask(address, authorization=f"Bearer {token}").status == 200
        assert ask(address, authorization="Bearer hf_all").status == 401
        assert ask(address).status == 401
        assert ask(address.replace(name, "0" * 64), authorization=f"Bearer {token}").status == 404
        assert ask(f"{hub.endpoint}/api/models/org/gated/xet-read-token/main").status == 401
        hub.expire_urls()
        assert ask(address, authorization=f"Bearer {token}").status == 401


def test_weights_are_redirected_and_small_files_are_not(hub: Hub) -> None:
    weights = ask(hub.endpoint + WEIGHTS_ADDRESS, "HEAD")
    small = ask(f"{hub.endpoint}/org/repo/resolve/main/config.json")
    assert weights.status == 302
    assert (weights.headers["X-Linked-Etag"], weights.headers["X-Linked-Size"]) == (f'"{SHA256}"', str(len(WEIGHTS)))
    assert urlsplit(weights.headers["Location"]).hostname == "localhost"
    assert urlsplit(hub.endpoint).hostname == "127.0.0.1"
    assert (small.status, small.body) == (200, CONFIG)
    assert weights.headers["X-Repo-Commit"] == small.headers["X-Repo-Commit"]


@pytest.mark.parametrize(
    ("asked", "status", "start", "stop"),
    [
        ("bytes=0-99", 206, 0, 100),
        ("bytes=100-", 206, 100, len(WEIGHTS)),
        ("bytes=-100", 206, len(WEIGHTS) - 100, len(WEIGHTS)),
        ("bytes=-999999999", 206, 0, len(WEIGHTS)),
        ("bytes=5-999999999", 206, 5, len(WEIGHTS)),
        ("bytes=0-1,5-6", 200, 0, len(WEIGHTS)),
        ("bytes=9-5", 200, 0, len(WEIGHTS)),
        ("lines=1-2", 200, 0, len(WEIGHTS)),
    ],
)
def test_ranges(signed: str, asked: str, status: int, start: int, stop: int) -> None:
    answer = ask(signed, Range=asked)
    assert (answer.status, answer.body) == (status, WEIGHTS[start:stop])
    assert answer.headers.get("Content-Range") == (f"bytes {start}-{stop - 1}/{len(WEIGHTS)}" if status == 206 else None)


@pytest.mark.parametrize("asked", [f"bytes={len(WEIGHTS)}-", "bytes=-0"])
def test_a_range_outside_the_file(signed: str, asked: str) -> None:
    answer = ask(signed, Range=asked)
    assert (answer.status, answer.headers["Content-Range"]) == (416, f"bytes */{len(WEIGHTS)}")


def test_one_connection_serves_many_requests(hub: Hub, signed: str) -> None:
    parts = urlsplit(signed)
    with contextlib.closing(connect(signed)) as link:
        got = b""
        for start in range(0, len(WEIGHTS), 100_000):
            link.request("GET", f"{parts.path}?{parts.query}", headers={"Range": f"bytes={start}-{start + 99_999}"})
            got += link.getresponse().read()
    assert got == WEIGHTS
    assert len({r.connection for r in hub.requests}) == 1
    assert hub.bytes_sent("model.safetensors") == len(WEIGHTS)


def test_a_signed_address_is_for_one_file_and_for_a_time(hub: Hub, signed: str) -> None:
    assert ask(signed).body == WEIGHTS
    assert ask(signed.replace("model.safetensors", "licence.txt")).status == 403
    assert ask(signed.partition("?")[0]).status == 403
    hub.expire_urls(life_s=0)
    late = ask(signed)
    assert (late.status, b"Request has expired" in late.body) == (403, True)
    assert ask(ask(hub.endpoint + WEIGHTS_ADDRESS, "HEAD").headers["Location"]).status == 403
    hub.reset()
    assert ask(ask(hub.endpoint + WEIGHTS_ADDRESS, "HEAD").headers["Location"]).status == 200


def test_a_token_that_reaches_the_cdn_is_remembered(hub: Hub, signed: str) -> None:
    ask(signed)
    assert hub.leaks == []
    ask(signed, Authorization="Bearer hf_all")
    ask(f"{signed}&token=c1")
    assert [(r.had_auth, r.had_query_token) for r in hub.leaks] == [(True, False), (False, True)]


def test_the_origins_do_not_answer_for_each_other(hub: Hub, signed: str) -> None:
    assert ask(hub.cdn_endpoint + WEIGHTS_ADDRESS).status == 404
    assert ask(signed.replace(hub.cdn_endpoint, hub.endpoint)).status == 404


def test_a_commit_id_stays_valid_when_main_moves(hub: Hub) -> None:
    old = ask(hub.endpoint + WEIGHTS_ADDRESS, "HEAD").headers
    new_id = hub.commit("org/repo", {"sub/model.safetensors": NEWER, "extra.bin": b"e"})
    new = ask(hub.endpoint + WEIGHTS_ADDRESS, "HEAD").headers
    pinned = ask(hub.endpoint + WEIGHTS_ADDRESS.replace("main", old["X-Repo-Commit"]), "HEAD").headers
    assert new["X-Repo-Commit"] == new_id != old["X-Repo-Commit"] == pinned["X-Repo-Commit"]
    assert ask(new["Location"]).body == NEWER
    assert ask(pinned["Location"]).body == ask(old["Location"]).body == WEIGHTS
    assert ask(f"{hub.endpoint}/org/repo/resolve/main/extra.bin", "HEAD").status == 302


def test_a_commit_id_follows_from_the_content(hub: Hub, root: Path) -> None:
    first = ask(hub.endpoint + WEIGHTS_ADDRESS, "HEAD").headers
    (root / "org/repo/sub/model.safetensors").write_bytes(NEWER)
    second = ask(hub.endpoint + WEIGHTS_ADDRESS, "HEAD").headers
    with Hub(root) as other:
        again = ask(other.endpoint + WEIGHTS_ADDRESS, "HEAD").headers
    assert first["X-Repo-Commit"] != second["X-Repo-Commit"] == again["X-Repo-Commit"]
    # The bytes behind the first id are gone: an address of theirs must not yield the new ones.
    assert ask(first["Location"]).status == 404
    assert ask(second["Location"]).body == NEWER


def test_a_plain_source(hub: Hub) -> None:
    address = f"{hub.endpoint}/files/org/repo/sub/model.safetensors"
    head = ask(address, "HEAD")
    assert (head.status, head.body, head.headers["Content-Length"]) == (200, b"", str(len(WEIGHTS)))
    assert (head.headers["Accept-Ranges"], ask(address).body) == ("bytes", WEIGHTS)
    part = ask(address, Range="bytes=10-19", If_Range=head.headers["ETag"])
    assert (part.status, part.body) == (206, WEIGHTS[10:20])
    assert ask(address, Range="bytes=10-19", If_Range='"other"').status == 200
    assert ask(address.replace(hub.endpoint, hub.cdn_endpoint)).body == WEIGHTS
    moved = ask(address.replace("/files/", "/redirect/"))
    assert moved.status == 302
    assert ask(moved.headers["Location"]).body == WEIGHTS
    assert ask(f"{hub.endpoint}/files/../../{__file__}").status == 404


def test_civitai(hub: Hub) -> None:
    address = f"{hub.endpoint}/api/download/models/77"
    assert ask(address).status == 401
    for answer in (ask(f"{address}?token=c1"), ask(address, Authorization="Bearer c1")):
        assert answer.status == 307
        file = ask(answer.headers["Location"])
        assert (file.body, file.headers["Content-Disposition"]) == (WEIGHTS, 'attachment; filename="model.safetensors"')
    version = json.loads(ask(f"{hub.endpoint}/api/v1/model-versions/77").body)
    assert version["files"][0]["hashes"]["SHA256"] == SHA256.upper()
    assert version["files"][0]["sizeKB"] * 1024 == len(WEIGHTS)
    assert ask(f"{hub.endpoint}/api/download/models/78?token=c1").status == 404
    assert hub.leaks == []


def test_an_error_can_quote_any_address(hub: Hub) -> None:
    answer = ask(f"{hub.endpoint}/org/repo/resolve/%0aX-Repo-Commit:%20%E2%82%AC/config.json")
    assert (answer.status, answer.headers["X-Error-Code"]) == (404, "RevisionNotFound")
    assert "X-Repo-Commit" not in answer.headers


# --- faults -------------------------------------------------------------------------------------


def test_a_status_befalls_the_requests_it_is_meant_for(hub: Hub, signed: str) -> None:
    hub.fault("status", file="org/*/model.safetensors", route="resolve", status=503, skip=1, count=2)
    assert ask(f"{hub.endpoint}/org/repo/resolve/main/config.json").status == 200
    assert ask(signed).status == 200
    assert [ask(hub.endpoint + WEIGHTS_ADDRESS, "HEAD").status for _ in range(4)] == [302, 503, 503, 302]
    assert [(f["seen"], f["fired"]) for f in hub.faults] == [(4, 2)]
    hub.fault("status", origin="cdn", method="GET", status=500)
    assert [ask(signed, "HEAD").status, ask(signed).status, ask(signed).status] == [200, 500, 200]
    hub.fault("status", route="api/*", status=502, count=None)
    hub.clear_faults()
    assert ask(f"{hub.endpoint}/api/models/org/repo").status == 200


def test_a_429_says_when_to_come_back(hub: Hub) -> None:
    hub.fault("status", status=429, retry_after_s=2)
    answer = ask(f"{hub.endpoint}/api/models/org/repo")
    assert (answer.status, answer.headers["Retry-After"], answer.headers["RateLimit"]) == (429, "2", '"api";r=0;t=2')


@pytest.mark.parametrize(
    ("kind", "options", "left"),
    [
        ("cut", {"after_bytes": 700}, 700),
        ("cut", {"after_bytes": 0}, 0),
        ("short", {"missing_bytes": 100}, 900),
    ],
)
def test_a_body_that_ends_early(hub: Hub, signed: str, kind: Any, options: dict[str, Any], left: int) -> None:
    hub.fault(kind, **options)
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(signed, Range="bytes=1000-1999")
    assert caught.value.partial == WEIGHTS[1000 : 1000 + left]
    assert caught.value.expected == 1000 - left
    assert ask(signed, Range="bytes=1000-1999").body == WEIGHTS[1000:2000]
    hub.wait_idle()
    assert [(r.bytes_sent, r.outcome, r.faults) for r in hub.requests] == [(left, "cut", (kind,)), (1000, "done", ())]


def test_a_cut_waits_for_a_body_that_is_long_enough(hub: Hub, signed: str) -> None:
    hub.fault("cut", after_bytes=1000)
    assert len(ask(signed, Range="bytes=0-999").body) == 1000
    with pytest.raises(http.client.IncompleteRead):
        ask(signed, Range="bytes=0-1000")


def test_a_connection_that_is_reset(hub: Hub, signed: str) -> None:
    hub.fault("cut", after_bytes=0, reset=True)
    with pytest.raises(ConnectionResetError):
        ask(signed)
    hub.fault("drop", count=2)
    with pytest.raises(http.client.RemoteDisconnected):
        ask(signed)
    with pytest.raises(http.client.RemoteDisconnected):
        ask(f"{hub.endpoint}/api/models/org/repo")
    assert ask(signed).status == 200


def test_a_stall_lasts_until_it_is_released(hub: Hub, signed: str) -> None:
    hub.fault("stall", after_bytes=500)
    parts = urlsplit(signed)
    with contextlib.closing(connect(signed)) as link:
        link.request("GET", f"{parts.path}?{parts.query}")
        answer = link.getresponse()
        got = answer.read(500)
        hub.wait_stalled(1)
        assert [(r.outcome, r.bytes_sent) for r in hub.requests] == [("open", 500)]
        hub.release()
        assert got + answer.read() == WEIGHTS


def test_a_stall_ends_by_itself_or_with_its_client(hub: Hub, signed: str) -> None:
    hub.fault("stall", after_bytes=500, hold_s=0.01)
    assert ask(signed).body == WEIGHTS
    hub.fault("hang")
    link = connect(signed)
    link.request("GET", urlsplit(signed).path)
    hub.wait_stalled(1)
    link.close()
    hub.wait_idle()
    assert [r.outcome for r in hub.requests] == ["done", "gone"]


def test_what_hangs_is_answered_when_released(hub: Hub) -> None:
    hub.fault("hang", route="resolve", count=2)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        asked = [pool.submit(ask, hub.endpoint + WEIGHTS_ADDRESS, "HEAD") for _ in range(2)]
        hub.wait_stalled(2)
        hub.release()
        assert [answer.result().status for answer in asked] == [302, 302]
    with pytest.raises(TimeoutError):
        hub.wait_stalled(1, timeout_s=0.01)


@pytest.mark.parametrize("at_byte", [1500, 1500 - len(WEIGHTS)])
def test_a_flipped_byte_strikes_the_range_that_holds_it_once(hub: Hub, signed: str, at_byte: int) -> None:
    hub.fault("flip", at_byte=at_byte)
    wrong = WEIGHTS[1000:1500] + bytes([WEIGHTS[1500] ^ 0xFF]) + WEIGHTS[1501:2000]
    assert ask(signed, Range="bytes=0-999").body == WEIGHTS[:1000]
    assert ask(signed, Range="bytes=1000-1999").body == wrong
    assert ask(signed, Range="bytes=1000-1999").body == WEIGHTS[1000:2000]


def test_a_byte_that_is_always_wrong(hub: Hub, signed: str) -> None:
    hub.fault("flip", at_byte=len(WEIGHTS) - 1, count=None)
    hub.fault("flip", at_byte=0, count=None)
    wrong = bytes([WEIGHTS[0] ^ 0xFF]) + WEIGHTS[1:-1] + bytes([WEIGHTS[-1] ^ 0xFF])
    assert [ask(signed).body == wrong for _ in range(2)] == [True, True]


def test_a_file_that_seems_shorter(hub: Hub, signed: str) -> None:
    hub.fault("truncate", missing_bytes=1000, count=2)
    size = len(WEIGHTS) - 1000
    assert ask(signed).body == WEIGHTS[:size]
    assert ask(signed, Range="bytes=10-19").headers["Content-Range"] == f"bytes 10-19/{size}"


def test_a_range_that_is_ignored(hub: Hub, signed: str) -> None:
    hub.fault("ignore_range")
    answer = ask(signed, Range="bytes=10-19")
    assert (answer.status, answer.body) == (200, WEIGHTS)
    assert ask(signed, Range="bytes=10-19").status == 206


def test_metadata_that_lies(hub: Hub) -> None:
    hub.fault("size", value=60_000_000_000, count=None)
    hub.fault("sha256", value="0" * 64, file="*.safetensors", count=None)
    head = ask(hub.endpoint + WEIGHTS_ADDRESS, "HEAD").headers
    assert (head["X-Linked-Size"], head["X-Linked-Etag"]) == ("60000000000", f'"{"0" * 64}"')
    listed = json.loads(ask(f"{hub.endpoint}/api/models/org/repo/tree/main/sub").body)[1]
    assert (listed["size"], listed["lfs"]["size"], listed["lfs"]["oid"]) == (60_000_000_000, 60_000_000_000, "0" * 64)
    assert ask(head["Location"]).body == WEIGHTS


def test_one_signed_address_that_expired(hub: Hub, signed: str) -> None:
    hub.fault("expired", skip=1)
    assert [ask(signed).status for _ in range(3)] == [200, 403, 200]


@pytest.mark.parametrize("shared", [True, False])
def test_a_slow_hub_is_slow_for_all_or_for_each(hub: Hub, signed: str, *, shared: bool) -> None:
    hub.fault("slow", bytes_per_s=1_000_000, shared=shared, count=None)
    start_s = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        got = list(pool.map(lambda _: ask(signed).body, range(2)))
    assert got == [WEIGHTS] * 2
    # A lower bound only: how fast it is beyond the pace depends on the machine. The last slice (1/20 s) is not waited for.
    assert time.monotonic() - start_s >= (0.5 if shared else 0.2)


def test_an_origin_that_refuses_connections(hub: Hub, signed: str) -> None:
    parts = urlsplit(signed)
    with contextlib.closing(connect(signed)) as link:
        link.request("GET", f"{parts.path}?{parts.query}")
        link.getresponse().read()
        hub.refuse("cdn")
        assert link.sock is not None
        assert link.sock.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        ask(signed)
    assert ask(hub.endpoint + WEIGHTS_ADDRESS, "HEAD").status == 302
    hub.listen("cdn")
    assert ask(signed).body == WEIGHTS


def test_an_origin_that_comes_back_by_itself(hub: Hub) -> None:
    hub.refuse("hub", for_s=0.05)
    end_s = time.monotonic() + 10
    while True:
        try:
            assert ask(hub.endpoint + WEIGHTS_ADDRESS, "HEAD").status == 302
        except ConnectionRefusedError:
            assert time.monotonic() < end_s, "it still refuses"
        else:
            break


def test_faults_strike_together(hub: Hub, signed: str) -> None:
    hub.fault("flip", at_byte=10)
    hub.fault("stall", after_bytes=10, hold_s=0.01)
    hub.fault("cut", after_bytes=20)
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(signed)
    assert caught.value.partial == WEIGHTS[:10] + bytes([WEIGHTS[10] ^ 0xFF]) + WEIGHTS[11:20]


def test_a_fault_that_makes_no_sense(hub: Hub) -> None:
    wrong: Any = "explode"
    with pytest.raises(ValueError, match="unknown fault 'explode'"):
        hub.fault(wrong)
    with pytest.raises(ValueError, match="needs the value"):
        Fault("size")
    with pytest.raises(ValueError, match="bytes_per_s"):
        Fault("slow", bytes_per_s=0)
    with pytest.raises(TypeError):
        hub.fault("cut", after=1)


def test_closing_ends_what_is_stalled(root: Path) -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with Hub(root) as hub:
            hub.fault("stall", after_bytes=0)
            asked = pool.submit(ask, ask(hub.endpoint + WEIGHTS_ADDRESS, "HEAD").headers["Location"])
            hub.wait_stalled(1)
        with pytest.raises(http.client.IncompleteRead):
            asked.result()


# --- in a process of its own --------------------------------------------------------------------


def test_a_hub_in_another_process_is_controlled_over_http(root: Path) -> None:
    with hub_process(
        root, "--private", "org/private", "--token", "t1", "--token", "t2=org/repo", "--civitai", "5=org/x"
    ) as hub:
        address = hub.endpoint + WEIGHTS_ADDRESS
        signed = ask(address, "HEAD", Authorization="Bearer t2").headers["Location"]
        assert signed.startswith(hub.cdn_endpoint)
        private = f"{hub.endpoint}/org/private/resolve/main/config.json"
        assert [ask(private, Authorization=f"Bearer {token}").status for token in ("t1", "t2", "t3")] == [200, 404, 401]
        number = hub.fault("stall", after_bytes=10)
        assert [(f["id"], f["kind"], f["fired"]) for f in hub.faults] == [(number, "stall", 0)]
        hub.clear_log()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            asked = pool.submit(ask, signed)
            hub.wait_stalled(1)
            assert [(r.file, r.bytes_sent, r.outcome) for r in hub.requests] == [("org/repo/sub/model.safetensors", 10, "open")]
            hub.release()
            assert asked.result().body == WEIGHTS
        hub.wait_until(lambda: all(r.outcome == "done" for r in hub.requests))
        assert (hub.bytes_sent(), hub.requests[0].faults) == (len(WEIGHTS), ("stall",))
        hub.refuse("hub")
        with pytest.raises(ConnectionRefusedError):
            ask(address)
        hub.listen("hub")
        old = ask(address, "HEAD").headers["X-Repo-Commit"]
        assert hub.commit("org/repo", {"sub/model.safetensors": NEWER}) != old
        hub.expire_urls()
        assert ask(signed).status == 403
        with pytest.raises(TimeoutError):
            hub.wait_stalled(1, timeout_s=0.01)
        with pytest.raises(ValueError, match="explode"):
            hub.fault("explode")  # type: ignore[arg-type]  # that is what is tested
        hub.reset()
        assert (hub.requests, hub.faults) == ([], [])
    with pytest.raises(ConnectionRefusedError):
        ask(address)


def test_a_hub_that_cannot_start(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match="exit code 2"), hub_process(tmp_path / "none"):
        pytest.fail("there is nothing to serve")
    with pytest.raises(NotADirectoryError):
        Hub(tmp_path / "none")


def test_eight_connections_fetch_a_file(tmp_path: Path) -> None:
    """The figure is printed (`pytest -s`), not asserted: it is the machine's."""
    size_bytes, part_bytes = 256 * 1024 * 1024, 32 * 1024 * 1024
    big = tmp_path / "root/org/repo/big.safetensors"
    big.parent.mkdir(parents=True)
    with big.open("wb") as stream:
        stream.truncate(size_bytes)
    with hub_process(tmp_path / "root") as hub:
        signed = ask(f"{hub.endpoint}/org/repo/resolve/main/big.safetensors", "HEAD").headers["Location"]
        parts = urlsplit(signed)

        def fetch(start: int) -> int:
            buffer, got = memoryview(bytearray(4 * 1024 * 1024)), 0
            with contextlib.closing(connect(signed)) as link:
                asked = {"Range": f"bytes={start}-{start + part_bytes - 1}"}
                link.request("GET", f"{parts.path}?{parts.query}", headers=asked)
                answer = link.getresponse()
                while count := answer.readinto(buffer):
                    got += count
            return got

        start_s = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            got = sum(pool.map(fetch, range(0, size_bytes, part_bytes)))
        print(f"\n8 connections: {size_bytes / (time.monotonic() - start_s) / 1e6:.0f} MB/s")  # noqa: T201 (a figure for people)
        assert got == size_bytes == hub.bytes_sent("big.safetensors")
