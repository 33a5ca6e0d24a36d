"""ComfyUI's own listing of models, from its real `folder_paths.py`, in a process of its own. Starts one process.

What a running engine would offer in a loader, without the seconds that its nodes take to import: `folder_paths` is the part of
ComfyUI that walks, filters and caches, and it keeps its cache from one question to the next as the server does.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from pathlib import Path

_ANSWER_S = 60.0

_PROGRAM = """
import json, sys, time
import comfy.options
comfy.options.enable_args_parsing()
import folder_paths
for line in sys.stdin:
    key, forget = json.loads(line)
    if key not in folder_paths.folder_names_and_paths:
        folder_paths.add_model_folder_path(key, folder_paths.models_dir + "/" + key)
    if forget:
        folder_paths.filename_list_cache.clear()
    started = time.perf_counter()
    try:
        answer = {"names": folder_paths.get_filename_list(key)}
    except Exception as exc:
        answer = {"error": repr(exc)}
    answer["seconds"] = time.perf_counter() - started
    print(json.dumps(answer), flush=True)
"""


class ListingError(RuntimeError):
    """`folder_paths` raised: what ComfyUI's server answers with 500."""


class ComfyListing:
    """Asks one ComfyUI, whose models are in `base_dir`/models; a context manager."""

    def __init__(self, comfyui_dir: Path, base_dir: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, "--base-directory", str(base_dir)],
            cwd=comfyui_dir,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate(timeout=_ANSWER_S)

    def names(self, folder: str) -> list[str]:
        """Return what a loader offers for this folder key, from ComfyUI's cache if it trusts that. Raises ListingError."""
        found: list[str] = self._ask(folder, forget=False)["names"]
        return found

    def walk_seconds(self, folder: str) -> float:
        """Return how long ComfyUI takes to list the folder when it has to walk it."""
        return float(self._ask(folder, forget=True)["seconds"])

    def _ask(self, folder: str, *, forget: bool) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise ListingError("the process has no pipes")
        stdin.write(json.dumps([folder, forget]) + "\n")
        stdin.flush()
        if not select.select([stdout], [], [], _ANSWER_S)[0]:
            raise ListingError(f"no answer within {_ANSWER_S:g} s")
        line = stdout.readline()
        if not line:
            raise ListingError(f"the process ended with {self._process.wait(_ANSWER_S)}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ListingError(answer["error"])
        return answer
