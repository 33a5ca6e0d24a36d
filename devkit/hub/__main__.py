"""`python -m devkit.hub`: serves until SIGTERM or SIGINT; the first line printed is the endpoint. Loopback network."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from devkit.hub.faults import MIB
from devkit.hub.local import Hub

if TYPE_CHECKING:
    from collections.abc import Sequence


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m devkit.hub", description="A stand-in of Hugging Face's HTTP interface.")
    parser.add_argument(
        "--root", type=Path, required=True, help="holds <org>/<repo>/<path>, and <org>/<repo>@<revision>/<path>"
    )
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--cdn-port", type=int, default=0)
    parser.add_argument("--private", action="append", default=[], metavar="REPO", help="a glob over org/repo")
    parser.add_argument("--gated", action="append", default=[], metavar="REPO", help="a glob over org/repo")
    parser.add_argument(
        "--token", action="append", default=[], metavar="TOKEN[=REPO,...]", help="a token, and what it opens (*)"
    )
    parser.add_argument("--civitai", action="append", default=[], metavar="ID=PATH", help="a model version, and its file")
    parser.add_argument("--civitai-token")
    parser.add_argument("--xet", action="append", default=[], metavar="REPO", help="a glob over org/repo: on Xet as well")
    parser.add_argument("--lfs-above-bytes", type=int, default=10 * MIB)
    parser.add_argument("--url-life-s", type=float, default=3600)
    parser.add_argument("--until-stdin-closes", action="store_true", help="end when whoever started this ends")
    return parser


def _token(text: str) -> tuple[str, list[str]]:
    token, equals, repos = text.partition("=")
    return token, [repo for repo in repos.split(",") if repo] if equals else ["*"]


def _stop_with_stdin(stop: threading.Event) -> None:
    # Not through sys.stdin: a daemon thread that holds its lock makes the interpreter's end a fatal error.
    while os.read(0, 1):
        pass
    stop.set()


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to stop."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if not given.root.is_dir():
        parser.error(f"{given.root} is not a folder")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with Hub(
        given.root,
        port=given.port,
        cdn_port=given.cdn_port,
        private=given.private,
        gated=given.gated,
        tokens=dict(map(_token, given.token)),
        civitai=dict(pair.split("=", 1) for pair in given.civitai),
        civitai_token=given.civitai_token,
        lfs_above_bytes=given.lfs_above_bytes,
        url_life_s=given.url_life_s,
        xet=given.xet,
    ) as hub:
        print(hub.endpoint, flush=True)
        if given.until_stdin_closes:
            threading.Thread(target=_stop_with_stdin, args=(stop,), daemon=True).start()
        stop.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
