"""Start ComfyUI, then hand over to `boot`, which does everything else while ComfyUI boots.

Only what the start needs is imported at the top, because each earlier import delays every cold start.
"""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from worker import __version__, logs
from worker.engine.process import EngineCommand, EngineProcess, prepare_base_dir
from worker.engine.start_files import request_start_files
from worker.sdk.arguments import sdk_arguments
from worker.settings import Settings, remarks

if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence


def run(argv: Sequence[str], environ: MutableMapping[str, str]) -> int:
    """Run the worker. Return the exit status. Raises `SettingsError` or `StartError`."""
    signal.signal(signal.SIGTERM, _leave)
    settings = Settings.from_env(environ)
    logs.configure_logs(settings.worker_log_level, settings.secrets())
    if settings.start_files:
        request_start_files(settings.start_files)
    for remark in remarks(environ):
        logging.getLogger("worker").warning("%s", remark)
    arguments = sdk_arguments(settings, argv, environ, Path.cwd())
    command = EngineCommand.of(settings, environ)
    prepare_base_dir(settings)
    if (settings.volume_path / "custom_nodes").is_dir():  # one look if there are none
        from worker.engine.custom_nodes import with_custom_nodes  # noqa: PLC0415 - only where a volume has custom nodes

        command = with_custom_nodes(settings, command)
    logging.getLogger("worker").info("comfyui-volume-worker %s", __version__)
    process = EngineProcess.spawn(command)

    from worker.warmup.warmup import Warmup  # noqa: PLC0415 - after the spawn: ComfyUI boots meanwhile

    warmup = Warmup(settings)
    warmup.begin()  # it takes longest of all on a network volume, so it begins before the other imports

    from worker import boot  # noqa: PLC0415 - as above

    return boot.run(boot.Worker(settings, command, process, warmup), settings, arguments, environ)


def _leave(number: int, _: object) -> None:
    """Unwind, so that ComfyUI is ended too. Uvicorn calls this handler when it has shut down."""
    sys.exit(128 + number)
