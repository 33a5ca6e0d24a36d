"""Texts as the editor changes them when it queues: `{a|b}` choices and `%...%` in file names.

Pure; clock and chance are passed in.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from worker.errors import UiWorkflowInvalid

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

_COMMENT = re.compile(r"/[*/]")
_LINE_END = re.compile(r"[\n\r\u2028\u2029]")
_MAX_DEPTH = 100
_MAX_MARKS = 50_000
_MARK = re.compile(r"\\[\s\S]|[{}|]")
_ESCAPED = re.compile(r"\\([{}|])")


def choose_options(text: str, random: Callable[[], float]) -> str:
    """Return a dynamic prompt with one option of each `{a|b}`, also nested, and without comments. An escaped brace stays.

    Comments are removed as the editor removes them, so the part after `https:` is lost as well.

    Raises:
        UiWorkflowInvalid: the braces are nested too deeply.
    """
    if "{" not in text and "/" not in text and "\\" not in text:
        return text
    if sum(text.count(mark) for mark in "{}|/\\") > _MAX_MARKS:
        raise UiWorkflowInvalid(f"a prompt has more than {_MAX_MARKS} braces, bars and slashes")
    text = _without_comments(text)
    # Each level has the complete options and the pieces of the current one.
    levels: list[tuple[list[str], list[str]]] = [([], [])]
    at = 0
    for mark in _MARK.finditer(text):
        levels[-1][1].append(text[at : mark.start()])
        at = mark.end()
        if mark[0] == "{":
            if len(levels) > _MAX_DEPTH:
                raise UiWorkflowInvalid(f"a prompt has more than {_MAX_DEPTH} braces in each other")
            levels.append(([], []))
        elif mark[0] == "|" and len(levels) > 1:
            levels[-1][0].append("".join(levels[-1][1]))
            levels[-1][1].clear()
        elif mark[0] == "}" and len(levels) > 1:
            _end_choice(levels, random)
        else:
            levels[-1][1].append(mark[0])
    rest = text[at:]
    # A backslash at the end: the editor appends what JavaScript finds there.
    levels[-1][1].append(rest + "undefined" if rest.endswith("\\") else rest)
    while len(levels) > 1:
        _end_choice(levels, random)
    return _ESCAPED.sub(r"\1", "".join(levels[0][1]))


def _without_comments(text: str) -> str:
    kept: list[str] = []
    at = 0
    while (found := _COMMENT.search(text, at)) is not None:
        if found[0] == "//":
            end = _LINE_END.search(text, found.end())
            stop = end.start() if end else len(text)
        else:
            close = text.find("*/", found.end())
            if close < 0:  # no comment, and no later one either
                return "".join(kept) + re.sub(r"//[^\n\r\u2028\u2029]*", "", text[at:])
            stop = close + 2
        kept.append(text[at : found.start()])
        at = stop
    return "".join(kept) + text[at:]


def _end_choice(levels: list[tuple[list[str], list[str]]], random: Callable[[], float]) -> None:
    options, pieces = levels.pop()
    options.append("".join(pieces))
    levels[-1][1].append(options[min(int(random() * len(options)), len(options) - 1)])


_TOKEN = re.compile(r"%([^%]+)%")
_DATE_PART = re.compile(r"y{2,4}|dd?|MM?|hh?|mm?|ss?")
_UNFIT = re.compile(r"[/?<>\\:*|\"\x00-\x1f\x7f]")


def fill_tokens(text: str, now: datetime, lookup: Callable[[str, str], str | None]) -> str:
    """Return a prompt or file name with `%date:FORMAT%` and `%Node.widget%` replaced. Other tokens, and unknown names, stay.

    `lookup(node, widget)` returns the value of a widget by its node's name, or None.
    """

    def fill(token: re.Match[str]) -> str:
        parts = token[1].split(".")
        if len(parts) != 2:  # noqa: PLR2004 - a node and a widget
            return _date(parts[0][5:], now) if parts[0].startswith("date:") else token[0]
        value = lookup(parts[0], parts[1])
        return token[0] if value is None else _UNFIT.sub("_", value)

    return _TOKEN.sub(fill, text) if "%" in text else text


def _date(pattern: str, now: datetime) -> str:
    parts = {"d": now.day, "M": now.month, "h": now.hour, "m": now.minute, "s": now.second}

    def fill(part: re.Match[str]) -> str:
        text = part[0]
        if text[0] == "y":
            return {"yy": f"{now.year % 100:02}", "yyyy": str(now.year)}.get(text, text)
        return str(parts[text[0]]).rjust(len(text), "0")

    return _DATE_PART.sub(fill, pattern)
