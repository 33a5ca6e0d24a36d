"""Models of the volume that RunPod's host cache also holds, where they are faster to read. Touches the disk.

A file counts as the same if the volume's seal has its sha256 and the cache has a blob of that name and size. The cache names
its blobs by their hash. Nothing is hashed or compared here.
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from worker.errors import FileUnusable
from worker.model_spec import HubFile
from worker.store.file_formats import check_whole
from worker.store.inventory import Standing, look_at_file
from worker.store.seals import read_seal, stat_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from worker.model_spec import ModelSpec
    from worker.store.inventory import InventoryEntry
    from worker.store.layout import Layout

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_SEAL: Final = ".json"


def cached_copies(layout: Layout) -> dict[Path, Path]:
    """Map the volume's models that are also in the host cache to their copies there.

    This lists the cache, in which RunPod keeps the one or few repositories that the endpoint names. If the cache holds files,
    every seal of the volume is read. Without a cache nothing of the volume is read.
    """
    blobs = dict(_cache_blobs(layout.host_cache))
    return dict(_sealed_as(layout, blobs)) if blobs else {}


def _cache_blobs(cache: Path) -> Iterator[tuple[str, Path]]:
    """Yield the sha256 and the path of each file in the host cache that is named by one. Small files have another name."""
    for repo in _cache_entries(cache):
        if repo.name.startswith("models--"):
            for blob in _cache_entries(repo / "blobs"):
                if _SHA256.fullmatch(blob.name):
                    yield blob.name, blob


def _cache_entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _sealed_as(layout: Layout, blobs: dict[str, Path]) -> Iterator[tuple[Path, Path]]:
    for folder, _, names in os.walk(layout.seals):
        above = layout.models / os.path.relpath(folder, layout.seals)
        for name in names:
            place = layout.seals / folder / name
            if name.endswith(_SEAL) and (seal := read_seal(place)) and (copy := blobs.get(seal.sha256 or "")):
                path = above / name.removesuffix(_SEAL)
                if _is_same_in_cache(look_at_file(path, place), copy):
                    yield path, copy


def _is_same_in_cache(own: InventoryEntry, copy: Path) -> bool:
    """Return whether the seal still fits the volume's file, and its copy in the host cache has the same length."""
    found = stat_file(copy)
    return own.standing is Standing.READY and found is not None and found.st_size == own.size_bytes


def link_host_cache(copies: dict[Path, Path], layout: Layout, root: Path) -> int:
    """Fill `root` with links to the host cache's copies, as a models folder for `ModelLinks`. Return the number of links.

    Remove what an earlier worker of this container left there, because its volume may have had other models.
    """
    shutil.rmtree(root, ignore_errors=True)
    made = 0
    for path, copy in copies.items():
        link = root / path.relative_to(layout.models)
        with suppress(OSError):
            link.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(copy, link)  # noqa: PTH211 - the same operation
            made += 1
    return made


def cached_file(host_cache: Layout, spec: ModelSpec) -> Path | None:
    """Return a hub model's file in RunPod's host cache, if its length and header say that it is whole.

    It is found by its name; its hash is not checked. Touches no network.
    """
    if not isinstance(spec.source, HubFile):
        return None
    repo = host_cache.host_cache_repo(spec.source.repo, spec.source.repo_type)
    revision = spec.source.revision
    with suppress(OSError, FileUnusable, UnicodeDecodeError):
        commit = revision if _COMMIT.fullmatch(revision) else (repo / "refs" / revision).read_text().strip()
        path = repo / "snapshots" / commit / spec.source.path
        size_bytes = path.stat().st_size
        check_whole(path, size_bytes)
        if spec.size_bytes in {None, size_bytes}:
            return path
    return None
