"""Find the source of a model by its name: one lookup over every list of models. Reads files, no network.

The lists are asked in this order. The first one that knows (folder, name) decides:

1. the request's `models`; 2. the metadata that ComfyUI's editor embeds in a workflow; 3. `models.toml` on the volume; 4.
`MODELS_MANIFEST`, the path of a manifest in the image or the manifest itself, then `MODELS`, short lines; 5. the official
catalogue, generated from ComfyUI's own templates and read when first asked.

A manifest (3 and 4) with a mistake is left out; if it was valid before, its earlier content counts. The other lists decide, and
a model that none of them knows fails with the mistake.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from worker.editor.embedded_models import embedded_models
from worker.errors import AmbiguousModel, ManifestInvalid, ModelsInvalid, RequestError, WorkerError
from worker.model_spec import ModelSpec, check_from_request, parse_spec
from worker.models.catalog import CATALOG, Catalog
from worker.models.lists import ModelList, SpecList, check_entry_fields, is_same_file, names_entry, values_of_entry
from worker.models.manifest import VolumeManifest, empty_if_wrong, environment_manifest, parse_short_line, parse_short_lines

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence


_NEAR_COUNT = 3


@dataclass(frozen=True, slots=True)
class _RefusedSource:
    """The source that a workflow's metadata gives and a request may not have downloaded, and why."""

    path: str
    error: RequestError


