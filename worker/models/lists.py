"""One list of models, in memory, and the fields of its entries. Pure."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from worker.base.text import shortened
from worker.errors import ManifestInvalid, SpecInvalid

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from worker.model_spec import ModelSpec


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
    """A list of models in memory.

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
        return [spec for spec, path in named if names_entry(path, name, folders) or (not folders and spec.name == name)]


def names_entry(path: str, name: str, folders: Collection[str]) -> bool:
    """Return whether a name, in one of the folders, means an entry of a list. No folders: in any.

    Paths are compared: folder "loras/flux" with name "x" and folder "loras" with name "flux/x" are one file.
    """
    if folders:
        return any(path == f"{folder}/{name}" for folder in folders)
    return path.partition("/")[2] == name


def is_same_file(one: ModelSpec, other: ModelSpec) -> bool:
    """Return whether two entries of lists mean the same content."""
    if one.sha256 and other.sha256:
        return one.sha256 == other.sha256
    return one.source == other.source


_FIELDS = frozenset({"folder", "source", "name", "sha256", "size_bytes"})
OTHER_WORDS = {"url": "source", "directory": "folder"}  # as ComfyUI's own metadata names them
_IGNORED = frozenset({"hash", "hash_type", "description"})


def values_of_entry(entry: Mapping[str, object]) -> dict[str, Any]:
    """Return the fields of a list's entry that `parse_spec` accepts, from our field names or those of ComfyUI's metadata."""
    values: dict[str, Any] = {"folder": None, "source": None}
    for key, value in entry.items():
        word = OTHER_WORDS.get(key, key)
        if word in _FIELDS and value is not None:
            values[word] = value
    if "sha256" not in values and is_sha256(entry.get("hash_type")) and entry.get("hash"):
        values["sha256"] = entry["hash"]
    return values


def is_sha256(kind: object) -> bool:
    """Return whether the kind of hash in a list's entry is sha256, in any spelling."""
    return isinstance(kind, str) and kind.replace("-", "").lower() == "sha256"


def check_entry_fields(entry: Mapping[str, object]) -> None:
    """Raise `SpecInvalid` for an unknown field in a list's entry."""
    name = entry.get("name")
    for key, hint in unknown_entry_fields(entry):
        raise SpecInvalid(f"field {shortened(key, 60)!r}", f"is unknown{hint}", name if isinstance(name, str) else None)


def unknown_entry_fields(values: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield each unknown field of a list's entry, with "; write ..." if a known one is similar."""
    known = _FIELDS | OTHER_WORDS.keys() | _IGNORED
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(_FIELDS), n=1)
            yield key, f"; write {near[0]}" if near else ""
