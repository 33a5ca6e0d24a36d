"""Resolve absolute links that were made where the volume has its other mount point: `/workspace` in a Pod. Reads the disk."""

# ruff: noqa: PTH110, PTH114, PTH115, PTH120
# No Path objects in what runs once for each link of a large volume.

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Final

from worker.store.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Iterable

NAMES: Final = ("/workspace", "/runpod-volume")
"""Where RunPod mounts a network volume: in a Pod, in a serverless worker."""

_MOST_LINKS: Final = 40


def real_path(path: str, tops: Iterable[str]) -> str:
    """Return the path without links. A link made in a Pod or a worker, broken in the other, is read as below one of `tops`.

    Raises `OSError` if it still leads nowhere.
    """
    for _ in range(_MOST_LINKS):
        try:
            return os.path.realpath(path, strict=True)
        except FileNotFoundError:
            lost = os.path.realpath(path)  # with missing parts as they were written
            moved = next((there for top in tops if (there := _below(top, lost)) and os.path.lexists(there)), None)
            if moved is None or moved == lost:
                raise
            path = moved
    return os.path.realpath(path, strict=True)


def _below(top: str, lost: str) -> str | None:
    name = next((name for name in NAMES if lost.startswith(f"{name}/")), None)
    return f"{top}{lost[len(name) :]}" if name else None


def is_absolute(link: str) -> bool:
    """Return whether a link names the volume by a mount point, so that it works in a Pod or in a worker, and not in both."""
    try:
        target = os.readlink(link)
    except OSError:
        return False
    return target.startswith(tuple(f"{name}/" for name in NAMES))


def relink(link: str, real: str) -> str:
    """Return the command that makes such a link work in a Pod and in a worker, wherever the volume is mounted."""
    return f"ln -sfn {shlex.quote(os.path.relpath(real, os.path.realpath(os.path.dirname(link))))} {shlex.quote(link)}"


def layout_at(root: Path) -> Layout:
    """Follow a Pod's absolute links to `models` and its folders. Return the volume's layout with their real places."""
    top = os.path.realpath(root)
    models = root / "models"
    moved = {"": found} if (found := _target_elsewhere(str(models), top)) else {}
    try:
        with os.scandir(moved.get("", models)) as entries:
            moved |= {
                entry.name: found for entry in entries if entry.is_symlink() and (found := _target_elsewhere(entry.path, top))
            }
    except OSError:
        pass
    return Layout(root, tuple((name, Path(found)) for name, found in moved.items()))


def _target_elsewhere(link: str, top: str) -> str | None:
    """Return the target of an absolute link that is broken here, because a Pod mounts the volume elsewhere."""
    if not os.path.islink(link) or os.path.exists(link):
        return None
    try:
        return real_path(link, (top,))
    except OSError:
        return None
