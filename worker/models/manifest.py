"""Parse the operator's manifests: TOML, JSON, YAML, short lines, and the formats of other tools. Reads files.

A manifest is TOML, or JSON with the same keys, or one of three formats of other tools: ComfyUI-Manager's `model-list.json`,
comfy-cli's `comfy-lock.yaml`, comfyui-api's manifest (JSON or YAML). The content decides.
"""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worker.comfyui_data import known
from worker.errors import ManifestInvalid
from worker.model_spec import ModelSpec, check_spec
from worker.models.lists import OTHER_WORDS, SpecList, is_same_file, is_sha256, unknown_entry_fields, values_of_entry

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence


@dataclass(frozen=True, slots=True)
class _ManifestEntry:
    """One model of a manifest. `where` gives the position of a field for people: a line if the format has lines."""

    values: Mapping[str, object]
    where: Callable[[str], str]
    strict: bool = True


@dataclass(frozen=True, slots=True)
class VolumeManifest:
    """The last valid content of `models.toml`. An empty list while there is no such file."""

    path: Path
    models: SpecList = field(default_factory=lambda: SpecList("models.toml"))
    stamp: tuple[int, ...] | None = None
    """None while there is no file, and while it cannot be read: then it is tried again."""

    def reread(self) -> VolumeManifest:
        """Return the current content, or the same object if nothing is new."""
        title = str(self.path)
        try:
            stamp = _file_stamp(self.path.stat())
            if stamp == self.stamp:
                return self
            data = self.path.read_bytes()
        except FileNotFoundError:
            return self if self.stamp is None and self.models.error is None else VolumeManifest(self.path)
        except OSError as exc:
            return self._wrong(None, _unreadable(title, exc))
        try:
            return VolumeManifest(self.path, _parse(_utf8_text(data, title), title), stamp)
        except ManifestInvalid as error:
            return self._wrong(stamp, error)

    def _wrong(self, stamp: tuple[int, ...] | None, error: ManifestInvalid) -> VolumeManifest:
        known = self.models.error
        if known and (stamp, error.problems) == (self.stamp, known.problems):
            return self
        return replace(self, models=replace(self.models, error=error), stamp=stamp)


def _file_stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def _unreadable(title: str, exc: OSError) -> ManifestInvalid:
    return ManifestInvalid(title, [f"it cannot be read: {exc.strerror}"])


