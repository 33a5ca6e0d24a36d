"""Run one job from start to end. The only place where an error becomes a result."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from worker.base.text import count
from worker.engine.event_loop import Aside
from worker.error_reply import DETAILS, carried, failure, sentence, sentences
from worker.errors import (
    DeliveryError,
    FieldInvalid,
    FileUnusable,
    InternalError,
    ModelMissing,
    NodeFailed,
    OutputGone,
    WorkerError,
    WorkflowRejected,
)
from worker.graph.graph import declares, needed_nodes
from worker.graph.model_names import named_models, renamed, respellable_names, with_accents, with_slashes
from worker.graph.paths import check_paths
from worker.graph.rejection import missing_model, with_sent
from worker.job import Request
from worker.job_timings import JobTimings
from worker.logs import RedactingFilter
from worker.media.picture_formats import PictureFormat
from worker.workflows import Workflows

if TYPE_CHECKING:
    from collections.abc import Awaitable, Collection, Iterable, Mapping, Sequence

    from worker.engine.client import RunResult
    from worker.engine.engine import Engine
    from worker.engine.events import Progress
    from worker.graph.graph import Graph
    from worker.graph.model_names import NamedModel
    from worker.job import Result
    from worker.media.delivery import Delivery
    from worker.media.inputs import InputFiles, JobFiles
    from worker.models.download_queue import Waiting
    from worker.models.job_models import JobModels, Name
    from worker.settings import Settings
    from worker.spec import ModelSpec
    from worker.store.leases import JobUse
    from worker.warmup.warmup import Warmup

log = logging.getLogger(__name__)

Tell = Callable[[dict[str, Any]], None]
"""Receives a job's progress, from any thread. Only the latest counts."""

_SAY_EVERY_S = 10.0
_SHOWN_IDS = 10


def _tell_nobody(_: dict[str, Any]) -> None:
    """Ignore progress, because nobody can see it, as in RunPod's local API."""


def _not_waited_for() -> None:
    """Default `engine_free`: ignore the signal (the local API has no queue)."""


