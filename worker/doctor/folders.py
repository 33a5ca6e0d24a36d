"""The folders of ComfyUI's loaders, and listings of folders that may be missing. Touches the disk."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def entries(folder: Path) -> list[Path]:
    """Return the sorted contents of a folder, empty if it does not exist."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder, empty if it cannot be read for any reason."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return [entry.name for entry in entries]
    return []
