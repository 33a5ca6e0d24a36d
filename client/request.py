"""Build a request from the command line's workflow, files and values. Reads the given files."""

from __future__ import annotations

import base64
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from client.errors import FileUnreadable, SetInvalid

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_CARRIERS: Final = {
    b"\x89PNG": "workflow.png",
    b"RIFF": "workflow.webp",
    b"\x1a\x45\xdf\xa3": "workflow.webm",
}
_OPTIONS: Final = {"images": "--image", "files": "--file", "models": "--model", "set": "--set"}
_SEED: Final = re.compile(r"-1|[0-9]{1,20}")
_LARGEST_SEED: Final = 2**64 - 1
_SHOWN_CHARS: Final = 40
_SAVED: Final = re.compile(r"(?![-.~/\\{])[^\x00-\x1f]*[^.\x00-\x1f](?<!\.json)(?<!\.png)(?<!\.webp)(?<!\.mp4)(?<!\.webm)")


@dataclass(frozen=True, slots=True)
class Wishes:
    """The command line's options for a run, as typed. Each pair is `LEFT=RIGHT`."""

    workflow: str
    values: Sequence[str] = ()
    images: Sequence[str] = ()
    files: Sequence[str] = ()
    models: Sequence[str] = ()
    seed: str | None = None
    timeout_s: float | None = None
    previews: bool = False


def build(wishes: Wishes) -> dict[str, Any]:
    """Return the body of POST /run: `{"input": {...}}`, with the other fields of a request's file.

    Raises:
        UsageError: a file cannot be read, or a pair is none.
    """
    job = _workflow(wishes.workflow)
    given: dict[str, Any] = job["input"]
    more: dict[str, Any] = {
        "images": [_file("--image", pair, "image") for pair in wishes.images],
        "files": [_file("--file", pair, "data") for pair in wishes.files],
        "models": [_model(pair) for pair in wishes.models],
        "set": dict(map(_value, wishes.values)),
    }
    for name, value in more.items():
        if value:
            given[name] = _joined(given.get(name), value, name, wishes.workflow)
    if wishes.seed is not None:
        given["seed"] = _seed(wishes.seed)
    if wishes.timeout_s is not None:
        given["timeout_s"] = wishes.timeout_s
    if wishes.previews:
        given["previews"] = True
    return job


def _joined(before: object, more: dict[str, Any] | list[Any], name: str, file: str) -> dict[str, Any] | list[Any]:
    """Return what a request's file has under `name`, followed by the options' values."""
    if not before:
        return more
    if isinstance(before, dict) and isinstance(more, dict):
        return {**before, **more}
    if isinstance(before, list) and isinstance(more, list):
        return [*before, *more]
    kind = "object" if isinstance(more, dict) else "list"
    raise FileUnreadable(f"has '{name}' that is no {kind}: correct it, or leave out {_OPTIONS[name]}", _shown(file))


def node_names(job: dict[str, Any]) -> dict[str, str]:
    """Return a name for each node while it works: its title, or its class. Empty if unknown."""
    graph = job["input"].get("workflow")
    if not isinstance(graph, dict):
        return {}
    saved = graph.get("nodes")
    if isinstance(saved, list):
        nodes = [(node.get("id"), node.get("title"), node.get("type")) for node in saved if isinstance(node, dict)]
    else:
        found = [(node_id, node) for node_id, node in graph.items() if isinstance(node, dict)]
        nodes = [(node_id, _title(node), node.get("class_type")) for node_id, node in found]
    return {str(node_id): str(title or kind) for node_id, title, kind in nodes if title or kind}


def _title(node: Mapping[str, Any]) -> object:
    meta = node.get("_meta")
    return meta.get("title") if isinstance(meta, dict) else None


def _workflow(name: str) -> dict[str, Any]:
    """Return a request for a workflow of either format, a whole request, or a file that contains a workflow.

    A name that is no file and looks like none is the name of a workflow on the endpoint's volume.
    """
    if _SAVED.fullmatch(name) and not Path(name).exists():
        return {"input": {"workflow": name}}
    data = sys.stdin.buffer.read() if name == "-" else _read(name)
    carrier = next((kind for magic, kind in _CARRIERS.items() if data.startswith(magic)), None)
    if data[4:8] == b"ftyp":
        carrier = "workflow.mp4"
    if carrier is not None:
        file = {"name": carrier, "data": base64.b64encode(data).decode()}
        return {"input": {"workflow_from": carrier, "files": [file]}}
    try:
        value = json.loads(data.decode(json.detect_encoding(data)))
    except (ValueError, RecursionError) as exc:
        why = str(exc).partition(";")[0]
        raise FileUnreadable(
            f"is neither JSON ({why}) nor a PNG, WEBP, MP4 or WEBM: give a workflow as ComfyUI saves or exports it",
            _shown(name),
        ) from None
    if not isinstance(value, dict):
        raise FileUnreadable("contains no workflow: give one as ComfyUI saves or exports it", _shown(name))
    wrapped = value.get("input")
    if isinstance(wrapped, dict) and ("workflow" in wrapped or "workflow_from" in wrapped):
        return {**value, "input": dict(wrapped)}
    if isinstance(value.get("workflow"), str):
        return {"input": value}
    return {"input": {"workflow": value}}


def _shown(name: str) -> str:
    return "standard input" if name == "-" else name


def _read(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as exc:
        raise FileUnreadable(f"cannot be read ({exc.strerror})", path) from None
    except RuntimeError:  # expanduser: ~name without such a user
        raise FileUnreadable("begins with a home folder that is not known; write it out", path) from None


def _file(option: str, pair: str, data_key: str) -> dict[str, str]:
    """Parse `NAME=PATH`, `NAME=https://...` or a path alone, whose own name is then the name."""
    name, equals, source = pair.partition("=")
    if not equals:
        name, source = Path(pair).name, pair
    if not name or not source:
        raise SetInvalid(f"takes NAME=PATH, NAME=https://... or a path, not '{pair}'", option)
    if source.startswith(("http://", "https://")):
        return {"name": name, "url": source}
    return {"name": name, data_key: base64.b64encode(_read(source)).decode()}


def _value(pair: str) -> tuple[str, Any]:
    """Parse `NODE.INPUT=VALUE`. The value is JSON if it can be read as that, otherwise the text itself."""
    key, equals, text = pair.partition("=")
    if not equals or "." not in key:
        raise SetInvalid(f"takes NODE.INPUT=VALUE, such as 6.text=\"a fox\", not '{pair}'", "--set")
    try:
        return key, json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return key, text


def _no_number(name: str) -> None:
    """Return NaN and Infinity as words: JSON cannot represent them as numbers."""
    raise ValueError(name)


def _model(pair: str) -> dict[str, str]:
    """Parse `FOLDER/NAME=SOURCE`."""
    path, equals, source = pair.partition("=")
    folder, slash, name = path.partition("/")
    if not (equals and slash and folder and name and source):
        raise SetInvalid(
            f"takes FOLDER/NAME=SOURCE, such as loras/x.safetensors=hf://org/repo/x.safetensors, not '{pair}'", "--model"
        )
    return {"folder": folder, "name": name, "source": source}


def _seed(text: str) -> str | int:
    if text in {"random", "next"}:
        return text
    if not _SEED.fullmatch(text) or int(text) > _LARGEST_SEED:
        shown = text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
        raise SetInvalid(f"takes random, next, -1 or a whole number up to {_LARGEST_SEED}, not '{shown}'", "--seed")
    return int(text)
