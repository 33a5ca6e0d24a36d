"""The command `up`: arguments and an environment in, an exit status out. Handles signals, asks once, prints errors."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from typing import IO, TYPE_CHECKING, Any, Final, NoReturn

from client.errors import ClientError, JobFailed
from client.request import Wishes, build
from worker.base.text import count
from worker.errors import ManifestInvalid, SettingsError, SpecInvalid, WorkerError
from worker.seed.errors import S3KeysMissing, SeedUsage, WhatUnknown
from worker.seed.screen import ScreenJson
from worker.settings import Settings
from worker.up import needs as needed
from worker.up.api import RunPodApi
from worker.up.errors import ApiKeyMissing, ApiKeyRefused, StateInvalid, UpUsage
from worker.up.options import parse_up_options
from worker.up.plan import make_up_plan
from worker.up.runpod_offer import volume_usd_month
from worker.up.screen import UpScreen, ask_once
from worker.up.state import UpState, state_lock, state_path
from worker.up.steps import UpSteps

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from worker.up.api import Kind, Thing
    from worker.up.options import UpOptions

FAILED: Final = 1
USAGE: Final = 2
STOPPED: Final = 130

_USAGE_ERRORS: Final = (
    *(UpUsage, StateInvalid, ApiKeyMissing, ApiKeyRefused, SettingsError),
    *(SeedUsage, WhatUnknown, SpecInvalid, ManifestInvalid, S3KeysMissing),
)
_GO_ON: Final = "Stopped. Run the same command again to resume, or `up down` to remove what exists."


def run(argv: Sequence[str], environ: Mapping[str, str], out: IO[str] | None = None) -> int:
    """Run the command `up`. Return the exit status, see `--help`."""
    stream, as_json = out or sys.stdout, "--json" in argv
    try:
        options = parse_up_options(argv)
        with _interrupted_by_sigterm():
            return _act(options, environ, UpScreen(stream, as_json=options.json))
    except SystemExit as exc:
        return int(exc.code or 0)
    except KeyboardInterrupt:
        UpScreen(stream, as_json=as_json).note(_GO_ON)
        return STOPPED
    except (WorkerError, ClientError) as exc:
        code = exc.worker_code or exc.code if isinstance(exc, JobFailed) else exc.code
        if as_json:
            ScreenJson(stream).tell("error", code=code, text=str(exc))
        else:
            print(f"error: {exc} [{code}]", file=sys.stderr)  # noqa: T201 - the command's output
        return USAGE if isinstance(exc, _USAGE_ERRORS) else FAILED


def _act(options: UpOptions, environ: Mapping[str, str], screen: UpScreen) -> int:
    if options.action != "up" and not options.name:
        raise UpUsage(f"Name the deployment: up {options.action} --name NAME, as `up` called it.")
    runpod = RunPodApi(environ.get("RUNPOD_API_KEY", "").strip(), environ.get("RUNPOD_API_BASE_URL", "").strip() or None)
    path = state_path(options.name, environ)
    try:
        if options.action == "status":
            return _up_status(options, runpod, UpState.load(path), screen)
        with state_lock(path):
            state = UpState.load(path)
            return (
                _up_down(options, runpod, state, screen)
                if options.action == "down"
                else _up(options, runpod, state, screen, environ)
            )
    finally:
        runpod.close()


def _up(options: UpOptions, runpod: RunPodApi, state: UpState, screen: UpScreen, environ: Mapping[str, str]) -> int:
    """Run `up` for a workflow: plan, ask once, and run the steps."""
    runpod.all("network-volumes")  # a wrong key is noticed here, before anybody waits for the models' sources
    digest = needed.needs_digest(options.workflow, options.whats)
    settings = Settings.from_env(environ)
    known = state.get("models")
    if known and known.get("digest") != digest:
        state.drop("models", "picture")
    needs = (
        None if state.get("models").get("done") else needed.read_needs(options.workflow, options.whats, settings, screen.note)
    )
    # Whatever the request names is there, or it ends here.
    job = build(Wishes(options.workflow, values=options.values, images=options.images))
    plan = make_up_plan(options, needs, runpod, state, environ)
    if needs is not None or options.dry_run:
        screen.plan(plan)
    if needs is not None:
        needs.check()
    if options.dry_run:
        return 0
    if needs is not None and needs.unknown_sizes and not (options.size_gb or options.volume):
        raise UpUsage(
            f"The size of {count(needs.unknown_sizes, 'model')} is not known now, because its source did not answer: say with "
            "--size how many GB the volume shall have, or try again."
        )
    if (plan.new or state.get("agreed").get("digest") != digest) and not options.yes:
        if not sys.stdin.isatty():
            raise UpUsage("Nobody can be asked here: run it with --yes, or with --dry-run to see only what it would make.")
        if not ask_once("Create it?"):
            screen.say("Nothing was created.")
            return FAILED
    state.put("agreed", **plan.agreed(), digest=digest)
    return UpSteps(runpod, options, plan, state, screen, environ, job).run()


def _find_deployment(options: UpOptions, runpod: RunPodApi, state: UpState) -> dict[Kind, list[Thing]]:
    """Return everything of a deployment that `up` finds: by what was written down and by its name."""
    found: dict[Kind, list[Thing]] = {}
    begun: set[Kind] = set()  # what a run was about to make when it was killed
    if state.get("models").get("pod_begun"):
        begun.add("pods")
    if state.get("endpoint").get("begun") and not state.get("endpoint").get("id"):
        begun.add("serverless")
    if state.get("volume").get("begun") and not state.get("volume").get("id"):
        begun.add("network-volumes")
    steps: tuple[tuple[Kind, Any], ...] = (
        ("pods", state.get("models").get("pod")),
        ("serverless", state.get("endpoint").get("id")),
        ("network-volumes", state.get("volume").get("id")),
    )
    for kind, thing_id in steps:
        things = {str(thing["id"]): thing for thing in runpod.named(kind, options.resource)}
        if not things and kind in begun:
            things = {str(thing["id"]): thing for thing in runpod.appearing(kind, options.resource)}
        if thing_id and str(thing_id) not in things and (thing := runpod.get(kind, str(thing_id))):
            things[str(thing_id)] = thing
        found[kind] = list(things.values())
    return found


def _up_status(options: UpOptions, runpod: RunPodApi, state: UpState, screen: UpScreen) -> int:
    """Run `up status`: show what exists, and its cost."""
    found = _find_deployment(options, runpod, state)
    workers = {str(thing["id"]): runpod.workers(str(thing["id"])).get("summary", {}) for thing in found["serverless"]}
    if screen.as_json:
        screen.result("status", "", name=options.name, **_resource_ids(found), workers=workers, steps=_done(state))
        return 0
    if not any(found.values()):
        screen.say(f"{options.name}: there is nothing, and nothing is billed.")
        return 0
    for volume in found["network-volumes"]:
        cost = f"${volume_usd_month(int(volume['size'])):.2f} a month"
        tier = cost if volume.get("type") == "STANDARD" else "high-performance"
        screen.say(f"volume    {volume['id']}  {volume['size']} GB in {volume['dataCenter']}, {tier}")
    for endpoint in found["serverless"]:
        most, counts = endpoint["workers"]["max"], workers[str(endpoint["id"])]
        said = ", ".join(f"{number} {word}" for word, number in counts.items() if number and word != "total")
        idle = ": RunPod lowers it without requests, `up` raises it again" if most == 0 else ""
        screen.say(f"endpoint  {endpoint['id']}  {said or 'no worker runs'}; at most {most}{idle}")
    for machine in found["pods"]:
        screen.say(f"Pod       {machine['id']}  {machine['status'].lower()}, ${float(machine.get('cost', 0)):.2f} an hour")
    return 0


def _up_down(options: UpOptions, runpod: RunPodApi, state: UpState, screen: UpScreen) -> int:
    """Run `up down`: remove what exists, the most expensive first, and the volume only on request."""
    found = _find_deployment(options, runpod, state)
    if state.get("volume").get("given"):
        kept, found["network-volumes"] = found["network-volumes"], []
    else:
        kept = [] if options.volume_too else found["network-volumes"]
        found["network-volumes"] = found["network-volumes"] if options.volume_too else []
    if not any(found.values()):
        state.drop("endpoint", "models", "picture", "agreed") if kept else state.remove()
        screen.result("down", f"{options.name}: there is nothing to remove.{_still(kept)}", name=options.name, removed={})
        return 0
    if not options.yes:
        what = ", ".join(f"{_WORDS[kind]} {thing['id']}" for kind, things in found.items() for thing in things)
        warning = " and every model on it" if found["network-volumes"] else ""
        if not sys.stdin.isatty():
            raise UpUsage("Nobody can be asked here: run `up down` with --yes.")
        if not ask_once(f"Remove {what}{warning}?"):
            screen.say("Nothing was removed.")
            return FAILED
    removed = _resource_ids(found)
    for kind, things in found.items():
        for thing in things:
            runpod.delete(kind, str(thing["id"]))
            screen.step(_WORDS[kind], f"{thing['id']} removed", id=thing["id"])
    if kept:
        state.drop("endpoint", "models", "picture", "agreed")
    else:
        state.remove()
    screen.result("down", f"{options.name}: removed.{_still(kept)}", name=options.name, removed=removed)
    return 0


_WORDS: Final[Mapping[Kind, str]] = {"pods": "Pod", "serverless": "endpoint", "network-volumes": "volume"}


def _resource_ids(found: Mapping[Kind, list[Thing]]) -> dict[str, Any]:
    return {
        "pods": [thing["id"] for thing in found["pods"]],
        "endpoints": [thing["id"] for thing in found["serverless"]],
        "volumes": [thing["id"] for thing in found["network-volumes"]],
    }


def _done(state: UpState) -> dict[str, bool]:
    return {
        "volume": bool(state.get("volume").get("id")),
        "endpoint": bool(state.get("endpoint").get("id")),
        "models": bool(state.get("models").get("done")),
        "picture": bool(state.get("picture").get("done")),
    }


def _still(kept: Sequence[Thing]) -> str:
    if not kept:
        return ""
    cost = sum(volume_usd_month(int(volume["size"])) for volume in kept)
    left = f"{count(len(kept), 'volume')} stays ({kept[0]['id']})"
    return f" {left}, about ${cost:.2f} a month; --volume-too removes what `up` made."


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the command `up` as Ctrl-C does."""

    def stop(_: int, __: object) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
