"""A terminal -> a picture for a README: `tmux capture-pane -e -p | python -m devkit.picture docs/seed.svg --title T`."""

from __future__ import annotations

import argparse
import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

_FONTS = re.compile(r"\s*@font-face \{.*?\}", re.DOTALL)


def svg_of(screen: str, title: str) -> str:
    """Return a picture of a terminal's content, without empty lines at its end, and with fonts that the reader has."""
    lines = [line.rstrip() for line in screen.splitlines()]
    while lines and not Text.from_ansi(lines[-1]).plain.strip():
        lines.pop()
    text = Text.from_ansi("\n".join(lines))
    width = max(len(line.plain.rstrip()) for line in text.split("\n"))
    console = Console(record=True, width=width + 1, file=io.StringIO(), force_terminal=True)
    console.print(text, no_wrap=True, overflow="ignore", crop=False)
    return _FONTS.sub("", console.export_svg(title=title, unique_id="terminal")).replace("Fira Code, ", "")


def main() -> None:
    """Read a screen from standard input, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--title", default="")
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(svg_of(sys.stdin.read(), options.title), encoding="utf-8")


if __name__ == "__main__":
    main()
