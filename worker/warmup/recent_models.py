"""The models that an endpoint's jobs used last, stored on the volume for its next workers. Touches the disk.

There is one small file for each endpoint, the most recent model first. It contains names of model files and, if a warm-up uses
it, the part of a graph that loads them; nothing else of a job. Several workers write it and the last one wins: a missing name
only costs the next worker a read at the usual time.
"""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING, Any, Final

from worker.base.files import write_atomically
from worker.errors import UnsafePath
from worker.store.layout import safe_parts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

log = logging.getLogger(__name__)

VERSION: Final = 1
_MOST: Final = 32
_MAX_BYTES: Final = 1 << 20
_WRITE_EVERY_S: Final = 60.0


class RecentModels:
    """The record of the models that one endpoint used last, in the file `path` on the volume. Not thread-safe."""

    def __init__(self, root: Path, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._root = root
        self._path = path
        self._clock = clock
        self._written_s: float | None = None
        self._failed = False
        self._noted: tuple[Sequence[str], Mapping[str, Any] | None] | None = None

    def files(self) -> list[Path]:
        """Return the files that jobs used, the latest first, without those that are gone or never were on the volume."""
        root = self._root.resolve()
        found = [(self._root / name).resolve() for name in self._names(self._read())]
        return [path for path in found if path.is_relative_to(root) and path.is_file()]

    def warmup(self) -> Any:  # noqa: ANN401 - JSON that anybody may have written
        """Return the graph that was stored with them, unchecked, or None."""
        return self._read().get("warmup")

    def note(self, files: Sequence[Path], warmup: Mapping[str, Any] | None = None) -> bool:
        """Put a job's files first in the record. Return whether it was written; small changes are not.

        A new name is written at once, a new order once a minute. Errors are logged and do not affect the job.
        """
        names = [name for path in files if (name := self._name(path))]
        if not names or self._failed or self._noted == (names, warmup):
            return False
        known = self._read()
        before = self._names(known)
        after = list(dict.fromkeys([*names, *before]))[:_MOST]
        graph = warmup or known.get("warmup")
        now_s = self._clock()
        is_new = not set(names) <= set(before) or (graph is not None and "warmup" not in known)
        recent = self._written_s is not None and now_s - self._written_s < _WRITE_EVERY_S
        if after == before and graph == known.get("warmup"):
            self._noted = (names, warmup)
            return False
        if recent and not is_new:
            return False
        record = {"v": VERSION, "files": after} | ({"warmup": graph} if graph else {})
        try:
            write_atomically(self._path, json.dumps(record, indent=1).encode(), durable=False)
        except OSError as exc:
            # Log this once: a volume that is read-only or full is so for each job.
            log.warning("the models of jobs cannot be recorded on the volume: %s", exc)
            self._failed = True
            return False
        self._written_s, self._noted = now_s, (names, warmup)
        return True

    def _name(self, path: Path) -> str | None:
        """Return the name of a file below the volume in the record. None for a file on the container's own disk."""
        try:
            return path.resolve().relative_to(self._root.resolve()).as_posix()
        except (OSError, ValueError):
            return None

    def _read(self) -> dict[str, Any]:
        try:
            with self._path.open("rb") as stream:
                record = json.loads(stream.read(_MAX_BYTES))
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    @staticmethod
    def _names(record: Mapping[str, Any]) -> list[str]:
        names = record.get("files")
        return [name for name in names if isinstance(name, str) and _is_safe(name)] if isinstance(names, list) else []


def _is_safe(name: str) -> bool:
    try:
        return bool(safe_parts("The file", name))
    except UnsafePath:
        return False
