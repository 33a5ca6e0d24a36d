"""This project's worker as RunPod starts it, its jobs coming from a control plane. Touches processes, disk, loopback."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from devkit.local_worker import JOB_TIMEOUT_S, LocalWorker

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from devkit.control_plane.plane import ControlPlane
    from devkit.engine.build import Engine

_LOOK_S = 0.2


class ProductionWorker(LocalWorker):
    """`python -m worker` as a child of ours, one pod of a control plane's endpoint, with its output in a log file."""

    def __init__(
        self,
        plane: ControlPlane,
        engine: Engine,
        folder: Path,
        volume: Path,
        environ: Mapping[str, str] | None = None,
        *,
        pod_id: str = "pod-1",
    ) -> None:
        super().__init__(engine, folder, volume, {**plane.environ(pod_id), **(environ or {})})
        self.plane = plane
        self.pod_id = pod_id

    def arguments(self) -> list[str]:
        """Return no arguments: on RunPod the environment says everything."""
        return []

    def serves(self) -> bool:
        """Return whether ComfyUI is up and it waits for a job."""
        if "cold start " not in self.log():
            time.sleep(_LOOK_S / 4)
            return False
        try:
            self.plane.wait_polling(self.pod_id, _LOOK_S)
        except TimeoutError:
            return False
        return True

    def kill(self) -> None:
        """End it, its heartbeat and its ComfyUI at once, as the machine's death does."""
        self.plane.kill_pod(self.pod_id)
        self.stop()

    def stop(self, timeout_s: float = 20.0) -> int:
        """End the worker as a container's end does: SIGTERM, then SIGKILL for everything. Returns its exit status."""
        status = super().stop(timeout_s)
        self.plane.kill_pod(self.pod_id)
        return status

    def runsync(self, job_input: object, timeout_s: float = JOB_TIMEOUT_S) -> dict[str, Any]:
        """Send one job through the plane and return RunPod's whole answer; any pod of the endpoint may take it."""
        return self.plane.submit(job_input, via="runsync").result(timeout_s)
