"""Text from the other side, or from a file, without sequences that a terminal would obey. Pure."""

from __future__ import annotations

import unicodedata


def printable(text: str, keep: str = "\n\t") -> str:
    """Return the text with a `?` for each character that is not printable, not a blank of any script, and not in `keep`."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep or unicodedata.category(char) == "Zs" else "?" for char in text)


def one_line(text: str) -> str:
    """Return the same on one line."""
    return printable(text, keep="")


def fits_a_header(text: str) -> bool:
    """Return whether it is printable ASCII without a blank, as addresses and headers must be."""
    return text.isascii() and text.isprintable() and " " not in text
