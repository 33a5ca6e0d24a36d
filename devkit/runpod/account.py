"""One account: its volumes, endpoints and Pods, and what it may do. Holds the machines; its methods block. Threads, disk."""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Final

from jsonschema import Draft202012Validator

from devkit.runpod.bodies import CREATE, UPDATE
from devkit.runpod.machines import EndpointMachines, PodMachine, no_value, now
from devkit.runpod.market import Market

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from devkit.engine.build import Engine

Thing = dict[str, Any]

LISTS: Final = {"network-volumes": "networkVolumes", "serverless": "endpoints", "pods": "pods"}


class Refused(Exception):  # noqa: N818 - an answer, not a fault
    """A status and what it is about."""

    def __init__(self, status: int, detail: str, errors: list[str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = errors or []


@dataclass(slots=True)
class Account:
    """What is there, under one lock. `address` gives the address of the APIs, once they listen."""

    folder: Path
    engine: Engine | None
    address: Callable[[], str]
    market: Market = field(default_factory=Market)
    balance: float = 25.0
    quota: int = 5
    images: Callable[[str], bool] = lambda _: True
    things: dict[str, dict[str, Thing]] = field(default_factory=lambda: {kind: {} for kind in LISTS})
    endpoints: dict[str, EndpointMachines] = field(default_factory=dict)
    pods: dict[str, PodMachine] = field(default_factory=dict)
    pod_environ: dict[str, str] = field(default_factory=dict)
    worker_environ: dict[str, str] = field(default_factory=dict)
    lag: int = 0
    """How many lists do not show yet what was just made."""
    workers_may_start: threading.Event = field(default_factory=threading.Event)
    on_volume: Callable[[str], object] = lambda _: None
    """Called with the id of a volume that is made."""
    before_worker: Callable[[str, Path], object] = lambda _, __: None
    """Called with a volume and its folder before a worker that has it starts."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    _hidden: dict[str, int] = field(default_factory=dict)
    _numbers: count[int] = field(default_factory=lambda: count(1))

    def __post_init__(self) -> None:
        self.workers_may_start.set()

    def close(self) -> None:
        """End every machine."""
        with self.lock:
            machines: list[PodMachine | EndpointMachines] = [*self.pods.values(), *self.endpoints.values()]
            self.pods, self.endpoints = {}, {}
        for machine in machines:
            machine.close()

    def volume_folder(self, volume_id: str) -> Path:
        """Return the folder of a volume's files."""
        return self.folder / "volumes" / volume_id

    # --- what is asked

    def shown(self, kind: str) -> Thing:
        """Return a list as the API shows it."""
        with self.lock:
            shown = [thing for thing in self.things[kind].values() if self._hidden.get(str(thing["id"]), 0) <= 0]
            for thing_id in self.things[kind]:
                self._hidden[thing_id] = self._hidden.get(thing_id, 0) - 1
            return {LISTS[kind]: shown}

    def one(self, kind: str, thing_id: str) -> Thing:
        """Return one of a kind."""
        with self.lock:
            if thing_id not in self.things[kind]:
                raise Refused(404, "resource not found")
            return self.things[kind][thing_id]

    def workers(self, endpoint_id: str) -> Thing:
        """Return an endpoint's workers."""
        endpoint = self.one("serverless", endpoint_id)
        running = self.endpoints[endpoint_id].running
        worker = {
            "id": f"{endpoint_id}-1",
            "status": "RUNNING",
            "isStale": False,
            "gpuCount": 1,
            "image": endpoint["image"],
            "uptimeSeconds": 1,
        }
        counts = dict.fromkeys(("idle", "initializing", "throttled", "unhealthy"), 0)
        summary = {"running": running, **counts, "total": running}
        return {"workers": [worker] * running, "summary": summary, "endpointVersion": 1}

    # --- what is made

    def create(self, kind: str, body: Thing) -> Thing:
        """Make one."""
        _check(CREATE[kind], body)
        if self.balance <= 0:
            raise Refused(402, "insufficient balance")
        makers = {"network-volumes": self._volume, "serverless": self._endpoint, "pods": self._pod}
        with self.lock:
            thing_id = f"{ {'network-volumes': 'vol', 'serverless': 'ep', 'pods': 'pod'}[kind] }{next(self._numbers):06d}"
            made = makers[kind](thing_id, body)
            self.things[kind][thing_id] = made
            self._hidden[thing_id] = self.lag
            return made

    def _volume(self, volume_id: str, body: Thing) -> Thing:
        types = self.market.centres.get(body["dataCenter"])
        kind = body.get("type", "STANDARD")
        if types is None or kind not in types:
            raise Refused(400, f"data center {body['dataCenter']} does not offer {kind} network volumes")
        self.volume_folder(volume_id).mkdir(parents=True)
        self.on_volume(volume_id)
        return {
            "id": volume_id,
            "name": body["name"],
            "size": body["size"],
            "dataCenter": body["dataCenter"],
            "type": kind,
        }

    def _endpoint(self, endpoint_id: str, body: Thing) -> Thing:
        if ("gpu" in body) == ("cpu" in body):
            raise Refused(400, "exactly one of gpu or cpu must be set")
        self._check_image(body["image"])
        workers = {"min": 0, "max": 3, "idleTimeout": 10, **body.get("workers", {})}
        self._check_quota(workers["max"], None)
        gpu = {"count": 1, "allowedCudaVersions": [], "minCudaVersion": None, **body["gpu"]}
        self._check_gpu(gpu)
        volumes = body.get("networkVolumes", [])
        centres = [self._volume_of(volume)["dataCenter"] for volume in volumes]
        if len(set(centres)) < len(centres):
            raise Refused(400, "only one network volume per data center")
        base = f"{self.address()}/jobs/v2/{endpoint_id}"
        paths = {"run": "run", "runSync": "runsync", "status": "status/{job_id}", "stream": "stream/{job_id}"}
        more = {"cancel": "cancel/{job_id}", "retry": "retry/{job_id}", "purgeQueue": "purge-queue", "health": "health"}
        made = {
            "id": endpoint_id,
            "name": body["name"],
            "type": body["type"],
            "requestUrls": {name: f"{base}/{path}" for name, path in {**paths, **more}.items()},
            "image": body["image"],
            "args": body.get("args", ""),
            "disk": body.get("disk", 20),
            "ports": [],
            "env": body.get("env", {}),
            "registry": body.get("registry"),
            "gpu": gpu,
            "workers": workers,
            "scaling": body["scaling"],
            "dataCenterIds": body.get("dataCenterIds", []),
            "networkVolumes": volumes,
            "timeout": body.get("timeout", 300_000),
            "flashboot": body.get("flashboot", "OFF"),
            "createdAt": now(),
        }
        folder = self.folder / "endpoints" / endpoint_id
        self.endpoints[endpoint_id] = EndpointMachines(endpoint_id, self.engine, folder, self.workers_may_start)
        self._configure(made)
        return made

    def _configure(self, endpoint: Thing) -> None:
        volumes = endpoint["networkVolumes"]
        folder = self.volume_folder(volumes[0]) if volumes else None
        environ = {**self.worker_environ, **endpoint["env"]}
        mount = partial(self.before_worker, volumes[0], folder) if folder else None
        self.endpoints[endpoint["id"]].configure(folder, environ, endpoint["workers"]["max"], mount)

    def _pod(self, pod_id: str, body: Thing) -> Thing:
        if ("gpu" in body) == ("cpu" in body):
            raise Refused(400, "exactly one of gpu or cpu must be set")
        self._check_image(body["image"])
        mount = body["mounts"]["network"][0]
        volume = self._volume_of(mount["volumeId"])
        flavour = body["cpu"]["id"]
        if flavour not in self.market.cpus:
            raise Refused(400, f"unknown CPU flavor {flavour}")
        wanted = body.get("dataCenterIds") or [volume["dataCenter"]]
        if volume["dataCenter"] not in wanted or self.market.level(volume["dataCenter"], flavour) == "NONE":
            raise Refused(400, "There are no longer any instances available with the requested specifications.")
        folder = self.volume_folder(volume["id"])
        environ = {
            **self.pod_environ,
            **body.get("env", {}),
            "RUNPOD_POD_ID": pod_id,
            "RUNPOD_API_KEY": f"rpa_{pod_id}",
            "RUNPOD_API_BASE_URL": self.address(),
            "VOLUME_PATH": str(folder),  # where /workspace would be: a Pod's mount needs a machine of its own
        }
        self.pods[pod_id] = PodMachine(body.get("args", ""), environ, self.folder / "pods" / pod_id)
        return {
            **no_value(),
            "id": pod_id,
            "name": body["name"],
            "status": "RUNNING",
            "image": body["image"],
            "args": body.get("args", ""),
            "disk": body.get("disk", 20),
            "env": body.get("env", {}),
            "registry": body.get("registry"),
            "mounts": body["mounts"],
            "cpu": {**body["cpu"], "memory": 4},
            "cloud": "SECURE",
            "dataCenterId": volume["dataCenter"],
            "cost": 0.06,
            "createdAt": now(),
        }

    # --- what is changed and removed

    def update(self, kind: str, thing_id: str, body: Thing) -> Thing:
        """Change one."""
        _check(UPDATE[kind], body)
        with self.lock:
            thing = self.one(kind, thing_id)
            if kind == "network-volumes" and body.get("size", thing["size"]) < thing["size"]:
                raise Refused(400, "network volume size cannot be reduced")
            if "workers" in body:
                self._check_quota(body["workers"].get("max", 0), thing_id)
            merged = {name: {**thing[name], **body[name]} if name in {"workers", "gpu"} else body[name] for name in body}
            thing |= merged
            if kind == "serverless":
                self._check_gpu(thing["gpu"])
                self._configure(thing)
            return thing

    def delete(self, kind: str, thing_id: str) -> None:
        """Remove one, with what runs for it."""
        with self.lock:
            self.one(kind, thing_id)
            if kind == "network-volumes" and (users := self._users(thing_id)):
                raise Refused(400, f"network volume is in use by {', '.join(users)}")
            del self.things[kind][thing_id]
            machine = self.pods.pop(thing_id, None) or self.endpoints.pop(thing_id, None)
        if machine is not None:
            machine.close()
        if kind == "network-volumes":
            shutil.rmtree(self.volume_folder(thing_id))

    def billed(self) -> dict[str, int]:
        """Return what costs money now, and the endpoints, which cost nothing by themselves."""
        with self.lock:
            return {
                "volumes": len(self.things["network-volumes"]),
                "pods": len(self.things["pods"]),
                "endpoints": len(self.things["serverless"]),
                "workers": sum(machines.running for machines in self.endpoints.values()),
            }

    # --- checks

    def _users(self, volume_id: str) -> list[str]:
        endpoints = [thing["name"] for thing in self.things["serverless"].values() if volume_id in thing["networkVolumes"]]
        mounted = [thing for thing in self.things["pods"].values() if thing["mounts"]["network"][0]["volumeId"] == volume_id]
        return endpoints + [thing["name"] for thing in mounted]

    def _volume_of(self, volume_id: str) -> Thing:
        found = self.things["network-volumes"].get(volume_id)
        if found is None:
            raise Refused(404, f"network volume {volume_id} not found")
        return found

    def _check_image(self, image: str) -> None:
        if not self.images(image):
            raise Refused(400, f"image {image} could not be found in its registry")

    def _check_quota(self, most: int, but: str | None) -> None:
        used = sum(thing["workers"]["max"] for thing in self.things["serverless"].values() if thing["id"] != but)
        if used + most > self.quota:
            raise Refused(400, f"Max workers across all endpoints must not exceed your workers quota ({self.quota}).")

    def _check_gpu(self, gpu: Thing) -> None:
        pools = self.market.pools
        if unknown := [pool for pool in gpu["pools"] if pool not in pools]:
            raise Refused(400, f"unknown GPU pool {unknown[0]}")
        types = [gpu_id for pool in gpu["pools"] for gpu_id in pools[pool]]
        excluded = gpu.get("excludedTypes", [])
        if wrong := [gpu_id for gpu_id in excluded if gpu_id not in types]:
            raise Refused(400, f"{wrong[0]} is not a GPU type in one of the pools")
        if set(types) <= set(excluded):
            raise Refused(400, "no GPU type is left")


def _check(schema: Thing, body: Thing) -> None:
    errors = [
        f"$.{'.'.join(map(str, error.path))}: {error.message}" for error in Draft202012Validator(schema).iter_errors(body)
    ]
    if errors:
        raise Refused(422, "Request validation failed.", errors)
