"""Put the models onto the volume: from this machine through S3, or by a CPU Pod that mounts it.

Uses the seeder and RunPod's API.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from worker.base.progress import ModelProgress
from worker.seed import seed_command
from worker.seed.outcome import Outcome
from worker.up.errors import FillFailed, ImageNotFound, NoCpuFree, RunPodRefused
from worker.up.plan import datacenter_now, free_cpus, planned_cpu_image

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from worker.seed.screen import SeedScreen
    from worker.up.api import RunPodApi, Thing
    from worker.up.options import UpOptions
    from worker.up.plan import UpPlan
    from worker.up.screen import UpScreen
    from worker.up.state import UpState

POD_COMMAND: Final = "worker up fill"
MODELS_VARIABLE: Final = "UP_MODELS"
HANDED_ON: Final = ("HF_TOKEN", "HF_ENDPOINT", "CIVITAI_TOKEN")
"""Variables of this environment that are passed to Pods and workers."""

_MOUNT: Final = "/workspace"
_DISK_GB: Final = 20
_SILENCE_S: Final = 1800.0
_LOOK_S: Final = 2.0
_GONE: Final = frozenset({"TERMINATED", "EXITED", "ERROR"})


@dataclass(slots=True)
class VolumeFilling:
    """The filling of one deployment's volume."""

    runpod: RunPodApi
    options: UpOptions
    plan: UpPlan
    state: UpState
    screen: UpScreen
    environ: Mapping[str, str]

    def through_s3(self, volume_id: str, manifest: str) -> None:
        """Send the models from this machine. Raises `FillFailed`, and KeyboardInterrupt if it was stopped."""
        with tempfile.TemporaryDirectory(prefix="worker-up-") as folder:
            wanted = Path(folder) / "models.json"
            wanted.write_text(manifest, "utf-8")
            where = ["--s3", volume_id, "--datacenter", self.plan.datacenter]
            more = ["--endpoint", self.options.s3_endpoint] if self.options.s3_endpoint else []
            argv = [str(wanted), *where, *more, *(["--json"] if self.screen.as_json else [])]
            code = seed_command.run(argv, self.environ, self.screen.stream)
        if code == seed_command.STOPPED:
            raise KeyboardInterrupt
        if code:
            raise FillFailed("what the seeder said above")

    def by_pod(self, volume_id: str, manifest: str) -> None:
        """Let a CPU Pod download the models, and remove it. Raises `NoCpuFree`, `FillFailed`, and errors of the API."""
        begun = bool(self.state.get("models").get("pod_begun"))
        self.state.put("models", pod_begun=True)
        pod = self._pod(volume_id, manifest, begun=begun)
        self.state.put("models", pod=pod["id"], pod_begun=False)
        try:
            failed = self._follow(str(pod["id"]))
        except KeyboardInterrupt:
            self.runpod.delete("pods", str(pod["id"]))
            raise
        self.runpod.delete("pods", str(pod["id"]))
        if failed:
            raise FillFailed(failed)

    def _pod(self, volume_id: str, manifest: str, *, begun: bool) -> Thing:
        """Return the Pod that fills the volume: an existing one, or a new one of the cheapest available kind."""
        image, refused = planned_cpu_image(self.plan.image), "none is free"
        for old in self.runpod.named("pods", self.options.resource):
            if old.get("env", {}).get(MODELS_VARIABLE) != manifest:  # it downloads the models of an earlier workflow
                self.runpod.delete("pods", str(old["id"]))
        for cpu in free_cpus(self.runpod, datacenter_now(self.runpod, self.plan.datacenter)):
            body = {
                "name": self.options.resource,
                "image": image,
                "cloud": "SECURE",
                "cpu": {"id": cpu.name, "vcpuCount": cpu.vcpus},
                "disk": _DISK_GB,
                "dataCenterIds": [self.plan.datacenter],
                "mounts": {"network": [{"volumeId": volume_id, "path": _MOUNT}]},
                "args": POD_COMMAND,
                "env": {MODELS_VARIABLE: manifest, **handed_on(self.environ)},
            }
            if self.options.registry:
                body["registry"] = self.options.registry
            try:
                return self.runpod.ensure("pods", body, begun=begun)[0]
            except RunPodRefused as exc:  # RunPod answers 400 both to a wrong request and to what is not free just now
                if "image" in exc.reason.lower():
                    raise ImageNotFound(image, exc.reason) from None
                refused = exc.reason
        raise NoCpuFree(self.plan.datacenter, refused)

    def _follow(self, pod_id: str) -> str:
        """Show the Pod's progress until it ends. Return why it failed, or nothing."""
        failures: list[str] = []
        with self.screen.models() as screen:
            for event in self._events(pod_id):
                if event.get("event") == "filled":
                    return "" if event.get("code") == 0 else "; ".join(failures) or "its log says why"
                failures += self._show(event, screen)
        return "its Pod ended before it was done"

    def _events(self, pod_id: str) -> Iterator[dict[str, Any]]:
        """Yield the seeder's events from the Pod's log, until the Pod is gone. Raises `FillFailed` if it is silent."""
        since: str | None = None
        heard_s = time.monotonic()
        while True:
            for position, line in self.runpod.log(pod_id, since):
                since, heard_s = position, time.monotonic()
                event = _event_in_log(line)
                if event:
                    yield event
            pod = self.runpod.get("pods", pod_id)
            if pod is None or pod.get("status") in _GONE:
                return
            if time.monotonic() - heard_s > _SILENCE_S:
                self.runpod.delete("pods", pod_id)
                raise FillFailed(f"its Pod printed nothing for {_SILENCE_S / 60:.0f} minutes and was removed")
            time.sleep(_LOOK_S)

    def _show(self, event: dict[str, Any], screen: SeedScreen) -> list[str]:
        """Show one event of the Pod's seeder. Return what failed."""
        if self.screen.as_json:
            self.screen.raw(event)
        match event.get("event"):
            case "begin" if not self.screen.as_json:
                models = int(event.get("models", 1))
                screen.expect([int(event.get("size_bytes", 0)), *[0] * (models - 1)])
            case "progress" if not self.screen.as_json:
                phase = event.get("phase")
                moment = ModelProgress(
                    phase if phase in {"waiting", "downloading", "checking"} else "waiting",
                    int(event.get("done_bytes", 0)),
                    int(event.get("total_bytes", 0)),
                    float(event.get("bytes_per_s", 0)),
                )
                screen.moved(str(event.get("model")), moment)
            case "ended":
                outcome = _outcome(event)
                if not self.screen.as_json:
                    screen.ended(outcome.model, [outcome])
                if not outcome.good:
                    return [str(event.get("error") or outcome.model)]
            case "error":
                return [str(event.get("text"))]
            case "note" if not self.screen.as_json:
                screen.say(str(event.get("text")))
        return []


def handed_on(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that are passed to Pods that fill volumes, and to workers."""
    return {name: environ[name].strip() for name in HANDED_ON if environ.get(name, "").strip()}


def _event_in_log(line: str) -> dict[str, Any] | None:
    """Return the event of the filling in a line of a Pod's log, or None."""
    if not line.startswith("{"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("event"), str) else None


def _outcome(event: Mapping[str, Any]) -> Outcome:
    how = event.get("how")
    good = how if how in {"ready", "by_hand", "adopted", "sent"} else "failed"
    return Outcome(
        str(event.get("model")),
        str(event.get("volume")),
        good,  # type: ignore[arg-type]  # one of the five
        int(event.get("size_bytes") or 0),
        int(event.get("moved_bytes") or 0),
        float(event.get("seconds") or 0.0),
        note=event.get("error") or event.get("note"),
    )
