"""The description of a model file and its source: `ModelSpec`, and the addresses that people write. Pure."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast
from urllib.parse import SplitResult, parse_qs, parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from worker.base.text import is_legible
from worker.errors import HostNotAllowed, SpecInvalid, SuffixNotAllowed

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

_T = TypeVar("_T")

REQUEST_SUFFIXES = (".safetensors", ".sft", ".gguf")
"""The formats that a request may have downloaded. They hold tensors, and loading them runs no code."""

WEIGHT_SUFFIXES = (*REQUEST_SUFFIXES, ".ckpt", ".pt", ".pt2", ".bin", ".pth", ".pkl", ".onnx")

HUB_HOST = "huggingface.co"
CIVITAI_HOST = "civitai.com"

_HUB_HOSTS = frozenset({HUB_HOST, "www.huggingface.co", "hf.co"})
_CIVITAI_HOSTS = frozenset({CIVITAI_HOST, "www.civitai.com"})
_MODELSCOPE_HOST = "modelscope.cn"
_MODELSCOPE_HOSTS = frozenset({_MODELSCOPE_HOST, "www.modelscope.cn"})
_MODELSCOPE_FILE = re.compile(r"/models/(?P<repo>[^/]+/[^/]+)/(?:resolve|file/view)/(?P<revision>[^/]+)/(?P<path>.*[^/])")
_REPO_TYPES = {"datasets": "dataset", "spaces": "space", "models": "model"}
_REPO_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
_SHA256 = re.compile(r"(?:sha256:)?([0-9a-fA-F]{64})")
_DRIVE = re.compile(r"[A-Za-z]:")
_SECRET_KEYS = re.compile(r"(?i)token|key|secret|signature|sig|password|auth|credential")
_COMPONENT_MAX_BYTES = 255  # Linux file systems allow no more for one name
_NAME_MAX_BYTES = 1024


@dataclass(frozen=True, slots=True)
class HubFile:
    """The source in a model spec: a file in a repository on Hugging Face, or on the mirror that `HF_ENDPOINT` names."""

    repo: str
    path: str
    revision: str = "main"
    repo_type: str = "model"

    @property
    def host(self) -> str:
        """Return the host that a request must be allowed to use for this file."""
        return HUB_HOST

    @property
    def file_name(self) -> str | None:
        """Return the file's name in the repository."""
        return self.path.rpartition("/")[2]

    def __str__(self) -> str:
        kind = "" if self.repo_type == "model" else f"{self.repo_type}s/"
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"hf://{kind}{self.repo}/{self.path}{revision}"


@dataclass(frozen=True, slots=True)
class UrlSource:
    """The source in a model spec: a plain address. Its text form hides possible secrets; `url` does not."""

    url: str

    @property
    def host(self) -> str:
        """Return the host in lower case, without the port."""
        return (urlsplit(self.url).hostname or "").rstrip(".")

    @property
    def file_name(self) -> str | None:
        """Return the file name in the address, if it ends like a weights file."""
        last = unquote(urlsplit(self.url).path).rpartition("/")[2]
        return last if last.lower().endswith(WEIGHT_SUFFIXES) else None

    def __str__(self) -> str:
        parts = urlsplit(self.url)
        query = urlencode([(key, "..." if _SECRET_KEYS.search(key) else value) for key, value in parse_qsl(parts.query)])
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, query, ""))

    def __repr__(self) -> str:
        return f"Url({str(self)!r})"


