"""PNGs whose pixels a test knows: made, and read back without an imaging library. Pure."""

from __future__ import annotations

import random
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_END: Final = b"IEND\xaeB`\x82"
_PIXEL: Final = 3


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture's size, and its pixels: three bytes each, row by row."""

    width: int
    height: int
    pixels: bytes

    @classmethod
    def of(cls, number: int) -> Picture:
        """Return noise in a size; both are this number's own."""
        width, height = 16 + number % 17, 8 + number // 17
        return cls(width, height, random.Random(number).randbytes(3 * width * height))

    @classmethod
    def read(cls, png: bytes) -> Picture:
        """Return what a whole PNG of eight bits shows, in colour and not interlaced. Raises `ValueError` for any other file."""
        if not (png.startswith(SIGNATURE) and png.endswith(_END)):
            raise ValueError("this is no whole PNG")
        (header,) = (chunk for kind, chunk in chunks(png) if kind == b"IHDR")
        width, height, *form = struct.unpack(">IIBBBBB", header)
        if form != [8, 2, 0, 0, 0]:
            raise ValueError(f"this PNG is of another form: {form}")
        data = zlib.decompress(b"".join(chunk for kind, chunk in chunks(png) if kind == b"IDAT"))
        rows = [bytes(3 * width)]
        for at in range(0, len(data), 1 + 3 * width):
            rows.append(_unfiltered(data[at], data[at + 1 : at + 1 + 3 * width], rows[-1]))
        return cls(width, height, b"".join(rows[1:]))

    def to_png(self) -> bytes:
        """Return the picture as a file."""
        step = 3 * self.width
        rows = b"".join(b"\0" + self.pixels[at : at + step] for at in range(0, len(self.pixels), step))
        header = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)
        parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
        return SIGNATURE + b"".join(
            len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4) for kind, data in parts
        )


def chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield each chunk's type and data."""
    offset = 8
    while offset < len(png):
        length = int.from_bytes(png[offset : offset + 4], "big")
        yield png[offset + 4 : offset + 8], png[offset + 8 : offset + 8 + length]
        offset += 12 + length


def _unfiltered(how: int, row: bytes, above: bytes) -> bytes:
    # As chapter 9 of the specification has it, for three bytes a pixel.
    shown = bytearray(row)
    for at, value in enumerate(row):
        left, up, corner = (shown[at - _PIXEL], above[at], above[at - _PIXEL]) if at >= _PIXEL else (0, above[at], 0)
        nearest = min((left, up, corner), key=lambda near: abs(left + up - corner - near))
        shown[at] = (value + (0, left, up, (left + up) // 2, nearest)[how]) & 0xFF
    return bytes(shown)