class JobHandler:
    """Takes a job as RunPod hands it out, and returns the result for RunPod."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        job_models: JobModels,
        inputs: InputFiles,
        delivery: Delivery,
        *,
        warmup: Warmup,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._job_models = job_models
        self._inputs = inputs
        self._workflows = Workflows(engine, settings.volume_path)
        self._delivery = delivery
        self._warmup = warmup
        self._redact = RedactingFilter(settings.secrets()).redact
        # ComfyUI runs one graph at a time anyway. One job at a time keeps their input files apart.
        self._turn = asyncio.Lock()

    async def handle(
        self, job: Mapping[str, Any], tell: Tell = _tell_nobody, engine_free: Callable[[], None] = _not_waited_for
    ) -> dict[str, Any]:
        """Return the job's result, or `{"error", "code", "retryable", "details"?}`. Report progress to `tell`.

        `engine_free` is called when the job's graph has run: the next job may come while this one's result is delivered. Only a
        cancellation is raised.
        """
        job_id, timings = str(job.get("id", "?")), JobTimings()
        log.info("job %s: started", job_id)
        try:
            aside = Aside(job.get("input"))
            around = Around(lambda progress: tell(carried(progress)), engine_free, timings, aside)
            result: dict[str, Any] = carried((await self._run(job, job_id, around)).to_dict())
            log.info("job %s: finished in %.2f s, %s", job_id, timings.total_s(), contents(result))
        except WorkerError as exc:
            result = failure(exc, self._redact)
            log.warning("job %s: failed after %.2f s: %s [%s]", job_id, timings.total_s(), result["error"], exc.code)
        except Exception:
            log.exception("job %s: failed after %.2f s by a defect of the worker", job_id, timings.total_s())
            result = failure(InternalError(), self._redact)
        except asyncio.CancelledError:
            log.info("job %s: cancelled after %.2f s", job_id, timings.total_s())
            raise
        if self.refreshes:
            result["refresh_worker"] = True
        return result

    @property
    def refreshes(self) -> bool:
        """Return whether each job is this worker's last: REFRESH_WORKER."""
        return self._settings.refresh_worker

    async def _run(self, job: Mapping[str, Any], job_id: str, around: Around) -> Result:
        request = await around.aside(Request.parse, job.get("input"))
        with self._inputs.of_job(request.files) as files, self._job_models.use() as use:
            try:
                return await self._run_request(request, files, job, job_id, replace(around, use=use))
            finally:
                self._delivery.job_ended()

    async def _run_request(
        self, request: Request, files: JobFiles, job: Mapping[str, Any], job_id: str, around: Around
    ) -> Result:
        await around.aside(files.check)
        given = await self._workflows.of(request, files, around.aside)
        graph, request = given.graph, replace(request, extra_pnginfo=given.extra_pnginfo)
        aside = given.aside
        await aside(check_paths, graph)
        check_outputs(graph, request.outputs)
        graph = await self._workflows.check_classes(graph)
        bucket = self._delivery.job_bucket(job.get("s3Config"))
        if bucket:
            await asyncio.to_thread(bucket.check_reachable)
        if names := await aside(respellable_names, graph):
            graph = renamed(graph, await aside(files.as_placed, names))
        with around.timings.step("models"):
            models = await self._as_written(await aside(named_models, graph))
            graph = await aside(with_slashes, graph, models)
            if around.use and not around.use.note(title for model in models for title in model.titles):
                await asyncio.to_thread(around.use.publish)  # before the look: whoever removes models looks after it moved one
            await self._ensure_models(graph, models, request, job_id, around.tell)
            if accented := by_name(model for model in models if not model.name.isascii()):
                graph = with_accents(graph, models, await asyncio.to_thread(self._job_models.respelled, accented))
        self._warmup.job(models)
        deliver = partial(
            self._delivery.deliver,
            job_id,
            nodes=request.outputs,
            previews=request.previews,
            bucket=bucket,
            pictures=picture_format(request),
        )
        try:
            run = await self._run_graph(graph, request, files, around)
        except NodeFailed as exc:
            return timed(await self._what_there_is(exc, deliver, job_id, around), request, around)
        self._warmup.ran(graph, models)
        if not self.refreshes:
            around.engine_free()
        deliver = partial(deliver, warnings=sentences(run.dropped, self._redact), silent=run.silent)
        try:
            with around.timings.step("delivering"):
                result = await deliver(run.outputs, cached=run.cached)
        except OutputGone as exc:
            if not exc.retryable:
                raise
            log.info("job %s: %s was cached, but its file is gone; running its node again", job_id, exc.filename)
            again = await self._run_again(graph, request, files, around, exc.nodes or frozenset(run.outputs))
            with around.timings.step("delivering"):
                result = await deliver(run.outputs | again.outputs)
        return timed(result, request, around, run.queued_s, run.node_s)

    async def _what_there_is(
        self, error: NodeFailed, deliver: Callable[..., Awaitable[Result]], job_id: str, around: Around
    ) -> Result:
        """Return what other nodes had saved before one failed, with the failure beside it, as worker-comfyui does.

        Raises the failure if there is nothing to deliver, or no place for it.
        """
        if not error.outputs:
            raise error
        if not self.refreshes:
            around.engine_free()
        try:
            with around.timings.step("delivering"):
                result = await deliver(error.outputs, warnings=[sentence(error.sentence, self._redact)])
        except (OutputGone, DeliveryError) as exc:
            raise error from exc
        if result.is_empty:
            raise error
        log.warning("job %s: %s; delivering what there is", job_id, result.warnings[0])
        return result

    async def _run_again(
        self, graph: Graph, request: Request, files: JobFiles, around: Around, nodes: Collection[str]
    ) -> RunResult:
        """Run these output nodes again, and no others."""
        roots = {node_id if node_id in graph else node_id.partition(".")[0] for node_id in nodes}
        return await self._run_graph(made_again(graph, roots, uuid.uuid4().hex), request, files, around, targets=roots)

    async def _run_graph(
        self, graph: Graph, request: Request, files: JobFiles, around: Around, targets: Collection[str] | None = None
    ) -> RunResult:
        """Run the graph, or only these outputs, with the job's files in place, when it is this job's turn."""
        key = request.comfy_org_api_key or self._settings.comfy_org_api_key
        extra_data: dict[str, Any] = {"api_key_comfy_org": key} if key else {}
        if request.extra_pnginfo is not None:
            extra_data["extra_pnginfo"] = request.extra_pnginfo
        timeout_s = min(request.timeout_s or math.inf, self._settings.job_timeout_s)
        with contextlib.ExitStack() as queueing:
            queueing.enter_context(around.timings.step("queueing"))
            async with self._turn:
                queueing.close()
                async with contextlib.AsyncExitStack() as stack:
                    with around.timings.step("inputs"):
                        await stack.enter_async_context(files.placed())
                    with around.timings.step("running"):
                        try:
                            run = await self._engine.run(
                                graph,
                                timeout_s=timeout_s,
                                extra_data=extra_data,
                                targets=targets,
                                on_progress=lambda step: around.tell(sampling_progress(step)),
                            )
                        except WorkflowRejected as exc:
                            exc.problems = with_sent(exc.problems, files.names)
                            raise
                        return replace(run, dropped=with_sent(run.dropped, files.names)) if run.dropped else run

    async def _ensure_models(
        self, graph: Graph, named: Sequence[NamedModel], request: Request, job_id: str, tell: Tell
    ) -> None:
        """Make the graph's models available. Download only missing models that this graph names.

        ComfyUI refuses a name without a known source. The exceptions: other models would be downloaded in vain first, or
        ComfyUI does not check the name, so that its node would run without the model.
        """
        if request.models is not None:
            await asyncio.to_thread(self._job_models.check_request, request.models)
        models, absent = await self._absent(graph, named)
        if not absent:
            return
        optional = [name for name in absent if all(model.optional for model in models[name])]
        guessed = [name for name in absent if all(model.guessed for model in models[name])]
        specs = await asyncio.to_thread(
            self._job_models.specs, absent, request.models, request.extra_pnginfo, optional=optional, guessed=guessed
        )
        known = [spec for spec in specs.values() if spec]
        nobodys = [name for name, spec in specs.items() if not (spec or name in optional)]
        unknown = [model for name in await self._nowhere(nobodys, guessed) for model in models[name]]
        if not known:
            unknown = await self._unchecked(graph, unknown)
        if unknown:
            raise ModelMissing([await self._missing_sentence(model, suggest=at < DETAILS) for at, model in enumerate(unknown)])
        if known:
            await self._fetch(known, job_id, tell)

    async def _missing_sentence(self, model: NamedModel, *, suggest: bool) -> str:
        choices = await self._choices(model) if suggest else ()
        return await asyncio.to_thread(missing_model, model, model.name, choices)

    async def _nowhere(self, names: Sequence[Name], guessed: Collection[Name]) -> list[Name]:
        """Return the names that no folder at all has, if their folder is only a guess."""
        anywhere = {name: ((), name[1]) for name in names if name in guessed}
        missing = await asyncio.to_thread(self._job_models.missing, tuple(anywhere.values())) if anywhere else []
        return [name for name in names if name not in anywhere or anywhere[name] in missing]

    async def _unchecked(self, graph: Graph, models: Sequence[NamedModel]) -> list[NamedModel]:
        """Return the models in rows that their class does not declare: ComfyUI checks no value there."""
        rows = [model for model in models if not isinstance(graph[model.node_id]["inputs"][model.input_name], str)]
        info = await self._engine.object_info({model.class_type for model in rows}) if rows else {}
        return [model for model in rows if model.class_type in info and not declares(info[model.class_type], model.input_name)]

    async def _as_written(self, models: Sequence[NamedModel]) -> Sequence[NamedModel]:
        """Return the models, with the backslash in a name if a file's name really contains it."""
        return [model.as_written() if model.written and await self._has_backslash(model) else model for model in models]

    async def _has_backslash(self, model: NamedModel) -> bool:
        real = model.as_written()
        if await asyncio.to_thread(self._job_models.located, by_name([real])):
            return True
        return not await asyncio.to_thread(self._job_models.located, by_name([model])) and await self._listed(real)

    async def _absent(
        self, graph: Graph, named: Sequence[NamedModel]
    ) -> tuple[Mapping[Name, Sequence[NamedModel]], list[Name]]:
        """Return the missing models, of those that the job runs with.

        Raises `FileUnusable` for one that is incomplete. ComfyUI is asked for the output nodes only if something is missing: a
        model that no output needs does not matter.
        """
        models = by_name(named)
        try:
            absent = await self._unseen(models)
            if not absent:
                return models, []
        except FileUnusable as exc:
            log.debug("%s; is it needed?", exc)
            absent = None
        needed = needed_nodes(graph, await self._outputs(graph))
        models = by_name(model for model in named if model.node_id in needed)
        if absent is None:
            absent = await self._unseen(models)
        return models, [name for name in absent if name in models]

    async def _unseen(self, models: Mapping[Name, Sequence[NamedModel]]) -> list[Name]:
        """Return those that are neither on the volume nor in ComfyUI's own folders."""
        missing = await asyncio.to_thread(self._job_models.missing, tuple(models)) if models else []
        return [name for name in missing if not any([await self._listed(model) for model in models[name]])]

    async def _outputs(self, graph: Graph) -> list[str]:
        """Return the graph's output nodes, and nodes of unknown classes: ComfyUI will report these itself."""
        info = await self._engine.object_info({node["class_type"] for node in graph.values()})
        unknown = {"output_node": True}
        return [node_id for node_id, node in graph.items() if info.get(node["class_type"], unknown).get("output_node")]

    async def _listed(self, model: NamedModel) -> bool:
        """Return whether ComfyUI sees it in one of its own folders, such as one from an extra_model_paths.yaml."""
        return model.name in await self._choices(model)

    async def _choices(self, model: NamedModel) -> Sequence[str]:
        """Return what ComfyUI lists for the input. If the class does not declare it, for a loader of the same folder."""
        found = await self._engine.choices(model.class_type, model.input_name)
        if found is None and model.loader:
            found = await self._engine.choices(*model.loader)
        return found or ()

    async def _fetch(self, specs: Sequence[ModelSpec], job_id: str, tell: Tell) -> None:
        log.info("job %s: waits for %s", job_id, ", ".join(map(str, specs)))
        cancel = threading.Event()
        said = time.monotonic()

        def on_progress(waiting: Waiting) -> None:
            nonlocal said
            tell(download_progress(waiting))
            if time.monotonic() - said > _SAY_EVERY_S:
                said = time.monotonic()
                log.info("job %s: waits for %s", job_id, waiting)

        try:
            with self._warmup.standing_back():
                await asyncio.to_thread(self._job_models.fetch, specs, cancel, on_progress)
        finally:
            cancel.set()


