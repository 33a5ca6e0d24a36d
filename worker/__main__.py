"""The entry point: read the arguments and the environment, build the worker or a command, and run it.

    python -m worker                        the worker; --rp_serve_api for a local API
    python -m worker plan WORKFLOW.json     what a workflow needs and where it comes from
    python -m worker doctor                 examine the volume
    python -m worker convert WORKFLOW.json  convert the editor's format to the graph that runs
    python -m worker seed WHAT ...          put models onto a volume before the first job
    python -m worker up WORKFLOW.json       create an endpoint on RunPod for a workflow; up status, up down
    python -m worker settings               print the table of settings
    python -m worker help                   print this list

Only modules that starting ComfyUI needs are imported at the top, because each earlier import delays every cold start.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from worker import __version__, logs
from worker.engine.process import EngineCommand, EngineProcess, prepare_base_dir
from worker.errors import CommandUnknown, NotOnWindows, WorkerError
from worker.sdk.serve import import_sdk, prepare_environ, sdk_arguments, serve, takes_jobs
from worker.settings import Settings, markdown_table, remarks

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping, Sequence
    from contextlib import AbstractContextManager


_HELP = """\
usage: python -m worker [COMMAND] ...        (in the image: worker [COMMAND] ...)

  plan WORKFLOW      show a workflow's models: which are there, and where the others come from
  doctor             examine the volume
  seed WHAT ...      fill a volume with models before the first job
  up WORKFLOW        create an endpoint on RunPod with volume, models and a first picture; up status, up down
  convert WORKFLOW   convert a workflow in the editor's format to the graph that runs
  settings           print the table of settings (environment variables)
  help               print this

plan, doctor, seed, up and convert have their own --help. Without a command the worker starts. On RunPod it takes jobs.
Elsewhere it needs --rp_serve_api for a local API (with --rp_api_host and --rp_api_port), or one job in
./test_input.json or --test_input.
"""


def main(argv: Sequence[str], environ: MutableMapping[str, str]) -> int:
    """Run a command, or the worker. Return the exit status. A failed start is one line and status 1."""
    command, rest = (argv[0], argv[1:]) if argv else ("", argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal's encoding lacks is no reason to fail
        sys.stdout.reconfigure(errors="replace")
    try:
        if command in {"-h", "--help", "help"}:
            print(_HELP, end="")  # noqa: T201 - the command's output
            return 0
        if command not in _ANYWHERE and not hasattr(os, "fork"):
            raise NotOnWindows(command or "The worker")
        if command in _COMMANDS:
            return _COMMANDS[command](rest, environ)
        if command and not command.startswith("-"):
            raise CommandUnknown(command, sorted(_COMMANDS))
        return run_worker(argv, environ)
    except WorkerError as exc:
        print(f"error: {exc} [{exc.code}]", file=sys.stderr)  # noqa: T201 - logging may not be set up yet
        return 1


def run_worker(argv: Sequence[str], environ: MutableMapping[str, str]) -> int:
    """Start the worker: ComfyUI, then everything else while it boots, then serve. Raises `SettingsError` or `StartError`."""
    signal.signal(signal.SIGTERM, _unwind)
    settings = Settings.from_env(environ)
    logs.configure_logs(settings.worker_log_level, settings.secrets())
    for remark in remarks(environ):
        logging.getLogger("worker").warning("%s", remark)
    arguments = sdk_arguments(settings, argv, environ, Path.cwd())
    command = EngineCommand.of(settings, environ)
    prepare_base_dir(settings)
    if (settings.volume_path / "custom_nodes").is_dir():  # one look if there are none
        command = _with_custom_nodes(settings, command)
    logging.getLogger("worker").info("comfyui-volume-worker %s", __version__)
    process = EngineProcess.spawn(command)

    from worker.warmup.warmup import Warmup  # noqa: PLC0415 - after the spawn: ComfyUI boots meanwhile

    warmup = Warmup(settings)
    warmup.begin()  # it takes longest of all on a network volume, so it begins before the other imports

    from worker.boot import Worker, process_start  # noqa: PLC0415 - as above

    prepare_environ(environ)
    worker = Worker(settings, command, process, warmup)
    try:
        early = settings.take_jobs == "booting" and settings.model_loading != "eager" and takes_jobs(arguments, environ)
        worker.start(lambda: import_sdk(arguments, environ), process_start(), wait=not early)
        serve(worker, arguments, environ)
    finally:
        worker.stop()
    return 1 if worker.failed else 0


def _with_custom_nodes(settings: Settings, command: EngineCommand) -> EngineCommand:
    """Before the entry point starts ComfyUI, link the volume's custom nodes and install their packages. A node never raises."""
    import socket  # noqa: PLC0415 - only where a volume has custom nodes
    import threading  # noqa: PLC0415 - as above
    from dataclasses import replace  # noqa: PLC0415 - as above

    from worker.engine import custom_nodes  # noqa: PLC0415 - as above

    def once(key: str, done: Callable[[], bool]) -> AbstractContextManager[object]:
        from worker.store.layout import Layout  # noqa: PLC0415 - only for the worker that installs packages
        from worker.store.locks import Locks, LockTiming  # noqa: PLC0415 - as above

        locks = Locks(
            Layout(settings.volume_path),
            settings.runpod_pod_id or socket.gethostname(),
            LockTiming(patience_s=custom_nodes.INSTALL_TIMEOUT_S),
        )
        return locks.hold(key, published=done, cancel=threading.Event(), name="the custom nodes' packages")

    folders = custom_nodes.NodeFolders.below(settings.volume_path, settings.base_dir, settings.comfyui_python)
    return replace(command, environ=custom_nodes.node_packages(folders, once, command.environ))


def _settings_table(_: Sequence[str], __: MutableMapping[str, str]) -> int:
    print(markdown_table(), end="")  # noqa: T201 - the command's output
    return 0


def _plan(argv: Sequence[str], environ: MutableMapping[str, str]) -> int:
    from worker import plan  # noqa: PLC0415 - only for this command

    return plan.run(argv, Settings.from_env(environ))


def _doctor(argv: Sequence[str], environ: MutableMapping[str, str]) -> int:
    from worker import doctor  # noqa: PLC0415 - only for this command

    return doctor.run(argv, Settings.from_env(environ))


def _convert(argv: Sequence[str], environ: MutableMapping[str, str]) -> int:
    from worker import convert_command  # noqa: PLC0415 - only for this command

    return convert_command.run(argv, Settings.from_env(environ))


def _seed(argv: Sequence[str], environ: MutableMapping[str, str]) -> int:
    from worker.seed import seed_command  # noqa: PLC0415 - only for this command

    return seed_command.run(argv, environ)


def _up(argv: Sequence[str], environ: MutableMapping[str, str]) -> int:
    if list(argv) == ["fill"]:
        from worker.up import pod  # noqa: PLC0415 - in the Pod that `up` makes, where there is no client

        return pod.fill_in_pod(environ, sys.stdout)
    try:
        from worker.up import up_command  # noqa: PLC0415 - only for this command
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] != "client":
            raise
        raise CommandUnknown("up", sorted(_COMMANDS.keys() - {"up"})) from None  # the image has no client

    return up_command.run(argv, environ)


_COMMANDS = {"settings": _settings_table, "plan": _plan, "doctor": _doctor, "convert": _convert, "seed": _seed, "up": _up}


_ANYWHERE = frozenset({"settings", "plan", "seed", "up"})


def _unwind(number: int, _: object) -> None:
    """Unwind the entry point on SIGTERM, so that ComfyUI is ended too. Uvicorn calls this handler when it has shut down."""
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
