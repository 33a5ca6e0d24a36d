"""Check partial downloads: their progress, who downloads, or when they stopped. Touches the disk."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from worker.base.text import count, size_text
from worker.doctor.findings import Severity, listing, note, ok
from worker.doctor.volume_checks import LOCK, entries
from worker.store.byte_ranges import Ranges
from worker.store.locks import Locks
from worker.store.seals import read_seal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.doctor.findings import Finding
    from worker.store.layout import Layout

_ACTIVE_S: Final = 60.0


def check_downloads(layout: Layout) -> Iterator[Finding]:
    """Yield partial downloads: their progress, who downloads, or when they stopped."""
    now_s = _now_s(layout)
    files = [path for folder in entries(layout.partials) for path in entries(folder)]
    parts = [path for path in files if path.suffix == ".part"]
    if not parts:
        yield ok("none under way, none broken off")
    sealed = _complete_contents(layout) if parts else set()
    for part in parts:
        with contextlib.suppress(FileNotFoundError):  # published meanwhile
            yield _partial(layout, part, now_s, there=part.parent.name in sealed)
    yield from _records_without_partial(files, now_s)
    holders = [holder for lock in entries(layout.locks) for holder in entries(lock / "holders")]
    stale = [str(holder) for holder in holders if _age_s(holder, now_s) > _ACTIVE_S]
    if stale:
        text = f"{count(stale, 'lock')} of workers that are gone: nothing to do, the next one takes over in 30 s."
        yield note(text, stale)
    uploads = [upload.name for upload in entries(layout.root / ".s3compat_uploads")]
    if uploads:
        text = f"{count(uploads, 'upload')} through S3 not completed; complete or abort it to have the space back"
        yield listing(Severity.NOTE, text, uploads)


def _complete_contents(layout: Layout) -> set[str]:
    """Return the contents that are complete, by the names of their partials' folders."""
    seals = (read_seal(Path(folder, name)) for folder, _, names in os.walk(layout.seals) for name in names)
    return {seal.sha256 for seal in seals if seal and seal.sha256}


def _records_without_partial(files: list[Path], now_s: float) -> Iterator[Finding]:
    """Yield the records of partial downloads without their file: a worker was killed between the two."""
    there = {path.with_suffix("") for path in files if path.suffix == ".part"}
    strays = [str(path) for path in files if path.with_suffix("") not in there and _ACTIVE_S < _age_s(path, now_s) < math.inf]
    if strays:
        yield listing(Severity.NOTE, f"{count(strays, 'record')} of downloads that are gone; remove what is named", strays)


def _partial(layout: Layout, part: Path, now_s: float, *, there: bool) -> Finding:
    journal, key = part.with_suffix(".journal"), part.parent.name
    size_bytes = part.stat().st_size
    try:
        done_bytes = Ranges((start, end) for start, end in json.loads(journal.read_bytes())["ranges"]).total
    except (OSError, ValueError, TypeError, KeyError):
        return note(f"{part} has no journal to go on with: remove it.", [part])
    holder = Locks(layout, LOCK).holder(key)
    by = f"worker {holder.by}" if holder else "a worker"
    amount = f"{key[:12]}, {size_text(done_bytes)} of {size_text(size_bytes)}"
    age_s = min(_age_s(journal, now_s), _age_s(layout.lock_progress(key), now_s))
    if age_s <= _ACTIVE_S:
        rate = f" at {size_text(int(holder.bytes_per_s))}/s" if holder else ""
        return ok(f"{amount}: {by} fetches it{rate}")
    folder = part.parent.with_name(f"{key[:12]}*")
    then = "and the model is there since: remove" if there else "the next one goes on from there. If nobody will, remove"
    return note(f"{amount}: {by} broke off {_duration(age_s)} ago, {then} {folder}", [part])


def _now_s(layout: Layout) -> float:
    """Return the volume's time, to tell the age of partial downloads. This machine's if nothing can be written."""
    with contextlib.suppress(OSError):
        return _touch_and_remove(layout.state)
    return time.time()


def _touch_and_remove(folder: Path) -> float:
    path = folder / f".doctor.{secrets.token_hex(4)}.tmp"
    try:
        path.touch()
        return path.stat().st_mtime
    finally:
        path.unlink(missing_ok=True)


def _age_s(path: Path, now_s: float) -> float:
    try:
        return max(0.0, now_s - path.stat().st_mtime)
    except OSError:
        return math.inf


def _duration(age_s: float) -> str:
    for unit, length_s in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if age_s >= 2 * length_s:
            return f"{age_s / length_s:.0f} {unit}"
    return f"{age_s:.0f} s"
