"""Read the user's document, a workflow and what came with it: JSON, a request, a picture or video. Reads files."""

from __future__ import annotations

import codecs
import errno
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from worker.comfyui_data import known
from worker.editor.convert import is_saved_workflow
from worker.editor.embedded_models import embedded_models
from worker.editor.embedded_workflow import embedded_workflow, json_fault
from worker.errors import FieldInvalid, NoWorkflowInFile, UnsafePath, WorkerError
from worker.graph.graph import needed_nodes, parse_graph, without_wrapper
from worker.graph.model_names import named_models
from worker.graph.paths import check_paths
from worker.graph.rejection import node_origins, unknown_nodes
from worker.job import Request
from worker.media.inputs import base64_pieces
from worker.plan.naming_graph import naming_graphs
from worker.volume_workflows import is_workflow_name

if TYPE_CHECKING:
    from worker.errors import UnknownNodes
    from worker.graph.graph import Graph
    from worker.graph.model_names import NamedModel


Saved = Callable[[str], dict[str, Any]]
"""Returns the workflow of a name on the volume, or raises."""


class UnreadableDocument(Exception):  # noqa: N818 - a command prints it and ends
    """Why there is no document, as the end of a sentence."""


def read_document(path: str, saved: Saved | None = None) -> object:
    """Return the JSON of a file, of standard input (`-`), or of ComfyUI's metadata in a picture or video.

    If there is no such file, `saved` looks it up as the name of a workflow. Raises `UnreadableDocument`, which says what
    would be right.
    """
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as exc:
        if saved is not None and isinstance(exc, FileNotFoundError):
            return _from_saved(path, saved)
        raise UnreadableDocument(f"it cannot be read: {exc.strerror or exc}") from None
    if carried := None if is_text(data) else embedded_workflow(data):
        found = {"prompt": carried.prompt, "workflow": carried.workflow}
        return {key: value for key, value in found.items() if value is not None}
    if not is_text(data):
        raise UnreadableDocument(
            "it contains no workflow: give a JSON, or a PNG, WEBP, MP4 or WEBM that ComfyUI saved with its metadata"
        )
    try:
        return json.loads(data.decode(json.detect_encoding(data)))
    except (ValueError, RecursionError) as exc:
        raise UnreadableDocument(
            f"it is no JSON ({str(exc).partition(';')[0]}): give a workflow as ComfyUI saves or exports it"
        ) from None


def installed_release(comfyui_dir: Path) -> str | None:
    """Return the release of the ComfyUI in this folder, for which a document is read, or None."""
    try:
        text = (comfyui_dir / "comfyui_version.py").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    found = re.search(r'^__version__ = "([0-9.]+)"', text, re.MULTILINE)
    return found[1] if found else None


def _from_saved(name: str, saved: Saved) -> object:
    try:
        return saved(name)
    except UnsafePath:
        raise UnreadableDocument(f"it cannot be read: {os.strerror(errno.ENOENT)}") from None
    except WorkerError as exc:
        raise UnreadableDocument(f"it is no file here. {exc}") from None


def is_text(data: bytes) -> bool:
    """Return whether a document's file is text, as JSON and every manifest is and no picture or video."""
    if data[:2] in {codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE}:
        return True
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in data


@dataclass(frozen=True, slots=True)
class PlanDocument:
    """A document's content: the workflow, the request's `models`, and the editor's form of the workflow, if any."""

    workflow: object
    models: object = None
    metadata: object = None

    @classmethod
    def read(cls, document: object, saved: Saved | None = None) -> PlanDocument:
        """Parse a workflow, a job (`{"input": {...}}`), its input, a body of `POST /prompt`, or the metadata of a PNG.

        `saved` looks up the workflow that a request names.
        """
        if isinstance(document, dict):
            if _wraps(document, "input"):
                return cls._of_request(document["input"], saved)
            for key in ("prompt", "output"):
                if _wraps(document, key):
                    return cls(document[key], metadata=document)
            if _wraps(document, "workflow") or isinstance(document.get("workflow"), str):
                return cls._of_request(document, saved)
        return cls(document, metadata=document)

    @classmethod
    def _of_request(cls, value: object, saved: Saved | None) -> PlanDocument:
        request = Request.parse(value)
        workflow = saved(str(request.workflow)) if saved and is_workflow_name(request.workflow) else request.workflow
        workflow = without_wrapper(_workflow_in_file(request, request.workflow_from) if request.workflow_from else workflow)
        metadata = request.extra_pnginfo if embedded_models(request.extra_pnginfo) else workflow
        return cls(workflow, request.models, metadata)

    def graphs(self, release: str | None = None) -> list[Graph]:
        """Return the graphs that a job may run. `release` is that of the ComfyUI that runs it, or None.

        A workflow in the editor's format gives two if the editor's dialects differ, and it may be of either. Raises a
        `RequestError` for what the worker would refuse.
        """
        graphs = (
            naming_graphs(self.workflow, release) if is_saved_workflow(self.workflow) else (without_wrapper(self.workflow),)
        )
        return [parse_graph(graph) for graph in graphs]

    def lacking(self, release: str | None = None) -> UnknownNodes | None:
        """Return the classes that this release of ComfyUI, or the newest recorded one, lacks. Packs' classes do not count.

        Nothing is known about a release that was not recorded.
        """
        release = release or known().newest
        if release not in known().releases:
            return None
        nodes = {node.class_type: node for graph in self.graphs(release) for node in node_origins(graph)}
        missing = [node for node in nodes.values() if node.is_own and not known().has(node.class_type, release)]
        return unknown_nodes(missing, release) if missing else None

    def names(self, release: str | None = None) -> list[tuple[NamedModel, ...]]:
        """Return the models that a job may need, each with every input that names it. `release` as for `graphs`."""
        found: dict[object, dict[NamedModel, None]] = {}
        for graph in self.graphs(release):
            check_paths(graph)
            running = _may_run(graph)
            for model in named_models(graph):
                if model.node_id in running:
                    found.setdefault((model.folders, model.file_names), {})[model] = None
        return [tuple(nodes) for nodes in found.values()]


def _workflow_in_file(request: Request, name: str) -> object:
    """Return the workflow in a file that the document, a request, contains. Raises a `RequestError`."""
    data = next((file.data for file in reversed(request.files) if file.name == name and file.data is not None), None)
    if data is None:
        raise FieldInvalid("workflow_from", "must be the name of a file whose bytes are in the request; a plan fetches none")
    content = b"".join(base64_pieces(name, data))
    found = embedded_workflow(content)
    if found is None:
        raise NoWorkflowInFile(name, json_fault(name, content))
    return found.best


_LOADER: Final = re.compile(r"(?<!up)(?<!down)loader", re.IGNORECASE)


def _may_run(graph: Graph) -> frozenset[str]:
    """Return the nodes that an output of the document may need, without an engine: an unknown class may be an output.

    Return all of them if there can be no output: a piece of a workflow is planned for its models.
    """
    outputs = [node_id for node_id, node in graph.items() if not _is_no_output(node["class_type"])]
    return needed_nodes(graph, outputs) if outputs else frozenset(graph)


def _is_no_output(class_type: str) -> bool:
    # None of the 57 outputs among the 849 classes of ComfyUI 0.3.75 and 0.29 is called a loader. In packs, uploaders and
    # downloaders are outputs.
    return known().is_no_output(class_type) or _LOADER.search(class_type) is not None


def _wraps(document: dict[str, Any], key: str) -> bool:
    inner = document.get(key)
    return isinstance(inner, dict) and "class_type" not in inner and not isinstance(document.get("nodes"), list)
