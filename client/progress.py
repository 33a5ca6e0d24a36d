"""A job's progress as one line for people: a bar for a terminal, a sentence for a log. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from client.plain import one_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from client.service import News

_BAR_WIDTH: Final = 24
_MINUTE_S: Final = 60
_HOUR_S: Final = 3600
_KB: Final = 1000
_NAME_CHARS: Final = 80
_UNITS: Final = ("kB", "MB", "GB", "TB")
_STEPS: Final = " ▏▎▍▌▋▊▉"
_WORDS: Final = {"SENDING": "sending", "IN_QUEUE": "queued", "IN_PROGRESS": "running"}


def bar_line(news: News, names: Mapping[str, str], width: int) -> str:
    """Return one line of at most `width` characters, with a bar if there is something to measure."""
    if news.trouble:
        return _cut(f"{_status(news)}  {_clock(news.waited_s)}  ({news.trouble})", width)
    what, share, numbers = _parts(news, names)
    if share is None:
        return _cut(f"{what}  {_clock(news.waited_s)}{f'  ({news.queue})' if news.queue else ''}", width)
    return _cut(f"{what}  {_bar(share)} {numbers}", width)


def plain_line(news: News, names: Mapping[str, str]) -> str:
    """Return the same in words, without a running clock."""
    if news.trouble:
        return f"{_status(news)}: {news.trouble}"
    what, share, numbers = _parts(news, names)
    if share is None:
        return f"{what}{f' ({news.queue})' if news.queue else ''}"
    return f"{what}: {numbers}"


def subject(news: News) -> tuple[object, ...]:
    """Return what a plain line is about. The next line about the same thing can wait."""
    progress = news.progress or {}
    return news.status, news.job_id, news.queue, news.trouble, progress.get("type"), progress.get("file"), progress.get("node")


def size(count: float) -> str:
    """Return bytes for people: `14.4 kB`, `23.8 GB`."""
    if count < _KB:
        return f"{count:.0f} B"
    power = min(int(math.log10(count) // 3), len(_UNITS))
    return f"{count / _KB**power:.1f} {_UNITS[power - 1]}"


def _parts(news: News, names: Mapping[str, str]) -> tuple[str, float | None, str]:
    """Return what is going on, the fraction done from 0 to 1, and its numbers."""
    progress = news.progress or {}
    value, most = _number(progress.get("value")), _number(progress.get("max"))
    if progress.get("type") == "download" and most:
        return f"downloading {_safe(progress.get('file'))}", value / most, _download(progress, value, most)
    if progress.get("type") == "progress" and most:
        node = _safe(progress.get("node"))
        name = f"{_safe(names[node])} (node {node})" if node in names else f"node {node}"
        return name, value / most, f"{value:g}/{most:g}"
    return _status(news), None, ""


def _download(progress: Mapping[str, Any], value: float, most: float) -> str:
    text = f"{100 * value / most:.0f} %  {size(value)} of {size(most)}"
    rate = _number(progress.get("bytes_per_s"))
    if rate <= 0:
        return text
    left = f"  {_clock((most - value) / rate)} left" if value < most else ""
    return f"{text}  {size(rate)}/s{left}"


def _status(news: News) -> str:
    return _WORDS.get(news.status, news.status.lower().replace("_", " "))


def _number(value: object) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return max(0.0, float(value)) if good else 0.0  # type: ignore[arg-type]  # mypy does not narrow by `good`


def _safe(value: object) -> str:
    """Return a name from the other side, shortened."""
    return one_line(str(value))[:_NAME_CHARS]


def _bar(share: float) -> str:
    whole, part = divmod(int(min(1.0, share) * _BAR_WIDTH * len(_STEPS)), len(_STEPS))
    drawn = "█" * whole + (_STEPS[part] if whole < _BAR_WIDTH else "")
    return f"▕{drawn.ljust(_BAR_WIDTH)}▏"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), _MINUTE_S)
    if seconds < _HOUR_S:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else f"{line[: max(0, width - 1)]}…"
