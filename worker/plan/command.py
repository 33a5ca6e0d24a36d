"""The command `plan`: a document in, its plan out. Prints."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import urllib.request
from functools import partial
from typing import TYPE_CHECKING, Final

from worker.errors import RequestError, VolumeFailed, WorkerError
from worker.fetch.http import Network
from worker.fetch.hub import Hub, credentials
from worker.plan.document import Unreadable, Wanted, installed, read_document
from worker.plan.items import THERE, Item, Plan
from worker.plan.lookup import ask_in_time, look, read_sources
from worker.plan.places import Places
from worker.plan.room import with_room
from worker.plan.screen import plan_lines
from worker.volume_workflows import read_workflow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.settings import Settings


CANNOT_RUN: Final = 1
USAGE: Final = 2

_PATIENCE_S: Final = 8.0
_DEADLINE_S: Final = 20.0


def run(argv: Sequence[str], settings: Settings, hub: Hub | None = None) -> int:
    """Print the plan of the workflow that `argv` names. Return 0 if it can run, 1 if it cannot, 2 if it is unreadable.

    `hub` asks the sources. Without one it is created from the settings.
    """
    parser = argparse.ArgumentParser(
        prog="python -m worker plan",
        description="What a workflow needs, what of it is there, and what would be fetched. Nothing is downloaded.",
    )
    parser.add_argument(
        "workflow",
        help="a workflow as ComfyUI saves or exports it, a whole request, a PNG, WEBP, MP4 or WEBM that ComfyUI made, "
        "the name of a workflow on the volume, or - for standard input",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    try:
        options = parser.parse_args(list(argv))
    except SystemExit as exc:
        return int(exc.code or 0)
    try:
        document = read_document(options.workflow, partial(read_workflow, settings.volume_path))
    except Unreadable as exc:
        print(f"error: {options.workflow}: {exc}", file=sys.stderr)  # noqa: T201 - the command's output
        return USAGE
    plan = make_plan(document, settings, hub or make_hub(settings))
    shown = "standard input" if options.workflow == "-" else options.workflow
    if options.json:
        text = json.dumps({"workflow": shown, **plan.to_dict()}, indent=2)
    else:
        text = "\n".join(plan_lines(shown, plan, shutil.get_terminal_size((100, 24)).columns))
    print(text)  # noqa: T201 - the command's output
    return 0 if plan.can_run else CANNOT_RUN


def make_hub(settings: Settings) -> Hub:
    """Return a hub with the worker's settings but less patience, because a person waits."""
    tokens = credentials(settings.hf_endpoint, settings.hf_token, settings.civitai_token)
    network = Network(tokens, urllib.request.getproxies(), connect_timeout_s=5.0, read_timeout_s=10.0)
    return Hub(settings.hf_endpoint, network, patience_s=_PATIENCE_S)


def make_plan(document: object, settings: Settings, hub: Hub, deadline_s: float = _DEADLINE_S) -> Plan:
    """Return the plan of a workflow from `read_document`. Problems are in the plan and are not raised."""
    sources, wrong_lists = read_sources(settings)
    places = Places.of(settings)
    problems: list[WorkerError] = []
    items: list[Item] = []
    try:
        wanted = Wanted.read(document, partial(read_workflow, settings.volume_path))
        sources = sources.with_request(wanted.models, settings.request_hosts)
        sources = sources.with_workflow(wanted.metadata, settings.request_hosts)
        release = installed(settings.comfyui_dir)
        items += [look(nodes, sources, places) for nodes in wanted.names(release)]
        if lacking := wanted.lacking(release):
            problems.append(lacking)
    except (RequestError, VolumeFailed) as exc:
        problems.append(exc)
    # A worker reads the lists for missing models, and at its start if it is to have all of them first.
    if settings.model_loading == "eager" or not all(item.state in THERE for item in items):
        problems += wrong_lists
        wrong_lists = []
    plan = Plan(ask_in_time(items, hub, places.begun_bytes, deadline_s), tuple(problems), tuple(map(str, wrong_lists)))
    return with_room(plan, settings, places)
