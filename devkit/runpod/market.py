"""What the stand-in has to offer: GPUs with their pools and prices, CPUs, data centres, and how many are free. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

MIG: Final = "NVIDIA RTX PRO 6000 Blackwell Server Edition MIG 1g.24gb"

# id, name, pool, GB, USD an hour as a Pod, USD an hour serverless.
_GPUS: Final = (
    ("NVIDIA RTX A4000", "RTX A4000", "AMPERE_16", 16, 0.25, 0.58),
    ("NVIDIA RTX A4500", "RTX A4500", "AMPERE_16", 20, 0.25, 0.58),
    ("NVIDIA L4", "L4", "AMPERE_24", 24, 0.39, 0.69),
    ("NVIDIA GeForce RTX 3090", "RTX 3090", "AMPERE_24", 24, 0.46, 0.69),
    (MIG, "PRO 6000 MIG 24GB", "AMPERE_24", 24, 0.5, 0.69),
    ("NVIDIA GeForce RTX 4090", "RTX 4090", "ADA_24", 24, 0.69, 1.1),
    ("NVIDIA GeForce RTX 5090", "RTX 5090", "ADA_32_PRO", 32, 0.94, 1.58),
    ("NVIDIA A40", "A40", "AMPERE_48", 48, 0.4, 1.22),
    ("NVIDIA L40S", "L40S", "ADA_48_PRO", 48, 0.86, 1.9),
    ("NVIDIA A100-SXM4-80GB", "A100 SXM", "AMPERE_80", 80, 1.74, 2.72),
    ("NVIDIA H100 80GB HBM3", "H100 SXM", "ADA_80_PRO", 80, 2.69, 4.18),
    ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000", "BLACKWELL_96", 96, 1.79, 4.0),
    ("NVIDIA H200", "H200 SXM", "HOPPER_141", 141, 3.59, 5.58),
    ("NVIDIA B200", "B200", "BLACKWELL_180", 180, 5.19, 8.64),
    ("NVIDIA RTX A2000", "RTX A2000", None, 6, 0.12, None),
)
_CPUS: Final = (("cpu3c", "Compute-Optimized", 2.0, 0.03), ("cpu5c", "Compute-Optimized", 2.0, 0.035))
_CENTRES: Final[tuple[tuple[str, str, str, list[str]], ...]] = (
    ("EU-RO-1", "EU Romania 1", "EUROPE", ["STANDARD", "HIGH_PERFORMANCE"]),
    ("US-KS-2", "US Kansas 2", "NORTH_AMERICA", ["STANDARD"]),
    ("AP-JP-1", "AP Japan 1", "ASIA", ["STANDARD"]),  # without an S3 API
    ("US-TX-3", "US Texas 3", "NORTH_AMERICA", []),  # without network volumes
)


@dataclass(slots=True)
class Market:
    """The catalog. `stock` says what is free, by `(data centre, pool or CPU)`; what is not in it is HIGH."""

    stock: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def centres(self) -> dict[str, list[str]]:
        """Return the data centres, and the kinds of volumes that each has."""
        return {name: types for name, _, _, types in _CENTRES}

    @property
    def pools(self) -> dict[str, list[str]]:
        """Return the GPU types of each pool."""
        found: dict[str, list[str]] = {}
        for gpu_id, _, pool, *_ in _GPUS:
            if pool:
                found.setdefault(pool, []).append(gpu_id)
        return found

    @property
    def cpus(self) -> set[str]:
        """Return the CPU flavours."""
        return {flavour for flavour, *_ in _CPUS}

    def level(self, centre: str, what: str | None) -> str:
        """Return how much of a pool or CPU is free in a data centre."""
        return self.stock.get((centre, what or ""), self.stock.get((centre, "*"), "HIGH"))

    def gpus_shown(self, *, available: bool) -> list[dict[str, Any]]:
        """Return the answer of `GET catalog/gpus`."""
        shown = []
        for gpu_id, name, pool, memory, pod_price, price in _GPUS:
            gpu: dict[str, Any] = {
                "id": gpu_id,
                "name": name,
                "pool": pool,
                "manufacturer": "NVIDIA",
                "memory": memory,
                "secure": True,
                "community": False,
                "price": {"secure": pod_price, "community": 0.0, **({"serverless": price} if price else {})},
                "maxCount": {"secure": 8, "community": 0},
            }
            if available:
                levels = [(centre, title, self.level(centre, pool)) for centre, title, _, _ in _CENTRES]
                gpu["availability"] = max((level for *_, level in levels), key=("NONE", "LOW", "MEDIUM", "HIGH").index)
                gpu["dataCenters"] = [
                    {"id": centre, "name": title, "availability": level} for centre, title, level in levels if level != "NONE"
                ]
            shown.append(gpu)
        return shown

    def cpus_shown(self) -> list[dict[str, Any]]:
        """Return the answer of `GET catalog/cpus`."""
        return [
            {
                "id": flavour,
                "name": name,
                "group": "Gen 3",
                "vcpu": {"min": 2, "max": 32},
                "ramGbPerVcpu": ram,
                "price": {"securePerVcpu": price, "serverlessPerVcpu": price},
            }
            for flavour, name, ram, price in _CPUS
        ]

    def centres_shown(self, include: str) -> list[dict[str, Any]]:
        """Return the answer of `GET catalog/datacenters`."""
        shown = []
        for centre, title, region, types in _CENTRES:
            found: dict[str, Any] = {
                "id": centre,
                "name": title,
                "region": region,
                "globalNetwork": False,
                "networkVolumeTypes": types,
                "compliance": [],
            }
            if "GPU_AVAILABILITY" in include:
                found["gpuAvailability"] = [
                    {"id": gpu_id, "name": name, "availability": self.level(centre, pool)} for gpu_id, name, pool, *_ in _GPUS
                ]
            if "CPU_AVAILABILITY" in include:
                found["cpuAvailability"] = [
                    {"id": flavour, "name": name, "availability": self.level(centre, flavour)} for flavour, name, *_ in _CPUS
                ]
            shown.append(found)
        return shown
