"""A stand-in of RunPod's control plane: the unmodified SDK runs against it in production mode. Threads, loopback network.

    with ControlPlane() as plane:                      # one endpoint
        environ.update(plane.environ("pod-1"))         # what a worker's process needs; as many pods as you like
        job = plane.submit({"workflow": {...}})
        job.result(timeout_s=60)                       # {"id", "status", "output", "error", ...}, as GET /status shows it
        job.answers, job.updates, job.late_updates     # answered exactly once? progress in order, none after the result?

    with ControlPlane() as plane, ProductionWorker(plane, engine, folder, volume) as worker:   # as RunPod starts this project's
        worker.wait_ready()

A client script finds api.runpod.ai's interface at `plane.url`: POST `run`, `runsync`, `cancel/<id>` and `purge-queue`, GET
`status/<id>` and `health`. RunPod's own client is sent there by RUNPOD_ENDPOINT_BASE_URL=<plane.base_url>.

Held polls are held, and a poll whose worker has died takes no job. Every request of a worker goes wrong on demand
(`plane.fault`). End the workers before the plane: the SDK asks an endpoint that refuses connections again without any pause.

Not imitated: webhooks, `retry`, `stream`, the expiry of results, rate limits, retries after a worker's death
(`plane.requeue` makes one).
"""

from devkit.control_plane.faults import Fault
from devkit.control_plane.jobs import Ping, Post, Update
from devkit.control_plane.plane import ControlPlane, JobHandle
from devkit.control_plane.production_worker import ProductionWorker

__all__ = ["ControlPlane", "Fault", "JobHandle", "Ping", "Post", "ProductionWorker", "Update"]
