"""Run ComfyUI as a child process: start it, read its output, report why it ended, stop it. Touches processes.

This module is imported before anything heavy, so that ComfyUI boots while the rest of the worker loads.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from worker.errors import EngineNotFound, NoGpu

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from worker.settings import Settings

log = logging.getLogger(__name__)

_LAST_LINES = 20
_LINE_LIMIT_BYTES = 1000
# Custom nodes run inside ComfyUI and do not need these. Tokens for downloads stay, because nodes download with them.
_WITHHELD = ("BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY", "COMFY_ORG_API_KEY", "RUNPOD_AI_API_KEY", "RUNPOD_API_KEY")
_TERMINAL_CODE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_])")
_ORDINARY = "[INFO]"
_FAILED_IMPORT = " module for custom nodes: "
# The output when an exception ends ComfyUI's one prompt thread, and the last line of the traceback. Python prints it, and for
# SystemExit the module in this folder.
_IN_COMFYUI = Path(__file__).with_name("in_comfyui")
_PROMPTS_ENDED = re.compile(r"Exception in thread .*\(prompt_worker\)")
_RAISED = re.compile(r"([A-Za-z_][\w.]*(Error|Exception|Interrupt)|SystemExit)\b.*")
# What a container sees of NVIDIA cards, of WSL's and of AMD's. Looking costs nothing; asking the driver takes 0.1-1 s.
_GPU_DEVICES = ("nvidia[0-9]*", "dxg", "kfd")


@dataclass(frozen=True, slots=True)
class EngineCommand:
    """How to start ComfyUI's process: the command line, its folder and its environment."""

    argv: tuple[str, ...]
    cwd: Path
    environ: Mapping[str, str]

    @classmethod
    def of(cls, settings: Settings, environ: Mapping[str, str]) -> EngineCommand:
        """Return the command for these settings.

        Raises `EngineNotFound` or `NoGpu` if it would only fail. Known now, that is one line in the log instead of a traceback
        after a minute.
        """
        main = settings.comfyui_dir / "main.py"
        if not main.is_file():
            raise EngineNotFound(main, "COMFYUI_DIR")
        python = shutil.which(settings.comfyui_python, path=environ.get("PATH"))
        if python is None:
            raise EngineNotFound(Path(settings.comfyui_python), "COMFYUI_PYTHON")
        if "--cpu" not in settings.comfy_args and not gpu_visible():
            raise NoGpu
        host = "0.0.0.0" if settings.serve_api_locally else "127.0.0.1"  # noqa: S104 - asked for by SERVE_API_LOCALLY
        argv = [python, "main.py", "--listen", host, "--port", str(settings.comfyui_port), "--disable-auto-launch"]
        argv += ["--verbose", settings.comfy_log_level]
        if settings.comfyui_base_dir:
            argv += ["--base-directory", str(settings.comfyui_base_dir)]
        # Newer releases keep a database in their user folder. A fresh container would create it at each start, and only one
        # process can have it. Only --enable-assets reads it.
        if not any(argument.startswith(("--database-url", "--enable-assets")) for argument in settings.comfy_args):
            argv += ["--database-url", "sqlite:///:memory:"]
        argv += settings.comfy_args
        shown = {name: value for name, value in environ.items() if name not in _WITHHELD}
        paths = os.pathsep.join(filter(None, (str(_IN_COMFYUI), environ.get("PYTHONPATH"))))
        return cls(tuple(argv), settings.comfyui_dir, {**shown, "PYTHONUNBUFFERED": "1", "PYTHONPATH": paths})


def prepare_base_dir(settings: Settings) -> None:
    """Create the folders that ComfyUI's process requires in a base directory (it lists custom_nodes at start)."""
    if settings.comfyui_base_dir:
        for name in ("models", "input", "output", "temp", "user", "custom_nodes"):
            (settings.comfyui_base_dir / name).mkdir(parents=True, exist_ok=True)


def gpu_visible(dev: Path = Path("/dev")) -> bool:
    """Return whether ComfyUI's process will find a GPU's device node. This says nothing about drivers."""
    return any(next(dev.glob(pattern), None) is not None for pattern in _GPU_DEVICES)


@dataclass(frozen=True, slots=True)
class EngineExit:
    """How ComfyUI's process ended. `str()` reads as the end of a sentence about it."""

    returncode: int

    def __str__(self) -> str:
        if self.returncode >= 0:
            return f"exited with code {self.returncode}"
        try:
            name = signal.Signals(-self.returncode).name
        except ValueError:
            name = f"signal {-self.returncode}"
        hint = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
        return f"was killed by {name} (exit code {self.returncode}{hint})"