def timed(
    result: Result, request: Request, around: Around, queued_s: float = 0.0, node_s: Mapping[str, float] | None = None
) -> Result:
    """Return the result with its timings, if the client asked for them."""
    return replace(result, timings=around.timings.to_dict(queued_s, node_s or {})) if request.return_timings else result


def picture_format(request: Request) -> PictureFormat | None:
    """Return the format in which the request wants its PNGs, or None."""
    return PictureFormat(request.output_format, request.quality) if request.output_format else None


def check_outputs(graph: Graph, node_ids: Collection[str] | None) -> None:
    """Refuse `outputs` that no node of the graph could have, before the GPU is used. Raises `FieldInvalid`.

    A node that others are expanded from while the graph runs has outputs under ids that begin with its own, as `5.0.1`.
    """
    unknown = [node_id for node_id in node_ids or () if node_id not in graph and node_id.partition(".")[0] not in graph]
    if unknown:
        shown = ", ".join(sorted(unknown)[:_SHOWN_IDS])
        raise FieldInvalid("outputs", f"names nodes that the workflow does not have: {shown}")


def by_name(models: Iterable[NamedModel]) -> dict[Name, list[NamedModel]]:
    """Map the supply's names to the models that use them."""
    found: dict[Name, list[NamedModel]] = {}
    for model in models:
        found.setdefault((model.folders, model.file_names), []).append(model)
    return found


