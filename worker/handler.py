"""One job, start to end; the only place where an error becomes a result."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from worker.comfy.rejection import missing_model
from worker.comfy.workflow import check_paths, named_models, parse_graph, with_slashes
from worker.errors import InternalError, ModelMissing, StartError, WorkerError
from worker.job import Request, Result

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from worker.comfy.engine import Engine
    from worker.comfy.workflow import NamedModel
    from worker.media.inputs import InputFiles
    from worker.media.outputs import OutputFiles
    from worker.models.provision import Waiting
    from worker.models.spec import ModelSpec
    from worker.models.supply import Supply
    from worker.settings import Settings

log = logging.getLogger(__name__)

Tell = Callable[[dict[str, Any]], None]
"""Takes a job's progress, from any thread; the latest counts."""

_SAY_EVERY_S = 10.0


def _tell_nobody(_: dict[str, Any]) -> None:
    """Progress where nobody can see it, as in RunPod's local API."""


class JobHandler:
    """Takes a job as RunPod hands it out, gives back what RunPod is to send."""

    def __init__(self, settings: Settings, engine: Engine, supply: Supply, inputs: InputFiles, outputs: OutputFiles) -> None:
        self._settings = settings
        self._engine = engine
        self._supply = supply
        self._inputs = inputs
        self._outputs = outputs
        # ComfyUI runs one graph at a time anyway; one job at a time keeps their input files apart.
        self._turn = asyncio.Lock()

    async def handle(self, job: Mapping[str, Any], tell: Tell = _tell_nobody) -> dict[str, Any]:
        """The job's result, or `{"error", "code", "retryable", "details"?}`; `tell` hears of its progress meanwhile.

        Raises nothing but the cancellation it is given.
        """
        job_id, began = str(job.get("id", "?")), time.monotonic()
        log.info("job %s: started", job_id)
        try:
            result = (await self._run(job, job_id, tell)).to_dict()
        except WorkerError as exc:
            log.warning("job %s: failed after %.2f s: %s [%s]", job_id, time.monotonic() - began, exc, exc.code)
            return failure(exc)
        except Exception:
            log.exception("job %s: failed after %.2f s by a defect of the worker", job_id, time.monotonic() - began)
            return failure(InternalError())
        except asyncio.CancelledError:
            log.info("job %s: cancelled after %.2f s", job_id, time.monotonic() - began)
            raise
        log.info("job %s: finished in %.2f s, %d images", job_id, time.monotonic() - began, len(result["images"]))
        return result

    async def _run(self, job: Mapping[str, Any], job_id: str, tell: Tell) -> Result:
        request = Request.parse(job.get("input"))
        graph = parse_graph(request.workflow)
        check_paths(graph)
        models = named_models(graph)
        graph = with_slashes(graph, models)
        await self._ensure_models(models, request, job_id, tell)
        key = request.comfy_org_api_key or self._settings.comfy_org_api_key
        extra_data: dict[str, Any] = {"api_key_comfy_org": key} if key else {}
        if request.extra_pnginfo is not None:
            extra_data["extra_pnginfo"] = request.extra_pnginfo
        async with self._turn:
            with self._inputs.placed(request.images):
                run = await self._engine.run(graph, timeout_s=self._settings.job_timeout_s, extra_data=extra_data)
        # In the loop: a hop to another thread costs more than reading and encoding a picture does.
        return Result(self._outputs.images(run.outputs), run.dropped)

    async def _ensure_models(self, named: Sequence[NamedModel], request: Request, job_id: str, tell: Tell) -> None:
        """Have the graph's models where ComfyUI finds them; what is missing and known is fetched, the job waits for no other.

        A name that nobody knows is ComfyUI's to refuse, unless others would be fetched for nothing first.
        """
        if request.models is not None:
            await asyncio.to_thread(self._supply.check_request, request.models)
        models = {(model.folders, model.file_names): model for model in named}
        if not models:
            return
        missing = await asyncio.to_thread(self._supply.missing, tuple(models))
        absent = [name for name in missing if not await self._listed(models[name])]
        if not absent:
            return
        specs = await asyncio.to_thread(self._supply.specs, absent, request.models, request.extra_pnginfo)
        known = [spec for spec in specs.values() if spec]
        if not known:
            return
        unknown = [models[name] for name, spec in specs.items() if not (spec or models[name].optional)]
        if unknown:
            raise ModelMissing([missing_model(model, model.name, await self._choices(model)) for model in unknown])
        await self._fetch(known, job_id, tell)

    async def _listed(self, model: NamedModel) -> bool:
        """Whether ComfyUI sees it in a place of its own, such as one from an extra_model_paths.yaml."""
        return model.name in await self._choices(model)

    async def _choices(self, model: NamedModel) -> Sequence[str]:
        return await self._engine.choices(model.class_type, model.input_name) or ()

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
            await asyncio.to_thread(self._supply.fetch, specs, cancel, on_progress)
        finally:
            cancel.set()


def download_progress(waiting: Waiting) -> dict[str, Any]:
    """What a client sees while a job waits for models: bytes and bytes a second over all of them, and a line for each."""
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


def failure(error: WorkerError) -> dict[str, Any]:
    """What the client gets for an error. RunPod shows `error` beside status FAILED, the rest as the job's output.

    A worker whose engine does not come back asks to be replaced instead of failing every job in the queue.
    """
    result: dict[str, Any] = {"error": str(error), "code": error.code, "retryable": error.retryable}
    if details := error.details():
        result["details"] = details
    if isinstance(error, StartError):
        result["refresh_worker"] = True
    return result
