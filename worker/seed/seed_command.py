"""The seeder's command: arguments and an environment in, an exit status out. Handles signals, prints errors."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import IO, TYPE_CHECKING, Final

from worker.errors import EnsureCancelled, ManifestInvalid, SettingsError, SpecInvalid, WorkerError
from worker.seed import maintenance, seeding, verify
from worker.seed.context import SeedContext, tell
from worker.seed.errors import DatacenterUnknown, S3KeysMissing, SeedUsage, WhatUnknown
from worker.seed.options import parse_seed_options
from worker.seed.screen import ScreenJson
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

FAILED: Final = 1
USAGE: Final = 2
STOPPED: Final = 130

_GO_ON: Final = "Stopped. The sent bytes are kept: run the same command again to resume."
_USAGE_ERRORS: Final = (SeedUsage, WhatUnknown, DatacenterUnknown, S3KeysMissing, SettingsError, SpecInvalid, ManifestInvalid)


def run(argv: Sequence[str], environ: Mapping[str, str], out: IO[str] | None = None) -> int:
    """Run the seeder's command. Return 0 if everything is there, 1 for a failure, 2 for wrong usage, 130 if stopped."""
    stream, as_json = out or sys.stdout, "--json" in argv
    cancel = threading.Event()
    try:
        options = parse_seed_options(argv)
        with _stop_on_signals(cancel):
            return _run_action(SeedContext(options, Settings.from_env(environ), environ, stream, cancel))
    except SystemExit as exc:
        return int(exc.code or 0)
    except EnsureCancelled:
        tell(_GO_ON, stream, as_json=as_json)
        return STOPPED
    except WorkerError as exc:
        if as_json:
            ScreenJson(stream).tell("error", code=exc.code, text=str(exc))
        else:
            print(f"error: {exc}", file=sys.stderr)  # noqa: T201 - the command's output
        return USAGE if isinstance(exc, _USAGE_ERRORS) else FAILED


def _run_action(context: SeedContext) -> int:
    place = context.place()
    if context.options.action == "list":
        code = maintenance.list_sealed(context, place)
    elif context.options.action == "sync":
        code = seeding.seed_from_sibling(context, place)
    else:
        actions = {
            "seed": seeding.seed,
            "dry_run": seeding.dry_run_seeding,
            "verify": verify.verify_all,
            "prune": maintenance.prune,
        }
        code = actions[context.options.action](context, place, context.sources(place))
    return code or (FAILED if place.away or context.left_out else 0)


@contextlib.contextmanager
def _stop_on_signals(cancel: threading.Event) -> Iterator[None]:
    """Let SIGINT and SIGTERM stop the seeder's command where it can be resumed. A second signal ends the process at once."""

    def stop(_: int, __: object) -> None:
        if cancel.is_set():
            os._exit(STOPPED)
        cancel.set()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
