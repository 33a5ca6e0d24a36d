"""Record what ComfyUI says of its node classes, for workers that boot. Touches processes, loopback and one file.

    record_definitions.py COMFYUI_DIR PYTHON [FLAG ...]     start ComfyUI without models; write COMFYUI_DIR/definitions.json

Run once, while an image is built, and again by an image that adds custom nodes. With it the first worker on an empty volume
knows what its first job needs while ComfyUI boots (worker/engine/definitions.py). It is for this version with these packs.
"""  # noqa: INP001 - a script, not a package

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

TIMEOUT_S = 600.0
POLL_S = 0.1


def record(comfyui_dir: Path, python: str, flags: Sequence[str]) -> None:
    """Start ComfyUI, ask it, end it, write the file. Raises `SystemExit` if it does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        for name in ("models", "input", "output", "temp", "user"):
            (Path(folder) / name).mkdir()
        (Path(folder) / "custom_nodes").symlink_to(comfyui_dir / "custom_nodes")
        command = [python, "main.py", *flags, "--port", str(port), "--disable-auto-launch", "--base-directory", folder]
        process = subprocess.Popen(  # noqa: S603 - the build's own
            [*command, "--database-url", "sqlite:///:memory:"], cwd=comfyui_dir, stdout=log, stderr=log
        )
        try:
            system = _first_answer(port, process, log)["system"]
            found = {
                "versions": {"comfyui": system.get("comfyui_version"), "frontend": system.get("required_frontend_version")},
                "classes": _ask(port, "/object_info"),
                "replacements": _ask_if_any(port, "/node_replacements"),
                "of": {
                    "version": (comfyui_dir / "comfyui_version.py").read_text("utf-8"),
                    "packs": sorted({path.name for path in (comfyui_dir / "custom_nodes").iterdir()} - {"__pycache__"}),
                },
            }
        finally:
            process.kill()
            process.wait()
    (comfyui_dir / "definitions.json").write_text(json.dumps(found, separators=(",", ":")), "utf-8")
    print(f"{len(found['classes'])} node classes of ComfyUI {system.get('comfyui_version')}")  # noqa: T201 - the build's log


def _first_answer(port: int, process: subprocess.Popen[bytes], log: IO[bytes]) -> Any:  # noqa: ANN401 - JSON
    until_s = time.monotonic() + TIMEOUT_S
    while process.poll() is None and time.monotonic() < until_s:
        try:
            return _ask(port, "/system_stats")
        except OSError:
            time.sleep(POLL_S)
    log.seek(0)
    raise SystemExit(f"ComfyUI does not answer:\n{log.read()[-4000:].decode('utf-8', 'replace')}")


def _ask_if_any(port: int, path: str) -> Any:  # noqa: ANN401 - JSON
    try:
        return _ask(port, path)
    except urllib.error.HTTPError:  # older releases do not have it
        return {}


def _ask(port: int, path: str) -> Any:  # noqa: ANN401 - JSON
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
        f"http://127.0.0.1:{port}{path}", timeout=60
    ) as answer:
        return json.load(answer)


if __name__ == "__main__":
    record(Path(sys.argv[1]).resolve(), sys.argv[2], sys.argv[3:])
