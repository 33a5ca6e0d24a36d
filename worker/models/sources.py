"""Find the source of a model by its name: one lookup over every list of models. Reads files, no network.

The lists are asked in this order. The first one that knows (folder, name) decides:

1. the request's `models`; 2. the metadata that ComfyUI's editor embeds in a workflow; 3. `models.toml` on the volume; 4.
`MODELS_MANIFEST`, the path of a manifest in the image or the manifest itself, then `MODELS`, short lines; 5. the official
catalogue, generated from ComfyUI's own templates and read when first asked.

A manifest (3 and 4) is TOML, or JSON with the same keys, or one of three existing formats: ComfyUI-Manager's `model-list.json`,
comfy-cli's `comfy-lock.yaml`, comfyui-api's manifest (JSON or YAML). Its content shows which.

A manifest with a mistake is left out; if it was valid before, its earlier content counts. The other lists decide, and a model
that none of them knows fails with the mistake.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from worker.base.text import shortened
from worker.comfyui_data import known
from worker.errors import AmbiguousModel, ManifestInvalid, ModelsInvalid, RequestError, SpecInvalid, WorkerError
from worker.spec import ModelSpec, check_from_request, check_spec, parse_spec

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

CATALOG = Path(__file__).parent.parent / "data" / "catalog.json"

_NEAR_COUNT = 3


# --- the lookup ---------------------------------------------------------------------------------


class ModelList(Protocol):
    """One of the lists of models that are asked in order."""

    @property
    def title(self) -> str:
        """Return the list's name for people."""
        ...

    @property
    def paths(self) -> Iterable[str]:
        """Return every model in it as `folder/name`."""
        ...

    @property
    def deliberate(self) -> bool:
        """Return whether it decides alone; see `SpecList`."""
        ...

    @property
    def error(self) -> ManifestInvalid | None:
        """Return its mistake, or None. With a mistake it may be incomplete."""
        ...

    def find(self, name: str, folders: Collection[str]) -> Sequence[ModelSpec]:
        """Return its models of this name in one of the folders, in its own order. Without folders: in any."""
        ...


@dataclass(frozen=True, slots=True)
class SpecList:
    """A list in memory.

    `deliberate`: a person put each model there for this worker or this job. It then decides, and two files for one name are an
    error at once. A catalogue or a workflow's metadata is not deliberate: a later list may resolve the ambiguity.
    """

    title: str
    specs: tuple[ModelSpec, ...] = ()
    deliberate: bool = True
    error: ManifestInvalid | None = None
    odd: ManifestInvalid | None = None
    """Entries that were left out because no file can have their name. The others count."""

    @property
    def paths(self) -> Iterable[str]:
        """Return every model in it as `folder/name`."""
        return (f"{spec.folder}/{spec.name}" for spec in self.specs)

    def find(self, name: str, folders: Collection[str]) -> Sequence[ModelSpec]:
        """Return its models of this name in one of the folders, in the order of the list. Without folders: in any."""
        named = zip(self.specs, self.paths, strict=True)
        return [spec for spec, path in named if _is_meant(path, name, folders) or (not folders and spec.name == name)]


@dataclass(frozen=True, slots=True)
class _Refused:
    """An embedded entry that a request may not have downloaded, and why."""

    path: str
    error: RequestError


