"""Check the volume itself: its mount, space, host cache, custom nodes, and room. Touches the disk."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from worker.base.files import FULL, READ_ONLY
from worker.base.text import count, size_text
from worker.doctor.findings import Severity, first_names, listing, note, ok, problem
from worker.engine.custom_nodes import read_failed_nodes
from worker.models.sources import Sources
from worker.pins import read_pins
from worker.store.eviction import EvictionLimits, eviction_outlook, survey_for_eviction
from worker.store.leases import LeaseTiming

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.doctor.checking import Subject
    from worker.doctor.findings import Finding
    from worker.store.layout import Layout


_LOW_BYTES: Final = 1_000_000_000
_SCARCE_BYTES: Final = 20_000_000_000


def volume_silence(root: Path) -> Finding | None:
    """Return why nothing can be read on the volume, or None."""
    try:
        os.listdir(root)  # noqa: PTH208 - a stat may be answered from a cache
    except (FileNotFoundError, NotADirectoryError):
        return problem(f"There is no volume at {root}: attach one to the endpoint, or set VOLUME_PATH to where it is mounted.")
    except OSError as exc:
        return problem(f"{root} exists but cannot be read ({exc.strerror}): stop this worker, its host lost the volume.")
    return None


def check_mount(root: Path, *, required: bool) -> Finding:
    """Return the file system of the volume, and where it is mounted."""
    mount = find_mount(Path("/proc/self/mountinfo").read_text("utf-8"), os.path.realpath(root))
    if mount is None or mount.point == "/":
        text = f"{root} is a folder on this container's own disk, gone with the container: attach a network volume."
        return problem(text) if required else note(text)
    return ok(f"{mount.title} ({mount.source}), mounted {mount.mode} at {mount.point}")


def check_space(layout: Layout) -> Iterator[Finding]:
    """Yield the volume's free bytes and inodes, as far as the file system reports them."""
    found = os.statvfs(layout.root)
    free, total = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    text = f"{size_text(free)} free of {size_text(total)}, less if there is a quota"
    if free < _LOW_BYTES:
        yield problem(f"{text}: enlarge the volume or remove models.")
    elif free < _SCARCE_BYTES:
        yield note(f"{text}: not enough for a large model.")
    else:
        yield ok(text)
    if found.f_files and found.f_favail * 100 < found.f_files:
        yield problem(f"{found.f_favail} of {found.f_files} inodes are free: remove small files.")


def check_writable(layout: Layout) -> Iterator[Finding]:
    """Yield whether a file on the volume can really be written, flushed, renamed and removed."""
    began_s = time.monotonic()
    try:
        whole_seconds = _write_and_remove(layout.state)
    except OSError as exc:
        yield _not_writable(layout.state, exc)
        return
    took_ms = (time.monotonic() - began_s) * 1000
    mtimes = "whole seconds" if whole_seconds else "fractions of a second"
    yield ok(f"1 MiB written, flushed, renamed and removed in {took_ms:.0f} ms; mtimes are kept in {mtimes}")


@dataclass(frozen=True, slots=True)
class Mount:
    """A mount that a check may find the volume on: a line of `/proc/self/mountinfo`."""

    point: str
    kind: str
    source: str
    mode: str

    @property
    def title(self) -> str:
        """Return the file system's name for people."""
        return "MooseFS" if self.kind.startswith("fuse") and self.source.startswith("mfs") else self.kind


