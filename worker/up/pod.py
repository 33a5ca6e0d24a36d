"""The program in the Pod that fills a volume: it runs the seeder, then removes the Pod.

Prints events; touches disk and network.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from worker.seed import seed_command
from worker.seed.screen import ScreenJson
from worker.up.api import RunPodApi
from worker.up.errors import UpError, UpUsage
from worker.up.filling import MODELS_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

LINGER_VARIABLE: Final = "UP_LINGER_S"

# `up` reads the log and removes the Pod. If `up` was killed, the Pod removes itself.
_LINGER_S: Final = 600.0
_AGAIN_S: Final = 300.0


def run(_: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run the command `up fill` in the Pod."""
    return fill_in_pod(environ, sys.stdout)


def fill_in_pod(environ: Mapping[str, str], stream: IO[str], sleep: Callable[[float], object] = time.sleep) -> int:
    """Download, in a Pod, the models that the environment names, report the result, and remove this Pod. Does not return there.

    RunPod restarts a container that ends, and its Pod costs money until it is removed.
    """
    manifest = environ.get(MODELS_VARIABLE, "")
    if not manifest:
        raise UpUsage(f"`up fill` runs in the Pod that `up` makes: it takes its models from {MODELS_VARIABLE}.")
    with tempfile.TemporaryDirectory(prefix="worker-up-") as folder:
        wanted = Path(folder) / "models.json"
        wanted.write_text(manifest, "utf-8")
        code = seed_command.run([str(wanted), "--json"], environ, stream)
    ScreenJson(stream).tell("filled", code=code)
    pod_id = environ.get("RUNPOD_POD_ID", "")
    if not pod_id:
        return code
    sleep(float(environ.get(LINGER_VARIABLE) or _LINGER_S))
    while True:
        try:
            runpod = RunPodApi(environ.get("RUNPOD_API_KEY", ""), environ.get("RUNPOD_API_BASE_URL"))
            runpod.delete("pods", pod_id)
        except UpError as exc:
            ScreenJson(stream).say(f"The Pod could not remove itself: {exc}")
        sleep(_AGAIN_S)
