"""RunPod's offer and its prices: GPU pools that fit a workflow, data centres with free GPUs. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

PRICES_OF: Final = "August 2026"
"""The date of the prices that are not in RunPod's API: those of volumes."""

VOLUME_GB_MONTH_USD: Final = 0.07
VOLUME_GB_MONTH_BEYOND_USD: Final = 0.05
SMALLEST_VOLUME_GB: Final = 10
LARGEST_VOLUME_GB: Final = 4096

# Memory of a GPU besides the weights. ComfyUI also runs with less, and then moves weights between GPU and memory.
_SPARE_GB: Final = 2
# Space for large outputs, workflows and custom nodes. A file system is never filled to its last byte.
_VOLUME_SPARE_GB: Final = 5
_VOLUME_SPARE_SHARE: Final = 0.1
_TIER_GB: Final = 1000
_GB: Final = 1_000_000_000
_LEVELS: Final = ("NONE", "LOW", "MEDIUM", "HIGH")
_MOST_POOLS: Final = 3
# A slice of a GPU, sold in the same pool as whole ones.
_SLICE: Final = " MIG "


@dataclass(frozen=True, slots=True)
class GpuPool:
    """A pool of GPUs that RunPod offers. `levels`: how many are free, by data centre. `slices`: types that are no whole GPU."""

    name: str
    memory_gb: int
    usd_hour: float
    gpus: tuple[str, ...]
    levels: Mapping[str, str]
    slices: tuple[str, ...] = ()

    @property
    def usd_second(self) -> float:
        """Return the price of a worker for a second."""
        return self.usd_hour / 3600

    def level(self, datacenter: str) -> str:
        """Return how many are free in a data centre: NONE, LOW, MEDIUM or HIGH."""
        return self.levels.get(datacenter, "NONE")


@dataclass(frozen=True, slots=True)
class DataCenter:
    """A data centre that RunPod offers network volumes in. `cpus`: its CPU flavours, and how many are free."""

    name: str
    title: str
    tiers: tuple[str, ...]
    cpus: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class CpuPod:
    """A kind of CPU Pod that RunPod offers. Its price is for one vCPU an hour."""

    name: str
    vcpus: int
    usd_hour: float


def pools_of(gpus: Iterable[Mapping[str, Any]]) -> dict[str, GpuPool]:
    """Return the offered pools in `GET catalog/gpus?include=AVAILABILITY&product=SERVERLESS`, the cheapest first."""
    by_pool: dict[str, list[Mapping[str, Any]]] = {}
    for gpu in gpus:
        if gpu.get("pool") and gpu.get("manufacturer") == "NVIDIA":
            by_pool.setdefault(str(gpu["pool"]), []).append(gpu)
    found = [_pool(name, types) for name, types in by_pool.items()]
    return {pool.name: pool for pool in sorted(found, key=lambda pool: (pool.usd_hour, pool.memory_gb)) if pool.gpus}


def _pool(name: str, types: Sequence[Mapping[str, Any]]) -> GpuPool:
    whole = [gpu for gpu in types if _SLICE not in f"{gpu['id']} "]
    levels: dict[str, str] = {}
    for gpu in whole:
        for place in gpu.get("dataCenters") or ():
            levels[place["id"]] = max(levels.get(place["id"], "NONE"), place["availability"], key=_offer_rank)
    prices = [float(gpu["price"]["serverless"]) for gpu in whole if gpu.get("price", {}).get("serverless")]
    return GpuPool(
        name,
        min((int(gpu["memory"]) for gpu in whole), default=0),
        max(prices, default=0.0),
        tuple(str(gpu["name"]) for gpu in whole),
        levels,
        tuple(str(gpu["id"]) for gpu in types if gpu not in whole),
    )


def datacenters_of(places: Iterable[Mapping[str, Any]]) -> dict[str, DataCenter]:
    """Return what RunPod offers in `GET catalog/datacenters?include=CPU_AVAILABILITY`: data centres with network volumes."""
    return {
        str(place["id"]): DataCenter(
            str(place["id"]),
            str(place.get("name", place["id"])),
            tuple(place["networkVolumeTypes"]),
            {str(cpu["id"]): str(cpu["availability"]) for cpu in place.get("cpuAvailability") or ()},
        )
        for place in places
        if place.get("networkVolumeTypes")
    }


def cpus_of(cpus: Iterable[Mapping[str, Any]]) -> list[CpuPod]:
    """Return the CPU Pods that RunPod offers in `GET catalog/cpus`, each in its smallest size, the cheapest first."""
    found = [
        CpuPod(
            str(cpu["id"]),
            max(2, int(cpu["vcpu"]["min"])),
            float(cpu["price"]["securePerVcpu"]) * max(2, int(cpu["vcpu"]["min"])),
        )
        for cpu in cpus
    ]
    return sorted(found, key=lambda cpu: cpu.usd_hour)


def wanted_gpu_gb(model_bytes: int) -> int:
    """Return the GPU memory that holds all of a workflow's files at once, in whole GB."""
    return -(-model_bytes // _GB) + _SPARE_GB


def fitting_pools(pools: Mapping[str, GpuPool], gb: int) -> list[GpuPool]:
    """Return the offered pools whose GPUs have this much memory, the cheapest first. If none, those with the most memory."""
    most = max((pool.memory_gb for pool in pools.values()), default=0)
    return [pool for pool in pools.values() if pool.memory_gb >= min(gb, most)]


@dataclass(frozen=True, slots=True)
class Offer:
    """A data centre, and the pools for an endpoint there: those with free GPUs, the cheapest first."""

    datacenter: str
    pools: tuple[GpuPool, ...]

    @property
    def best(self) -> str:
        """Return how many GPUs of the most available kind are free."""
        return max((pool.level(self.datacenter) for pool in self.pools), key=_offer_rank, default="NONE")


def offers(pools: Sequence[GpuPool], datacenters: Iterable[DataCenter], preferred: Iterable[str]) -> list[Offer]:
    """Return where GPUs of these pools are free, the best first: cheap, then many, then a `preferred` data centre."""
    liked = set(preferred)
    found = []
    for place in datacenters:
        free = tuple(pool for pool in pools if pool.level(place.name) != "NONE")[:_MOST_POOLS]
        if free:
            found.append(Offer(place.name, free))
    return sorted(
        found,
        key=lambda offer: (
            offer.pools[0].usd_hour,
            -_offer_rank(offer.pools[0].level(offer.datacenter)),
            offer.datacenter not in liked,
        ),
    )


def volume_gb(model_bytes: int) -> int:
    """Return the size of a volume to offer for models of this size."""
    spare = max(_VOLUME_SPARE_GB, int(model_bytes * _VOLUME_SPARE_SHARE) // _GB)
    return min(LARGEST_VOLUME_GB, max(SMALLEST_VOLUME_GB, -(-model_bytes // _GB) + spare))


def volume_usd_month(size_gb: int) -> float:
    """Return the price that RunPod asks for a standard volume, a month."""
    beyond = max(0, size_gb - _TIER_GB)
    return (size_gb - beyond) * VOLUME_GB_MONTH_USD + beyond * VOLUME_GB_MONTH_BEYOND_USD


def _offer_rank(level: str) -> int:
    return _LEVELS.index(level) if level in _LEVELS else 0