class EngineProcess:
    """One run of ComfyUI, from start to exit. `exited` resolves to its `EngineExit`, exactly once, however it ends."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self.pid = popen.pid
        self.spawned_at = time.monotonic()
        self.exited: Future[EngineExit] = Future()
        self.prompts_ended: Future[str] = Future()  # the exception that ended its prompt thread, if one did
        self._popen = popen
        self.failed_imports: list[str] = []  # its output about custom nodes that it starts without
        self._lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._pump = threading.Thread(target=self._read_output, name="comfyui-output", daemon=True)
        self._pump.start()
        threading.Thread(target=self._wait, name="comfyui-exit", daemon=True).start()

    @classmethod
    def spawn(cls, command: EngineCommand) -> EngineProcess:
        """Start ComfyUI in its own process group. It dies with the worker even if the worker is killed."""
        # After a kill -9 of the worker, ComfyUI would keep the port and the GPU. The kernel's parent-death signal prevents
        # this. setpriv sets it after the fork, which preexec_fn cannot do safely in a process with threads.
        setpriv = shutil.which("setpriv")
        guard = (setpriv, "--pdeathsig", "KILL", "--") if setpriv else ()
        if not setpriv:
            log.warning("setpriv (util-linux) is not installed: if the worker is killed, ComfyUI keeps running")
        popen = subprocess.Popen(  # noqa: S603 - the command is the operator's
            (*guard, *command.argv),
            cwd=command.cwd,
            env=dict(command.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        log.info("worker-comfyui: Starting ComfyUI (pid %d)", popen.pid)
        return cls(popen)

    @property
    def last_lines(self) -> Sequence[str]:
        """Return the last lines it printed, oldest first."""
        return tuple(self._lines)

    def forget_lines(self) -> None:
        """Clear `last_lines`, because a job begins."""
        self._lines.clear()

    def stop(self, grace_s: float = 5.0) -> EngineExit:
        """End it and all its children: first ask, then kill. Return when it is gone."""
        self._signal(signal.SIGTERM)
        try:
            return self.exited.result(grace_s)
        except TimeoutError:
            log.warning("ComfyUI did not end within %g s of SIGTERM and is killed", grace_s)
            self._signal(signal.SIGKILL)
            return self.exited.result(grace_s)

    def _signal(self, number: signal.Signals) -> None:
        if not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def _wait(self) -> None:
        # Before it is reaped: until then no other process group can have its id.
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        # A child that it forked (a custom node's pool) holds the port and the GPU's memory, and no restart would succeed.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        returncode = self._popen.wait()
        # The last lines say why it died. A grandchild that keeps the pipe open must not delay this.
        self._pump.join(timeout=0.5)
        self.exited.set_result(EngineExit(returncode))

    def _read_output(self) -> None:
        stream = self._popen.stdout
        assert stream is not None  # noqa: S101 - spawn asks for a pipe
        ending = False
        for line in _output_lines(stream):
            self._lines.append(line)
            ending = ending or _PROMPTS_ENDED.match(line) is not None
            if ending and not self.prompts_ended.done() and _RAISED.match(line):
                self.prompts_ended.set_result(line)
            if _FAILED_IMPORT in line:
                self.failed_imports.append(line)
            log.info("comfyui: %s", line)


def _output_lines(stream: IO[bytes]) -> Iterator[str]:
    """Yield the process's output as decoded, non-empty lines, without terminal codes.

    A line that was redrawn with carriage returns (a progress bar) is cut to its last state. Newer releases of ComfyUI begin a
    line with its level in colour: `[INFO]` is removed, other levels stay. A very long line is cut to its beginning, because
    ComfyUI prints values that it does not accept, whole files in base64 among them.
    """
    while raw := stream.readline(_LINE_LIMIT_BYTES):
        left_out = 0
        while not raw.endswith(b"\n") and (more := stream.readline(_LINE_LIMIT_BYTES)):
            left_out += len(more)
            if more.endswith(b"\n"):
                break
        text = _TERMINAL_CODE.sub("", raw.decode("utf-8", "replace")).rstrip().rsplit("\r", 1)[-1]
        text = text.removeprefix(_ORDINARY).removeprefix(" ")
        if text:
            yield f"{text} ... ({left_out} more bytes)" if left_out else text
