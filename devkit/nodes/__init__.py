"""Custom nodes for ComfyUI that tests put in its way. Touches disk.

`install(base_dir)` puts them there; `FLAGS` has the engine load them and no other.
"""

from __future__ import annotations

import shutil
from pathlib import Path

FLAGS = ("--whitelist-custom-nodes", "fault_nodes.py")
"""More of ComfyUI's flags, beside those that keep every custom node out."""


def install(base_dir: Path) -> None:
    """Install the nodes for the ComfyUI that starts on this base directory next."""
    folder = base_dir / "custom_nodes"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(__file__).with_name("fault_nodes.py"), folder)
