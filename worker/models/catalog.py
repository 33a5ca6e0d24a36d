"""The official catalogue: models of ComfyUI's own templates. Reads one generated file on first use."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worker.model_spec import ModelSpec, parse_spec
from worker.models.lists import names_entry, values_of_entry

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence


CATALOG = Path(__file__).parent.parent / "data" / "catalog.json"


class Catalog:
    """The official catalogue of models. Its file is read when it is first asked, and an entry is parsed when it is found."""

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
        return tuple(parse_spec(**values_of_entry(entries[number])) for number in self._document["by_template"][name])

    def find(self, name: str, folders: Collection[str]) -> Sequence[ModelSpec]:
        """Return its models of this name, one for each folder. Without folders: in any."""
        paths = (
            [f"{folder}/{name}" for folder in folders] if folders else [p for p in self._entries if names_entry(p, name, ())]
        )
        return [parse_spec(**values_of_entry(self._entries[path])) for path in paths if path in self._entries]