def _utf8_text(data: bytes, title: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise ManifestInvalid(title, [f"it is no UTF-8 text (byte {exc.start})"]) from exc


def empty_if_wrong(title: str, parse: Callable[[], SpecList]) -> SpecList:
    """Return the manifest from the environment, or an empty one with its error: nobody can correct it while the worker runs."""
    try:
        return parse()
    except ManifestInvalid as error:
        return SpecList(title, error=error)


def environment_manifest(value: str) -> SpecList:
    """Read `MODELS_MANIFEST`: a manifest if it has several lines or begins like JSON or TOML, otherwise a path."""
    value = value.strip()
    if "\n" in value or re.match(r"[{\[]|models?\s*[=:]", value):
        return _parse(value, "MODELS_MANIFEST")
    title = f"{value} (MODELS_MANIFEST)"
    try:
        return _parse(_utf8_text(Path(value).read_bytes(), title), title)
    except OSError as exc:
        raise _unreadable(title, exc) from exc


def _parse(text: str, title: str) -> SpecList:
    """Return the models of a manifest in any format. Raises `ManifestInvalid` with all its mistakes."""
    try:
        entries = _manifest_entries(text)
    except _MalformedManifest as error:
        raise ManifestInvalid(title, [str(error)]) from None
    except (ValueError, RecursionError) as exc:  # a number of thousands of digits, or brackets nested as deeply
        raise ManifestInvalid(title, [f"it cannot be read: {str(exc).partition(';')[0]}"]) from None
    specs, problems, odd = _checked_entries(entries)
    if problems:
        raise ManifestInvalid(title, problems)
    left_out = ManifestInvalid(title, odd) if odd else None
    return SpecList(title, tuple(specs), deliberate=all(entry.strict for entry in entries), odd=left_out)


def _checked_entries(entries: Sequence[_ManifestEntry]) -> tuple[list[ModelSpec], list[str], list[str]]:
    """Return the manifest's models, its mistakes, and the entries that are only named as no file can be."""
    problems: list[str] = []
    odd: list[str] = []
    placed: dict[str, tuple[ModelSpec, _ManifestEntry]] = {}
    specs: list[ModelSpec] = []
    for entry in entries:
        spec, wrong = check_spec(**values_of_entry(entry.values))
        if entry.strict:
            fields = unknown_entry_fields(entry.values)
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
        if entry.strict and not is_same_file(before, spec):
            place = first.where("name")
            problems.append(f"{entry.where('source')}: {path} has another source than at {place}; keep one of the two")
        elif before is spec or not entry.strict:
            specs.append(spec)
    return specs, problems, odd


class _MalformedManifest(Exception):  # noqa: N818 - never leaves this module
    """Why a text cannot be read as a manifest at all."""


def _manifest_entries(text: str) -> list[_ManifestEntry]:
    if text.lstrip().startswith("{") or re.match(r"\s*\[\s*[{\]]", text):
        return _json_entries(text)
    first = re.search(r"^(?!\s*(?:#|$|---)).*$", text, re.MULTILINE)
    if first and re.match(r"([A-Za-z_]\w*\s*:|-)(\s|$)", first[0]):
        return _yaml_entries(text)
    return _toml_entries(text)


def _json_entries(text: str) -> list[_ManifestEntry]:
    try:
        return _document_entries(json.loads(text))
    except json.JSONDecodeError as exc:
        raise _MalformedManifest(f"line {exc.lineno}: it is no JSON: {exc.msg}") from None


def _yaml_entries(text: str) -> list[_ManifestEntry]:
    # Importing it costs 27 ms of a cold start, and few manifests are YAML. huggingface_hub depends on it, so it is installed.
    import yaml  # type: ignore[import-untyped]  # noqa: PLC0415 - it ships no types; see above

    try:
        return _document_entries(yaml.safe_load(text))
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        raise _MalformedManifest(f"{place}it is no YAML: {getattr(exc, 'problem', None) or exc}") from None


def _document_entries(document: object) -> list[_ManifestEntry]:
    """Return a manifest's entries in JSON or YAML: a list of models, or an object that has one, in one of the known forms."""
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
        raise _MalformedManifest(f"'{what}' must be a list of models")
    for number, item in enumerate(value, 1):
        if not isinstance(item, dict) or not all(isinstance(key, str) for key in item):
            raise _MalformedManifest(f"entry {number} of '{what}' is no object")
    return value


def _shown(address: object) -> str:
    # The part after the question mark, and the part before an @, may be a token.
    return re.sub(r"//[^/@]*@", "//", str(address).partition("?")[0])


def _numbered(models: Iterable[Mapping[str, object]], *, strict: bool = True) -> list[_ManifestEntry]:
    def placed(number: int, values: Mapping[str, object]) -> _ManifestEntry:
        called = values.get("name") or values.get("source") or values.get("url")
        place = f"entry {number}" + (f" ('{_shown(called)}')" if called else "")
        return _ManifestEntry(values, lambda _: place, strict)

    return [placed(number, values) for number, values in enumerate(models, 1)]


_TOML_HEADER = re.compile(r"^\s*\[\[\s*models?\s*\]\]")


def _toml_entries(text: str) -> list[_ManifestEntry]:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        place = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", str(exc))
        line = (place[1] if place else None) or len(text.splitlines())
        raise _MalformedManifest(f"line {line}: it is no TOML: {str(exc)[: place.start()] if place else exc}") from None
    models: list[dict[str, Any]] = []
    for key, value in document.items():
        if key not in {"model", "models"}:
            raise _MalformedManifest(f"'{key}' is not known; each model is a [[model]] with source and folder")
        models += _list_of(value, key)
    lines = text.splitlines()
    headers = [number for number, line in enumerate(lines, 1) if _TOML_HEADER.match(line)]
    if len(headers) != len(models):
        return _numbered(models)  # written as an inline array: there are no blocks to count
    return [_ManifestEntry(model, _toml_place(lines, line)) for model, line in zip(models, headers, strict=True)]


def _toml_place(lines: Sequence[str], header: int) -> Callable[[str], str]:
    def where(name: str) -> str:
        words = {name, *(other for other, word in OTHER_WORDS.items() if word == name)}
        for number, line in enumerate(islice(lines, header, None), header + 1):
            if line.lstrip().startswith("["):
                break
            if line.partition("=")[0].strip().strip("\"'") in words:
                return f"line {number}"
        return f"line {header}"

    return where


# An address contains no white space, but it may contain a comma: only one before another "folder=address" ends an entry.
_BETWEEN_LINES = re.compile(r"[\s,;]+(?=[^\s,;=?&]*=[A-Za-z]+://)|\s+")
_SHORT_FORM = "write folder=hf://org/repo/file@revision or folder/name=https://..., with #sha256=... at the end if you know it"


def parse_short_lines(text: str) -> SpecList:
    """Parse the manifest `MODELS`: entries separated by line ends, spaces, commas or semicolons. # begins a comment."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    words = [word for word in _BETWEEN_LINES.split(lines.strip().strip(",;")) if word]
    problems = [
        f"entry {number} ('{_shown(word)}'): {_SHORT_FORM}"
        for number, word in enumerate(words, 1)
        if not parse_short_line(word).get("folder")
    ]
    specs, wrong, odd = _checked_entries(_numbered(map(parse_short_line, words)))
    if problems or wrong:
        raise ManifestInvalid("MODELS", problems or wrong)
    return SpecList("MODELS", tuple(specs), odd=ManifestInvalid("MODELS", odd) if odd else None)


def parse_short_line(text: str) -> dict[str, object]:
    """Parse a manifest's line `folder=source` or `folder/name=source`, with `#sha256=...` after the source.

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


def _from_manager(model: Mapping[str, Any]) -> dict[str, object] | None:
    """Read a manifest's entry as in ComfyUI-Manager's `model-list.json`. None for whole repositories and custom nodes."""
    save_path, file_name = str(model.get("save_path", "")), str(model.get("filename", ""))
    if save_path == "default":
        save_path = known().manager_folders.get(str(model.get("type", "")).lower(), "")
    folder, _, below = save_path.strip("/").partition("/")
    if not folder or folder == "custom_nodes" or not file_name or file_name.startswith("<"):
        return None
    return {"folder": folder, "name": f"{below}/{file_name}" if below else file_name, "source": model.get("url")}


def _from_comfy_lock(model: Mapping[str, Any]) -> Iterator[dict[str, object]]:
    """Read a manifest's entry as in comfy-cli's `comfy-lock.yaml`: one file at some paths. Or its type tells the folder."""
    hashes = [model, *(item for item in model.get("hashes") or () if isinstance(item, dict))]
    sha256 = next((item.get("hash") for item in hashes if is_sha256(item.get("type"))), None)
    common = {"source": model.get("url"), "sha256": sha256}
    paths = [item.get("path") for item in model.get("paths") or () if isinstance(item, dict)]
    for path in paths:
        yield _place_in_path(path) | common
    if not paths:
        yield {"folder": known().manager_folders.get(str(model.get("type", "")).lower())} | common


def _from_comfyui_api(model: Mapping[str, Any]) -> dict[str, object]:
    """Read an entry of comfyui-api's manifest."""
    return _place_in_path(model.get("local_path")) | {"source": model.get("url")}


def _place_in_path(path: object) -> dict[str, object]:
    """Return folder and name from an entry's path such as `models/loras/x.safetensors` or `/opt/ComfyUI/models/loras/x`."""
    parts = [part for part in str(path or "").replace("\\", "/").split("/") if part not in {"", "."}]
    # The last "models" that is followed by a folder and a file: /models/ComfyUI/models/loras/x.safetensors.
    start = max((at + 1 for at, part in enumerate(parts[:-2]) if part == "models"), default=0)
    below = parts[start:]
    if start == 0 and str(path or "").startswith("/"):
        below = []  # an absolute path that leads to no models folder
    return {"folder": below[0] if len(below) > 1 else None, "name": "/".join(below[1:]) or None}
