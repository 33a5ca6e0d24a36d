"""Questions about a text that every wing asks. Pure."""

from __future__ import annotations

import unicodedata
from typing import Final, Literal

_ILLEGIBLE: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})


def is_legible(text: str) -> bool:
    """Whether a name has no control character, line end or half of a character.

    Blanks of any width, joined emoji and characters newer than this Python are letters to those who write them.
    """
    return text.isprintable() or not any(unicodedata.category(char) in _ILLEGIBLE for char in text)


def form_of(text: str) -> Literal["NFC", "NFD"]:
    """Which of the two ways to write accents a text keeps to."""
    return "NFC" if unicodedata.is_normalized("NFC", text) else "NFD"


def forms(text: str) -> tuple[str, ...]:
    """The text, then its other spellings of accents: a Mac writes `e` and an accent (NFD) where others write `é` (NFC)."""
    if text.isascii():
        return (text,)
    return tuple(dict.fromkeys((text, unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text))))