@dataclass(frozen=True, slots=True)
class Sources:
    """The lists of models in order, and the lookup over them. Immutable; its methods return new ones."""

    manifests: tuple[SpecList, ...]
    catalog: ModelList
    volume: _VolumeFile | None = None
    request: SpecList = field(default_factory=lambda: SpecList("the request's 'models'"))
    embedded: SpecList = field(default_factory=lambda: SpecList("the workflow's metadata", deliberate=False))
    refused: tuple[_Refused, ...] = ()

    @classmethod
    def gather(
        cls,
        *,
        volume_manifest: Path | None = None,
        manifest: str | None = None,
        models: str | None = None,
        catalog: Path = CATALOG,
    ) -> Sources:
        """Return the lists that apply to every job. Mistakes in them are in `errors`.

        `volume_manifest` need not exist; `manifest` and `models` are the values of `MODELS_MANIFEST` and `MODELS`.
        """
        manifests = []
        if manifest and manifest.strip():
            manifests.append(_or_wrong("MODELS_MANIFEST", lambda: _environment_manifest(manifest)))
        if models and models.strip():
            manifests.append(_or_wrong("MODELS", lambda: _short_lines(models)))
        volume = _VolumeFile(volume_manifest).reread() if volume_manifest else None
        return cls(tuple(manifests), Catalog(catalog), volume)

    @classmethod
    def read(cls, **lists: Any) -> Sources:  # noqa: ANN401 - what `gather` takes
        """Like `gather`, but require all lists to be valid.

        Raises:
            ManifestInvalid: with all mistakes of the first list that has any.
        """
        sources = cls.gather(**lists)
        for error in sources.errors:
            raise error
        return sources

    @property
    def errors(self) -> tuple[ManifestInvalid, ...]:
        """Return the mistakes of the manifests, one error for each that has any."""
        return tuple(models.error for models in self._manifests() if models.error)

    @property
    def odd(self) -> tuple[ManifestInvalid, ...]:
        """Return entries with impossible file names in otherwise valid manifests. Only these are left out."""
        return tuple(models.odd for models in self._manifests() if models.odd)

    def refreshed(self) -> Sources:
        """Return these with the current `models.toml`, or the same object if nothing changed. Costs one stat."""
        now = self.volume.reread() if self.volume else None
        return self if now is self.volume else replace(self, volume=now)

    def with_request(self, models: object, allowed_hosts: Collection[str]) -> Sources:
        """Return these with a request's `models`: a list of objects, or of short lines as in `MODELS`, or None.

        Raises:
            ModelsInvalid, SpecInvalid, HostNotAllowed, SuffixNotAllowed: the request may not ask for one of them, or not so.
        """
        if models is None:
            return self
        if not isinstance(models, list) or not all(isinstance(entry, (dict, str)) for entry in models):
            raise ModelsInvalid
        entries = [_short_line(entry) if isinstance(entry, str) else entry for entry in models]
        for entry in entries:
            _check_fields(entry)
        specs = tuple(parse_spec(**_known_values(entry)) for entry in entries)
        for spec in specs:
            check_from_request(spec, allowed_hosts)
        return replace(self, request=replace(self.request, specs=specs))

    def with_workflow(self, workflow: object, allowed_hosts: Collection[str]) -> Sources:
        """Return these with a workflow's metadata: the editor's format, or an `extra_data` or `extra_pnginfo`.

        The workflow's author wrote it. So an entry that makes no sense, or that a request may not ask for, is skipped; `find`
        raises for it only if no other list knows the model.
        """
        specs, refused = [], []
        for entry in embedded_models(workflow):
            try:
                spec = parse_spec(**_known_values(entry))
                check_from_request(spec, allowed_hosts)
            except RequestError as error:
                refused.append(_Refused(f"{entry.get('directory')}/{entry.get('name')}", error))
            else:
                specs.append(spec)
        return replace(self, embedded=replace(self.embedded, specs=tuple(specs)), refused=tuple(refused))

    def find(self, name: str, folders: Collection[str] = (), *, guessed: bool = False) -> ModelSpec | None:
        """Return the file that `name` means to a loader that reads these folders (none: any), or None if no list knows it.

        The request's own models count in any folder. If the folders are `guessed`, so do the manifests' models that no list has
        in these folders: their author knew what the loader reads.

        Mirrors of one file (the same sha256, or the same source given twice) count once: the first in its list.

        Raises:
            AmbiguousModel: a list has different files for the name, and it is deliberate or no later list knows better.
            ManifestInvalid: no list knows the name, but there is a manifest with a mistake, which may.
            HostNotAllowed, SuffixNotAllowed, SpecInvalid: only the workflow's metadata knows it, with an entry that is refused.
        """
        problem: WorkerError | None
        problem = next((entry.error for entry in self.refused if _is_meant(entry.path, name, folders)), None)
        wrong: ManifestInvalid | None = None
        for models, places in self._steps(folders, guessed=guessed):
            found = _distinct(models.find(name, places))
            if len(found) == 1:
                return found[0]
            wrong = wrong or models.error
            if found and (guessed or places == folders):
                problem = AmbiguousModel(name, models.title, [str(spec) for spec in found])
                if models.deliberate:
                    break
        if wrong:
            raise wrong.copy()  # a copy for each job: the list keeps this one
        if problem:
            raise problem
        return None

    def manifest(self) -> tuple[ModelSpec, ...]:
        """Return every model of the manifests, which the operator wants on the volume. Once a path, first list first.

        Mistakes in them do not matter here; see `errors`.
        """
        wanted = (spec for models in self._manifests() if models.deliberate for spec in models.specs)
        found: dict[str, ModelSpec] = {}
        for spec in wanted:
            found.setdefault(f"{spec.folder}/{spec.name}", spec)
        return tuple(found.values())

    def requested(self) -> tuple[ModelSpec, ...]:
        """Return the models of the request's own `models`, whether or not the graph names them."""
        return self.request.specs

    def near(self, name: str) -> tuple[str, ...]:
        """Return up to three models, as `folder/name`, with similar names, for an error about an unknown name."""
        by_stem = {PurePosixPath(path).stem: path for models in self._lists() for path in models.paths}
        close = difflib.get_close_matches(PurePosixPath(name).stem, by_stem, n=_NEAR_COUNT)
        return tuple(by_stem[match] for match in close)

    def _steps(self, folders: Collection[str], *, guessed: bool) -> Iterator[tuple[ModelList, Collection[str]]]:
        """Yield the lists in the order to ask them, each with the folders to ask for."""
        first, *others = ((models, folders) for models in self._lists())
        anywhere: tuple[ModelList, Collection[str]] = (self.request, ())
        yield first
        if guessed:
            yield anywhere
        yield from others
        if guessed:
            yield from ((models, ()) for models in self._manifests())
        elif folders:
            yield anywhere

    def _manifests(self) -> Iterator[SpecList]:
        if self.volume:
            yield self.volume.models
        yield from self.manifests

    def _lists(self) -> Iterator[ModelList]:
        return chain((self.request, self.embedded), self._manifests(), (self.catalog,))


