"""Check the lists of models, the host's cache, and custom nodes. Touches the disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from worker.base.text import count, size_text
from worker.doctor.findings import Severity, first_names, listing, note, ok, problem
from worker.doctor.volume_checks import entries, names_in
from worker.engine.custom_nodes import read_failed_nodes
from worker.errors import ManifestInvalid
from worker.models.sources import Sources
from worker.pins import read_pins
from worker.store.eviction import EvictionLimits, eviction_outlook, survey
from worker.store.leases import LeaseTiming
from worker.store.seals import stat_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.doctor.findings import Finding, Subject
    from worker.spec import ModelSpec
    from worker.store.layout import Layout


def check_manifests(layout: Layout, subject: Subject) -> Iterator[Finding]:
    """Yield whether the lists of models are readable, and what they name that is missing."""
    lists: list[dict[str, Any]] = [
        {"volume_manifest": layout.manifest},
        {"manifest": subject.manifest},
        {"models": subject.models},
    ]
    specs: list[ModelSpec] = []
    wrong = False
    for one in lists:
        try:
            sources = Sources.read(**one)
            specs += sources.manifest()
            faults: list[ManifestInvalid] = list(sources.odd)
        except ManifestInvalid as exc:
            faults = [exc]
        for fault in faults:
            wrong = True
            for text in fault.problems:
                yield problem(f"{fault.where}: {text}", [fault.where])
    names = {f"{spec.folder}/{spec.name}" for spec in specs}
    missing = sorted(name for name in names if stat_file(layout.listed(name)) is None)
    if missing:
        yield ok(f"{count(names, 'model')}, {len(missing)} still to be fetched: {first_names(missing)}")
    elif names:
        yield ok(f"{count(names, 'model')}, all there")
    elif not wrong:
        yield ok("no model in models.toml, MODELS_MANIFEST or MODELS")


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
    found = survey(layout, pins, LeaseTiming())
    taken = f"{size_text(found.used_bytes)} taken by models"
    taken += f", of {size_text(limits.keep_bytes)} that VOLUME_KEEP_GB allows" if limits.keep_bytes is not None else ""
    if pins.trouble:
        yield problem(f"{taken}. No model is removed while this is so: {pins.trouble}")
    elif not limits:
        yield note(f"{taken}. This endpoint removes nothing, another one on the volume does; {eviction_outlook(found, limits)}")
    else:
        over = found.excess(limits)
        yield (note if over > 0 else ok)(f"{taken}; {eviction_outlook(found, limits)}")
    stays = [f"{one.title}: {one.kept}" for one in found.contents if one.kept]
    if stays and not pins.trouble:
        yield listing(Severity.OK, f"{count(stays, 'model')} kept", stays)
