"""The process that encodes pictures. It runs under ComfyUI's Python, which has Pillow, and imports nothing of the worker.

Standard input is one JSON, `{"format", "quality", "pictures": [[source, target], ...]}`. Standard output is a list of the same
length: null, or why a picture could not be encoded.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor

from PIL import Image, UnidentifiedImageError  # type: ignore[import-not-found,unused-ignore]  # only ComfyUI's Python has it

_AT_ONCE = 4
_PLAIN = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})
# Where ComfyUI's own WEBP writer puts its metadata, and where its editor looks for it.
_PROMPT_TAG, _FIRST_TAG, _LAST_TAG = 0x0110, 0x010F, 0x0100
# A JPEG segment has at most 65,535 bytes, including its length and the EXIF header.
_JPEG_EXIF_BYTES = 65_000


def encode(source: str, target: str, kind: str, quality: int) -> str | None:
    """Encode one picture. Return why it cannot be encoded, or None."""
    try:
        with Image.open(source) as image:
            if getattr(image, "n_frames", 1) > 1:
                return "it is animated"
            if image.mode not in _PLAIN:
                return f"its pixels are of the kind {image.mode}"
            image.load()
            exif = _metadata(image, kind)
            icc = image.info.get("icc_profile")
            picture = _opaque(image) if kind == "jpeg" else image.convert("RGBA" if _has_alpha(image) else "RGB")
            more = {"icc_profile": icc} if icc else {}
            picture.save(target, kind, quality=quality, exif=exif, **more)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as exc:
        return " ".join(str(exc).split())[:200] or type(exc).__name__
    return None


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in {"LA", "RGBA"} or "transparency" in image.info


def _opaque(image: Image.Image) -> Image.Image:
    """Return the picture on white for encoding as JPEG, which has no transparency."""
    if not _has_alpha(image):
        return image.convert("RGB")
    over = image.convert("RGBA")
    under = Image.new("RGBA", over.size, "white")
    return Image.alpha_composite(under, over).convert("RGB")


def _metadata(image: Image.Image, kind: str) -> bytes:
    """Return the texts of the PNG to encode as EXIF. Empty if they are too long for the format."""
    exif, tag = Image.Exif(), _FIRST_TAG
    for name, text in getattr(image, "text", {}).items():
        value = f"{name}:{text}".encode("ascii", "backslashreplace").decode()
        if name == "prompt":
            exif[_PROMPT_TAG] = value
        elif tag >= _LAST_TAG:
            exif[tag] = value
            tag -= 1
    found: bytes = exif.tobytes()
    return found if kind == "webp" or len(found) <= _JPEG_EXIF_BYTES else b""


def main() -> None:
    """Encode the pictures that standard input names."""
    asked = json.load(sys.stdin)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        pairs = asked["pictures"]
        done = [pool.submit(encode, source, target, asked["format"], asked["quality"]) for source, target in pairs]
        json.dump([each.result() for each in done], sys.stdout)


if __name__ == "__main__":
    main()