Source: TypeAlias = HubFile | UrlSource


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The spec of one model file: its place under `models/` and its source.

    An instance is always valid: folder and name are relative and stay in their folder, `sha256` is 64 lower-case hex digits.

    Raises:
        SpecInvalid: from the constructor, naming the field.
    """

    folder: str
    name: str
    source: Source
    sha256: str | None = None
    size_bytes: int | None = None

    def __post_init__(self) -> None:
        check_model_name("name", self.name)
        check_model_name("folder", self.folder, model=self.name)
        object.__setattr__(self, "sha256", _checked_sha256(self.sha256, self.name))
        _check_size(self.size_bytes, self.name)

    def __str__(self) -> str:
        return f"{self.folder}/{self.name} from {self.source}"


def parse_spec(
    folder: object,
    source: object,
    *,
    name: object = None,
    sha256: object = None,
    size_bytes: object = None,
) -> ModelSpec:
    """Return the spec of the model that these values describe. Without `name` it has its source's file name.

    Raises:
        SpecInvalid: naming the first wrong field and what would be right.
    """
    spec, problems = check_spec(folder, source, name=name, sha256=sha256, size_bytes=size_bytes)
    if spec is None:
        raise problems[0]
    return spec


def check_spec(
    folder: object,
    source: object,
    *,
    name: object = None,
    sha256: object = None,
    size_bytes: object = None,
) -> tuple[ModelSpec | None, tuple[SpecInvalid, ...]]:
    """Return a model's spec and no problems, or None and a problem for each wrong field. Otherwise like `parse_spec`."""
    model = name if isinstance(name, str) else None
    problems: list[SpecInvalid] = []

    def checked(check: Callable[[], _T]) -> _T | None:
        try:
            return check()
        except SpecInvalid as error:
            problems.append(error)
            return None

    origin = checked(lambda: parse_source(source, model=model))
    called = name
    if called is None and origin is not None:
        called = checked(lambda: _name_in_source(origin))
    if called is not None:
        checked(lambda: check_model_name("name", called, model=model))
    checked(lambda: check_model_name("folder", folder, model=model))
    checked(lambda: _checked_sha256(sha256, model))
    checked(lambda: _check_size(size_bytes, model))
    if problems:
        return None, tuple(problems)
    spec = ModelSpec(
        cast("str", folder),
        cast("str", called),
        cast("Source", origin),
        cast("str | None", sha256),
        cast("int | None", size_bytes),
    )
    return spec, ()


def _name_in_source(source: Source) -> str:
    if source.file_name is None:
        raise SpecInvalid("name", f"is missing, and the address {source} does not tell it; give a name")
    return source.file_name


def check_from_request(spec: ModelSpec, allowed_hosts: Collection[str]) -> None:
    """Raise unless a request may have this model spec downloaded: a format without code, over https, from an allowed host.

    Raises:
        SuffixNotAllowed, HostNotAllowed: as they say.
        SpecInvalid: http, a port, or a user in the address.
    """
    if not spec.name.lower().endswith(REQUEST_SUFFIXES):
        raise SuffixNotAllowed(spec.name, REQUEST_SUFFIXES)
    if spec.source.host not in {host.strip().lower() for host in allowed_hosts}:
        raise HostNotAllowed(spec.name, spec.source.host, tuple(allowed_hosts))
    if isinstance(spec.source, UrlSource):
        parts = urlsplit(spec.source.url)
        if parts.scheme != "https" or parts.netloc.lower() not in {spec.source.host, f"{spec.source.host}:443"}:
            raise SpecInvalid("source", "must be a plain https address when it comes from a request", spec.name)


# --- names --------------------------------------------------------------------------------------


def check_model_name(field: str, value: object, *, model: str | None = None) -> None:
    """Return a model spec's name of folders and a file, separated by `/`, that stays in its folder and that a disk can store.

    Raises:
        SpecInvalid: naming `field` and what is wrong with it.
    """
    if value is None:
        raise SpecInvalid(field, "is missing", model)
    if not isinstance(value, str):
        raise SpecInvalid(field, f"must be a text, not {value!r}", model)
    shown = model if model is not None else _printable(value)
    if reason := _name_problem(value):
        odd = not is_legible(value) or _length_problem(value.split("/")) is not None
        raise SpecInvalid(field, reason, shown, odd=odd)


def _name_problem(value: str) -> str | None:
    parts = value.split("/")
    problems = (
        (not value, "is empty"),
        (not is_legible(value), "holds characters that cannot be printed"),
        ("\\" in value, "holds a backslash; write / between folders"),
        (value.startswith(("/", "~")) or _DRIVE.match(value), "is absolute; it must be relative to its folder"),
        (".." in parts, "holds '..' and would leave its folder"),
        (any(part.strip() in {"", "."} for part in parts), "holds an empty part or a '.'; write it without"),
        (any(part.startswith(".") for part in parts), "has a part that begins with a dot, which ComfyUI is not shown"),
    )
    return next((reason for wrong, reason in problems if wrong), None) or _length_problem(parts)


