"""Read workflows that are stored on the volume and requested by name. Touches the disk."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from worker.base.text import unicode_forms
from worker.editor.embedded_workflow import MAX_TEXT_BYTES, embedded_workflow, json_fault
from worker.errors import NoWorkflowInFile, UnsafePath, VolumeFailed, WorkflowUnknown
from worker.store.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Iterator

_ABSENT: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG})
# Names are listed for a sentence. A folder with more is not listed to the end.
_LISTED: Final = 1000


def is_workflow_name(workflow: object) -> bool:
    """Return whether a request names a workflow on the volume: a text that is not the JSON of an object."""
    return isinstance(workflow, str) and not workflow.lstrip().startswith("{")


def read_workflow(volume: Path, name: str) -> dict[str, Any]:
    """Return the volume's workflow of this name, in either format.

    Raises `UnsafePath` for a name that leaves the folder, `WorkflowUnknown` with the existing names, `NoWorkflowInFile` and
    `VolumeFailed`.
    """
    data = workflow_bytes(volume, name)
    if data is None:
        raise WorkflowUnknown(name, workflow_names(volume), taken=os.path.lexists(Layout(volume).workflow(name)))
    return decode_workflow(name, data)


def decode_workflow(name: str, data: bytes) -> dict[str, Any]:
    """Return the workflow in a file of the volume. Raises `NoWorkflowInFile`."""
    found = embedded_workflow(data)
    if found is None:
        file = f"{name.removesuffix('.json')}.json"
        raise NoWorkflowInFile(file, json_fault(file, data))
    return found.best


def workflow_bytes(volume: Path, name: str) -> bytes | None:
    """Return the file of the volume's workflow of this name, with accents in either form. None if no regular file is there.

    Raises `UnsafePath` and `VolumeFailed`.
    """
    layout = Layout(volume)
    found = (_file_bytes(layout, layout.workflow(form), name) for form in unicode_forms(name))
    return next((data for data in found if data is not None), None)


def _file_bytes(layout: Layout, path: Path, name: str) -> bytes | None:
    if not os.path.realpath(path).startswith(f"{os.path.realpath(layout.workflows)}{os.sep}"):
        raise UnsafePath("The workflow's name, through a link,", name)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO waits for its writer
            return None
        with path.open("rb") as stream:
            return stream.read(MAX_TEXT_BYTES + 1)
    except OSError as exc:
        if exc.errno in _ABSENT:
            return None
        raise VolumeFailed(path, exc.strerror or str(exc)) from exc


def workflow_names(volume: Path) -> list[str]:
    """Return the names of the workflows on the volume, sorted."""
    return sorted(name for name, _ in zip(_names(Layout(volume).workflows), range(_LISTED), strict=False))


def all_workflows(volume: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the bytes of every workflow on the volume. Raises `VolumeFailed`."""
    for name in _names(Layout(volume).workflows):
        with contextlib.suppress(UnsafePath):  # nobody can ask for it
            if (data := workflow_bytes(volume, name)) is not None:
                yield name, data


def _names(folder: Path) -> Iterator[str]:
    for above, _, files in os.walk(folder):
        for file in files:
            if file.endswith(".json"):
                yield (Path(above) / file).relative_to(folder).as_posix().removesuffix(".json")
