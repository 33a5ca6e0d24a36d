"""Run one job from start to end. The only place where an error becomes a result."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import uuid
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from worker.base.text import encodable
from worker.engine.event_loop import LoopAside
from worker.error_reply import error_reply, reply_sentence, reply_sentences
from worker.errors import (
    DeliveryError,
    InternalError,
    NodeFailed,
    OutputGone,
    WorkerError,
    WorkflowRejected,
)
from worker.graph.graph import with_inputs
from worker.graph.model_names import named_models
from worker.graph.rejection import with_sent_files
from worker.job import Request, result_contents
from worker.job_timings import JobTimings, with_timings
from worker.logs import RedactingFilter
from worker.media.picture_formats import requested_format
from worker.preparation import JobToPrepare, Preparation, PreparationParts
from worker.request_workflow import Workflows

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping

    from worker.engine.client import RunResult
    from worker.engine.definitions import StoredDefinitions
    from worker.engine.engine import Engine
    from worker.engine.event_loop import BootMilestones
    from worker.engine.events import NodeProgress
    from worker.graph.graph import Graph
    from worker.job import Result
    from worker.media.delivery import Delivery
    from worker.media.inputs import InputFiles, JobInputFiles
    from worker.models.job_models import JobModels
    from worker.preparation import PreparedJob, Tell
    from worker.settings import Settings
    from worker.store.leases import JobUse
    from worker.warmup.warmup import Warmup

log = logging.getLogger(__name__)


def _tell_nobody(_: dict[str, Any]) -> None:
    """Ignore for the handler a job's progress, which nobody can see, as in RunPod's local API."""


def _ignore_free_engine() -> None:
    """Ignore for the handler that the engine is free after a job: the default, because the local API has no queue."""


async def _nothing_ahead() -> None:
    """Do nothing for a job ahead."""


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
        boot: BootMilestones,
        kept: StoredDefinitions,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._job_models = job_models
        self._inputs = inputs
        self._workflows = Workflows(settings.volume_path)
        self._parts = PreparationParts(self._workflows, job_models, warmup, boot.linked)
        self._boot = boot
        self._kept = kept
        self._keeping: asyncio.Task[None] | None = None
        self._delivery = delivery
        self._warmup = warmup
        self._redact = RedactingFilter(settings.secrets()).redact
        # ComfyUI runs one graph at a time anyway. One job at a time keeps their input files apart.
        self._turn = asyncio.Lock()

    async def handle(
        self, job: Mapping[str, Any], tell: Tell = _tell_nobody, engine_free: Callable[[], None] = _ignore_free_engine
    ) -> dict[str, Any]:
        """Return the job's result, or `{"error", "code", "retryable", "details"?}`. Report progress to `tell`.

        `engine_free` is called when the job's graph has run: the next job may come while this one's result is delivered. Only a
        cancellation is raised.
        """
        job_id, timings = str(job.get("id", "?")), JobTimings()
        log.info("job %s: started", job_id)
        try:
            aside = LoopAside(job.get("input"))
            around = JobContext(lambda progress: tell(encodable(progress)), engine_free, timings, aside)
            result: dict[str, Any] = encodable((await self._run(job, job_id, around)).to_dict())
            log.info("job %s: finished in %.2f s, %s", job_id, timings.total_s(), result_contents(result))
        except WorkerError as exc:
            result = error_reply(exc, self._redact)
            log.warning("job %s: failed after %.2f s: %s [%s]", job_id, timings.total_s(), result["error"], exc.code)
        except Exception:
            log.exception("job %s: failed after %.2f s by a defect of the worker", job_id, timings.total_s())
            result = error_reply(InternalError(), self._redact)
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

    async def _run(self, job: Mapping[str, Any], job_id: str, around: JobContext) -> Result:
        request = await around.aside(Request.parse, job.get("input"))
        with self._inputs.of_job(request.files) as files, self._job_models.use() as use:
            try:
                return await self._run_request(request, files, job, job_id, replace(around, use=use))
            finally:
                self._delivery.job_ended()

    async def _run_request(
        self, request: Request, files: JobInputFiles, job: Mapping[str, Any], job_id: str, around: JobContext
    ) -> Result:
        await around.aside(files.check)
        if request.models is not None:
            await asyncio.to_thread(self._job_models.check_request, request.models)
        bucket = self._delivery.job_bucket(job.get("s3Config"))
        source = await self._workflows.read(request, files, around.aside)
        wanted = JobToPrepare(job_id, source, request, files, around.tell, around.use)
        prepare = Preparation(self._engine, self._parts, wanted)
        async with self._ahead(wanted) as ahead:
            given = await prepare.graph()
            request = replace(request, extra_pnginfo=given.extra_pnginfo)
            if bucket:
                await asyncio.to_thread(bucket.check_reachable)
            with around.timings.step("models"):
                await ahead()
                prepared = await prepare.models(given)
            if prepared.is_refused:
                await self._ask_the_judge(prepared, request, files, around)
                with around.timings.step("models"):
                    prepared = await prepare.models(given, whatever=True)
        graph, models = prepared.graph, prepared.models
        self._warmup.job(models)
        deliver = partial(
            self._delivery.deliver,
            job_id,
            nodes=request.outputs,
            previews=request.previews,
            bucket=bucket,
            pictures=requested_format(request),
        )
        try:
            run = await self._run_graph(graph, request, files, around)
        except NodeFailed as exc:
            return with_timings(await self._what_there_is(exc, deliver, job_id, around), request, around.timings)
        self._warmup.ran(graph, models)
        if not self.refreshes:
            around.engine_free()
        deliver = partial(deliver, warnings=reply_sentences(run.dropped, self._redact), silent=run.silent)
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
        self._keep_definitions()
        return with_timings(result, request, around.timings, run.queued_s, run.node_s)

    async def _ask_the_judge(self, prepared: PreparedJob, request: Request, files: JobInputFiles, around: JobContext) -> None:
        """Have ComfyUI refuse, in its own words, a graph that no file can save. Returns if it does not refuse it for that.

        Nothing was fetched for it, so what ComfyUI says of files that would have been is left out.
        """
        unfetched = [f"node {model.node_id} ({model.class_type}) needs the model" for model in prepared.withheld]
        unfetched += [f" file: {name}" for name in files.names if files.has_addresses]
        try:
            await self._run_graph(prepared.graph, request, files, around, place=not files.has_addresses)
        except NodeFailed:
            return  # it was taken: once more with everything in its place
        except WorkflowRejected as exc:
            told = tuple(problem for problem in exc.problems if not any(text in problem for text in unfetched))
            if told:
                exc.problems = told
                raise

    def _keep_definitions(self) -> None:
        """Keep what ComfyUI says of its node classes for workers that boot, once, behind the jobs."""
        if self._keeping is None:
            self._keeping = asyncio.create_task(self._do_keep(), name="keep-definitions")

    async def _do_keep(self) -> None:
        try:
            if await asyncio.to_thread(self._kept.wanted):
                await asyncio.to_thread(self._kept.write, await self._engine.everything(), self._job_models.is_model)
        except WorkerError as exc:
            log.info("the definitions of node classes could not be kept: %s", exc)

    @contextlib.asynccontextmanager
    async def _ahead(self, wanted: JobToPrepare) -> AsyncIterator[Callable[[], Awaitable[object]]]:
        """While ComfyUI still boots, have done what the job needs without it. Yields what waits for the end of that.

        It answers nothing: whatever is wrong is found once more when ComfyUI is there, and told then.
        """
        if not self._engine.is_booting:
            yield _nothing_ahead
            return
        task = asyncio.create_task(self._do_ahead(wanted), name="ahead")
        try:
            yield partial(asyncio.wait, {task})
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _do_ahead(self, wanted: JobToPrepare) -> None:
        try:
            await self._boot.linked.wait()
            kept = await asyncio.to_thread(self._kept.read)
            if kept is None:  # what there is to read may be read; what there is to download may be in vain
                if not wanted.source.is_saved:
                    given = await self._workflows.graph_of(wanted.source, wanted.request, self._engine)
                    self._warmup.job(named_models(given.graph))
                return
            prepare = Preparation(kept, self._parts, wanted)
            given = await prepare.graph()
            if await prepare.is_refused(given.graph):
                return
            self._warmup.job(named_models(given.graph))
            wanted.files.fetch_ahead()
            self._warmup.job((await prepare.models(given)).models)
        except Exception as exc:  # noqa: BLE001 - it is told when ComfyUI is there
            log.debug("job %s: not done ahead: %s", wanted.id, exc)

    async def _what_there_is(
        self, error: NodeFailed, deliver: Callable[..., Awaitable[Result]], job_id: str, around: JobContext
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
                result = await deliver(error.outputs, warnings=[reply_sentence(error.sentence, self._redact)])
        except (OutputGone, DeliveryError) as exc:
            raise error from exc
        if result.is_empty:
            raise error
        log.warning("job %s: %s; delivering what there is", job_id, result.warnings[0])
        return result

    async def _run_again(
        self, graph: Graph, request: Request, files: JobInputFiles, around: JobContext, nodes: Collection[str]
    ) -> RunResult:
        """Run these output nodes again, and no others."""
        roots = {node_id if node_id in graph else node_id.partition(".")[0] for node_id in nodes}
        nonce = uuid.uuid4().hex  # an extra input, which only ComfyUI's cache notices
        again = with_inputs(graph, {node_id: {"run_again": nonce} for node_id in roots & graph.keys()})
        return await self._run_graph(again, request, files, around, targets=roots)

    async def _run_graph(
        self,
        graph: Graph,
        request: Request,
        files: JobInputFiles,
        around: JobContext,
        targets: Collection[str] | None = None,
        *,
        place: bool = True,
    ) -> RunResult:
        """Run the graph, or only these outputs, when it is this job's turn; with `place` with the job's files in place."""
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
                        if place:
                            await stack.enter_async_context(files.placed())
                    await self._boot.ready.wait()
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
                            exc.problems = with_sent_files(exc.problems, files.names)
                            raise
                        return replace(run, dropped=with_sent_files(run.dropped, files.names)) if run.dropped else run


@dataclass(frozen=True, slots=True)
class JobContext:
    """A job's context in the handler: who hears of its progress and of the free engine, its clock, and where it is read."""

    tell: Tell
    engine_free: Callable[[], None]
    timings: JobTimings
    aside: LoopAside
    use: JobUse | None = None
    """What protects its models from removal."""


def sampling_progress(step: NodeProgress) -> dict[str, Any]:
    """Return what the handler tells a job's client while a node works: step `value` of `max` in the node with this id."""
    percent = 100 * step.value / step.maximum if step.maximum else 0.0
    return {"type": "progress", "value": step.value, "max": step.maximum, "percent": round(percent, 1), "node": step.node_id}