@dataclass(frozen=True, slots=True)
class Around:
    """A job's context: the listener of its progress, the waiter for the engine, its clock, and where it is read."""

    tell: Tell
    engine_free: Callable[[], None]
    timings: JobTimings
    aside: Aside
    use: JobUse | None = None
    """What protects its models from removal."""


def made_again(graph: Graph, nodes: Collection[str], nonce: str) -> Graph:
    """Return the graph with an extra input in these nodes, which only ComfyUI's cache notices."""
    return {
        node_id: {**node, "inputs": {**node["inputs"], "run_again": nonce}} if node_id in nodes else node
        for node_id, node in graph.items()
    }


def sampling_progress(step: Progress) -> dict[str, Any]:
    """Return what a client sees while a node works: step `value` of `max` in the node with this id."""
    percent = 100 * step.value / step.maximum if step.maximum else 0.0
    return {"type": "progress", "value": step.value, "max": step.maximum, "percent": round(percent, 1), "node": step.node_id}


def contents(result: Mapping[str, Any]) -> str:
    """Return what a result holds, for the log: `2 images, 1 text`."""
    kinds = {"images": "image", "videos": "video", "audio": "audio file", "text": "text", "files": "file"}
    return ", ".join(count(result[key], kind) for key, kind in kinds.items() if result.get(key)) or "no outputs"


def download_progress(waiting: Waiting) -> dict[str, Any]:
    """Return what a client sees while a job waits for models: total bytes and bytes a second, and a line for each model."""
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
