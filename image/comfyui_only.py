"""ComfyUI with the volume's models, for a handler of another kind that talks to it by itself. Touches processes and the disk.

Started by start.sh when /handler.py does not use the worker. Ends with ComfyUI, and ComfyUI with it.
"""  # noqa: INP001 - a script, not a package

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING

from worker import logs
from worker.engine.custom_nodes import report_failed_nodes, with_custom_nodes
from worker.engine.process import EngineCommand, EngineProcess, prepare_base_dir
from worker.engine.start_files import request_start_files
from worker.errors import WorkerError
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

_LOOK_EVERY = 10  # seconds


def run(environ: Mapping[str, str]) -> int:
    """Start ComfyUI, link the volume's models while it boots, name the nodes that failed; return its exit status in the end."""
    settings = Settings.from_env(environ)
    logs.configure_logs(settings.worker_log_level, settings.secrets())
    if settings.start_files:
        request_start_files(settings.start_files)
    prepare_base_dir(settings)
    command = EngineCommand.of(settings, environ)
    if (settings.volume_path / "custom_nodes").is_dir():
        command = with_custom_nodes(settings, command)
    process = EngineProcess.spawn(command)
    signal.signal(signal.SIGTERM, lambda *_: process.stop())

    from worker.links.model_links import ModelLinks  # noqa: PLC0415 - after the spawn: ComfyUI boots meanwhile

    links = ModelLinks(settings.base_dir / "models", [settings.volume_path / "models"], within=[settings.volume_path])
    reported = False
    for second in itertools.count():
        if second % _LOOK_EVERY == 0:
            links.refresh()  # again and again: nobody here says which files a job wants, and some come while ComfyUI runs
        if not reported and _answers(settings.comfyui_port):  # it has imported its nodes
            report_failed_nodes(settings, process.failed_imports)
            reported = True
        with contextlib.suppress(TimeoutError):
            ended = process.exited.result(1.0)
            break
    print(f"ComfyUI {ended}", file=sys.stderr)  # noqa: T201 - the last line of the container's log
    return ended.returncode if ended.returncode >= 0 else 128 - ended.returncode


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
        return True
    return False


if __name__ == "__main__":
    try:
        sys.exit(run(os.environ))
    except WorkerError as exc:
        sys.exit(f"error: {exc} [{exc.code}]")
