"""Check for seals without a file, and for interrupted publications. Touches the disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from worker.base.text import count
from worker.doctor.findings import Severity, listing, ok
from worker.store.layout import sealed_by
from worker.store.seals import read_seal, stat_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.doctor.findings import Finding
    from worker.store.layout import Layout


def seals(layout: Layout) -> Iterator[Finding]:
    """Yield seals without a file, and interrupted publications."""
    paths = [Path(folder, name) for folder, _, names in os.walk(layout.seals) for name in names if name[0] != "."]
    sealed = [seal for seal in paths if seal.suffix == ".json"]
    yield ok(count(sealed, "seal") if sealed else "none yet")
    gone = [name for seal in sealed if stat_file(layout.listed(name := _sealed_by(layout, seal))) is None]
    if gone:
        text = f"{count(gone, 'seal')} whose file somebody removed; fetched again when wanted"
        yield listing(Severity.NOTE, text, gone)
    unreadable = [str(seal) for seal in sealed if read_seal(seal) is None]
    if unreadable:
        text = f"{count(unreadable, 'seal')} that cannot be read; remove it, its file then counts as put there by hand"
        yield listing(Severity.NOTE, text, unreadable)
    pending = [_sealed_by(layout, seal.with_suffix("")) for seal in paths if seal.suffix == ".pending"]
    if pending:
        text = f"{count(pending, 'publication')} under way or cut short; the next worker that wants it completes it"
        yield listing(Severity.NOTE, text, pending)


def _sealed_by(layout: Layout, seal: Path) -> str:
    return sealed_by(seal.relative_to(layout.seals).as_posix())
