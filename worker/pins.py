"""Which models people name, so that no removal touches them: in manifests, and in workflows on the volume. Reads the disk."""

from __future__ import annotations

import json
import re
import unicodedata
from functools import lru_cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from worker.errors import NoWorkflowInFile, WorkerError
from worker.store.eviction import EvictionPins
from worker.store.leases import LeasedTitles
from worker.volume_workflows import all_workflows, decode_workflow

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from worker.models.sources import Sources

_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")
_FOLDERS_OF_FOLDERS = frozenset({"diffusers"})
"""Folders whose models are folders: a workflow names these, not the files in them."""


def read_pins(volume: Path, sources: Sources) -> EvictionPins:
    """Return what the manifests and the workflows on the volume name.

    While a manifest has a mistake, or a workflow cannot be read, nobody knows what they name: then every model is pinned.
    """
    for error in sources.errors:
        return EvictionPins(trouble=str(error))
    titles = LeasedTitles((f"{spec.folder}/{spec.name}", "a manifest names it") for spec in sources.manifest())
    try:
        texts = [(name, _text_of_workflow(name, data)) for name, data in all_workflows(volume)]
    except (OSError, WorkerError) as exc:
        return EvictionPins(trouble=f"a workflow on the volume cannot be read ({exc})")
    return EvictionPins(titles, lambda title: _workflow_that_pins(title, texts))


def _text_of_workflow(name: str, data: bytes) -> str:
    """Return all that is written in the file of a workflow, whose models are pinned, as a text; also of one that is none."""
    try:
        text = json.dumps(decode_workflow(name, data), ensure_ascii=False)
    except (NoWorkflowInFile, RecursionError, ValueError):
        text = data.decode("utf-8", "replace")
    if "\\u" in text:
        text = _ESCAPE.sub(lambda found: chr(int(found[1], 16)), text)
    return unicodedata.normalize("NFC", text)


def _workflow_that_pins(title: str, texts: Sequence[tuple[str, str]]) -> str | None:
    """Return which workflow pins a model: any place where its file's name, without its suffix, stands as a word counts.

    That is more than a job of the workflow loads. Prompts name embeddings and LoRAs, and custom nodes have forms of their own.
    """
    stems = _stems(unicodedata.normalize("NFC", title))
    for name, text in texts:
        if any(stem in text and _word(stem).search(text) for stem in stems):
            return f"workflows/{name}.json names it"
    return None


def _stems(title: str) -> list[str]:
    folder, *parts = title.split("/")
    stems = [PurePosixPath(parts[-1]).stem]
    return stems + parts[:-1] if folder in _FOLDERS_OF_FOLDERS else stems


@lru_cache(maxsize=4096)
def _word(stem: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-]){re.escape(stem)}(?![\w-])")