def _is_meant(path: str, name: str, folders: Collection[str]) -> bool:
    # Compare them as paths: folder "loras/flux" with name "x" and folder "loras" with name "flux/x" are one file.
    if folders:
        return any(path == f"{folder}/{name}" for folder in folders)
    return path.partition("/")[2] == name


def _distinct(found: Sequence[ModelSpec]) -> list[ModelSpec]:
    kept: list[ModelSpec] = []
    for spec in found:
        if not any(_is_same_file(spec, other) for other in kept):
            kept.append(spec)
    return kept


def _is_same_file(one: ModelSpec, other: ModelSpec) -> bool:
    if one.sha256 and other.sha256:
        return one.sha256 == other.sha256
    return one.source == other.source


# --- the official catalogue ---------------------------------------------------------------------


class Catalog:
    """The official catalogue. Its file is read when it is first asked, and an entry is parsed when it is found."""

    title = "the official catalogue"
    deliberate = False
    error = None

    def __init__(self, path: Path = CATALOG) -> None:
        self._path = path

    @cached_property
    def _document(self) -> Mapping[str, Any]:
        document: Mapping[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
        return document

    @cached_property
    def _entries(self) -> Mapping[str, Mapping[str, object]]:
        return {f"{entry['folder']}/{entry['name']}": entry for entry in self._document["models"]}

    @property
    def version(self) -> str:
        """Return the version of the package that it was generated from."""
        return str(self._document["version"])

    @property
    def paths(self) -> Iterable[str]:
        """Return every model in it as `folder/name`."""
        return self._entries

    @property
    def templates(self) -> Collection[str]:
        """Return the names of the official templates that use models."""
        names: Mapping[str, object] = self._document["by_template"]
        return names.keys()

    def of_template(self, name: str) -> tuple[ModelSpec, ...]:
        """Return the models of an official template's active nodes. Raises `KeyError` if it has none."""
        entries = self._document["models"]
        return tuple(parse_spec(**_known_values(entries[number])) for number in self._document["by_template"][name])

    def find(self, name: str, folders: Collection[str]) -> Sequence[ModelSpec]:
        """Return its models of this name, one for each folder. Without folders: in any."""
        paths = [f"{folder}/{name}" for folder in folders] if folders else [p for p in self._entries if _is_meant(p, name, ())]
        return [parse_spec(**_known_values(self._entries[path])) for path in paths if path in self._entries]


# --- one entry, in everybody's words ------------------------------------------------------------

_FIELDS = frozenset({"folder", "source", "name", "sha256", "size_bytes"})
_OTHER_WORDS = {"url": "source", "directory": "folder"}  # as ComfyUI's own metadata names them
_IGNORED = frozenset({"hash", "hash_type", "description"})


def _known_values(entry: Mapping[str, object]) -> dict[str, Any]:
    """Return the fields that `parse_spec` accepts, from an entry with our field names or those of ComfyUI's metadata."""
    values: dict[str, Any] = {"folder": None, "source": None}
    for key, value in entry.items():
        word = _OTHER_WORDS.get(key, key)
        if word in _FIELDS and value is not None:
            values[word] = value
    if "sha256" not in values and _is_sha256(entry.get("hash_type")) and entry.get("hash"):
        values["sha256"] = entry["hash"]
    return values


def _is_sha256(kind: object) -> bool:
    return isinstance(kind, str) and kind.replace("-", "").lower() == "sha256"


# --- manifests ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Entry:
    """One model of a manifest. `where` gives the position of a field for people: a line if the format has lines."""

    values: Mapping[str, object]
    where: Callable[[str], str]
    strict: bool = True


@dataclass(frozen=True, slots=True)
class _VolumeFile:
    """The last valid content of `models.toml`. An empty list while there is no such file."""

    path: Path
    models: SpecList = field(default_factory=lambda: SpecList("models.toml"))
    stamp: tuple[int, ...] | None = None
    """None while there is no file, and while it cannot be read: then it is tried again."""

    def reread(self) -> _VolumeFile:
        """Return the current content, or the same object if nothing is new."""
        title = str(self.path)
        try:
            stamp = _stamp(self.path.stat())
            if stamp == self.stamp:
                return self
            data = self.path.read_bytes()
        except FileNotFoundError:
            return self if self.stamp is None and self.models.error is None else _VolumeFile(self.path)
        except OSError as exc:
            return self._wrong(None, _unreadable(title, exc))
        try:
            return _VolumeFile(self.path, _parse(_decoded(data, title), title), stamp)
        except ManifestInvalid as error:
            return self._wrong(stamp, error)

    def _wrong(self, stamp: tuple[int, ...] | None, error: ManifestInvalid) -> _VolumeFile:
        known = self.models.error
        if known and (stamp, error.problems) == (self.stamp, known.problems):
            return self
        return replace(self, models=replace(self.models, error=error), stamp=stamp)


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def _unreadable(title: str, exc: OSError) -> ManifestInvalid:
    return ManifestInvalid(title, [f"it cannot be read: {exc.strerror}"])


def _decoded(data: bytes, title: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise ManifestInvalid(title, [f"it is no UTF-8 text (byte {exc.start})"]) from exc


def _or_wrong(title: str, parse: Callable[[], SpecList]) -> SpecList:
    """Return the list from the environment, or an empty one with its error: it cannot be corrected while the worker runs."""
    try:
        return parse()
    except ManifestInvalid as error:
        return SpecList(title, error=error)


def _environment_manifest(value: str) -> SpecList:
    """Read `MODELS_MANIFEST`: a manifest if it has several lines or begins like JSON or TOML, otherwise a path."""
    value = value.strip()
    if "\n" in value or re.match(r"[{\[]|models?\s*[=:]", value):
        return _parse(value, "MODELS_MANIFEST")
    title = f"{value} (MODELS_MANIFEST)"
    try:
        return _parse(_decoded(Path(value).read_bytes(), title), title)
    except OSError as exc:
        raise _unreadable(title, exc) from exc


def _parse(text: str, title: str) -> SpecList:
    """Return the models of a manifest in any format. Raises `ManifestInvalid` with all its mistakes."""
    try:
        entries = _entries(text)
    except _Malformed as error:
        raise ManifestInvalid(title, [str(error)]) from None
    except (ValueError, RecursionError) as exc:  # a number of thousands of digits, or brackets nested as deeply
        raise ManifestInvalid(title, [f"it cannot be read: {str(exc).partition(';')[0]}"]) from None
    specs, problems, odd = _checked(entries)
    if problems:
        raise ManifestInvalid(title, problems)
    left_out = ManifestInvalid(title, odd) if odd else None
    return SpecList(title, tuple(specs), deliberate=all(entry.strict for entry in entries), odd=left_out)


def _checked(entries: Sequence[_Entry]) -> tuple[list[ModelSpec], list[str], list[str]]:
    """Return the models, the list's mistakes, and the entries that are only named as no file can be."""
    problems: list[str] = []
    odd: list[str] = []
    placed: dict[str, tuple[ModelSpec, _Entry]] = {}
    specs: list[ModelSpec] = []
    for entry in entries:
        spec, wrong = check_spec(**_known_values(entry.values))
        if entry.strict:
            fields = _unknown_fields(entry.values)
            unknown = [f"{entry.where(key)}: {key} is no field of a model{hint}" for key, hint in fields]
            told = [f"{entry.where(problem.field)}: {problem.field} {problem.reason}" for problem in wrong]
            if not unknown and [problem.field for problem in wrong] == ["name"] and wrong[0].odd:
                odd += told
            else:
                problems += [*told, *unknown]
        if spec is None:
            continue
        path = f"{spec.folder}/{spec.name}"
        before, first = placed.setdefault(path, (spec, entry))
        if entry.strict and not _is_same_file(before, spec):
            place = first.where("name")
            problems.append(f"{entry.where('source')}: {path} has another source than at {place}; keep one of the two")
        elif before is spec or not entry.strict:
            specs.append(spec)
    return specs, problems, odd


def _check_fields(entry: Mapping[str, object]) -> None:
    """Raise `SpecInvalid` for an unknown field."""
    name = entry.get("name")
    for key, hint in _unknown_fields(entry):
        raise SpecInvalid(f"field {shortened(key, 60)!r}", f"is unknown{hint}", name if isinstance(name, str) else None)


def _unknown_fields(values: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield each unknown field, with "; write ..." if a known one is similar."""
    known = _FIELDS | _OTHER_WORDS.keys() | _IGNORED
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(_FIELDS), n=1)
            yield key, f"; write {near[0]}" if near else ""


class _Malformed(Exception):  # noqa: N818 - never leaves this module
    """Why a text cannot be read as a manifest at all."""


def _entries(text: str) -> list[_Entry]:
    if text.lstrip().startswith("{") or re.match(r"\s*\[\s*[{\]]", text):
        return _json_entries(text)
    first = re.search(r"^(?!\s*(?:#|$|---)).*$", text, re.MULTILINE)
    if first and re.match(r"([A-Za-z_]\w*\s*:|-)(\s|$)", first[0]):
        return _yaml_entries(text)
    return _toml_entries(text)


def _json_entries(text: str) -> list[_Entry]:
    try:
        return _document_entries(json.loads(text))
    except json.JSONDecodeError as exc:
        raise _Malformed(f"line {exc.lineno}: it is no JSON: {exc.msg}") from None


def _yaml_entries(text: str) -> list[_Entry]:
    # Importing it costs 27 ms of a cold start, and few manifests are YAML. huggingface_hub depends on it, so it is installed.
    import yaml  # type: ignore[import-untyped]  # noqa: PLC0415 - it ships no types; see above

    try:
        return _document_entries(yaml.safe_load(text))
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        raise _Malformed(f"{place}it is no YAML: {getattr(exc, 'problem', None) or exc}") from None


def _document_entries(document: object) -> list[_Entry]:
    """Return the entries of JSON or YAML: a list of models, or an object that has one, in one of the known forms."""
    models = document.get("models", document.get("model")) if isinstance(document, dict) else document
    if isinstance(models, dict):
        stages = [stage for key in ("before_start", "after_start") for stage in _list_of(models.get(key), f"models.{key}")]
        return _numbered(map(_from_comfyui_api, stages))
    models = _list_of(models, "models")
    if any("save_path" in model for model in models):
        return _numbered(filter(None, map(_from_manager, models)), strict=False)
    if any("paths" in model or "model" in model for model in models):
        return _numbered(chain.from_iterable(map(_from_comfy_lock, models)))
    return _numbered(models)


def _list_of(value: object, what: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise _Malformed(f"'{what}' must be a list of models")
    for number, item in enumerate(value, 1):
        if not isinstance(item, dict) or not all(isinstance(key, str) for key in item):
            raise _Malformed(f"entry {number} of '{what}' is no object")
    return value


def _shown(address: object) -> str:
    # The part after the question mark, and the part before an @, may be a token.
    return re.sub(r"//[^/@]*@", "//", str(address).partition("?")[0])


def _numbered(models: Iterable[Mapping[str, object]], *, strict: bool = True) -> list[_Entry]:
    def placed(number: int, values: Mapping[str, object]) -> _Entry:
        called = values.get("name") or values.get("source") or values.get("url")
        place = f"entry {number}" + (f" ('{_shown(called)}')" if called else "")
        return _Entry(values, lambda _: place, strict)

    return [placed(number, values) for number, values in enumerate(models, 1)]


# --- TOML, with line numbers --------------------------------------------------------------------

_TOML_HEADER = re.compile(r"^\s*\[\[\s*models?\s*\]\]")


def _toml_entries(text: str) -> list[_Entry]:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        place = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", str(exc))
        line = (place[1] if place else None) or len(text.splitlines())
        raise _Malformed(f"line {line}: it is no TOML: {str(exc)[: place.start()] if place else exc}") from None
    models: list[dict[str, Any]] = []
    for key, value in document.items():
        if key not in {"model", "models"}:
            raise _Malformed(f"'{key}' is not known; each model is a [[model]] with source and folder")
        models += _list_of(value, key)
    lines = text.splitlines()
    headers = [number for number, line in enumerate(lines, 1) if _TOML_HEADER.match(line)]
    if len(headers) != len(models):
        return _numbered(models)  # written as an inline array: there are no blocks to count
    return [_Entry(model, _toml_place(lines, line)) for model, line in zip(models, headers, strict=True)]


def _toml_place(lines: Sequence[str], header: int) -> Callable[[str], str]:
    def where(name: str) -> str:
        words = {name, *(other for other, word in _OTHER_WORDS.items() if word == name)}
        for number, line in enumerate(islice(lines, header, None), header + 1):
            if line.lstrip().startswith("["):
                break
            if line.partition("=")[0].strip().strip("\"'") in words:
                return f"line {number}"
        return f"line {header}"

    return where


# --- short lines --------------------------------------------------------------------------------

# An address contains no white space, but it may contain a comma: only one before another "folder=address" ends an entry.
_BETWEEN_LINES = re.compile(r"[\s,;]+(?=[^\s,;=?&]*=[A-Za-z]+://)|\s+")
_SHORT_FORM = "write folder=hf://org/repo/file@revision or folder/name=https://..., with #sha256=... at the end if you know it"


def _short_lines(text: str) -> SpecList:
    """Parse `MODELS`: entries separated by line ends, spaces, commas or semicolons. A line that begins with # is a comment."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    words = [word for word in _BETWEEN_LINES.split(lines.strip().strip(",;")) if word]
    problems = [
        f"entry {number} ('{_shown(word)}'): {_SHORT_FORM}"
        for number, word in enumerate(words, 1)
        if not _short_line(word).get("folder")
    ]
    specs, wrong, odd = _checked(_numbered(map(_short_line, words)))
    if problems or wrong:
        raise ManifestInvalid("MODELS", problems or wrong)
    return SpecList("MODELS", tuple(specs), odd=ManifestInvalid("MODELS", odd) if odd else None)


def _short_line(text: str) -> dict[str, object]:
    """Parse `folder=source` or `folder/name=source`, with `#sha256=...` after the source.

    A left side that ends like a file contains the name.
    """
    place, equals, source = text.strip().partition("=")
    if not equals or ":" in place:  # an address alone, with or without a "=" in its query
        return {"source": text.strip()}
    source, _, sha256 = source.partition("#sha256=")
    values: dict[str, object] = {"folder": place, "source": source}
    folder, slash, name = place.partition("/")
    if slash and "." in name.rpartition("/")[2]:
        values |= {"folder": folder, "name": name}
    return values | ({"sha256": sha256} if sha256 else {})


# --- other people's formats ---------------------------------------------------------------------


def _from_manager(model: Mapping[str, Any]) -> dict[str, object] | None:
    """Read an entry of ComfyUI-Manager's `model-list.json`. None for whole repositories and custom nodes."""
    save_path, file_name = str(model.get("save_path", "")), str(model.get("filename", ""))
    if save_path == "default":
        save_path = known().manager_folders.get(str(model.get("type", "")).lower(), "")
    folder, _, below = save_path.strip("/").partition("/")
    if not folder or folder == "custom_nodes" or not file_name or file_name.startswith("<"):
        return None
    return {"folder": folder, "name": f"{below}/{file_name}" if below else file_name, "source": model.get("url")}


def _from_comfy_lock(model: Mapping[str, Any]) -> Iterator[dict[str, object]]:
    """Read an entry of comfy-cli's `comfy-lock.yaml`: one file at some paths. Without one, its type tells the folder."""
    hashes = [model, *(item for item in model.get("hashes") or () if isinstance(item, dict))]
    sha256 = next((item.get("hash") for item in hashes if _is_sha256(item.get("type"))), None)
    common = {"source": model.get("url"), "sha256": sha256}
    paths = [item.get("path") for item in model.get("paths") or () if isinstance(item, dict)]
    for path in paths:
        yield _place(path) | common
    if not paths:
        yield {"folder": known().manager_folders.get(str(model.get("type", "")).lower())} | common


def _from_comfyui_api(model: Mapping[str, Any]) -> dict[str, object]:
    """Read an entry of comfyui-api's manifest."""
    return _place(model.get("local_path")) | {"source": model.get("url")}


def _place(path: object) -> dict[str, object]:
    """Return folder and name of a path such as `models/loras/x.safetensors` or `/opt/ComfyUI/models/loras/x.safetensors`."""
    parts = [part for part in str(path or "").replace("\\", "/").split("/") if part not in {"", "."}]
    # The last "models" that is followed by a folder and a file: /models/ComfyUI/models/loras/x.safetensors.
    start = max((at + 1 for at, part in enumerate(parts[:-2]) if part == "models"), default=0)
    below = parts[start:]
    if start == 0 and str(path or "").startswith("/"):
        below = []  # an absolute path that leads to no models folder
    return {"folder": below[0] if len(below) > 1 else None, "name": "/".join(below[1:]) or None}


# --- metadata that a workflow carries -----------------------------------------------------------

_MUTED, _BYPASSED = 2, 4


def embedded_models(workflow: object) -> tuple[Mapping[str, Any], ...]:
    """Return the entries `{name, url, directory, hash?, hash_type?}` of the models that an editor's workflow uses.

    They come from `properties.models` of every active node, including those inside used subgraphs, and from a `models` at the
    top. The name must be the current value of a widget, because editing a node leaves old entries behind.
    """
    graph = _editor_graph(workflow)
    if graph is None:
        return ()
    nodes = list(_active_nodes(graph))
    values = {str(value).replace("\\", "/") for node in nodes for value in _widget_values(node)}
    lists = [graph.get("models"), *(_properties(node).get("models") for node in nodes)]
    entries = chain.from_iterable(map(_dicts, lists))
    return tuple(entry for entry in entries if str(entry.get("name", "")).replace("\\", "/") in values)


def _editor_graph(value: object) -> Mapping[str, Any] | None:
    while isinstance(value, dict):
        if isinstance(value.get("nodes"), list):
            return value
        value = next((value[key] for key in ("extra_data", "extra_pnginfo", "workflow") if key in value), None)
    return None


def _active_nodes(graph: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield nodes that are neither muted nor bypassed. Yield a subgraph's nodes once, if any active node is an instance."""
    definitions = graph.get("definitions")
    subgraphs = definitions.get("subgraphs") if isinstance(definitions, dict) else None
    by_id = {str(inner.get("id")): inner for inner in _dicts(subgraphs)}
    waiting = [graph]
    while waiting:
        for node in _dicts(waiting.pop().get("nodes")):
            if node.get("mode") not in (_MUTED, _BYPASSED):
                yield node
                if inner := by_id.pop(str(node.get("type")), None):
                    waiting.append(inner)


def _dicts(value: object) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _properties(node: Mapping[str, Any]) -> Mapping[str, Any]:
    properties = node.get("properties")
    return properties if isinstance(properties, dict) else {}


def _widget_values(node: Mapping[str, Any]) -> Iterator[object]:
    values = node.get("widgets_values")
    if isinstance(values, dict):
        yield from values.values()
    elif isinstance(values, list):
        yield from values
