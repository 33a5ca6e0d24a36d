"""The command `convert`: print the graph of a workflow in the editor's format. Touches disk and loopback."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worker.editor.convert import classes_to_convert, convert, is_saved_workflow
from worker.editor.embedded_workflow import embedded_workflow
from worker.engine.client import ComfyClient, Versions
from worker.errors import ConvertUsage, EngineUnreachable
from worker.graph.graph import parse_graph, without_wrapper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.settings import Settings


def run(argv: Sequence[str], settings: Settings) -> int:
    """Run the command `convert`: print the graph, return 0. Raises `ConvertUsage`, and a `RequestError` for the workflow."""
    parser = argparse.ArgumentParser(
        prog="python -m worker convert",
        description="Convert a workflow in the editor's format, or one in a picture or video, to the graph that "
        "its editor would send (its API format).",
    )
    parser.add_argument("workflow", help="a workflow's .json, or a .png, .webp, .mp4 or .webm; - for standard input")
    parser.add_argument(
        "--object-info",
        type=Path,
        metavar="FILE",
        help="the answer of ComfyUI's /object_info; without it the ComfyUI on COMFYUI_PORT is asked",
    )
    parser.add_argument("--frontend", metavar="VERSION", help="convert as this version of the editor does, such as 1.58.1")
    options = parser.parse_args(argv)
    value = _read_workflow(options.workflow)
    if is_saved_workflow(value):
        info, versions = _definitions(value, settings, options.object_info)
        value = convert(value, info, frontend=options.frontend or versions.frontend, comfyui=versions.comfyui).graph
    print(json.dumps(parse_graph(value), indent=2, ensure_ascii=False))  # noqa: T201 - the command's output
    return 0


def _read_workflow(name: str) -> Any:  # noqa: ANN401 - a workflow of either format
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as exc:
        raise ConvertUsage(f"{name} cannot be read ({exc.strerror}).") from exc
    found = embedded_workflow(data)
    if found is None:
        raise ConvertUsage(
            f"{name} contains no workflow: give a .json that ComfyUI saved, or a picture or video with its metadata."
        )
    return without_wrapper(found.best)


def _definitions(ui: object, settings: Settings, path: Path | None) -> tuple[dict[str, Any], Versions]:
    """Return, for the command `convert`, the definitions of the workflow's node classes, and ComfyUI's versions if known."""
    if path is None:
        return asyncio.run(_ask(ui, f"127.0.0.1:{settings.comfyui_port}"))
    try:
        info = json.loads(path.read_bytes())
    except (OSError, ValueError) as exc:
        raise ConvertUsage(f"{path} is no answer of ComfyUI's /object_info ({exc}).") from exc
    if not isinstance(info, dict):
        raise ConvertUsage(f"{path} is no answer of ComfyUI's /object_info (it is no object).")
    return info, Versions()


async def _ask(ui: object, address: str) -> tuple[dict[str, Any], Versions]:
    client = ComfyClient(address)
    try:
        definitions = await client.object_info(classes_to_convert(ui))
        await client.answers()
    except EngineUnreachable as exc:
        raise ConvertUsage(
            f"No ComfyUI answers at {address}: start one, set COMFYUI_PORT, or give --object-info FILE "
            "(curl http://HOST:8188/object_info > FILE)."
        ) from exc
    else:
        return definitions, client.versions
    finally:
        await client.close()
