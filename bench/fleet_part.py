"""One cold worker's part with the volume: the worker's own code, with ComfyUI left out. `bench/fleet.py` starts it many times.

    python -m bench.fleet_part BASE_DIR VOLUME

Says how long its imports took, waits for a line, does what `worker/spawn.py` and `worker/boot.py` do with a volume before
the first job, and says when that is done; then when what goes on behind it is done as well. Lives until it is killed.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

from worker.engine.custom_nodes import with_custom_nodes
from worker.engine.process import EngineCommand, EngineProcess, prepare_base_dir
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.warmup.warmup import Warmup

ENDPOINT = "bench"
_NO_HUB = "http://127.0.0.1:9"
"""Nothing listens there: a model that is not found ready cannot be fetched, which the log says."""
_STAND_IN = ("sleep", "3600")
_SETTLE_S = 60.0
_POLL_S = 0.02


def main(argv: Sequence[str]) -> None:
    """Print `{"imports_s"}`; after a line on standard input `{"links"}`, then `{"read_bytes"}`. Raises what goes wrong."""
    base_dir, volume = argv
    environ = {"COMFYUI_BASE_DIR": base_dir, "VOLUME_PATH": volume, "RUNPOD_ENDPOINT_ID": ENDPOINT, "HF_ENDPOINT": _NO_HUB}
    settings = Settings.from_env({**environ, "COMFYUI_PYTHON": sys.executable})
    _say(imports_s=import_all())
    imported = set(sys.modules)
    sys.stdin.readline()
    run(settings)
    if late := sorted(name for name in set(sys.modules) - imported if name.startswith("worker.")):
        raise RuntimeError(f"imported while it was measured: {', '.join(late)}")
    sys.stdin.readline()


def import_all() -> float:
    """Import what the worker imports on its way to its models; seconds since the process began."""
    import worker.downloads  # noqa: PLC0415 - as above
    import worker.engine.custom_nodes  # noqa: PLC0415 - in the order in which the worker does
    import worker.models.sources  # noqa: PLC0415 - as above
    import worker.store.locks  # noqa: PLC0415 - as above
    import worker.warmup.warmup  # noqa: F401, PLC0415 - as above
    from worker.base.clock import process_start  # noqa: PLC0415 - as above

    return time.monotonic() - process_start()


def run(settings: Settings) -> None:
    """As `spawn.run` does around the spawn, and as `Worker.start` does in its thread for the models."""
    from worker.boot import BootTimeline, Worker  # noqa: PLC0415 - imported by import_all
    from worker.warmup.warmup import Warmup  # noqa: PLC0415 - as above

    prepare_base_dir(settings)
    command = EngineCommand(_STAND_IN, settings.base_dir, os.environ)
    if (settings.volume_path / "custom_nodes").is_dir():
        command = with_custom_nodes(settings, command)
    process = EngineProcess.spawn(command)
    warmup = Warmup(settings)
    warmup.begin()
    worker, timeline = Worker(settings, command, process, warmup), BootTimeline(time.monotonic())
    worker._supply_models(timeline)  # noqa: SLF001 - the part of `Worker.start` that is measured
    _say(links=timeline.summary())
    _say(read_bytes=_settled(warmup))


def _settled(warmup: Warmup) -> int:
    """How much is in memory of what jobs used, once it is read and every model of the manifest has been looked at."""
    deadline = time.monotonic() + _SETTLE_S
    while (warmed := warmup.warmed()) is None or warmed.running or _looking():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not over after {_SETTLE_S:g} s: {warmed}, {threading.enumerate()}")
        time.sleep(_POLL_S)
    return warmed.read_bytes + warmed.cached_bytes


def _looking() -> bool:
    """Whether models are looked at behind the jobs; the worker's threads for that have no end that others could see."""
    return any(thread.name.startswith("fetch-") for thread in threading.enumerate())


def _say(**value: object) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