def _length_problem(parts: list[str]) -> str | None:
    sizes = [len(part.encode()) for part in parts]
    if max(sizes) > _COMPONENT_MAX_BYTES:
        return f"has a part of {max(sizes)} bytes; a disk takes {_COMPONENT_MAX_BYTES}"
    if sum(sizes) + len(sizes) > _NAME_MAX_BYTES:
        return f"is longer than {_NAME_MAX_BYTES} bytes"
    return None


def _printable(text: str) -> str:
    return "".join(char if is_legible(char) else "?" for char in text[:200])


def _checked_sha256(value: object, model: str | None) -> str | None:
    if value is None:
        return None
    found = _SHA256.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise SpecInvalid("sha256", "must be 64 hexadecimal digits", model)
    return found[1].lower()


def _check_size(value: object, model: str | None) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value <= 0):
        raise SpecInvalid("size_bytes", f"is {value!r}; it must be a whole number above 0", model)


# --- addresses ----------------------------------------------------------------------------------


def parse_source(text: object, *, model: str | None = None) -> Source:
    """Return the source in a model spec, of an address. All spellings of one file on Hugging Face give one `HubFile`.

    Accepted are `hf://org/repo/path[@revision]` (also `hf://org/repo@revision/path`, and `hf://datasets/...`), links from
    Hugging Face's pages with `resolve`, `blob` or `raw` in them, Civitai's download addresses and those of its pages that name
    a version, ModelScope's addresses of files, and any other http or https address.

    Raises:
        SpecInvalid: saying what would be right.
    """
    if not isinstance(text, str) or not text.strip():
        raise SpecInvalid("source", "is missing; write hf://org/repo/path or https://...", model)
    text = text.strip()
    if not is_legible(text) or "\\" in text or any(char.isspace() for char in text):
        raise SpecInvalid("source", "holds white space, backslashes or control characters; write a space as %20", model)
    scheme, separator, rest = text.partition("://")
    try:
        if separator and scheme.lower() == "hf":
            return _hub_file(rest)
        if separator and scheme.lower() in {"http", "https"}:
            return _from_url(text)
    except _MalformedSource as error:
        raise SpecInvalid("source", str(error), model) from None
    raise SpecInvalid("source", "is no address; write hf://org/repo/path or https://...", model)


class _MalformedSource(Exception):  # noqa: N818 - never leaves this module
    """A problem with the address in a model spec, as the end of a sentence."""


_HUB_FORM = "write hf://org/repo/path/to/file, with @revision at the end for another one than main"


def _hub_file(rest: str) -> HubFile:
    repo_type, rest = _repo_type(rest)
    org, _, rest = rest.partition("/")
    name, _, path = rest.partition("/")
    name, _, revision = name.partition("@")
    if not revision:
        path, revision = _cut_revision(path)
    return _checked_hub_file(org, name, unquote(path), unquote(revision), repo_type)


def _cut_revision(path: str) -> tuple[str, str]:
    # "sprite@2x.safetensors" is a file name: no revision ends like a weights file.
    head, at, revision = path.rpartition("@")
    if not at or revision.lower().endswith(WEIGHT_SUFFIXES):
        return path, ""
    if not revision:
        raise _MalformedSource("ends with '@' and no revision")
    return head, revision


def _repo_type(rest: str) -> tuple[str, str]:
    first, _, after = rest.partition("/")
    return (_REPO_TYPES[first], after) if first in _REPO_TYPES else ("model", rest)


def _checked_hub_file(org: str, name: str, path: str, revision: str, repo_type: str) -> HubFile:
    if not path or path.endswith("/"):
        raise _MalformedSource(f"names no file of a repository; {_HUB_FORM}")
    if not all(_REPO_PART.fullmatch(part) and "--" not in part and ".." not in part for part in (org, name)):
        raise _MalformedSource(f"names no repository: '{org}/{name}'; {_HUB_FORM}")
    if not is_legible(path) or "\\" in path or any(part in {"", ".", ".."} for part in path.split("/")):
        raise _MalformedSource(f"names no file of a repository: '{_printable(path)}'; {_HUB_FORM}")
    revision = revision or "main"
    if not revision.isprintable() or any(part in {"", ".", ".."} for part in revision.split("/")):
        raise _MalformedSource(f"has an impossible revision: '{_printable(revision)}'")
    return HubFile(f"{org}/{name}", path, revision, repo_type)