@dataclass(frozen=True, slots=True)
class Sources:
    """The lists of models in order, and the lookup over them. Immutable; its methods return new ones."""

    manifests: tuple[SpecList, ...]
    catalog: ModelList
    volume: VolumeManifest | None = None
    request: SpecList = field(default_factory=lambda: SpecList("the request's 'models'"))
    embedded: SpecList = field(default_factory=lambda: SpecList("the workflow's metadata", deliberate=False))
    refused: tuple[_RefusedSource, ...] = ()

    @classmethod
    def gather(
        cls,
        *,
        volume_manifest: Path | None = None,
        manifest: str | None = None,
        models: str | None = None,
        catalog: Path = CATALOG,
    ) -> Sources:
        """Return the lists that apply to every job. Mistakes in them are in `errors`.

        `volume_manifest` need not exist; `manifest` and `models` are the values of `MODELS_MANIFEST` and `MODELS`.
        """
        manifests = []
        if manifest and manifest.strip():
            manifests.append(empty_if_wrong("MODELS_MANIFEST", lambda: environment_manifest(manifest)))
        if models and models.strip():
            manifests.append(empty_if_wrong("MODELS", lambda: parse_short_lines(models)))
        volume = VolumeManifest(volume_manifest).reread() if volume_manifest else None
        return cls(tuple(manifests), Catalog(catalog), volume)

    @classmethod
    def read(cls, **lists: Any) -> Sources:  # noqa: ANN401 - what `gather` takes
        """Like `gather`, but require all lists to be valid.

        Raises:
            ManifestInvalid: with all mistakes of the first list that has any.
        """
        sources = cls.gather(**lists)
        for error in sources.errors:
            raise error
        return sources

    @property
    def errors(self) -> tuple[ManifestInvalid, ...]:
        """Return the mistakes of the manifests, one error for each that has any."""
        return tuple(models.error for models in self._manifests() if models.error)

    @property
    def odd(self) -> tuple[ManifestInvalid, ...]:
        """Return entries with impossible file names in otherwise valid manifests. Only these are left out."""
        return tuple(models.odd for models in self._manifests() if models.odd)

    def refreshed(self) -> Sources:
        """Return these with the current `models.toml`, or the same object if nothing changed. Costs one stat."""
        now = self.volume.reread() if self.volume else None
        return self if now is self.volume else replace(self, volume=now)

    def with_request(self, models: object, allowed_hosts: Collection[str]) -> Sources:
        """Return these with a request's `models`: a list of objects, or of short lines as in `MODELS`, or None.

        Raises:
            ModelsInvalid, SpecInvalid, HostNotAllowed, SuffixNotAllowed: the request may not ask for one of them, or not so.
        """
        if models is None:
            return self
        if not isinstance(models, list) or not all(isinstance(entry, (dict, str)) for entry in models):
            raise ModelsInvalid
        entries = [parse_short_line(entry) if isinstance(entry, str) else entry for entry in models]
        for entry in entries:
            check_entry_fields(entry)
        specs = tuple(parse_spec(**values_of_entry(entry)) for entry in entries)
        for spec in specs:
            check_from_request(spec, allowed_hosts)
        return replace(self, request=replace(self.request, specs=specs))

    def with_workflow(self, workflow: object, allowed_hosts: Collection[str]) -> Sources:
        """Return these with a workflow's metadata: the editor's format, or an `extra_data` or `extra_pnginfo`.

        The workflow's author wrote it. So an entry that makes no sense, or that a request may not ask for, is skipped; `find`
        raises for it only if no other list knows the model.
        """
        specs, refused = [], []
        for entry in embedded_models(workflow):
            try:
                spec = parse_spec(**values_of_entry(entry))
                check_from_request(spec, allowed_hosts)
            except RequestError as error:
                refused.append(_RefusedSource(f"{entry.get('directory')}/{entry.get('name')}", error))
            else:
                specs.append(spec)
        return replace(self, embedded=replace(self.embedded, specs=tuple(specs)), refused=tuple(refused))

    def find(self, name: str, folders: Collection[str] = (), *, guessed: bool = False) -> ModelSpec | None:
        """Return the file that `name` means to a loader that reads these folders (none: any), or None if no list knows it.

        The request's own models count in any folder. If the folders are `guessed`, so do the manifests' models that no list has
        in these folders: their author knew what the loader reads.

        Mirrors of one file (the same sha256, or the same source given twice) count once: the first in its list.

        Raises:
            AmbiguousModel: a list has different files for the name, and it is deliberate or no later list knows better.
            ManifestInvalid: no list knows the name, but there is a manifest with a mistake, which may.
            HostNotAllowed, SuffixNotAllowed, SpecInvalid: only the workflow's metadata knows it, with an entry that is refused.
        """
        problem: WorkerError | None
        problem = next((entry.error for entry in self.refused if names_entry(entry.path, name, folders)), None)
        wrong: ManifestInvalid | None = None
        for models, places in self._steps(folders, guessed=guessed):
            found = _distinct(models.find(name, places))
            if len(found) == 1:
                return found[0]
            wrong = wrong or models.error
            if found and (guessed or places == folders):
                problem = AmbiguousModel(name, models.title, [str(spec) for spec in found])
                if models.deliberate:
                    break
        if wrong:
            raise wrong.copy()  # a copy for each job: the list keeps this one
        if problem:
            raise problem
        return None

    def manifest(self) -> tuple[ModelSpec, ...]:
        """Return every model of the manifests, which the operator wants on the volume. Once a path, first list first.

        Mistakes in them do not matter here; see `errors`.
        """
        wanted = (spec for models in self._manifests() if models.deliberate for spec in models.specs)
        found: dict[str, ModelSpec] = {}
        for spec in wanted:
            found.setdefault(f"{spec.folder}/{spec.name}", spec)
        return tuple(found.values())

    def requested(self) -> tuple[ModelSpec, ...]:
        """Return the models of the request's own `models`, whether or not the graph names them."""
        return self.request.specs

    def near(self, name: str) -> tuple[str, ...]:
        """Return up to three models, as `folder/name`, with similar names, for an error about an unknown name."""
        by_stem = {PurePosixPath(path).stem: path for models in self._lists() for path in models.paths}
        close = difflib.get_close_matches(PurePosixPath(name).stem, by_stem, n=_NEAR_COUNT)
        return tuple(by_stem[match] for match in close)

    def _steps(self, folders: Collection[str], *, guessed: bool) -> Iterator[tuple[ModelList, Collection[str]]]:
        """Yield the lists in the order to ask them, each with the folders to ask for."""
        first, *others = ((models, folders) for models in self._lists())
        anywhere: tuple[ModelList, Collection[str]] = (self.request, ())
        yield first
        if guessed:
            yield anywhere
        yield from others
        if guessed:
            yield from ((models, ()) for models in self._manifests())
        elif folders:
            yield anywhere

    def _manifests(self) -> Iterator[SpecList]:
        if self.volume:
            yield self.volume.models
        yield from self.manifests

    def _lists(self) -> Iterator[ModelList]:
        return chain((self.request, self.embedded), self._manifests(), (self.catalog,))


def _distinct(found: Sequence[ModelSpec]) -> list[ModelSpec]:
    kept: list[ModelSpec] = []
    for spec in found:
        if not any(is_same_file(spec, other) for other in kept):
            kept.append(spec)
    return kept
