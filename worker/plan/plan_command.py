"""The command `plan`: a document in, its plan out. Prints."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import urllib.request
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Final

from worker.base.text import count, size_text, wrapped
from worker.errors import RequestError, VolumeFailed, WorkerError
from worker.fetch.http import Network
from worker.fetch.hub import Hub, credentials
from worker.plan.document import PlanDocument, UnreadableDocument, installed_release, read_document
from worker.plan.items import FETCHED, THERE, ItemState, Plan, PlanItem
from worker.plan.lookup import ask_sources_in_time, look_up_offline, read_valid_sources
from worker.plan.places import Places, with_space
from worker.volume_workflows import read_workflow

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from worker.plan.items import PlanItem
    from worker.settings import Settings


CANNOT_RUN: Final = 1
USAGE: Final = 2

_PATIENCE_S: Final = 8.0
_DEADLINE_S: Final = 20.0


def run(argv: Sequence[str], settings: Settings, hub: Hub | None = None) -> int:
    """Run the command `plan`. Return 0 if the workflow can run, 1 if it cannot, 2 if it is unreadable.

    `hub` asks the sources. Without one it is created from the settings.
    """
    parser = argparse.ArgumentParser(
        prog="python -m worker plan",
        description="Show a workflow's models: which are there, and which would be downloaded. Downloads nothing.",
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
    except UnreadableDocument as exc:
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
    """Return the hub of the command `plan`, with less patience than the worker's, because a person waits."""
    tokens = credentials(settings.hf_endpoint, settings.hf_token, settings.civitai_token)
    network = Network(tokens, urllib.request.getproxies(), connect_timeout_s=5.0, read_timeout_s=10.0)
    return Hub(settings.hf_endpoint, network, patience_s=_PATIENCE_S)


def make_plan(document: object, settings: Settings, hub: Hub, deadline_s: float = _DEADLINE_S) -> Plan:
    """Return the plan of a workflow from `read_document`. Problems are in the plan and are not raised."""
    sources, wrong_lists = read_valid_sources(settings)
    places = Places.of(settings)
    problems: list[WorkerError] = []
    items: list[PlanItem] = []
    try:
        wanted = PlanDocument.read(document, partial(read_workflow, settings.volume_path))
        sources = sources.with_request(wanted.models, settings.request_hosts)
        sources = sources.with_workflow(wanted.metadata, settings.request_hosts)
        release = installed_release(settings.comfyui_dir)
        items += [look_up_offline(nodes, sources, places) for nodes in wanted.names(release)]
        if lacking := wanted.lacking(release):
            problems.append(lacking)
    except (RequestError, VolumeFailed) as exc:
        problems.append(exc)
    # A worker reads the lists for missing models, and at its start if it is to have all of them first.
    if settings.model_loading == "eager" or not all(item.state in THERE for item in items):
        problems += wrong_lists
        wrong_lists = []
    plan = Plan(ask_sources_in_time(items, hub, places.begun_bytes, deadline_s), tuple(problems), tuple(map(str, wrong_lists)))
    return with_space(plan, settings, places)


# --- the plan as a terminal shows it ----------------------------------------------------------------


_WHAT_TO_DO_WITH_UNKNOWN: Final = (
    "No list knows the models that are UNKNOWN: put the files under models/ on the volume, "
    "or name their sources in models.toml or in the request's 'models'."
)
_LABEL_WIDTH: Final = max(map(len, ItemState))
_SIZE_WIDTH: Final = len("999.9 GB")
_INDENT: Final = 2 + _LABEL_WIDTH + 2 + _SIZE_WIDTH + 2


def plan_lines(title: str, plan: Plan, width: int) -> Iterator[str]:
    """Yield the lines that the command `plan` prints. What needs action comes last."""
    there, blocking = sum(item.state in THERE for item in plan.items), sum(item.blocking for item in plan.items)
    stopping = f", {blocking} blocking" if blocking else ""
    yield f"{title}: {count(len(plan.items), 'model')}, {there} present, {len(plan.to_fetch)} to download{stopping}"
    yield ""
    for item in sorted(plan.items, key=_row_rank):
        yield plan_row(item.state.upper() if item.blocking else item.state, item.size_bytes, item.title)
        for text in _details(item):
            yield from wrapped(text, _INDENT, width)
    if plan.items:
        yield ""
    yield from _totals(plan, width)


def _row_rank(item: PlanItem) -> tuple[bool, int]:
    return item.blocking, list(ItemState).index(item.state)


def plan_row(label: str, size_bytes: int | None, text: str) -> str:
    """Return a line of the printed plan: state, size, name."""
    size = "?" if size_bytes is None else size_text(size_bytes)
    return f"  {label:<{_LABEL_WIDTH}}  {size:>{_SIZE_WIDTH}}  {text}"


def _details(item: PlanItem) -> Iterator[str]:
    if item.spec and item.state in FETCHED:
        yield f"{item.spec.source}" + (f" ({item.known_by})" if item.known_by else "")
    if item.begun_bytes:
        yield f"{size_text(item.begun_bytes)} of it are on the volume already"
    if item.message and not (item.state is ItemState.UNKNOWN and item.blocking):
        yield item.message
    if item.blocking and item.nodes:
        yield "named by " + ", ".join(f"node {node.node_id} ({node.class_type})" for node in item.nodes)
    if item.near:
        yield f"near: {', '.join(item.near)}"


def _totals(plan: Plan, width: int) -> Iterator[str]:
    if plan.to_fetch:
        unknown = f", {plan.unknown_sizes} of unknown size" if plan.unknown_sizes else ""
        yield plan_row("to download", plan.fetch_bytes, f"in {count(len(plan.to_fetch), 'file')}{unknown}")
    if plan.free_bytes is not None:
        yield plan_row("free", plan.free_bytes, f"on {plan.target}, less if there is a quota")
    yield ""
    for text in plan.notes:
        yield from wrapped(text, 0, width)
    if any(item.state is ItemState.UNKNOWN and item.blocking for item in plan.items):
        yield from wrapped(_WHAT_TO_DO_WITH_UNKNOWN, 0, width)
    for problem in plan.problems:
        yield from wrapped(str(problem), 0, width)
    yield _verdict(plan)


def _verdict(plan: Plan) -> str:
    if plan.can_run:
        unasked = sum(item.state is ItemState.NO_ANSWER for item in plan.items)
        return "can run" + (f", if the {count(unasked, 'model')} without an answer can be downloaded" if unasked else "")
    states = Counter(item.state for item in sorted(plan.items, key=_row_rank) if item.blocking)
    reasons = [f"{number} {state}" for state, number in states.items()]
    if plan.problems:
        reasons.append(count(len(plan.problems), "problem"))
    return f"CANNOT RUN: {', '.join(reasons)}"
