"""Models of the volume that RunPod's host cache holds as well: quicker to read from there. Touches the disk.

A file counts as the same when the volume's seal has its sha256 and the cache has a blob of that name and size: the cache calls
its blobs by what they hash to. Nothing is hashed or compared here.
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from worker.errors import UnsafePath
from worker.models.seals import read_seal, stat_file

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from worker.models.layout import Layout

_SHA256: Final = re.compile(r"[0-9a-f]{64}")


def cached_copy(layout: Layout, path: Path) -> Path | None:
    """The host cache's copy of a model on the volume; None where there is none. Two small looks at the volume."""
    try:
        folder, *name = path.relative_to(layout.models).parts
        seal = read_seal(layout.seal(folder, "/".join(name)))
        if seal is None or not seal.repo or not _SHA256.fullmatch(seal.sha256 or ""):
            return None
        copy = layout.host_cache_repo(seal.repo) / "blobs" / str(seal.sha256)
    except (ValueError, UnsafePath):
        return None
    found, own = stat_file(copy), stat_file(path)
    return copy if found and own and found.st_size == own.st_size == seal.size else None


def with_copies(layout: Layout, paths: Iterable[Path]) -> dict[Path, Path | None]:
    """Each of the files with its copy in the host cache; where there is no such cache, nothing is looked at."""
    if not layout.host_cache.is_dir():
        return dict.fromkeys(paths)
    return {path: cached_copy(layout, path) for path in paths}


def lay_out(copies: dict[Path, Path | None], layout: Layout, root: Path) -> int:
    """Make `root` a models folder of links to the copies, as ModelLinks takes it for `nearer`; how many there are.

    What an earlier worker of this container left there goes first: its volume may have other models by now.
    """
    shutil.rmtree(root, ignore_errors=True)
    made = 0
    for path, copy in copies.items():
        if copy is not None:
            link = root / path.relative_to(layout.models)
            with suppress(OSError):
                link.parent.mkdir(parents=True, exist_ok=True)
                os.symlink(copy, link)  # noqa: PTH211 - the same thing
                made += 1
    return made
