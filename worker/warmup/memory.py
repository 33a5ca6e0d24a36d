"""The memory that this container can still use: its own limit, not only the machine's. Reads /proc and /sys.

A container on a shared machine sees the machine's /proc/meminfo. But its control group's limit ends a process, and reads
through the page cache count towards it. Both versions of control groups are read, at each level from the process's own group
up: the tightest counts. Files in the page cache can be evicted, so they count as free.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROOT: Final = Path("/")
_SYS: Final = Path("sys/fs/cgroup")
# Version 1 has no word for "no limit": it reports the largest number of whole pages.
_NO_LIMIT_BYTES: Final = 1 << 60


def free_memory_bytes(root: Path = _ROOT) -> int:
    """Return how much memory can be used before a process is killed or swapped out. 0 if unknown.

    `root` is where `proc` and `sys` are found.
    """
    known = [*_of_machine(root), *_of_groups(root)]
    return max(0, min(known)) if known else 0


def _of_machine(root: Path) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024


def _of_groups(root: Path) -> Iterator[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            for mount in (root / _SYS, root / _SYS / "unified"):
                yield from _memory_by_group(mount, path, ("memory.max", "memory.current", "inactive_file", "active_file"))
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file")
            yield from _memory_by_group(root / _SYS / "memory", path, names)


def _memory_by_group(mount: Path, path: str, names: tuple[str, str, str, str]) -> Iterator[int]:
    """Yield the remaining memory of each group from `path` up to the mount's own.

    Without its own namespace a container reads its path as the machine has it, and sees its own group as the mount's top.
    """
    group = mount / path.lstrip("/")
    while group.is_relative_to(mount):
        yield from _left(group, *names)
        group = group.parent


def _left(group: Path, limit_name: str, usage_name: str, *cache_names: str) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):  # no such group here, or `max`: no limit
        limit_bytes = int((group / limit_name).read_text())
        if limit_bytes < _NO_LIMIT_BYTES:
            usage_bytes = int((group / usage_name).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            yield limit_bytes - usage_bytes + sum(int(stat.get(name, 0)) for name in cache_names)
