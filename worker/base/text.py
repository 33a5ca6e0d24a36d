"""Text for people, and checks of names: sizes, counts, line wrapping, accents. Pure."""

from __future__ import annotations

import textwrap
import unicodedata
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Sized

_UNITS: Final = ("B", "kB", "MB", "GB", "TB")
_SHOWN_CHARS: Final = 60
_NARROWEST: Final = 40
_ILLEGIBLE: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})


def is_legible(text: str) -> bool:
    """Return whether a name has no control character, no line end and no unpaired surrogate.

    Blanks of any width, joined emoji and characters newer than this Python are allowed.
    """
    return text.isprintable() or not any(unicodedata.category(char) in _ILLEGIBLE for char in text)


def unicode_form(text: str) -> Literal["NFC", "NFD"]:
    """Return which Unicode normalisation form (of accents) the text uses."""
    return "NFC" if unicodedata.is_normalized("NFC", text) else "NFD"


def unicode_forms(text: str) -> tuple[str, ...]:
    """Return the text, then its other normalisation forms.

    A Mac stores `é` as `e` and an accent (NFD), other systems as one character (NFC).
    """
    if text.isascii():
        return (text,)
    return tuple(dict.fromkeys((text, unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text))))


def size_text(size_bytes: int) -> str:
    """Return a size in powers of 1000, as disks and hubs count: `11.9 GB`."""
    return _scaled(size_bytes, size_bytes)


def part_text(part_bytes: int, whole_bytes: int) -> str:
    """Return a part of a size in one unit: `3.1 of 11.9 GB`."""
    return f"{_scaled(part_bytes, whole_bytes).partition(' ')[0]} of {size_text(whole_bytes)}"


def compared_sizes(*sizes_bytes: int) -> list[str]:
    """Return sizes in one unit with two decimals, so that two similar sizes differ in the text."""
    return [_scaled(each, max(sizes_bytes), 2) for each in sizes_bytes]


def _scaled(size_bytes: int, like_bytes: int, decimals: int = 1) -> str:
    power = min(max(0, (len(str(abs(like_bytes))) - 1) // 3), len(_UNITS) - 1)
    return f"{size_bytes / 1000**power:.{decimals if power else 0}f} {_UNITS[power]}"


def duration_text(seconds: float) -> str:
    """Return a duration as text for people: `3 days`, `20 s`."""
    for unit, length_s in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{seconds:.0f} s"


def count(things: int | Sized, what: str) -> str:
    """Return a count with its noun: `1 model`, `2 models`, `2 entries`."""
    number = things if isinstance(things, int) else len(things)
    plural = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    return f"{number} {what if number == 1 else plural}"


def wrapped(text: str, indent: int, width: int) -> list[str]:
    """Return the text as indented lines of the terminal's width.

    Addresses and paths are not broken, so that they can be copied.
    """
    margin = " " * indent
    return textwrap.wrap(
        text,
        max(width, indent + _NARROWEST),
        initial_indent=margin,
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    )


def printable(text: str) -> str:
    """Return a file name with its line breaks, control characters and odd bytes escaped, for a log or a terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def quotable(text: str, limit: int = _SHOWN_CHARS) -> str:
    """Return a name or title from a request as text for a sentence: one line, printable, cut at `limit` characters."""
    line = "".join(char if char.isprintable() else "?" for char in text[:limit])
    return line + "..." if len(text) > limit else line


def shortened(text: str, most: int) -> str:
    """Return at most `most` characters of a text: its beginning and its end. Sentences quote what clients send."""
    if len(text) <= most:
        return text
    mark = f" ... ({len(text)} characters) ... "
    end = max(0, (most - len(mark)) // 3)
    return text[: most - len(mark) - end] + mark + text[len(text) - end :]


def encodable(value: Any) -> Any:  # noqa: ANN401 - JSON
    """Return a text without characters that UTF-8 cannot encode, or JSON with such texts.

    An unpaired surrogate comes from a request that quotes one, or from a file's name. The SDK would lose a result with one.
    """
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {encodable(key): encodable(inner) for key, inner in value.items()}
    return [encodable(inner) for inner in value] if isinstance(value, (list, tuple)) else value
