"""The folders of ComfyUI's loaders, and what lies in a folder that may not be there. Touches the disk."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def entries(folder: Path) -> list[Path]:
    """What lies in it, sorted; nothing where there is no such folder."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def names_in(folder: Path) -> list[str]:
    """The names in it; none where it cannot be read, for whatever reason."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return [entry.name for entry in entries]
    return []