def find_mount(mountinfo: str, path: str) -> Mount | None:
    """Return the mount of the volume that is checked: the last one at the longest mount point above it."""
    found: Mount | None = None
    for line in mountinfo.splitlines():
        head, _, tail = line.partition(" - ")
        fields, kinds = head.split(" "), tail.split(" ")
        point = _unescaped(fields[4])
        above = point in {"/", path} or path.startswith(f"{point}/")
        if above and (found is None or len(point) >= len(found.point)):
            options = {*fields[5].split(","), *kinds[2].split(",")}
            found = Mount(point, kinds[0], _unescaped(kinds[1]), "read-only" if "ro" in options else "read-write")
    return found


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _write_and_remove(folder: Path) -> bool:
    """Check a write to the volume, as a download does it. Return whether it keeps whole seconds. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".doctor.{secrets.token_hex(4)}.tmp"
    renamed = path.with_suffix(".renamed.tmp")
    try:
        with path.open("xb") as stream:
            stream.write(bytes(1 << 20))
            stream.flush()
            os.fsync(stream.fileno())
        path.replace(renamed)
        os.utime(renamed, ns=(1_500_000_000_123_456_789, 1_500_000_000_123_456_789))
        return renamed.stat().st_mtime_ns % 1_000_000_000 == 0
    finally:
        path.unlink(missing_ok=True)
        renamed.unlink(missing_ok=True)


def _not_writable(folder: Path, exc: OSError) -> Finding:
    reason = exc.strerror or str(exc)
    if exc.errno in FULL:
        return problem(f"{folder} is full ({reason}): enlarge the volume or its quota, or remove models.")
    if exc.errno in READ_ONLY:
        return problem(f"{folder} cannot be written ({reason}): missing models go to the container's disk; mount it writable.")
    return problem(f"{folder} cannot be written ({reason}): check the volume.")


# --- listings ---------------------------------------------------------------------------------------


def entries(folder: Path) -> list[Path]:
    """Return, for a check, the sorted contents of a folder of the volume, empty if it does not exist."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def names_in(folder: Path) -> list[str]:
    """Return, for a check, the names in a folder of the volume, empty if it cannot be read for any reason."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return [entry.name for entry in entries]
    return []


# --- its host cache, custom nodes and room --------------------------------------------------------


def check_host_cache(layout: Layout) -> Iterator[Finding]:
    """Yield what RunPod put on this machine, which is used before any download."""
    repos = [entry.name.partition("--")[2].replace("--", "/") for entry in entries(layout.host_cache)]
    repos = [repo for repo in repos if repo]
    yield ok(f"{count(repos, 'repository')}: {first_names(repos)}" if repos else "none on this machine")


def check_custom_nodes(layout: Layout) -> Iterator[Finding]:
    """Yield the volume's nodes, and those that ComfyUI could not import at the last start."""
    folder = layout.root / "custom_nodes"
    failures = read_failed_nodes(layout.root)
    for failed in failures:
        text = f"The custom node '{failed.name}' could not be imported ({failed.reason}): add what it lacks to its"
        yield problem(f"{text} requirements.txt, or remove it.", [folder / failed.name])
    if folder.is_dir() and not failures:
        yield ok(f"{count(names_in(folder), 'custom node')} on the volume, none known to fail")


def check_room(layout: Layout, subject: Subject) -> Iterator[Finding]:
    """Yield what would be removed next to make room, and what stays and why. Nothing where no worker removes models."""
    limits = EvictionLimits.of_gb(subject.keep_gb, subject.free_gb)
    if not limits and not layout.leases_began.exists():
        return
    sources = Sources.gather(volume_manifest=layout.manifest, manifest=subject.manifest, models=subject.models)
    pins = read_pins(layout.root, sources)
    found = survey_for_eviction(layout, pins, LeaseTiming())
    taken = f"{size_text(found.used_bytes)} taken by models"
    taken += f", of {size_text(limits.keep_bytes)} that VOLUME_KEEP_GB allows" if limits.keep_bytes is not None else ""
    if pins.trouble:
        yield problem(f"{taken}. No model is removed until this is fixed: {pins.trouble}")
    elif not limits:
        yield note(
            f"{taken}. This endpoint removes nothing, but another one on the volume does; {eviction_outlook(found, limits)}"
        )
    else:
        over = found.excess(limits)
        yield (note if over > 0 else ok)(f"{taken}; {eviction_outlook(found, limits)}")
    stays = [f"{one.title}: {one.kept}" for one in found.contents if one.kept]
    if stays and not pins.trouble:
        yield listing(Severity.OK, f"{count(stays, 'model')} kept", stays)
