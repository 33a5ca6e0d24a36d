"""Run every check in a thread of a child process, each with a deadline. Starts processes, and threads in them."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from worker.doctor.child import Child
from worker.doctor.findings import Finding, FolderCount, Severity, problem
from worker.doctor.lock_check import check_locks
from worker.doctor.model_checks import check_downloads, check_manifests, check_misplaced, check_models, check_seals
from worker.doctor.volume_checks import (
    check_custom_nodes,
    check_host_cache,
    check_mount,
    check_room,
    check_space,
    check_writable,
    volume_silence,
)
from worker.store.pod_links import layout_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from worker.settings import Settings


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long the volume may take to answer at all, and each check for its findings."""

    answer_s: float = 10.0
    check_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Subject:
    """What the checks examine, as it is passed to their child."""

    volume: str
    comfyui_models: str
    manifest: str | None
    models: str | None
    require_volume: bool
    keep_gb: float | None = None
    free_gb: float | None = None
    deadlines: Deadlines = field(default_factory=Deadlines)

    @classmethod
    def of(cls, settings: Settings, deadlines: Deadlines) -> Subject:
        """Return the subject of these settings."""
        comfyui_models = str(settings.base_dir / "models")
        manifest, models = settings.models_manifest, settings.models
        limits = settings.volume_keep_gb, settings.volume_free_gb
        return cls(str(settings.volume_path), comfyui_models, manifest, models, settings.require_volume, *limits, deadlines)


class Probe:
    """All checks of the doctor, each a generator of findings. They run in threads and share only immutable values."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.root = Path(subject.volume)
        self.answers = False
        self.folders: list[FolderCount] = []

    def volume(self) -> Iterator[Finding]:
        """Yield whether there is a volume, what it is, and whether it answers. The other checks require that it does."""
        silent = volume_silence(self.root)
        if silent:
            yield silent
            return
        self.answers = True
        yield check_mount(self.root, required=self.subject.require_volume)

    @property
    def checks(self) -> dict[str, Callable[[], Iterable[Finding]]]:
        """Return the checks of a volume that answers, in the order of the report. Reads a link on the volume."""
        layout, subject = layout_at(self.root), self.subject
        return {
            "space": partial(check_space, layout),
            "room": partial(check_room, layout, subject),
            "writable": partial(check_writable, layout),
            "locks": partial(check_locks, layout),
            "models": partial(check_models, layout, counted=self.folders.extend),
            "seals": partial(check_seals, layout),
            "misplaced": partial(check_misplaced, layout, Path(subject.comfyui_models)),
            "downloads": partial(check_downloads, layout),
            "manifests": partial(check_manifests, layout, subject),
            "host cache": partial(check_host_cache, layout),
            "custom nodes": partial(check_custom_nodes, layout),
        }


# --- the checks and their order ---------------------------------------------------------------------


_END: Final = "end"


def examine(subject: Subject) -> tuple[list[Finding], list[FolderCount]]:
    """Return everything that the checks find, in order. A check that hangs is a finding; so is a silent child."""
    child = Child(probe_in_child)
    child.tell(json.dumps(asdict(subject)))
    until_s = time.monotonic() + subject.deadlines.answer_s + subject.deadlines.check_s + 5
    findings: list[Finding] = []
    folders: list[FolderCount] = []
    said: list[str] = []
    try:
        while (line := child.line(until_s)) != _END:
            if not line.startswith("{"):
                said.append(line)
                continue
            found = json.loads(line)
            findings += [Finding(Severity(item.pop("severity")), **item) for item in found["findings"]]
            folders += [FolderCount(**item) for item in found["folders"]]
    except (TimeoutError, EOFError) as exc:
        why = "hangs" if isinstance(exc, TimeoutError) else f"ended: {' '.join(said)[-300:]}"
        findings.append(problem(f"The process that examines {subject.volume} {why}.", check="volume"))
    finally:
        child.leave()
    return findings, folders


def probe_in_child() -> None:
    """Run every check in the child, report the findings, and end what still hangs."""
    values = json.loads(sys.stdin.read())
    subject = Subject(**{**values, "deadlines": Deadlines(**values["deadlines"])})
    probe = Probe(subject)
    for found in _run_checks(probe):
        print(json.dumps(found), flush=True)  # noqa: T201 - the line to the parent
    print(_END, flush=True)  # noqa: T201 - as above
    os._exit(0)  # a normal exit would wait for threads that cannot end


def _run_checks(probe: Probe) -> Iterator[dict[str, Any]]:
    """Yield what each check found, in order: first whether the volume answers at all, then the others in parallel."""
    deadlines = probe.subject.deadlines
    answers = _Check("volume", probe.volume)
    yield answers.result(time.monotonic() + deadlines.answer_s)
    if not probe.answers:
        return
    checks = [_Check(name, look) for name, look in probe.checks.items()]
    until_s = time.monotonic() + deadlines.check_s
    for check in checks:
        result = check.result(until_s)
        yield result | ({"folders": [asdict(found) for found in probe.folders]} if check.name == "models" else {})


class _Check:
    """One check in its own thread."""

    def __init__(self, name: str, look: Callable[[], Iterable[Finding]]) -> None:
        self.name = name
        self._look = look
        self._findings: list[Finding] = []
        self._began_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for found in self._look():
                self._findings.append(found)
        except OSError as exc:
            where = f" at {exc.filename}" if exc.filename else ""
            self._findings.append(problem(f"This check failed{where} ({exc.strerror or exc}): check the volume."))
        except Exception as exc:  # noqa: BLE001 - a defect of one check must not hide what the others found
            self._findings.append(problem(f"This check failed by a defect of the doctor ({exc!r}): please report it."))

    def result(self, until_s: float) -> dict[str, Any]:
        """Return what it found by then, and whether it hangs."""
        self._thread.join(max(0.0, until_s - time.monotonic()))
        findings = list(self._findings)
        if self._thread.is_alive():
            waited_s = time.monotonic() - self._began_s
            text = (
                f"No answer within {waited_s:.0f} s: the volume hangs or is very slow. If other workers are fine, end this one."
            )
            findings.append(problem(text))
        return {"findings": [asdict(replace(found, check=self.name)) for found in findings], "folders": []}
