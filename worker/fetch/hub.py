"""Look up an address: size, sha256, commit, and an address for range requests. Touches the network.

Hugging Face's metadata comes from `huggingface_hub`. For other sources this sends a GET for the first byte, because many signed
addresses refuse HEAD.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import logging
import re
import time
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeVar

import httpx2
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, is_offline_mode, set_client_factory
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from socksio import ProtocolError

from worker.base.retry import OK, PARTIAL, PROXY_LOGIN, TRANSIENT, UNAUTHORISED, UNSATISFIABLE, Backoff, retry_after_s
from worker.errors import (
    ContentMismatch,
    EnsureCancelled,
    FileNotInRepo,
    HubOffline,
    ModelError,
    NotAFile,
    RepoGated,
    RepoNotFound,
    RevisionNotFound,
    SourceRefused,
    SourceUnreachable,
)
from worker.fetch.blocking_call import abandonable
from worker.fetch.http import (
    Credential,
    FollowedAnswer,
    Network,
    bare_etag,
    content_coding,
    follow_redirects,
    login_refused,
    request_headers,
    request_target,
    shown_address,
    token_refused,
    what_failed,
)
from worker.model_spec import HubFile, Source, UrlSource, at_endpoint, content_key, modelscope_listing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from email.message import Message

    from worker.base.progress import CancelToken
    from worker.model_spec import ModelSpec

log = logging.getLogger(__name__)

T = TypeVar("T")

HF_TOKEN: Final = "HF_TOKEN"  # noqa: S105 - the variable's name
CIVITAI_TOKEN: Final = "CIVITAI_TOKEN"  # noqa: S105 - the variable's name
_CIVITAI: Final = "https://civitai.com"
_SHA256: Final = re.compile(r"[0-9a-fA-F]{64}")
_SHA1: Final = re.compile(r"[0-9a-f]{40}")
# Nothing but the text of httpx2's error tells a refused login from a proxy that cannot connect.
_LOGIN_REFUSED: Final = re.compile(r"^407\b|Invalid username/password|^Requested .* from proxy server")
_SETTLED_S: Final = 2.0
_MOST_SAID_BYTES: Final = 64 * 1024
_MOST_LISTED_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as the hub or another source describes it. `url` serves ranges and may be signed: it is never shown or stored."""

    source: Source
    size_bytes: int
    sha256: str | None
    etag: str | None
    commit: str | None
    url: str = field(repr=False)
    has_ranges: bool = True
    xet: Any = field(default=None, repr=False)  # huggingface_hub's XetFileData, which it does not export
    modified: str | None = None
    git_sha1: str | None = None  # the content's name in git: the hub gives no other hash of a small file

    @property
    def where(self) -> str:
        """Return the address as people know it."""
        return str(self.source)

    @property
    def key(self) -> str:
        """Return the name of its partial downloads and its lock."""
        address = self.source.url if isinstance(self.source, UrlSource) else str(self.source)
        return content_key(self.sha256, address, "\n".join(filter(None, (self.etag, self.modified))), self.size_bytes)

    @property
    def is_verified(self) -> bool:
        """Return whether the source gives a hash of the content."""
        return bool(self.sha256 or self.git_sha1)

    @property
    def has_validator(self) -> bool:
        """Return whether two answers of the source can be known to be the same version."""
        return self.is_verified or bool(self.etag or self.modified)

    @property
    def strong_etag(self) -> str | None:
        """Return the ETag for a request. A weak one does not promise the same bytes."""
        return None if not self.etag or self.etag.startswith("W/") else f'"{bare_etag(self.etag)}"'

    def is_version(self, headers: Message) -> bool:
        """Return whether an answer is of the version that was looked up, if that matters: a hash detects any other."""
        if self.is_verified:
            return True
        same_etag = bare_etag(headers.get("ETag")) == bare_etag(self.etag)
        return same_etag and (bool(self.strong_etag) or self.modified in {None, headers.get("Last-Modified")})

    def check_against(self, spec: ModelSpec) -> None:
        """Raise `ContentMismatch` if the source now has another file than the model spec says."""
        if spec.sha256 and self.sha256 and spec.sha256 != self.sha256:
            raise ContentMismatch(self.where, "sha256", spec.sha256, self.sha256)
        if spec.size_bytes not in {None, self.size_bytes}:
            raise ContentMismatch(self.where, "size", str(spec.size_bytes), str(self.size_bytes))

    def same_content(self, other: RemoteFile) -> bool:
        """Return whether both describe the same bytes."""
        if self.sha256 and other.sha256:
            return self.sha256 == other.sha256
        if self.git_sha1 and other.git_sha1:
            return self.git_sha1 == other.git_sha1
        same_version = bool(self.strong_etag) or self.modified == other.modified
        return same_version and (self.etag, self.size_bytes) == (other.etag, other.size_bytes)


