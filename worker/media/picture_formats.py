"""Convert a job's PNGs to WEBP or JPEG, in a process of ComfyUI's Python. Touches processes and disk.

The worker's own packages lack Pillow. It would add 20 MB to the image; the process costs a tenth of a second for each job that
asks.
"""

from __future__ import annotations

import json
import logging
import subprocess
import threading
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.job import Request
    from worker.media.outputs import Output

log = logging.getLogger(__name__)

_ENCODER: Final = Path(__file__).with_name("picture_encoder.py")
_SUFFIXES: Final = {"webp": ".webp", "jpeg": ".jpg"}
_START_S: Final = 30.0
_EACH_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class PictureFormat:
    """The format in which PNGs are returned: `webp` or `jpeg`, with a quality from 1 to 100."""

    kind: str
    quality: int


def requested_format(request: Request) -> PictureFormat | None:
    """Return the picture format in which a job's request wants its PNGs, or None."""
    return PictureFormat(request.output_format, request.quality) if request.output_format else None


class PictureEncoding:
    """The conversion of a job's PNGs to another format, into a folder. Call `run` in a thread, and `stop` from any other."""

    def __init__(self, python: str, outputs: Sequence[Output], wanted: PictureFormat, folder: Path) -> None:
        self._python = python
        self._outputs = outputs
        self._wanted = wanted
        self._folder = folder
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False

    def run(self) -> tuple[list[Output], list[str]]:
        """Return all outputs with the encoded ones replaced, and a sentence for each that stays as it is."""
        pairs = [self._pair(index, each) for index, each in enumerate(self._outputs)]
        asked = [pair for pair in pairs if pair]
        answers = iter(self._encoded(asked) if asked else ())
        outputs: list[Output] = []
        said: list[str] = []
        for each, pair in zip(self._outputs, pairs, strict=True):
            reason = next(answers) if pair else None
            if pair is None or reason is not None:
                outputs.append(each)
                if reason is not None:
                    said.append(f"The picture {each.filename} is returned as it is, not as {self._wanted.kind}: {reason}.")
            else:
                outputs.append(self._made(each, pair[1]))
        return outputs, said

    def stop(self) -> None:
        """Make `run` return soon."""
        with self._lock:
            self._stopped = True
            if self._process:
                self._process.kill()

    def _pair(self, index: int, output: Output) -> tuple[Path, Path] | None:
        """Return a PNG's path and the path of its encoded form. None for any other output."""
        if output.kind != "images" or output.media_type != "image/png" or isinstance(output.source, str):
            return None
        source = output.source if isinstance(output.source, Path) else self._folder / f"{index}.png"
        if isinstance(output.source, bytes):
            source.write_bytes(output.source)
        return source, self._folder / f"{index}{_SUFFIXES[self._wanted.kind]}"

    def _made(self, output: Output, path: Path) -> Output:
        name = str(PurePosixPath(output.filename).with_suffix(path.suffix))
        return replace(
            output,
            filename=name,
            media_type=f"image/{self._wanted.kind}",
            size_bytes=path.stat().st_size,
            source=path,
        )

    def _encoded(self, pairs: Sequence[tuple[Path, Path]]) -> list[str | None]:
        """Return for each pair None, or why it could not be encoded."""
        asked = {
            "format": self._wanted.kind,
            "quality": self._wanted.quality,
            "pictures": [[str(path) for path in pair] for pair in pairs],
        }
        errors = ""
        try:
            with self._lock:
                if self._stopped:
                    return ["the job was cancelled"] * len(pairs)
                self._process = subprocess.Popen(  # noqa: S603 - our own file, with the operator's Python
                    [self._python, str(_ENCODER)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            with self._process as process:
                try:
                    out, errors = process.communicate(json.dumps(asked), _START_S + _EACH_S * len(pairs))
                finally:
                    process.kill()
            answers: list[str | None] = json.loads(out)
        except (OSError, ValueError, subprocess.SubprocessError) as exc:
            reason = "the encoder did not answer"
            lines = errors.strip().splitlines() if isinstance(exc, ValueError) else [str(exc)]
            log.warning("pictures could not be encoded as %s: %s", self._wanted.kind, (lines or ["no reason given"])[-1])
            return [reason] * len(pairs)
        return answers
