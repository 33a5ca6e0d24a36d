"""The findings of checks, and their wording. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


_SHOWN: Final = 3
_SHOWN_PROBLEMS: Final = 8


class Severity(StrEnum):
    """How much a finding matters. Only a problem makes the command fail."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding: a sentence with what to do. `paths` are all affected paths, the sentence names a few."""

    severity: Severity
    message: str
    paths: tuple[str, ...] = ()
    check: str = ""


@dataclass(frozen=True, slots=True)
class FolderCount:
    """What findings count in one folder of models. `size_bytes` and `sealed` are None if there are too many files to stat."""

    folder: str
    files: int
    size_bytes: int | None
    sealed: int | None


def ok(message: str) -> Finding:
    """Return a finding that all is well."""
    return Finding(Severity.OK, message)


def note(message: str, paths: Iterable[object] = ()) -> Finding:
    """Return a finding to know, which may need action."""
    return Finding(Severity.NOTE, message, tuple(map(str, paths)))


def problem(message: str, paths: Iterable[object] = (), check: str = "") -> Finding:
    """Return a finding that needs action, with what to do in its message."""
    return Finding(Severity.PROBLEM, message, tuple(map(str, paths)), check)


def listing(severity: Severity, text: str, names: Sequence[str]) -> Finding:
    """Return a finding about several things. The first few are named, all of them are in `paths`."""
    return Finding(severity, f"{text}: {first_names(names)}", tuple(names))


def capped(troubles: Sequence[tuple[str, str]], severity: Severity = Severity.PROBLEM) -> Iterator[Finding]:
    """Yield a finding for each sentence and its path, up to a limit: a volume full of problems must not hide the rest."""
    for text, path in troubles[:_SHOWN_PROBLEMS]:
        yield Finding(severity, text, (path,))
    if rest := [path for _, path in troubles[_SHOWN_PROBLEMS:]]:
        yield listing(severity, f"{len(rest)} more like these (--json names all)", rest)


def first_names(names: Sequence[str]) -> str:
    """Return the first few names, for a finding's sentence."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