def _from_url(text: str) -> Source:
    try:
        parts = urlsplit(text)
        host, _ = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        raise _MalformedSource("is no address that can be read") from None
    if not host:
        raise _MalformedSource("names no host")
    if host in _HUB_HOSTS:
        return _from_hub_page(parts)
    if host in _CIVITAI_HOSTS:
        return _from_civitai(parts)
    if host in _MODELSCOPE_HOSTS:
        return _from_modelscope(parts)
    return UrlSource(urlunsplit(parts._replace(fragment="")))


def _from_hub_page(parts: SplitResult) -> HubFile:
    repo_type, path = _repo_type(parts.path.lstrip("/"))
    pieces = path.split("/")
    if len(pieces) < 5 or pieces[2] not in {"resolve", "blob", "raw"}:  # noqa: PLR2004 - org, repo, verb, revision, file
        raise _MalformedSource("is a page of Hugging Face and no file; open the file there and copy its download link")
    # Slashes in a revision are escaped, but the hub also accepts refs/pr/1 and refs/convert/parquet.
    size = 3 if pieces[3] == "refs" and len(pieces) > 6 else 1  # noqa: PLR2004 - refs, kind, id, file
    revision, rest = "/".join(pieces[3 : 3 + size]), "/".join(pieces[3 + size :])
    return _checked_hub_file(pieces[0], pieces[1], unquote(rest), unquote(revision), repo_type)


def _from_civitai(parts: SplitResult) -> UrlSource:
    query = parse_qs(parts.query)
    if re.fullmatch(r"/models/\d+(/[^/]*)?/?", parts.path):
        version = query.get("modelVersionId", [""])[0]
        if not version.isdecimal():
            raise _MalformedSource("is a page of Civitai with several files; copy the link of its download button")
        return UrlSource(f"https://{CIVITAI_HOST}/api/download/models/{version}")
    return UrlSource(urlunsplit((parts.scheme, parts.netloc.lower().replace("www.", "", 1), parts.path, parts.query, "")))


def _from_modelscope(parts: SplitResult) -> UrlSource:
    found = _MODELSCOPE_FILE.fullmatch(parts.path)
    if found:
        path = f"/models/{found['repo']}/resolve/{found['revision']}/{found['path']}"
        return UrlSource(urlunsplit((parts.scheme, _MODELSCOPE_HOST, path, "", "")))
    if parts.path.startswith("/models/"):
        raise _MalformedSource("is a page of ModelScope and no file; open the file there and copy its download link")
    return UrlSource(urlunsplit(parts._replace(fragment="")))


def modelscope_listing(source: UrlSource) -> tuple[str, str] | None:
    """Return the address of ModelScope's listing that contains a source's file, and its path there. None for other hosts."""
    parts = urlsplit(source.url)
    found = _MODELSCOPE_FILE.fullmatch(parts.path) if source.host == _MODELSCOPE_HOST else None
    if not found:
        return None
    path = unquote(found["path"])
    query = urlencode({"Revision": unquote(found["revision"]), "Root": path.rpartition("/")[0]})
    return urlunsplit((parts.scheme, parts.netloc, f"/api/v1/models/{found['repo']}/repo/files", query, "")), path


def at_endpoint(source: Source, endpoint: str) -> Source:
    """Return the hub's file for a source below `endpoint`, the hub's own or a mirror's. Return other sources unchanged."""
    base = f"{endpoint.rstrip('/')}/"
    if isinstance(source, UrlSource) and source.url.startswith(base):
        try:
            return _from_hub_page(urlsplit(f"https://{HUB_HOST}/{source.url.removeprefix(base)}"))
        except _MalformedSource:
            return source
    return source


def content_key(sha256: str | None, address: str, etag: str | None, size_bytes: int) -> str:
    """Return the name of a model spec's content, for its partial downloads and lock.

    It is the sha256. If that is unknown, it is a digest of the address, the ETag and the size.
    """
    if sha256:
        return sha256.lower()
    return "url-" + hashlib.sha256(f"{address}\n{etag or ''}\n{size_bytes}".encode()).hexdigest()
