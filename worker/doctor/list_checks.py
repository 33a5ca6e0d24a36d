"""Check the lists of models, the host's cache, and custom nodes. Touches the disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from worker.base.text import count
from worker.doctor.findings import ok, problem, some
from worker.doctor.volume_checks import entries, names_in
from worker.engine.custom_nodes import read_failures
from worker.errors import ManifestInvalid
from worker.models.sources import Sources
from worker.store.seals import stat_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.doctor.findings import Finding, Subject
    from worker.spec import ModelSpec
    from worker.store.layout import Layout


def manifests(layout: Layout, subject: Subject) -> Iterator[Finding]:
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
        yield ok(f"{count(names, 'model')}, {len(missing)} still to be fetched: {some(missing)}")
    elif names:
        yield ok(f"{count(names, 'model')}, all there")
    elif not wrong:
        yield ok("no model in models.toml, MODELS_MANIFEST or MODELS")


def host_cache(layout: Layout) -> Iterator[Finding]:
    """Yield what RunPod put on this machine, which is used before any download."""
    repos = [entry.name.partition("--")[2].replace("--", "/") for entry in entries(layout.host_cache)]
    repos = [repo for repo in repos if repo]
    yield ok(f"{count(repos, 'repository')}: {some(repos)}" if repos else "none on this machine")


def custom_nodes(layout: Layout) -> Iterator[Finding]:
    """Yield the volume's nodes, and those that ComfyUI could not import at the last start."""
    folder = layout.root / "custom_nodes"
    failures = read_failures(layout.root)
    for failed in failures:
        text = f"The custom node '{failed.name}' could not be imported ({failed.reason}): add what it lacks to its"
        yield problem(f"{text} requirements.txt, or remove it.", [folder / failed.name])
    if folder.is_dir() and not failures:
        yield ok(f"{count(names_in(folder), 'custom node')} on the volume, none known to fail")
