"""`/_control/...`: a Hub's own methods over HTTP, for tests whose hub is another process. Loopback network."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from devkit.hub.state import State
    from devkit.hub.wire import Wire


def answer_control(wire: Wire, command: str) -> None:
    """Do what is asked and answer with JSON: 400 for what makes no sense, 408 for a wait that was in vain."""
    try:
        if wire.command == "GET":
            result, status = _read(wire.hub, command, wire.query), 200
        else:
            result, status = _do(wire, command, json.loads(wire.body or b"{}")), 200
    except TimeoutError as problem:
        result, status = {"error": str(problem)}, 408
    except (TypeError, ValueError, KeyError) as problem:
        result, status = {"error": f"{command}: {problem}"}, 400
    wire.json(result, status=status)


def _read(hub: State, command: str, query: dict[str, str]) -> object:
    match command:
        case "log":
            return [asdict(request) for request in hub.requests]
        case "faults":
            return hub.faults
        case "about":
            return {"endpoint": hub.endpoint, "cdn_endpoint": hub.cdn_endpoint}
        case "wait":
            timeout_s = float(query.get("timeout_s", "60"))
            if "idle" in query:
                hub.wait_idle(timeout_s)
            else:
                hub.wait_stalled(int(query.get("stalled", "1")), timeout_s)
            return {}
    raise ValueError("no such command")


def _do(wire: Wire, command: str, value: Any) -> object:  # noqa: ANN401 (JSON)
    hub = wire.hub
    match command:
        case "faults":
            return [hub.fault(**fault) for fault in (value if isinstance(value, list) else [value])]
        case "commit":
            content = {path: base64.b64decode(data) for path, data in value["files"].items()}
            return {"commit": hub.commit(value["repo"], content, value.get("revision", "main"))}
        case "expire":
            hub.expire_urls(value.get("life_s"))
        case "refuse":
            hub.refuse(value["origin"], value.get("for_s"), keep=wire.connection)
        case "listen":
            hub.listen(value["origin"])
        case "reset" | "clear-log" | "clear-faults" | "release":
            {"reset": hub.reset, "clear-log": hub.clear_log, "clear-faults": hub.clear_faults, "release": hub.release}[
                command
            ]()
        case _:
            raise ValueError("no such command")
    return {}
