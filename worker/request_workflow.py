"""Turn a request's workflow, in any form, into the graph that runs. Touches nothing itself."""

from __future__ import annotations

import asyncio
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from worker.editor.embedded_workflow import embedded_workflow, json_fault
from worker.editor.saved_workflow import is_saved_workflow
from worker.engine.event_loop import LoopAside, is_large_json
from worker.errors import FieldInvalid, NoWorkflowInFile, UiWorkflowInvalid
from worker.graph.graph import is_finite, parse_graph, without_wrapper
from worker.graph.overrides import apply_overrides, reseeded
from worker.graph.rejection import node_origins, unknown_nodes
from worker.job import check_depth
from worker.volume_workflows import is_workflow_name, read_workflow

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from worker.editor.convert import Control
    from worker.engine.definitions import DefinitionSource
    from worker.graph.graph import Graph
    from worker.job import Request
    from worker.media.inputs import JobInputFiles


@dataclass(frozen=True, slots=True)
class RequestWorkflow:
    """A request's workflow as it came, what came with it for ComfyUI to embed, and where large requests are processed."""

    value: object
    extra_pnginfo: dict[str, Any] | None
    aside: LoopAside

    @property
    def is_saved(self) -> bool:
        """Return whether it is in the editor's format, which only ComfyUI's definitions make a graph of."""
        return is_saved_workflow(self.value)


@dataclass(frozen=True, slots=True)
class GraphToRun:
    """The graph to run, made from a request's workflow, and what ComfyUI embeds in its pictures."""

    graph: Graph
    extra_pnginfo: dict[str, Any] | None


class Workflows:
    """Turns requests' workflows into graphs: in API format, in the editor's format, and in files that contain either."""

    def __init__(self, volume: Path) -> None:
        self._volume = volume

    async def read(self, request: Request, files: JobInputFiles, aside: LoopAside) -> RequestWorkflow:
        """Return the request's workflow, from wherever it is.

        Raises a `RequestError`. Raises `InputError` if the file that contains the workflow is unavailable, and `VolumeFailed`
        if a named one cannot be read.
        """
        value, pnginfo = request.workflow, request.extra_pnginfo
        if request.workflow_from is not None:
            value, carried = await _carried(request, request.workflow_from, files)
            pnginfo = pnginfo or ({"workflow": carried} if carried else None)
        elif is_workflow_name(value):
            name, value = str(value), await asyncio.to_thread(read_workflow, self._volume, str(value))
            check_depth(value, f"The workflow '{name}'")
        if value is not request.workflow and is_large_json(value):
            aside = LoopAside(value)
        return RequestWorkflow(without_wrapper(value), pnginfo, aside)

    async def graph_of(self, source: RequestWorkflow, request: Request, answers: DefinitionSource) -> GraphToRun:
        """Return the graph with the request's seeds and overrides applied. The request itself is not changed.

        Raises a `RequestError`: nothing is guessed. `answers` is asked for a workflow in the editor's format only.
        """
        value, pnginfo, aside = source.value, source.extra_pnginfo, source.aside
        controls: Sequence[Control] = ()
        if source.is_saved:
            graph, controls = await self._converted(value, aside, answers)
            # As the editor does: the picture can be dropped into it again, and the models' addresses are in there.
            pnginfo = pnginfo or {"workflow": value}
            if not await aside(is_finite, pnginfo):
                raise UiWorkflowInvalid("a number in it is NaN or infinite")
        else:
            graph = await aside(parse_graph, value)
        if request.seed is not None or request.set:
            graph = await aside(_changed, graph, controls, request)
        return GraphToRun(graph, pnginfo)

    async def check_classes(self, graph: Graph, answers: DefinitionSource) -> Graph:
        """Return the graph if ComfyUI has all its node classes. It refuses any other graph, even if a node is unused.

        Raises `UnknownNodes` with all missing classes. If ComfyUI replaces a node's class, the node gets the `_meta` without
        which ComfyUI 0.33.0 fails.
        """
        lacking, replaced = await answers.lacks({node["class_type"] for node in graph.values()})
        if lacking:
            raise unknown_nodes(node_origins(graph, lacking), (await answers.versions()).comfyui)
        if not replaced:
            return graph
        return {key: {"_meta": {}, **node} if node["class_type"] in replaced else node for key, node in graph.items()}

    async def _converted(
        self,
        ui: Any,  # noqa: ANN401 - what the editor saved
        aside: LoopAside,
        answers: DefinitionSource,
    ) -> tuple[Graph, Sequence[Control]]:
        # Jobs in API format never need it. It would add 2,000 lines to every cold start.
        await asyncio.to_thread(importlib.import_module, "worker.editor.convert")
        from worker.editor.convert import classes_to_convert, convert  # noqa: PLC0415 - imported above, away from the event loop

        needed = await aside(classes_to_convert, ui)
        info, versions = await asyncio.gather(answers.object_info(needed), answers.versions())
        converted = await asyncio.to_thread(convert, ui, info, frontend=versions.frontend, comfyui=versions.comfyui)
        return await aside(parse_graph, converted.graph), converted.controls


def _changed(graph: Graph, controls: Sequence[Control], request: Request) -> Graph:
    if request.seed is not None:
        graph = reseeded(graph, controls, request.seed)
    return parse_graph(apply_overrides(graph, request.set) if request.set else graph)


async def _carried(request: Request, name: str, files: JobInputFiles) -> tuple[object, Mapping[str, Any] | None]:
    if not any(file.name == name for file in request.files):
        raise FieldInvalid("workflow_from", "must be the name of one of the job's 'images' or 'files'")
    found = await files.look_into(name, lambda data: embedded_workflow(data) or json_fault(name, data))
    if isinstance(found, str):
        raise NoWorkflowInFile(name, found)
    for value in (found.prompt, found.workflow):
        await asyncio.to_thread(check_depth, value, f"The workflow in '{name}'")
    # A number outside JSON would be in the pictures, and nobody could read them again.
    return found.best, found.workflow if await asyncio.to_thread(is_finite, found.workflow) else None
