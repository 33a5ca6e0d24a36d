"""What a check finds, and how it is put into words. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from worker.settings import Settings

_SHOWN: Final = 3
_SHOWN_PROBLEMS: Final = 8


class Severity(StrEnum):
    """How much a finding matters: only a problem makes the command fail."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a check found: a sentence with what to do; `paths` are all it is about, the sentence names a few."""

    severity: Severity
    message: str
    paths: tuple[str, ...] = ()
    check: str = ""


@dataclass(frozen=True, slots=True)
class FolderCount:
    """What one folder of models holds; `size_bytes` and `sealed` are None where there are too many files to look at each."""

    folder: str
    files: int
    size_bytes: int | None
    sealed: int | None


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long the volume may take to answer at all, and each check after that."""

    answer_s: float = 10.0
    check_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Subject:
    """What is looked at, as it is handed to the child."""

    volume: str
    comfyui_models: str
    manifest: str | None
    models: str | None
    require_volume: bool
    deadlines: Deadlines = field(default_factory=Deadlines)

    @classmethod
    def of(cls, settings: Settings, deadlines: Deadlines) -> Subject:
        """What the settings say."""
        comfyui_models = str(settings.base_dir / "models")
        manifest, models = settings.models_manifest, settings.models
        return cls(str(settings.volume_path), comfyui_models, manifest, models, settings.require_volume, deadlines)


def ok(message: str) -> Finding:
    """All is well."""
    return Finding(Severity.OK, message)


def note(message: str, paths: Iterable[object] = ()) -> Finding:
    """Something to know, and to act upon where it matters."""
    return Finding(Severity.NOTE, message, tuple(map(str, paths)))


def problem(message: str, paths: Iterable[object] = (), check: str = "") -> Finding:
    """Something to act upon, with what to do in its message."""
    return Finding(Severity.PROBLEM, message, tuple(map(str, paths)), check)


def listing(severity: Severity, text: str, names: Sequence[str]) -> Finding:
    """A finding about several things, the first few named, all of them in `paths`."""
    return Finding(severity, f"{text}: {some(names)}", tuple(names))


def capped(troubles: Sequence[tuple[str, str]], severity: Severity = Severity.PROBLEM) -> Iterator[Finding]:
    """A problem for each sentence and its path; a volume full of them must not hide the rest."""
    for text, path in troubles[:_SHOWN_PROBLEMS]:
        yield Finding(severity, text, (path,))
    if rest := [path for _, path in troubles[_SHOWN_PROBLEMS:]]:
        yield listing(severity, f"{len(rest)} more like these (--json names all)", rest)


def some(names: Sequence[str]) -> str:
    """The first few by name."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
