"""The records of models that were removed to make room: when, by whom, and where each comes from again. Touches the disk.

A tombstone is the model's seal, moved. The move takes no space, so that a full volume can be freed; what else it says comes
after that.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from worker.base.files import write_atomically
from worker.errors import UnsafePath
from worker.store.layout import split_title
from worker.store.leases import read_json
from worker.store.seals import Seal, decode_seal, read_seal, seal_time

if TYPE_CHECKING:
    from worker.store.layout import Layout


@dataclass(frozen=True, slots=True)
class Tombstone:
    """A model that was removed to make room. `by` and `at` are unknown where the remover was killed at that moment."""

    title: str
    seal: Seal
    by: str | None
    at: str | None
    why: str | None

    def __str__(self) -> str:
        return f"removed to make room by {self.by or 'a worker that died since'}" + (f" at {self.at}" if self.at else "")


def tombstone_of(layout: Layout, folder: str, name: str) -> Tombstone | None:
    """Return a model's tombstone, the record that it was removed, or None."""
    with contextlib.suppress(UnsafePath):
        read = read_json(layout.tombstone(folder, name))
        seal = decode_seal(json.dumps(read[0]).encode()) if read else None
        if read and seal:
            words = (read[0].get(key) for key in ("removed_by", "removed_at", "removed_for"))
            by, at, why = (word if isinstance(word, str) else None for word in words)
            return Tombstone(f"{folder}/{name}", seal, by, at, why)
    return None


def removed_folders(layout: Layout) -> list[str]:
    """Return the folders of models that have tombstones."""
    try:
        return sorted(entry.name for entry in os.scandir(layout.tombstones))
    except OSError:
        return []


def forget_tombstone(layout: Layout, folder: str, name: str) -> None:
    """Remove a model's tombstone: the model is there again."""
    with contextlib.suppress(OSError):
        layout.tombstone(folder, name).unlink(missing_ok=True)


def bury(layout: Layout, title: str, seal: Seal, by: str, why: str) -> None:
    """Make a tombstone of the seal of a model that was removed: by a rename, which takes no space, then with more in it.

    Raises nothing: the model is gone either way. A seal that is another file's by now stays.
    """
    with contextlib.suppress(UnsafePath):
        path, tombstone = layout.seal(*split_title(title)), layout.tombstone(*split_title(title))
        if read_seal(path) != seal:
            return
        try:
            tombstone.parent.mkdir(parents=True, exist_ok=True)
            path.replace(tombstone)
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return
        words = {"removed_by": by, "removed_at": seal_time(), "removed_for": why}
        with contextlib.suppress(OSError):
            write_atomically(tombstone, json.dumps(asdict(seal) | words, indent=1).encode(), durable=False)
