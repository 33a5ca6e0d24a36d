"""Record what `up` has begun and what it has created, in a file that is complete at any moment. Touches the disk.

A step is recorded before it begins and after it has ended. A resource that was created and not recorded is found by its name,
which follows from the deployment's own.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from filelock import FileLock, Timeout

from worker.up.errors import StateInvalid, UpUsage

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

VERSION: Final = 1


@contextlib.contextmanager
def state_lock(path: Path) -> Iterator[None]:
    """Prevent other processes of this machine from working on the deployment whose state is recorded.

    Raises `UpUsage` if one does; a kill ends its lock.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"), timeout=0)
        lock.acquire()
    except Timeout:
        raise UpUsage(f"Another `up` works on {path.stem} just now: wait for its end.") from None
    except OSError as exc:
        raise StateInvalid(path, exc.strerror or str(exc)) from None
    try:
        yield
    finally:
        lock.release()


def state_path(name: str, environ: Mapping[str, str]) -> Path:
    """Return the path of the file with a deployment's state."""
    home = environ.get("XDG_STATE_HOME", "").strip()
    return (Path(home) if home else Path.home() / ".local" / "state") / "comfyui-volume-worker" / f"{name}.json"


class UpState:
    """What `up` has begun and created for a deployment. Every change is on the disk when the method returns."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self._values = values
        self._new = path.with_suffix(".new")

    @classmethod
    def load(cls, path: Path) -> UpState:
        """Read the file. A missing file means that nothing was created. Raises `StateInvalid`."""
        try:
            values = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return cls(path, {"version": VERSION})
        except OSError as exc:
            raise StateInvalid(path, exc.strerror or str(exc)) from None
        except ValueError:
            raise StateInvalid(path, "it is not JSON") from None
        if not isinstance(values, dict) or values.get("version") != VERSION:
            raise StateInvalid(path, f"it is not of version {VERSION}")
        return cls(path, values)

    @property
    def exists(self) -> bool:
        """Return whether anything was recorded."""
        return len(self._values) > 1

    def get(self, key: str) -> dict[str, Any]:
        """Return what is known of a step or a wish, or an empty object."""
        found = self._values.get(key)
        return dict(found) if isinstance(found, dict) else {}

    def put(self, key: str, **values: Any) -> None:  # noqa: ANN401 - JSON
        """Record something besides what is known already."""
        self._values[key] = {**self.get(key), **values}
        self._save()

    def drop(self, *keys: str) -> None:
        """Remove an entry."""
        if any(self._values.pop(key, None) is not None for key in keys):
            self._save()

    def remove(self) -> None:
        """Remove all entries and the file."""
        self._values = {"version": VERSION}
        self.path.unlink(missing_ok=True)
        self._new.unlink(missing_ok=True)

    def _save(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._new.open("w", encoding="utf-8") as file:
                json.dump(self._values, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            self._new.replace(self.path)
        except OSError as exc:
            raise StateInvalid(self.path, exc.strerror or str(exc)) from None
