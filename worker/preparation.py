"""What a job needs before it can run: its graph, and its models where ComfyUI finds them. Touches nothing itself."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from worker.engine.definitions import declares_input
from worker.error_reply import DETAILS
from worker.errors import FieldInvalid, FileUnusable, ModelMissing
from worker.graph.graph import needed_nodes
from worker.graph.model_names import named_models, renamed, respellable_names, with_accents, with_slashes
from worker.graph.paths import check_paths
from worker.graph.preflight import runnable_outputs
from worker.graph.rejection import missing_model_sentence

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from worker.engine.definitions import DefinitionSource
    from worker.engine.event_loop import Milestone
    from worker.graph.graph import Graph
    from worker.graph.model_names import NamedModel
    from worker.job import Request
    from worker.media.inputs import JobInputFiles
    from worker.model_spec import ModelSpec
    from worker.models.download_queue import JobWait
    from worker.models.job_models import JobModels, Name
    from worker.request_workflow import GraphToRun, RequestWorkflow, Workflows
    from worker.store.leases import JobUse
    from worker.warmup.warmup import Warmup

    Tell = Callable[[dict[str, Any]], None]
    """Receives a job's progress, from any thread. Only the latest counts."""

log = logging.getLogger(__name__)

_SAY_EVERY_S = 10.0
_SHOWN_IDS = 10


@dataclass(frozen=True, slots=True)
class PreparedJob:
    """A job after its preparation: a graph, and the models that it names, which are there.

    Where ComfyUI will refuse the graph whatever files there are, `is_refused` is set and nothing was downloaded for it:
    `withheld` are the models that would have been.
    """

    graph: Graph
    models: Sequence[NamedModel]
    is_refused: bool = False
    withheld: Sequence[NamedModel] = ()


@dataclass(frozen=True, slots=True)
class JobToPrepare:
    """A job that is to be prepared, and who hears of its progress."""

    id: str
    source: RequestWorkflow
    request: Request
    files: JobInputFiles
    tell: Tell
    use: JobUse | None = None
    """What protects its models from removal."""


@dataclass(frozen=True, slots=True)
class PreparationParts:
    """What prepares every job. The models are `linked` where ComfyUI finds them a moment after the start."""

    workflows: Workflows
    job_models: JobModels
    warmup: Warmup
    linked: Milestone