@dataclass(frozen=True, slots=True)
class XetAccess:
    """Access that the hub gives to a repository's files in Xet's storage until `expires_s` (Unix time). Where to renew it."""

    endpoint: str
    token: str = field(repr=False)
    expires_s: int
    refresh_url: str
    refresh_headers: Mapping[str, str] = field(repr=False)


def credentials(endpoint: str, hf_token: str | None, civitai_token: str | None) -> tuple[Credential, ...]:
    """Return which token goes to which origin: the hub's only to the hub, Civitai's only to civitai.com."""
    return Credential(endpoint, HF_TOKEN, hf_token), Credential(_CIVITAI, CIVITAI_TOKEN, civitai_token)


class Hub:
    """Looks up addresses. It holds the tokens and sends each only to its own origin."""

    def __init__(
        self, endpoint: str, network: Network, patience_s: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.network = network
        self.clock = clock
        self._endpoint = endpoint.rstrip("/")
        self._patience_s = patience_s
        # Otherwise the first look-up of a process asks the hub for a list of coding agents first, and a job waits for that.
        constants.HF_HUB_DISABLE_TELEMETRY = True
        # huggingface_hub's own client does not start if any proxy is of a kind that it does not know.
        set_client_factory(partial(_client, network))

    def look_up(self, source: Source, cancel: CancelToken) -> RemoteFile:
        """Ask a source for its metadata, and retry while it is busy.

        Raises permanent errors at once (gated, not found, unauthorised), `SourceUnreachable` after `patience_s`, and
        `EnsureCancelled` at once.
        """
        found = at_endpoint(source, self._endpoint)
        if isinstance(found, HubFile):
            return self._asked(lambda: self._ask_hub(found), str(found), cancel)
        remote = self._asked(lambda: self._ask_url(found), str(found), cancel)
        if remote.sha256 is None and (listing := modelscope_listing(found)):
            return self._asked(lambda: self._with_sha256(remote, *listing), str(found), cancel)
        return remote

    def question(self, source: Source) -> str:
        """Return a key that look-ups with the same answer share: the address, and whether a token is sent.

        It may contain a secret: it is never shown or stored. Raises `TokenMalformed`.
        """
        found = at_endpoint(source, self._endpoint)
        url, address = (found.url, found.url) if isinstance(found, UrlSource) else (self._endpoint, str(found))
        credential = self.network.credential(url)
        return f"{address}\n{bool(credential and credential.token)}"

    def list_files(self, folder: HubFile, cancel: CancelToken) -> tuple[str, ...]:
        """Return every file of a repository at a revision, sorted. `folder.path` is ignored. Raises what `look_up` raises."""
        return self._asked(lambda: self._ask_files(folder), f"hf://{folder.repo}", cancel)

    def _asked(self, ask: Callable[[], T], where: str, cancel: CancelToken) -> T:
        backoff = Backoff(partial(SourceUnreachable, where), self._patience_s, clock=self.clock)
        while True:
            try:
                return abandonable(ask, where, cancel)
            except HfHubHTTPError as exc:
                reason, named_s = f"status {exc.response.status_code}", retry_after_s(exc.response.headers)
            except _HubBusy as exc:
                reason, named_s = str(exc), exc.named_s
            except (OSError, httpx2.HTTPError) as exc:
                reason, named_s = what_failed(exc), None
            if cancel.wait(backoff.failed(reason, named_s)):
                raise EnsureCancelled(where)

    def _ask_files(self, folder: HubFile) -> tuple[str, ...]:
        from huggingface_hub import HfApi  # noqa: PLC0415 - a large module, and no worker lists repositories

        token = self._hub_token()
        if is_offline_mode():
            raise HubOffline(f"hf://{folder.repo}")
        api = HfApi(endpoint=self._endpoint, token=token or False)
        try:
            return tuple(sorted(api.list_repo_files(folder.repo, revision=folder.revision, repo_type=folder.repo_type)))
        except HFValidationError as exc:
            raise RepoNotFound(folder.repo, folder.path, has_token=bool(token)) from exc
        except HfHubHTTPError as exc:
            if refusal := self._refusal(exc, folder, folder.revision, has_token=bool(token)):
                raise refusal from exc
            raise

    def _ask_hub(self, source: HubFile) -> RemoteFile:
        if is_offline_mode():
            raise HubOffline(str(source))
        token = self._hub_token()
        revision = source.revision or "main"
        url_at = partial(hf_hub_url, source.repo, source.path, repo_type=source.repo_type, endpoint=self._endpoint)
        try:
            url = url_at(revision=revision)
            found = get_hf_file_metadata(url, token=token or False, endpoint=self._endpoint)
        except HFValidationError as exc:
            raise RepoNotFound(source.repo, source.path, has_token=bool(token)) from exc
        except HfHubHTTPError as exc:
            if refusal := self._refusal(exc, source, revision, has_token=bool(token)):
                raise refusal from exc
            raise
        sha256, git_sha1 = _hashes(found.etag)
        location = found.location
        if found.size is None and location != url:
            # A mirror that redirects and leaves out the length that the hub gives.
            there = self._ask_url(UrlSource(location))
            return replace(there, source=source, sha256=sha256, git_sha1=git_sha1, commit=found.commit_hash)
        if found.size is None:
            raise NotAFile(str(source), "of unknown length")
        if location == url and found.commit_hash:
            # The hub serves a small file itself, at an address that may soon mean another commit.
            location = url_at(revision=found.commit_hash)
        remote = RemoteFile(source, found.size, sha256, found.etag, found.commit_hash, location, xet=found.xet_file_data)
        return replace(remote, git_sha1=git_sha1)

    def _hub_token(self) -> str | None:
        """Return the hub's token. Raises `TokenMalformed`."""
        credential = self.network.credential(self._endpoint)
        return credential.token if credential else None

    def _refusal(self, exc: HfHubHTTPError, source: HubFile, revision: str, *, has_token: bool) -> ModelError | None:
        """Return the error of a permanent answer. None if a retry may succeed. Order matters: gated is a kind of not found."""
        status = exc.response.status_code
        match exc:
            case GatedRepoError():
                return RepoGated(source.repo, source.path, has_token=has_token)
            case RepositoryNotFoundError():
                return RepoNotFound(source.repo, source.path, has_token=has_token)
            case RevisionNotFoundError():
                return RevisionNotFound(source.repo, source.path, revision)
            case RemoteEntryNotFoundError():
                return FileNotInRepo(source.repo, source.path, revision)
        if status in UNAUTHORISED:
            return token_refused(f"{self._endpoint}/{source.repo}", status, self.network.credential(self._endpoint))
        return None if status in TRANSIENT else SourceRefused(str(source), status)

    @contextlib.contextmanager
    def _got(self, start: str, headers: Mapping[str, str] = MappingProxyType({})) -> Iterator[FollowedAnswer[httpx2.Response]]:
        """Send a GET, and those that its redirects ask for.

        Raises `_HubBusy` for a transient status, `httpx2.HTTPError`, `ProxyUnusable`, and as `follow`.
        """
        with contextlib.closing(_HubRoute(self.network)) as route, contextlib.ExitStack() as open_answers:

            def send(url: str) -> httpx2.Response:
                open_answers.close()
                answer = route.get(url, request_headers(self.network, url, headers))
                open_answers.callback(answer.close)
                return answer

            found = follow_redirects(self.network, start, send)
            if found.answer.status_code in TRANSIENT:
                raise _HubBusy(f"status {found.answer.status_code}", retry_after_s(found.answer.headers))
            yield found

    def _ask_url(self, source: UrlSource) -> RemoteFile:
        with self._got(source.url, {"Range": "bytes=0-0"}) as found:
            status, headers = found.answer.status_code, found.answer.headers
            if status in UNAUTHORISED:
                raise token_refused(source.url, status, self.network.credential(source.url))
            if status not in {OK, PARTIAL, UNSATISFIABLE}:
                raise SourceRefused(shown_address(source.url), status)
            if headers.get("Content-Type", "").partition(";")[0].strip().lower() == "text/html":
                raise NotAFile(shown_address(source.url), "a web page")
            stated = headers.get("Content-Length") if status == OK else headers.get("Content-Range", "").rpartition("/")[2]
            if not stated or not stated.isdecimal():
                raise NotAFile(shown_address(source.url), "of unknown length")
            if coding := content_coding(headers):
                raise NotAFile(shown_address(source.url), f"sent compressed ({coding})")
            sha256, git_sha1 = _hashes(found.linked_etag)
            remote = RemoteFile(source, int(stated), sha256, headers.get("ETag"), None, found.url, modified=_modified(headers))
            return replace(remote, git_sha1=git_sha1, has_ranges=status != OK)

    def _with_sha256(self, remote: RemoteFile, listing: str, path: str) -> RemoteFile:
        """Add the hash from ModelScope's API, if it gives one."""
        with self._got(listing) as got:
            said = _read_body(got.answer, _MOST_LISTED_BYTES) if got.answer.status_code == OK else b"{}"
        try:
            files = json.loads(said)["Data"]["Files"]
            found = next(file for file in files if (file["Path"], file["Size"]) == (path, remote.size_bytes))
            sha256 = _hashes(str(found["Sha256"]))[0]
        except (ValueError, TypeError, KeyError, StopIteration):
            sha256 = None
        return replace(remote, sha256=sha256)

    def renew(self, remote: RemoteFile, cancel: CancelToken) -> RemoteFile:
        """Return a fresh address for the same file. The commit is pinned, so that the bytes are those that were looked up."""
        source = remote.source
        if isinstance(source, HubFile) and remote.commit:
            fresh = self.look_up(replace(source, revision=remote.commit), cancel)
            return replace(fresh, source=source)
        return self.look_up(source, cancel)

    def xet_access(self, remote: RemoteFile, cancel: CancelToken) -> XetAccess:
        """Get a Xet access token for a file (`RemoteFile.xet`), valid for about an hour. Raises the errors of `look_up`."""
        return self._asked(lambda: self._ask_xet(remote), remote.where, cancel)

    def _ask_xet(self, remote: RemoteFile) -> XetAccess:
        address = remote.xet.refresh_route
        credential = self.network.credential(address)
        with self._got(address) as got:
            status = got.answer.status_code
            if status in UNAUTHORISED:
                raise token_refused(address, status, credential)
            if status != OK:
                raise SourceRefused(remote.where, status)
            said = _read_body(got.answer, _MOST_SAID_BYTES)
        headers = {"Authorization": f"Bearer {credential.token}"} if credential and credential.token else {}
        try:
            found = json.loads(said)
            return XetAccess(str(found["casUrl"]), str(found["accessToken"]), int(found["exp"]), address, headers)
        except (ValueError, TypeError, KeyError):
            raise _HubBusy("no access to Xet was given", None) from None


def _hashes(etag: str | None) -> tuple[str | None, str | None]:
    """Return the sha256 and the git hash in the hub's ETag. A small file has only the latter."""
    found = bare_etag(etag) or ""
    return (found.lower() if _SHA256.fullmatch(found) else None), (found if _SHA1.fullmatch(found) else None)


def _read_body(answer: httpx2.Response, most_bytes: int) -> bytes:
    """Return the body of a hub's answer, cut at about so many bytes."""
    said = bytearray()
    for data in answer.iter_bytes():
        said += data
        if len(said) > most_bytes:
            break
    return bytes(said)


def _modified(headers: httpx2.Headers) -> str | None:
    """Return the Last-Modified that identifies a version of a looked-up file. A file may change twice within its second."""
    text, date = headers.get("Last-Modified"), headers.get("Date")
    if not text or not date:
        return text
    try:
        age = email.utils.parsedate_to_datetime(date) - email.utils.parsedate_to_datetime(text)
    except (ValueError, TypeError):
        return None
    return text if age.total_seconds() >= _SETTLED_S else None


class _HubRoute(httpx2.BaseTransport):
    """Sends look-ups through the proxies of their addresses, huggingface_hub's as well."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._ways: dict[str | None, httpx2.HTTPTransport] = {}

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request through its address's proxy. Raises `ProxyUnusable` if that wants another login."""
        proxy = self._network.proxy(str(request.url))
        if proxy not in self._ways:
            self._ways[proxy] = httpx2.HTTPTransport(verify=self._network.tls, proxy=proxy, trust_env=False)
        try:
            answer = self._ways[proxy].handle_request(request)
        except httpx2.ProxyError as exc:
            if proxy and _LOGIN_REFUSED.search(str(exc)):
                raise login_refused(proxy) from exc
            raise
        except ProtocolError as exc:  # of socksio, which httpx2 lets through
            raise httpx2.ProxyError("the proxy's answer is not SOCKS") from exc
        if proxy and answer.status_code == PROXY_LOGIN:
            answer.close()
            raise login_refused(proxy)
        return answer

    def get(self, url: str, headers: Mapping[str, str]) -> httpx2.Response:
        """Send a GET and return its answer, with headers as latin-1. Raises as `handle_request`."""
        network = self._network
        limits = httpx2.Timeout(network.read_timeout_s, connect=network.connect_timeout_s).as_dict()
        # httpx2 writes an address in its own way; a signature may cover the way it came in.
        extensions = {"timeout": limits, "target": request_target(url).encode()}
        try:
            request = httpx2.Request("GET", url, headers=headers, extensions=extensions)
            answer = self.handle_request(request)
        except httpx2.InvalidURL:
            raise NotAFile(shown_address(url), "no address that can be asked") from None
        answer.headers.encoding = "latin-1"
        return answer

    def close(self) -> None:
        """Close all connections."""
        for way in self._ways.values():
            way.close()


def _client(network: Network) -> httpx2.Client:
    return httpx2.Client(transport=_HubRoute(network), follow_redirects=True, timeout=None, trust_env=False)


class _HubBusy(Exception):  # noqa: N818 - never leaves this module
    """The hub, or another source, asks the client to come back later."""

    def __init__(self, reason: str, named_s: float | None) -> None:
        super().__init__(reason)
        self.named_s = named_s
