"""A file's bytes, whole or a range of them, and what can go wrong on the way. Reads disk, loopback network."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from devkit.hub.answers import RefusedError
from devkit.hub.faults import MIB

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from devkit.hub.faults import FaultKind, Pace, Rule
    from devkit.hub.wire import Wire

_CHUNK_BYTES: Final = MIB


def parse_range(header: str | None, size: int) -> range | None:
    """Return the requested bytes.

    None for the whole file (no range, several, or an unreadable one). Raises RefusedError 416.
    """
    unit, _, spec = (header or "").partition("=")
    first, dash, last = spec.strip().partition("-")
    if unit.strip() != "bytes" or not dash or not (first + last).isdigit() or (first and last and int(last) < int(first)):
        return None
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if start >= stop:
        raise RefusedError(416, "Requested Range Not Satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return range(start, stop)


def send_file(wire: Wire, source: Path, headers: Mapping[str, str]) -> None:
    """Answer with a file, or the range of it that was asked for; `headers` hold what tells its version."""
    headers = _spoilt(wire, headers)
    with source.open("rb") as stream:
        missing_bytes = sum(rule.fault.missing_bytes for rule in wire.befall("truncate"))
        size = max(0, os.fstat(stream.fileno()).st_size - missing_bytes)
        wanted = _wanted(wire, size, headers)
        part = range(size) if wanted is None else wanted
        rules = [] if wire.command == "HEAD" else _rules(wire, part, size)
        about = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", "Content-Length": str(len(part))}
        if wanted is not None:
            about["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{size}"
        wire.head(200 if wanted is None else 206, {**headers, **about})
        if wire.command != "HEAD":
            _Body(wire, stream.fileno(), rules).send(part, size)


def _spoilt(wire: Wire, headers: Mapping[str, str]) -> dict[str, str]:
    gone = {str(rule.fault.value).lower() for rule in wire.befall("without")}
    more = dict(str(rule.fault.value).split(": ", 1) for rule in wire.befall("header"))
    weak = {"ETag": f"W/{headers['ETag']}"} if wire.befall("weak") else {}
    return {**{name: value for name, value in {**headers, **weak}.items() if name.lower() not in gone}, **more}


def _wanted(wire: Wire, size: int, headers: Mapping[str, str]) -> range | None:
    asked = wire.headers.get("If-Range")
    # A weak ETag never fits If-Range.
    known = {value for name, value in headers.items() if name in {"ETag", "Last-Modified"} and not value.startswith("W/")}
    if asked is not None and asked not in known and not wire.befall("ignore_if_range"):
        return None
    wanted = parse_range(wire.headers.get("Range"), size)
    return None if wanted is not None and wire.befall("ignore_range") else wanted


def _rules(wire: Wire, part: range, size: int) -> list[Rule]:
    kinds: tuple[FaultKind, ...] = ("cut", "short", "stall", "flip", "slow")
    return wire.record(wire.hub.book.take(wire.entry, kinds, lambda fault: fault.mark(part, size) is not None))


class _Body:
    """One body on its way out."""

    def __init__(self, wire: Wire, fd: int, rules: Sequence[Rule]) -> None:
        self._wire = wire
        self._fd = fd
        self._rules = rules
        self._pace: Pace | None = next((rule.pace() for rule in rules if rule.fault.kind == "slow"), None)

    def send(self, part: range, size: int) -> None:
        """Send the part, with each fault where it strikes."""
        marks = sorted((rule.fault.mark(part, size) or 0, rule.number, rule.fault) for rule in self._rules)
        at = part.start
        for mark, _, fault in marks:
            self._copy(at, mark)
            at = max(at, mark)
            match fault.kind:
                case "stall":
                    self._wire.hold(fault)
                case "cut" | "short":
                    self._wire.abort(reset=fault.reset)
                case "flip" if at == mark:
                    self._flip(at)
                    at += 1
        self._copy(at, part.stop)

    def _flip(self, at: int) -> None:
        self._count(1)
        self._wire.wfile.write(bytes([os.pread(self._fd, 1, at)[0] ^ 0xFF]))

    def _copy(self, at: int, stop: int) -> None:
        while at < stop:
            length = min(stop - at, self._pace.slice_bytes if self._pace else _CHUNK_BYTES)
            if self._pace and self._wire.hub.ledger.closing.wait(self._pace.delay_s(length)):
                raise ConnectionAbortedError
            at += self._send_slice(at, length)

    def _send_slice(self, at: int, length: int) -> int:
        """Send up to `length` bytes. Counted before they leave: who has a file's last byte finds it in the log as well."""
        self._count(length)
        sent = 0
        try:
            sent = os.sendfile(self._wire.connection.fileno(), self._fd, at, length)
        finally:
            if sent != length:
                self._count(sent - length)
        if sent == 0:
            # The file became shorter under our hands: the body ends early, as any server's would.
            raise ConnectionAbortedError
        return sent

    def _count(self, size_bytes: int) -> None:
        self._wire.note(bytes_sent=self._wire.entry.bytes_sent + size_bytes)