class Preparation:
    """Prepares one job, by what `answers` says of ComfyUI's node classes: ComfyUI itself, or what one said before."""

    def __init__(self, answers: DefinitionSource, parts: PreparationParts, job: JobToPrepare) -> None:
        self._answers = answers
        self._workflows = parts.workflows
        self._job_models = parts.job_models
        self._warmup = parts.warmup
        self._linked = parts.linked
        self._job = job
        self._judged: tuple[Graph, list[str]] | None = None

    async def graph(self) -> GraphToRun:
        """Return the graph, checked as far as that needs no model. Raises a `RequestError`."""
        job, aside = self._job, self._job.source.aside
        given = await self._workflows.graph_of(job.source, job.request, self._answers)
        await aside(check_paths, given.graph)
        check_outputs(given.graph, job.request.outputs)
        graph = await self._workflows.check_classes(given.graph, self._answers)
        if names := await aside(respellable_names, graph):
            graph = renamed(graph, await aside(job.files.as_placed, names))
        return replace(given, graph=graph)

    async def is_refused(self, graph: Graph) -> bool:
        """Return whether ComfyUI refuses the graph whatever files there are."""
        return not await self._outputs(graph)

    async def models(self, given: GraphToRun, *, whatever: bool = False) -> PreparedJob:
        """Return the graph with the names of its models as they are on the disk, once they are all there.

        `whatever` says that ComfyUI takes a graph that would be refused by its own definitions.
        """
        await self._linked.wait()
        aside, files = self._job.source.aside, self._job.files
        models = await self._as_written(await aside(named_models, given.graph))
        graph = await aside(with_slashes, given.graph, models)
        use = self._job.use
        if use and not use.note(title for model in models for title in model.titles):
            await asyncio.to_thread(use.publish)  # before the look: whoever removes models looks after it moved one
        needed, absent = await self._absent(graph, models)
        is_refused = False
        if not whatever and (absent or files.has_addresses or self._warmup.is_new(models)):
            is_refused = await self.is_refused(graph)
        if is_refused:
            return PreparedJob(
                graph, models, is_refused=True, withheld=await self._withheld(needed, absent, given.extra_pnginfo)
            )
        if absent:
            await self._fetch_missing(graph, needed, absent, given.extra_pnginfo)
        if accented := models_by_name(model for model in models if not model.name.isascii()):
            graph = with_accents(graph, models, await asyncio.to_thread(self._job_models.respelled, accented))
        return PreparedJob(graph, models)

    async def _withheld(
        self, models: Mapping[Name, Sequence[NamedModel]], absent: Sequence[Name], embedded: object
    ) -> Sequence[NamedModel]:
        """Return those of the missing models that have a known source."""
        if not absent:
            return ()
        specs = await asyncio.to_thread(
            self._job_models.specs, absent, self._job.request.models, embedded, optional=absent, guessed=()
        )
        return [model for name, spec in specs.items() if spec for model in models[name]]

    async def _fetch_missing(
        self, graph: Graph, models: Mapping[Name, Sequence[NamedModel]], absent: Sequence[Name], embedded: object
    ) -> None:
        """Download the missing models.

        ComfyUI refuses a name without a known source. The exceptions: other models would be downloaded in vain first, or
        ComfyUI does not check the name, so that its node would run without the model.
        """
        optional = [name for name in absent if all(model.optional for model in models[name])]
        guessed = [name for name in absent if all(model.guessed for model in models[name])]
        specs = await asyncio.to_thread(
            self._job_models.specs, absent, self._job.request.models, embedded, optional=optional, guessed=guessed
        )
        known = [spec for spec in specs.values() if spec]
        nobodys = [name for name, spec in specs.items() if not (spec or name in optional)]
        unknown = [model for name in await self._nowhere(nobodys, guessed) for model in models[name]]
        if not known:
            unknown = await self._unchecked(graph, unknown)
        if unknown:
            raise ModelMissing([await self._missing_sentence(model, suggest=at < DETAILS) for at, model in enumerate(unknown)])
        if known:
            await self._fetch(known)

    async def _missing_sentence(self, model: NamedModel, *, suggest: bool) -> str:
        choices = await self._choices(model) if suggest else ()
        return await asyncio.to_thread(missing_model_sentence, model, model.name, choices)

    async def _nowhere(self, names: Sequence[Name], guessed: Collection[Name]) -> list[Name]:
        """Return the names that no folder at all has, if their folder is only a guess."""
        anywhere = {name: ((), name[1]) for name in names if name in guessed}
        missing = await asyncio.to_thread(self._job_models.missing, tuple(anywhere.values())) if anywhere else []
        return [name for name in names if name not in anywhere or anywhere[name] in missing]

    async def _unchecked(self, graph: Graph, models: Sequence[NamedModel]) -> list[NamedModel]:
        """Return the models in rows that their class does not declare: ComfyUI checks no value there."""
        rows = [model for model in models if not isinstance(graph[model.node_id]["inputs"][model.input_name], str)]
        info = await self._answers.object_info({model.class_type for model in rows}) if rows else {}
        return [
            model for model in rows if model.class_type in info and not declares_input(info[model.class_type], model.input_name)
        ]

    async def _as_written(self, models: Sequence[NamedModel]) -> Sequence[NamedModel]:
        """Return the models, with the backslash in a name if a file's name really contains it."""
        return [model.as_written() if model.written and await self._has_backslash(model) else model for model in models]

    async def _has_backslash(self, model: NamedModel) -> bool:
        real = model.as_written()
        if await asyncio.to_thread(self._job_models.located, models_by_name([real])):
            return True
        return not await asyncio.to_thread(self._job_models.located, models_by_name([model])) and await self._listed(real)

    async def _absent(
        self, graph: Graph, named: Sequence[NamedModel]
    ) -> tuple[Mapping[Name, Sequence[NamedModel]], list[Name]]:
        """Return the missing models, of those that the job runs with.

        Raises `FileUnusable` for one that is incomplete. ComfyUI is asked for the output nodes only if something is missing: a
        model that no output needs does not matter.
        """
        models = models_by_name(named)
        try:
            absent = await self._unseen(models)
            if not absent:
                return models, []
        except FileUnusable as exc:
            log.debug("%s; is it needed?", exc)
            absent = None
        outputs = await self._outputs(graph) or list(graph)
        needed = needed_nodes(graph, outputs)
        models = models_by_name(model for model in named if model.node_id in needed)
        if absent is None:
            absent = await self._unseen(models)
        return models, [name for name in absent if name in models]

    async def _unseen(self, models: Mapping[Name, Sequence[NamedModel]]) -> list[Name]:
        """Return those that are neither on the volume nor in ComfyUI's own folders."""
        missing = await asyncio.to_thread(self._job_models.missing, tuple(models)) if models else []
        return [name for name in missing if not any([await self._listed(model) for model in models[name]])]

    async def _outputs(self, graph: Graph) -> list[str]:
        """Return the output nodes that ComfyUI may run, by its definitions. It reports nodes of unknown classes itself."""
        if self._judged is None or self._judged[0] is not graph:
            known = await self._answers.definitions({node["class_type"] for node in graph.values()})
            release = (await self._answers.versions()).comfyui
            self._judged = graph, await self._job.source.aside(runnable_outputs, graph, known, release)
        return self._judged[1]

    async def _listed(self, model: NamedModel) -> bool:
        """Return whether ComfyUI sees it in one of its own folders, such as one from an extra_model_paths.yaml."""
        return model.name in await self._choices(model)

    async def _choices(self, model: NamedModel) -> Sequence[str]:
        """Return what ComfyUI lists for the input. If the class does not declare it, for a loader of the same folder."""
        found = await self._answers.choices(model.class_type, model.input_name)
        if found is None and model.loader:
            found = await self._answers.choices(*model.loader)
        return found or ()

    async def _fetch(self, specs: Sequence[ModelSpec]) -> None:
        job_id = self._job.id
        log.info("job %s: waits for %s", job_id, ", ".join(map(str, specs)))
        cancel = threading.Event()
        said = time.monotonic()

        def on_progress(waiting: JobWait) -> None:
            nonlocal said
            self._job.tell(download_progress(waiting))
            if time.monotonic() - said > _SAY_EVERY_S:
                said = time.monotonic()
                log.info("job %s: waits for %s", job_id, waiting)

        try:
            with self._warmup.standing_back():
                await asyncio.to_thread(self._job_models.fetch, specs, cancel, on_progress)
        finally:
            cancel.set()
        self._warmup.fetched()


