"""Find weights where no worker looks. Touches the disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from worker.base.text import count
from worker.comfyui_data import known
from worker.doctor.findings import Severity, listing, note, ok, problem
from worker.doctor.folders import names_in
from worker.spec import WEIGHT_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from worker.doctor.findings import Finding
    from worker.store.layout import Layout

_WALKED_FOLDERS: Final = 5_000
_WALKED_DEPTH: Final = 6
_NEVER_MODELS: Final = frozenset({"custom_nodes", "site-packages", "dist-packages", "node_modules", "__pycache__", "outputs"})
_SURE_SUFFIXES: Final = (".safetensors", ".sft", ".gguf", ".ckpt")


def misplaced(layout: Layout, comfyui_models: Path) -> Iterator[Finding]:
    """Yield weights where no worker looks."""
    ours = known().folders.union(names_in(layout.models), names_in(comfyui_models))
    groups: dict[tuple[str, str], list[str]] = {}
    stray: list[str] = []
    walk = _Walk(layout)
    for parts, names in walk:
        if belongs := _belongs(parts, ours):
            found = groups.setdefault(belongs, [])
            found += ["/".join((*parts, name)) for name in names if name.lower().endswith(WEIGHT_SUFFIXES)]
        else:
            stray += ["/".join((*parts, name)) for name in names if name.lower().endswith(_SURE_SUFFIXES)]
    groups = {key: found for key, found in groups.items() if found}
    for (group, folder), found in sorted(groups.items()):
        to = layout.models / folder
        yield problem(f"{count(found, 'model file')} in {group}/, where no worker looks: move to {to}/.", found)
    if stray:
        text = f"{count(stray, 'model file')} outside models/, where no worker looks; move those that workflows use"
        yield listing(Severity.NOTE, text, stray)
    if walk.cut_short:
        yield note(f"Only the first {_WALKED_FOLDERS} folders outside models/ were looked at.")
    if not (groups or stray):
        yield ok("no weights outside models/")


def _belongs(parts: tuple[str, ...], known: Collection[str]) -> tuple[str, str] | None:
    """Return the folder with models of a kind, and that kind. None if the path does not tell the kind."""
    for at in range(len(parts) - 1, -1, -1):
        if parts[at] in known and (at == 0 or parts[at - 1] == "models"):
            return "/".join(parts[: at + 1]), parts[at]
    return None


class _Walk:
    """The folders of a volume outside `models/` as (parts of the path, names of files), with limits."""

    def __init__(self, layout: Layout) -> None:
        self._root = os.path.realpath(layout.root)
        self._leave_out = {os.path.realpath(place) for place in (layout.models, layout.state, layout.host_cache.parent)}
        self.cut_short = False

    def __iter__(self) -> Iterator[tuple[tuple[str, ...], list[str]]]:
        for walked, (folder, below, names) in enumerate(os.walk(self._root)):
            if walked == _WALKED_FOLDERS:
                self.cut_short = True
                return
            parts = Path(folder).relative_to(self._root).parts
            deep = len(parts) >= _WALKED_DEPTH or "pyvenv.cfg" in names
            below[:] = [] if deep else sorted(name for name in below if self._enters(folder, name))
            yield parts, names

    def _enters(self, folder: str, name: str) -> bool:
        return name[0] != "." and name not in _NEVER_MODELS and f"{folder}/{name}" not in self._leave_out
