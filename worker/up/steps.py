"""The steps of `up`: volume, endpoint, models, picture. Each may be killed at any point and repeated. Uses RunPod's API.

The endpoint comes before the models: it costs nothing without jobs, and problems with the image, the quota or the balance show
before gigabytes are sent.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from client.command import check, tell_outputs, watched
from client.errors import ServiceError
from client.service import ENDPOINTS, Endpoint
from worker.base.text import count, size_text
from worker.up.errors import ImageNotFound, RunPodRefused, WorkerQuota
from worker.up.filling import VolumeFilling, handed_on
from worker.up.runpod_offer import volume_usd_month

if TYPE_CHECKING:
    from collections.abc import Mapping

    from worker.up.api import RunPodApi, Thing
    from worker.up.options import UpOptions
    from worker.up.plan import UpPlan
    from worker.up.screen import UpScreen
    from worker.up.state import UpState

_DISK_GB: Final = 30
_IDLE_S: Final = 5
_QUEUE_DELAY_S: Final = 4
_TIMEOUT_MS: Final = 3_600_000
_PICTURE_TIMEOUT_S: Final = 3600.0


@dataclass(slots=True)
class UpSteps:
    """The steps of one plan of `up`."""

    runpod: RunPodApi
    options: UpOptions
    plan: UpPlan
    state: UpState
    screen: UpScreen
    environ: Mapping[str, str]
    job: Mapping[str, Any]
    """The request that makes the first picture."""

    def run(self) -> int:
        """Do what is not done yet. Return the exit status. Raises errors of `up`, the seeder and the client."""
        volume = self.volume()
        endpoint = self.endpoint(str(volume["id"]))
        self.models(str(volume["id"]))
        return self.picture(endpoint)

    def volume(self) -> Thing:
        """Return the volume. Create or enlarge it if needed."""
        plan, name = self.plan, self.options.resource
        found = self.runpod.get("network-volumes", plan.volume_id) if plan.volume_id else None
        made = False
        if found is None:
            begun = bool(self.state.get("volume").get("begun")) and not self.state.get("volume").get("id")
            self.state.put("volume", name=name, begun=True)
            tier = {"type": "HIGH_PERFORMANCE"} if plan.high_performance else {}
            body = {"name": name, "size": plan.size_gb, "dataCenter": plan.datacenter, **tier}
            found, made = self.runpod.ensure("network-volumes", body, begun=begun)
        if str(found["id"]) != self.state.get("volume").get("id"):
            self.state.drop("models", "picture")  # another volume than the one with the models
        self.state.put("volume", name=name, id=found["id"], given=not plan.own_volume)
        said = "made" if made else "there"
        if int(found["size"]) < plan.size_gb:
            found = self.runpod.update("network-volumes", str(found["id"]), {"size": plan.size_gb})
            said = "enlarged"
        self.screen.step("volume", f"{found['id']}, {found['size']} GB in {found['dataCenter']}, {said}", id=found["id"])
        return found

    def endpoint(self, volume_id: str) -> Thing:
        """Return the endpoint. Create or correct it if needed. Raises `ImageNotFound`, `WorkerQuota`."""
        body = self._endpoint_body(volume_id)
        known = self.state.get("endpoint").get("id")
        found = self.runpod.get("serverless", str(known)) if known else None
        said = "there"
        try:
            if found is None:
                begun = bool(self.state.get("endpoint").get("begun")) and not known
                self.state.put("endpoint", name=self.options.resource, begun=True)
                found, made = self.runpod.ensure("serverless", body, begun=begun)
                said = "made" if made else said
            if wrong := _endpoint_changes(found, body, self.options):
                found = self.runpod.update("serverless", str(found["id"]), wrong)
                said = f"changed: {', '.join(sorted(wrong))}"
        except RunPodRefused as exc:
            raise self._named(exc) from None
        url = found.get("requestUrls", {}).get("run") or f"{ENDPOINTS}/{found['id']}/run"
        self.state.put("endpoint", id=found["id"], url=str(url).removesuffix("/run"))
        most = found["workers"]["max"]
        self.screen.step("endpoint", f"{found['id']}, up to {count(most, 'worker')}, {said}", id=found["id"])
        return found

    def _endpoint_body(self, volume_id: str) -> dict[str, Any]:
        plan = self.plan
        gpu = {"pools": list(plan.pools), "count": 1, "minCudaVersion": plan.cuda}
        if plan.excluded:
            gpu["excludedTypes"] = list(plan.excluded)
        body: dict[str, Any] = {
            "name": self.options.resource,
            "image": plan.image,
            "type": "QUEUE",
            "disk": _DISK_GB,
            "env": handed_on(self.environ),
            "gpu": gpu,
            "networkVolumes": [volume_id],
            "dataCenterIds": [plan.datacenter],
            "workers": {"min": 0, "max": plan.max_workers, "idleTimeout": _IDLE_S},
            "scaling": {"type": "QUEUE_DELAY", "queueDelay": _QUEUE_DELAY_S},
            "flashboot": "FLASHBOOT",
            "timeout": _TIMEOUT_MS,
        }
        return body | ({"registry": self.options.registry} if self.options.registry else {})

    def _named(self, exc: RunPodRefused) -> Exception:
        """Return a more precise error for a refusal, if its text allows."""
        words = exc.reason.lower()
        if "quota" in words:
            return WorkerQuota(self.plan.max_workers, exc.reason)
        if "image" in words:
            return ImageNotFound(self.plan.image, exc.reason)
        return exc

    def models(self, volume_id: str) -> None:
        """Put the models onto the volume. Raises `NoCpuFree`, `FillFailed`, and errors of the seeder."""
        needs = self.plan.needs
        if needs is None or self.state.get("models").get("done"):
            self.screen.step("models", "there")
            return
        self.state.put("models", digest=needs.digest, begun=True, done=False)
        filler = VolumeFilling(self.runpod, self.options, self.plan, self.state, self.screen, self.environ)
        if needs.fetched and self.plan.fill == "s3":
            filler.through_s3(volume_id, needs.manifest())
        elif needs.fetched and self.plan.fill == "pod":
            filler.by_pod(volume_id, needs.manifest())
        self.state.put("models", done=True, pod=None)
        how = ", to be fetched by the first job" if needs.fetched and self.plan.fill == "job" else ""
        self.screen.step("models", f"{count(len(needs.fetched), 'model')}, {size_text(needs.size_bytes)}{how}")

    def picture(self, endpoint: Thing) -> int:
        """Send the workflow, save the result, and say how to send the next one. Return the exit status."""
        request = self.options.output / f"{self.options.name}.request.json"
        self.options.output.mkdir(parents=True, exist_ok=True)
        request.write_text(json.dumps(self.job), "utf-8")
        url = self.state.get("endpoint")["url"]
        status = 0
        if self.options.picture and not self.state.get("picture").get("done"):
            status = self._picture(str(url))
        if status == 0:
            curl = (
                f'curl -s {url}/runsync -H "Authorization: Bearer $RUNPOD_API_KEY" '
                f"-H 'content-type: application/json' -d @{request}"
            )
            month = (
                f"${volume_usd_month(self.plan.size_gb):.2f} a month" if not self.plan.high_performance else "as it was made"
            )
            text = (
                f"\nThe next one:\n  {curl}\n\nWhat it costs: the volume {month}; a worker while it runs, {self.plan.gpu_cost}."
                f"\nEnd it: python -m worker up down --name {self.options.name}"
            )
            self.screen.result("done", text, endpoint=endpoint["id"], url=url, curl=curl, request=str(request))
        return status

    def _picture(self, url: str) -> int:
        base, _, endpoint_id = url.rpartition("/")
        known = self.state.get("picture")
        where = {"RUNPOD_API_KEY": self.environ.get("RUNPOD_API_KEY", ""), "RUNPOD_ENDPOINT_BASE_URL": base}
        service = _RecordingService(Endpoint.of(endpoint_id, where, known.get("job")), self.state)
        if known.get("begun") and not known.get("job"):
            # Killed between sending a job and recording its id: no other job is in this queue yet.
            service.endpoint.wire.post("/purge-queue", None, 30.0)
        self.state.put("picture", begun=True)
        try:
            answer = watched(service, self.job, _PICTURE_TIMEOUT_S)
        except ServiceError:
            if known.get("job"):
                self.state.drop("picture")  # its result is kept for only half an hour: the next run makes another
            raise
        if answer is None:
            self.state.drop("picture")
            raise KeyboardInterrupt
        self.state.drop("picture")  # whatever is wrong with this one, the next run makes another
        check(answer)
        stream = sys.stderr if self.screen.as_json else self.screen.stream
        status = tell_outputs(answer["output"], self.options.output, stream, str(answer.get("id", "")))
        if status == 0:
            self.state.put("picture", done=True)
        return status


@dataclass(slots=True)
class _RecordingService:
    """A service for a step that records its job's id as soon as it is known."""

    endpoint: Endpoint
    state: UpState

    def run(self, job: Mapping[str, Any], watch: Any, timeout_s: float | None) -> dict[str, Any]:  # noqa: ANN401 - the client's own
        """Like `Service.run`."""

        def noting(news: Any) -> None:  # noqa: ANN401 - the client's own
            if news.job_id and self.state.get("picture").get("job") != news.job_id:
                self.state.put("picture", job=news.job_id)
            watch(news)

        return self.endpoint.run(job, noting, timeout_s)

    def abandon(self) -> str:
        """Like `Service.abandon`."""
        return self.endpoint.abandon()

    def aftermath(self, error: Exception) -> str | None:
        """Like `Service.aftermath`."""
        return self.endpoint.aftermath(error)


def _endpoint_changes(found: Thing, body: Mapping[str, Any], options: UpOptions) -> dict[str, Any]:
    """Return the fields of an existing endpoint that the step changes: those that this command line names, and necessary ones.

    What somebody set in the console stays. But RunPod itself lowers the workers of an endpoint without requests, to 2 after
    three days and to 0 after seven.
    """
    wrong: dict[str, Any] = {}
    most, wanted = found["workers"]["max"], body["workers"]["max"]
    if most < wanted or (options.max_workers and most != wanted):
        wrong["workers"] = {"max": wanted}
    if list(found.get("networkVolumes", ())) != body["networkVolumes"]:
        wrong["networkVolumes"] = body["networkVolumes"]
        wrong["dataCenterIds"] = body["dataCenterIds"]
    if options.image and found.get("image") != body["image"]:
        wrong["image"] = body["image"]
    if options.pools and list(found.get("gpu", {}).get("pools", ())) != body["gpu"]["pools"]:
        # The two are one choice: pools without exclusions would clear them.
        wrong["gpu"] = {name: value for name, value in body["gpu"].items() if name in {"pools", "excludedTypes"}}
    return wrong
