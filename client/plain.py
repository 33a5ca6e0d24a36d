"""Text from the other side, or from a file, without what a terminal would obey. Pure."""

from __future__ import annotations

import unicodedata


def printable(text: str, keep: str = "\n\t") -> str:
    """The text with a `?` for each character that is neither printable, nor a blank of some script, nor in `keep`."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep or unicodedata.category(char) == "Zs" else "?" for char in text)


def one_line(text: str) -> str:
    """The same on one line."""
    return printable(text, keep="")


def fits_a_header(text: str) -> bool:
    """Whether it is printable ASCII without a blank: what an address and a header may hold."""
    return text.isascii() and text.isprintable() and " " not in text
