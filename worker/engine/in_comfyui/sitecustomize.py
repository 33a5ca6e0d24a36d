"""Run by ComfyUI's Python when it starts: report a `sys.exit()` that ends ComfyUI's thread of workflows. Imports nothing of us.

Python prints a traceback when an exception ends a thread, but not for `SystemExit`. ComfyUI then answers requests and runs no
workflow any more. `process.EngineCommand` puts this folder on PYTHONPATH, `process.EngineProcess` reads what is printed.
"""

from __future__ import annotations

import sys
import threading
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

_default = threading.excepthook


def _report(args: threading.ExceptHookArgs) -> None:
    name = args.thread.name if args.thread else ""
    if args.exc_type is SystemExit and name.endswith("(prompt_worker)"):
        sys.stderr.write(f"Exception in thread {name}:\nSystemExit: {args.exc_value}\n")
        sys.stderr.flush()  # ComfyUI's own stream keeps what is written until then
    else:
        _default(args)


def _run_shadowed() -> None:
    """Run the `sitecustomize` that Python would have run without this one."""
    own = Path(__file__).parent
    spec = PathFinder.find_spec("sitecustomize", [path for path in sys.path if Path(path) != own])
    if spec and spec.loader:
        spec.loader.exec_module(module_from_spec(spec))


threading.excepthook = _report
_run_shadowed()
