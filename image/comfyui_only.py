"""ComfyUI with the volume's models, for a handler of another kind that talks to it by itself. Touches processes and the disk.

Started by start.sh when /handler.py does not use the worker. Ends with ComfyUI, and ComfyUI with it.
"""  # noqa: INP001 - a script, not a package

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING

from worker import logs
from worker.__main__ import with_custom_nodes
from worker.comfy.process import EngineCommand, EngineProcess, prepare_base_dir
from worker.errors import WorkerError
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

_LOOK_EVERY_S = 10.0


def run(environ: Mapping[str, str]) -> int:
    """Start ComfyUI, link the volume's models while it boots, and return its exit status once it has ended."""
    settings = Settings.from_env(environ)
    logs.configure(settings.worker_log_level, settings.secrets())
    prepare_base_dir(settings)
    command = EngineCommand.of(settings, environ)
    if (settings.volume_path / "custom_nodes").is_dir():
        command = with_custom_nodes(settings, command)
    process = EngineProcess.spawn(command)
    signal.signal(signal.SIGTERM, lambda *_: process.stop())

    from worker.models.links import ModelLinks  # noqa: PLC0415 - after the spawn: ComfyUI boots meanwhile

    links = ModelLinks(settings.base_dir / "models", [settings.volume_path / "models"], within=[settings.volume_path])
    ended = None
    while ended is None:
        links.refresh()  # again and again: nobody here says which files a job wants, and some come while ComfyUI runs
        with contextlib.suppress(TimeoutError):
            ended = process.exited.result(_LOOK_EVERY_S)
    print(f"ComfyUI {ended}", file=sys.stderr)  # noqa: T201 - the last line of the container's log
    return ended.returncode if ended.returncode >= 0 else 128 - ended.returncode


if __name__ == "__main__":
    try:
        sys.exit(run(os.environ))
    except WorkerError as exc:
        sys.exit(f"error: {exc} [{exc.code}]")
