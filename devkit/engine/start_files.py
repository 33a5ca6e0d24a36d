"""The list of files that the CPU engine's start reads, as an image has one of its own. Touches the page cache and processes.

python -m devkit.engine.start_files     records it; from then on every worker on this engine reads these files ahead
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from devkit.engine.build import engine_args, ensure_engine

if TYPE_CHECKING:
    from devkit.engine.build import Engine

_RECORDER = Path(__file__).resolve().parents[2] / "image/record_start.py"


def start_files(engine: Engine) -> Path:
    """Return where the engine's list is, recorded or not."""
    return engine.root / "start-files"


def record(engine: Engine) -> Path:
    """Record a start of the engine, as the image's build does. Return the list."""
    folders = ",".join(map(str, (engine.comfyui_dir, engine.root / "venv", *_interpreter())))
    with tempfile.TemporaryDirectory(prefix="record-") as base:
        command = [engine.python, "main.py", "--base-directory", base, "--disable-auto-launch"]
        arguments = [str(start_files(engine)), folders, *map(str, command), *engine_args(engine)]
        subprocess.run([sys.executable, str(_RECORDER), *arguments], check=True, cwd=engine.comfyui_dir)
    return start_files(engine)


def _interpreter() -> list[Path]:
    """Return where the interpreter's own library is, and the libraries of the system."""
    return [Path("/usr/lib"), *({Path(sys.base_prefix, "lib")} - {Path("/usr/lib")})]


if __name__ == "__main__":
    print(record(ensure_engine()))
