"""What a ComfyUI answers about its node classes, and what one answered before, on the volume or in the image. Touches disk.

While ComfyUI boots, the kept answers say what a job will need, so that it can be fetched meanwhile. They only decide what is
done early. What is answered to a client is decided by the ComfyUI that runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from worker.engine.client import Versions
from worker.graph.rejection import combo_options

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from worker.engine.process import EngineCommand

log = logging.getLogger(__name__)

# A pack's own version and files at its top. Kept answers of a pack that changed below them only make a download early or late.
_TELLING = (".py", ".toml")
# Beside ComfyUI, written while the image was built (image/record_definitions.py).
_OF_IMAGE = "definitions.json"
# What importing packs leaves behind.
_NO_PACK = "__pycache__"


class DefinitionSource(Protocol):
    """Who is asked about node classes: `Engine`, or `KeptDefinitions`."""

    async def object_info(self, class_types: Collection[str]) -> dict[str, Any]:
        """Return the definitions of these classes, without those that do not exist."""
        ...

    async def definitions(self, class_types: Collection[str]) -> dict[str, Any]:
        """As `object_info`, but what the definitions say of files may be old."""
        ...

    async def lacks(self, class_types: Collection[str]) -> tuple[frozenset[str], frozenset[str]]:
        """Return the classes that do not exist, and those that are replaced by others."""
        ...

    async def choices(self, class_type: str, input_name: str) -> Sequence[str] | None:
        """Return the choices of an input. None if there is no list."""
        ...

    async def versions(self) -> Versions:
        """Return the versions of ComfyUI and of its editor."""
        ...


def declares_input(definition: Mapping[str, Any], input_name: str) -> bool:
    """Return whether a class's definition has this input, or a group that it belongs to."""
    groups = definition.get("input") or {}
    return any(name in group for group in groups.values() for name in (input_name, input_name.partition(".")[0]))


class KeptDefinitions:
    """Answers about node classes as ComfyUI did when `everything` was asked for."""

    def __init__(self, everything: dict[str, Any]) -> None:
        self._classes: dict[str, Any] = everything["classes"]
        self._replacements: dict[str, Any] = everything["replacements"]
        self._versions = Versions(everything["versions"]["comfyui"], everything["versions"]["frontend"])

    async def object_info(self, class_types: Collection[str]) -> dict[str, Any]:
        """Return the definitions of these classes, without those that did not exist."""
        return {name: self._classes[name] for name in class_types if name in self._classes}

    async def definitions(self, class_types: Collection[str]) -> dict[str, Any]:
        """Return the definitions of these classes, without those that did not exist."""
        return await self.object_info(class_types)

    async def lacks(self, class_types: Collection[str]) -> tuple[frozenset[str], frozenset[str]]:
        """Return the classes that did not exist, and those that were replaced by others."""
        lacking = set(class_types) - self._classes.keys()
        replaced = frozenset(name for name in lacking if self._successor(name) in self._classes)
        return frozenset(lacking) - replaced, replaced

    async def choices(self, class_type: str, input_name: str) -> Sequence[str] | None:
        """Return the choices that an input had. None if there was no list."""
        groups = self._classes.get(class_type, {}).get("input") or {}
        return next((combo_options(group[input_name]) for group in groups.values() if input_name in group), None)

    async def versions(self) -> Versions:
        """Return the versions."""
        return self._versions

    def _successor(self, name: str) -> str | None:
        with contextlib.suppress(LookupError, TypeError):
            return str(self._replacements[name][0]["new_node_id"])
        return None


class StoredDefinitions:
    """Where the answers of a ComfyUI of this version with these custom nodes are kept. Its failures cost no job anything.

    The image has those of a ComfyUI without a GPU, for the image's own packs. The volume's come first.
    """

    def __init__(self, folder: Path | None, command: EngineCommand, node_folders: Sequence[Path]) -> None:
        self._folder = folder
        self._command = command
        self._node_folders = node_folders

    def read(self) -> KeptDefinitions | None:
        """Return the answers, or None if there are none. Blocks."""
        for read in (self._read_volume, self._read_image):
            try:
                if (everything := read()) is not None:
                    return KeptDefinitions(everything)
            except (OSError, ValueError, LookupError, TypeError) as exc:
                log.debug("no definitions of node classes are kept: %s", exc)
        return None

    def _read_volume(self) -> dict[str, Any] | None:
        path = self._path()
        return json.loads(path.read_bytes()) if path else None

    def _read_image(self) -> dict[str, Any] | None:
        """Return the image's, unless ComfyUI has other packs than the image."""
        everything = json.loads((self._command.cwd / _OF_IMAGE).read_bytes())
        packs = {pack.name for folder in self._node_folders if folder.is_dir() for pack in folder.iterdir()}
        ours = {"version": self._version(), "packs": sorted(packs - {_NO_PACK})}
        return everything if everything["of"] == ours else None

    def wanted(self) -> bool:
        """Return whether there is a place for them and they are not there. Blocks."""
        with contextlib.suppress(OSError):
            path = self._path()
            return path is not None and not path.is_file()
        return False

    def write(self, everything: dict[str, Any], is_model: Callable[[str], bool]) -> None:
        """Keep them, whole or not at all, without the models among the choices, which come and go. Blocks."""
        try:
            _leave_out(everything["classes"], is_model)
            path = self._path()
            if path is None:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix=".new-", dir=path.parent)
            try:
                with os.fdopen(descriptor, "wb") as stream:
                    stream.write(json.dumps(everything, separators=(",", ":")).encode())
                Path(name).chmod(0o644)
                Path(name).replace(path)
            finally:
                Path(name).unlink(missing_ok=True)
        except (OSError, ValueError) as exc:
            log.info("the definitions of node classes could not be kept: %s", exc)

    def _path(self) -> Path | None:
        if self._folder is None:
            return None
        digest = hashlib.sha256(json.dumps(list(self._parts())).encode()).hexdigest()
        return self._folder / f"{digest[:32]}.json"

    def _version(self) -> str:
        return (self._command.cwd / "comfyui_version.py").read_text("utf-8", "replace")

    def _parts(self) -> Iterator[object]:
        yield self._version()
        # Ports and paths differ between machines, and say nothing of node classes; what the operator adds may.
        yield [part for part in self._command.argv[1:] if not part.startswith("/") and not part.isdecimal()]
        for folder in self._node_folders:
            for pack in sorted(folder.iterdir()) if folder.is_dir() else ():
                files = [pack] if pack.is_file() else sorted(pack.iterdir())
                told = [(file.name, file.stat()) for file in files if file.suffix in _TELLING]
                yield pack.name, [(name, info.st_size, int(info.st_mtime)) for name, info in told]


def _leave_out(classes: dict[str, Any], is_model: Callable[[str], bool]) -> None:
    for definition in classes.values():
        for group in (definition.get("input") or {}).values():
            for config in group.values() if isinstance(group, dict) else ():
                for options in _lists_in(config):
                    options[:] = [choice for choice in options if not (isinstance(choice, str) and is_model(choice))]


def _lists_in(config: object) -> Iterator[list[Any]]:
    for part in config if isinstance(config, list) else ():
        if isinstance(part, list):
            yield part
        elif isinstance(part, dict) and isinstance(part.get("options"), list):
            yield part["options"]
