"""Clocks of a pod that jump ahead on demand, as they do when a machine is thawed an hour later. Touches the disk.

`ShiftedClock.environ` goes into a pod's environment. Every Python process of it then adds what the file says to `time.time` and
to `time.monotonic`, which asyncio, threads and libraries ask. Waits in the kernel are relative and go on for what was left.
"""

from __future__ import annotations

import struct
from pathlib import Path

_OFFSETS = struct.Struct("dd")


class ShiftedClock:
    """How far ahead a pod's clocks are; the file is made at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._monotonic_s = self._wall_s = 0.0
        self._write()

    @property
    def environ(self) -> dict[str, str]:
        """Return what to set for the pod's processes."""
        return {"PYTHONPATH": str(Path(__file__).parent), "SHIFTED_CLOCK": str(self._path)}

    def jump(self, seconds: float, *, monotonic: bool) -> None:
        """Move the wall clock ahead, and the monotonic one where the machine's went on meanwhile."""
        self._wall_s += seconds
        self._monotonic_s += seconds if monotonic else 0.0
        self._write()

    def _write(self) -> None:
        with self._path.open("r+b" if self._path.exists() else "wb") as file:
            file.write(_OFFSETS.pack(self._monotonic_s, self._wall_s))
