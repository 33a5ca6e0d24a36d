"""Choose what `up` will create, from RunPod's offer and a workflow's needs. Asks RunPod, changes nothing."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from worker.seed.options import KEY_ID, KEY_SECRET
from worker.seed.s3_api import DATACENTERS
from worker.up import runpod_offer
from worker.up.errors import NoGpuFree, UpUsage, VolumeUnknown
from worker.up.options import IMAGE
from worker.up.runpod_offer import DataCenter, volume_gb, volume_usd_month, wanted_gpu_gb

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from worker.up.api import RunPodApi, Thing
    from worker.up.needs import Needs
    from worker.up.options import Fill, UpOptions
    from worker.up.runpod_offer import CpuPod, GpuPool, Offer
    from worker.up.state import UpState

_CHECKOUT: Final = Path(__file__).resolve().parents[2]
_GIT_TIMEOUT_S: Final = 10.0
_MAX_WORKERS: Final = 3


@dataclass(frozen=True, slots=True)
class UpPlan:
    """What `up` will create. `volume_id` is that of an existing volume; `own_volume`: `up` created it, or will.

    `needs` is None if the models are on the volume already and were not requested again.
    """

    name: str
    needs: Needs | None
    image: str
    cuda: str
    datacenter: str
    pools: tuple[str, ...]
    excluded: tuple[str, ...]
    usd_second: tuple[float, ...]
    size_gb: int
    volume_id: str | None
    own_volume: bool
    high_performance: bool
    fill: Fill
    pod_usd_hour: float
    max_workers: int
    offers: tuple[Offer, ...] = ()
    new: bool = True

    @property
    def gpu_cost(self) -> str:
        """Return a worker's price for a second, in words."""
        low, high = min(self.usd_second, default=0.0), max(self.usd_second, default=0.0)
        return f"${low:.5f} a second" if low == high else f"${low:.5f} to ${high:.5f} a second"

    def agreed(self) -> dict[str, Any]:
        """Return what the person agrees to, as the state stores it."""
        return {
            "image": self.image,
            "cuda": self.cuda,
            "datacenter": self.datacenter,
            "pools": list(self.pools),
            "excluded": list(self.excluded),
            "usd_second": list(self.usd_second),
            "size_gb": self.size_gb,
            "high_performance": self.high_performance,
            "fill": self.fill,
            "pod_usd_hour": self.pod_usd_hour,
            "max_workers": self.max_workers,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the plan for `--json`."""
        needs = self.needs
        return {
            "name": self.name,
            **self.agreed(),
            "volume": self.volume_id,
            "volume_usd_month": None if self.high_performance else round(volume_usd_month(self.size_gb), 2),
            "prices_of": runpod_offer.PRICES_OF,
            "models": [item.to_dict() for item in needs.items] if needs else [],
            "size_bytes": needs.size_bytes if needs else None,
            "gpu_gb": wanted_gpu_gb(needs.size_bytes) if needs else None,
            "offers": [
                {
                    "datacenter": offer.datacenter,
                    "pools": [
                        {
                            "name": pool.name,
                            "gpus": list(pool.gpus),
                            "memory_gb": pool.memory_gb,
                            "usd_second": round(pool.usd_second, 6),
                            "free": pool.level(offer.datacenter),
                        }
                        for pool in offer.pools
                    ],
                }
                for offer in self.offers
            ],
        }


def make_up_plan(
    options: UpOptions, needs: Needs | None, runpod: RunPodApi, state: UpState, environ: Mapping[str, str]
) -> UpPlan:
    """Return what `up` will create. For a deployment that was agreed to before, return the agreed plan.

    Raises `NoGpuFree`, `VolumeUnknown`, `UpUsage`, and errors of RunPod's API.
    """
    volume = _planned_volume(options, runpod, state)
    own = options.volume is None and not state.get("volume").get("given")
    agreed = state.get("agreed")
    if agreed and not options.pools:
        return _as_agreed(options, needs, agreed, volume, own=own)
    pools = runpod_offer.pools_of(runpod.all("catalog/gpus", include="AVAILABILITY", product="SERVERLESS"))
    centres = runpod_offer.datacenters_of(runpod.all("catalog/datacenters", include="GPU_AVAILABILITY,CPU_AVAILABILITY"))
    size_bytes = needs.size_bytes if needs else 0
    wanted = _allowed_pools(options, pools, size_bytes)
    datacenter = _planned_datacenter(options, volume)
    places = _candidate_datacenters(options, centres, datacenter)
    offers = runpod_offer.offers(wanted, places, DATACENTERS)
    fill = options.fill or ("s3" if _has_s3_keys(environ) else "pod")
    if fill == "s3" and options.s3_endpoint is None:
        if datacenter and datacenter not in DATACENTERS:
            if options.fill == "s3":
                raise UpUsage(f"RunPod has no S3 API in {datacenter}: use --fill pod, or another --datacenter.")
            fill = "pod"
        else:
            offers = [offer for offer in offers if offer.datacenter in DATACENTERS]
    if not offers:
        raise NoGpuFree([pool.name for pool in wanted], datacenter or "any data centre with network volumes")
    offer = offers[0]
    cpus = free_cpus(runpod, centres[offer.datacenter]) if fill == "pod" else []
    size_gb = options.size_gb or volume_gb(size_bytes)
    return UpPlan(
        name=options.name,
        needs=needs,
        image=planned_image(options),
        cuda=options.cuda,
        datacenter=offer.datacenter,
        pools=tuple(pool.name for pool in offer.pools),
        excluded=tuple(gpu for pool in offer.pools for gpu in pool.slices),
        usd_second=tuple(pool.usd_second for pool in offer.pools),
        size_gb=max(size_gb, int(volume["size"])) if volume else size_gb,
        volume_id=str(volume["id"]) if volume else None,
        own_volume=own,
        high_performance=options.high_performance,
        fill=fill,
        pod_usd_hour=cpus[0].usd_hour if cpus else 0.0,
        max_workers=options.max_workers or _MAX_WORKERS,
        offers=tuple(offers),
    )


def _as_agreed(
    options: UpOptions, needs: Needs | None, agreed: Mapping[str, Any], volume: Thing | None, *, own: bool
) -> UpPlan:
    size_gb = max(int(agreed["size_gb"]), volume_gb(needs.size_bytes) if needs else 0, int(volume["size"]) if volume else 0)
    plan = UpPlan(
        name=options.name,
        needs=needs,
        image=str(agreed["image"]),
        cuda=str(agreed["cuda"]),
        datacenter=_planned_datacenter(options, volume) or str(agreed["datacenter"]),
        pools=tuple(agreed["pools"]),
        excluded=tuple(agreed["excluded"]),
        usd_second=tuple(agreed["usd_second"]),
        size_gb=size_gb,
        volume_id=str(volume["id"]) if volume else None,
        own_volume=own,
        high_performance=bool(agreed["high_performance"]),
        fill=options.fill or agreed["fill"],
        pod_usd_hour=float(agreed["pod_usd_hour"]),
        max_workers=options.max_workers or int(agreed["max_workers"]),
        new=False,
    )
    # Options of this command line take precedence over the agreed ones.
    plan = replace(plan, image=options.image or plan.image, cuda=options.cuda if options.image else plan.cuda)
    return replace(plan, size_gb=max(plan.size_gb, options.size_gb or 0))


def _planned_volume(options: UpOptions, runpod: RunPodApi, state: UpState) -> Thing | None:
    """Return the existing volume that `up` will use: given, created by an earlier run, or with the deployment's name."""
    known = state.get("volume")
    if wanted := options.volume or (known.get("id") if known.get("given") else None):
        found = runpod.get("network-volumes", str(wanted))
        if found is None:
            raise VolumeUnknown(str(wanted))
        return found
    found = runpod.get("network-volumes", str(known["id"])) if known.get("id") else None
    if found is None:
        found = next(iter(runpod.named("network-volumes", options.resource)), None)
    return found


def _planned_datacenter(options: UpOptions, volume: Thing | None) -> str | None:
    """Return the data centre to which the plan of `up` is bound, None for any. Raises `UpUsage` if the volume is elsewhere."""
    if volume is None:
        return options.datacenter
    there = str(volume["dataCenter"])
    if options.datacenter not in {None, there}:
        raise UpUsage(f"--datacenter: the volume {volume['id']} is in {there}; use another --name for another data centre.")
    return there


def _allowed_pools(options: UpOptions, pools: Mapping[str, GpuPool], size_bytes: int) -> Sequence[GpuPool]:
    if not options.pools:
        return runpod_offer.fitting_pools(pools, wanted_gpu_gb(size_bytes))
    if unknown := [name for name in options.pools if name not in pools]:
        raise UpUsage(f"--gpu: RunPod has no pool {unknown[0]}; it is one of {', '.join(sorted(pools))}.")
    return [pools[name] for name in options.pools]


def _candidate_datacenters(options: UpOptions, centres: Mapping[str, DataCenter], name: str | None) -> list[DataCenter]:
    tier = "HIGH_PERFORMANCE" if options.high_performance else None
    if name is None:
        return [place for place in centres.values() if tier is None or tier in place.tiers]
    if name not in centres:
        raise UpUsage(f"--datacenter: there are no network volumes in {name}; they are in {', '.join(sorted(centres))}.")
    if tier and options.volume is None and tier not in centres[name].tiers:
        raise UpUsage(f"--high-performance: {name} has no such storage.")
    return [centres[name]]


def free_cpus(runpod: RunPodApi, centre: DataCenter) -> list[CpuPod]:
    """Return the CPU Pods that `up` can plan with in a data centre now, the cheapest first."""
    return [cpu for cpu in runpod_offer.cpus_of(runpod.all("catalog/cpus")) if centre.cpus.get(cpu.name, "NONE") != "NONE"]


def datacenter_now(runpod: RunPodApi, name: str) -> DataCenter:
    """Return the current state of a data centre for the plan of `up`."""
    centres = runpod_offer.datacenters_of(runpod.all("catalog/datacenters", include="CPU_AVAILABILITY"))
    return centres.get(name) or DataCenter(name, name, (), {})


def _has_s3_keys(environ: Mapping[str, str]) -> bool:
    return all(environ.get(name, "").strip() for name in (KEY_ID, KEY_SECRET))


def planned_image(options: UpOptions) -> str:
    """Return the image that `up` will give the workers: the named one, or that of the owner of this clone. Raises `UpUsage`."""
    if options.image:
        return options.image
    if "OWNER" not in IMAGE:
        return IMAGE
    owner = _clone_owner()
    if not owner:
        raise UpUsage(
            "Say with --image what the endpoint runs, such as ghcr.io/you/comfyui-volume-worker:1.0.0: "
            "this checkout was not cloned from GitHub, whose name for its owner the image would have."
        )
    return IMAGE.replace("OWNER", owner.lower())


def planned_cpu_image(image: str) -> str:
    """Return the image with which `up` will fill a volume: the small one without CUDA of a release, else the workers' image."""
    repository, _, tag = image.rpartition(":")
    if "@" in image or not repository.startswith("ghcr.io/") or not repository.endswith("/comfyui-volume-worker"):
        return image
    return f"{repository}:{tag.partition('-')[0]}-cpu"


def _clone_owner() -> str | None:
    """Return the owner of the repository on GitHub that this checkout was cloned from, whose image `up` plans with."""
    try:
        found = subprocess.run(  # noqa: S603 - our own words
            ["git", "-C", str(_CHECKOUT), "remote", "get-url", "origin"],  # noqa: S607 - whichever git there is
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    address = found.stdout.strip().replace("git@github.com:", "https://github.com/")
    parts = urlsplit(address)
    return parts.path.strip("/").partition("/")[0] or None if parts.hostname == "github.com" else None
