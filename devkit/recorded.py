"""Workflows that a real editor saved, each with the graph that it sent, for tests that somebody has such recordings for.

WORKFLOW_PAIRS names the folder: `pairs*/*.json` as {ui, api, frontend, object_info}, and beside these folders the gzipped
answers of `/object_info` that they name. Reads files.
"""

from __future__ import annotations

import gzip
import json
import os
from functools import cache
from pathlib import Path
from typing import Any


def recorded_pairs() -> dict[str, Path]:
    """Return the recordings by name, `pairs/NAME`. Empty if the variable is not set."""
    folder = os.environ.get("WORKFLOW_PAIRS")
    paths = sorted(Path(folder).glob("pairs*/*.json")) if folder else []
    return {f"{path.parent.name}/{path.stem}": path for path in paths}


def recording(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a pair, and the node classes of its ComfyUI."""
    pair: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return pair, _object_info(path.parent.parent / pair["object_info"])


@cache
def _object_info(path: Path) -> dict[str, Any]:
    info: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return info