def check_outputs(graph: Graph, node_ids: Collection[str] | None) -> None:
    """While a job is prepared, refuse `outputs` that no node of the graph could have. Raises `FieldInvalid`.

    A node that others are expanded from while the graph runs has outputs under ids that begin with its own, as `5.0.1`.
    """
    unknown = [node_id for node_id in node_ids or () if node_id not in graph and node_id.partition(".")[0] not in graph]
    if unknown:
        shown = ", ".join(sorted(unknown)[:_SHOWN_IDS])
        raise FieldInvalid("outputs", f"names nodes that the workflow does not have: {shown}")


def models_by_name(models: Iterable[NamedModel]) -> dict[Name, list[NamedModel]]:
    """Map each name that `JobModels` knows to the models of the job to prepare that use it."""
    found: dict[Name, list[NamedModel]] = {}
    for model in models:
        found.setdefault((model.folders, model.file_names), []).append(model)
    return found


def download_progress(waiting: JobWait) -> dict[str, Any]:
    """Return what a client sees while a job is prepared and waits for models: total bytes, bytes a second, a line for each."""
    percent = 100 * waiting.done_bytes / waiting.total_bytes if waiting.total_bytes else 0.0
    return {
        "type": "download",
        "value": waiting.done_bytes,
        "max": waiting.total_bytes,
        "percent": round(percent, 1),
        "bytes_per_s": round(waiting.bytes_per_s),
        "file": waiting.models[0][0],
        "text": str(waiting),
    }
