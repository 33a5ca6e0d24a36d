"""Resolve the WHAT arguments to models with sources: manifests, workflows, addresses, whole repositories, templates.

Reads files, and asks the hub for a repository's files if a pattern is given.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from worker.comfyui_data import known
from worker.errors import FileNotInRepo, ManifestInvalid, RequestError, WorkflowUnknown
from worker.graph.rejection import NodeOrigin, unknown_nodes
from worker.model_spec import HubFile, ModelSpec, parse_source, parse_spec
from worker.models.catalog import Catalog
from worker.models.lists import SpecList
from worker.models.sources import Sources
from worker.plan.document import PlanDocument, UnreadableDocument, is_text, read_document
from worker.plan.items import ItemState, PlanItem
from worker.plan.lookup import item_of_spec, look_up_name
from worker.seed.errors import SeedUsage, WhatUnknown
from worker.volume_workflows import decode_workflow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from worker.base.progress import CancelToken
    from worker.errors import UnknownNodes
    from worker.fetch.hub import Hub
    from worker.seed.volumes import SeedVolume

_GLOB: Final = re.compile(r"[*?\[]")
_SHORT_LINE: Final = re.compile(r"[^:/=]+(/[^:=]*)?=[A-Za-z]+://")
_NEAR: Final = 3


def _say_nothing(_: str) -> None:
    """Ignore a sentence about the selection."""


class Selection:
    """Selects models: resolves WHATs. `sources` are the lists that always apply; manifests among the WHATs come before them.

    `folder` is for an address that names no folder; `hosts` are those that a workflow's metadata may name; `volumes` have the
    workflows that are given by name. `tell` takes a warning before models are sent: a workflow that its ComfyUI cannot run.
    `warn` takes manifests with entries that are left out.
    """

    def __init__(
        self,
        sources: Sources,
        hub: Hub,
        hosts: Sequence[str],
        folder: str | None,
        cancel: CancelToken,
        *,
        volumes: Sequence[SeedVolume] = (),
        tell: Callable[[str], None] = _say_nothing,
        warn: Callable[[Sources], None] = lambda _: None,
    ) -> None:
        self._sources = sources
        self._hub = hub
        self._hosts = hosts
        self._folder = folder
        self._cancel = cancel
        self._volumes = volumes
        self._tell = tell
        self._warn_of_lists = warn

    def read(self, whats: Sequence[str]) -> tuple[PlanItem, ...]:
        """Return the models, each once: to be downloaded, or with an error. Without a WHAT: those of the manifests.

        Raises `SeedUsage`, `WhatUnknown` or `SpecInvalid` for a wrong WHAT, `ManifestInvalid`, and what listing a repository
        raises.
        """
        manifests = [self._manifest(Path(what)) for what in whats if _is_manifest(what)]
        self._sources = replace(self._sources, manifests=(*manifests, *self._sources.manifests))
        items: list[PlanItem] = []
        for what in whats:
            items += self._items(what)
        if not whats:
            items += self._of_specs(self._sources.manifest(), None)
        found: dict[tuple[str | None, str], PlanItem] = {}
        for item in items:
            found.setdefault((item.folder, item.name), item)
        return tuple(found.values())

    def _items(self, what: str) -> Iterable[PlanItem]:
        if _SHORT_LINE.match(what):
            return self._of_specs(_models_in_argument(what), what)
        if "://" in what:
            return self._of_specs(self._addressed(what), what)
        if what == "-" or Path(what).is_file():
            if _is_manifest(what):
                return self._of_specs(self._manifest(Path(what)).specs, Path(what).name)
            return self._workflow(what)
        if (saved := self._found(what)) is not None:
            return self._of_document(what, saved)
        name = what.removesuffix(".json")
        catalog = Catalog()
        if name in catalog.templates:
            lacking = [NodeOrigin(kind, node_id, {}) for kind, node_id in known().lacking_templates.get(name, {}).items()]
            self._warn(name, unknown_nodes(lacking, known().newest) if lacking else None)
            return self._of_specs(catalog.of_template(name), f"the template {name}")
        within = [template for template in catalog.templates if name and name in template]
        near = within[:_NEAR] or difflib.get_close_matches(name, catalog.templates, n=_NEAR)
        raise WhatUnknown(what, near, self._saved_names())

    def _warn(self, what: str, lacking: UnknownNodes | None) -> None:
        """Warn that a workflow cannot run. Its models are still sent: the image may have a newer ComfyUI."""
        if lacking:
            self._tell(f"warning: {what} CANNOT RUN; its models are sent all the same. {lacking}")

    def _of_specs(self, specs: Iterable[ModelSpec], known_by: str | None) -> list[PlanItem]:
        items = [item_of_spec(PlanItem(spec.name, spec.folder, ItemState.UNKNOWN), spec, self._sources) for spec in specs]
        return [replace(item, known_by=known_by or item.known_by) for item in items]

    # --- addresses

    def _addressed(self, address: str) -> list[ModelSpec]:
        if self._folder is None:
            raise SeedUsage(
                f"Say with --folder where {address} belongs, such as --folder checkpoints, or write folder=address."
            )
        if not _GLOB.search(address):
            return [parse_spec(self._folder, address)]
        pattern = parse_source(address)
        if not isinstance(pattern, HubFile):
            raise SeedUsage(f"Patterns such as in {address} are for hf:// addresses only.")
        found = [path for path in self._hub.list_files(pattern, self._cancel) if fnmatch.fnmatchcase(path, pattern.path)]
        if not found:
            raise FileNotInRepo(pattern.repo, pattern.path, pattern.revision)
        # Files of one name in several folders of the repository keep these folders. All others lose them.
        names = Counter(path.rpartition("/")[2] for path in found)
        short = {path: path.rpartition("/")[2] for path in found if names[path.rpartition("/")[2]] == 1}
        return [ModelSpec(self._folder, short.get(path, path), replace(pattern, path=path)) for path in found]

    # --- files

    def _manifest(self, path: Path) -> SpecList:
        """Return a manifest in any of the formats that the worker reads."""
        sources = Sources.read(volume_manifest=path)
        self._warn_of_lists(sources)
        volume = sources.volume
        return replace(volume.models, title=path.name) if volume else SpecList(path.name)

    def _workflow(self, path: str) -> list[PlanItem]:
        try:
            document = read_document(path)
        except UnreadableDocument as exc:
            raise SeedUsage(f"{path}: {exc}.") from None
        return self._of_document(path, document)

    def _of_document(self, title: str, document: object) -> list[PlanItem]:
        try:
            wanted = PlanDocument.read(document, self._saved)
            sources = self._sources.with_request(wanted.models, self._hosts).with_workflow(wanted.metadata, self._hosts)
            items = [look_up_name(nodes, sources) for nodes in wanted.names()]
            self._warn(title, wanted.lacking())
            return [*items, *self._of_specs(sources.requested(), "the request")]
        except RequestError as exc:
            raise SeedUsage(f"{title}: {exc}") from exc

    def _saved(self, name: str) -> dict[str, Any]:
        """Return the workflow of this name on a volume. Raises `WorkflowUnknown`, `NoWorkflowInFile`, and reading errors."""
        found = self._found(name)
        if found is None:
            raise WorkflowUnknown(name, self._saved_names())
        return found

    def _found(self, name: str) -> dict[str, Any] | None:
        files = (volume.workflow(name) for volume in self._volumes)
        return next((decode_workflow(name, data) for data in files if data is not None), None)

    def _saved_names(self) -> list[str]:
        return sorted({name for volume in self._volumes for name in volume.workflow_names()})


def _models_in_argument(what: str) -> Iterable[ModelSpec]:
    """Return the models that an argument selects, such as `loras=hf://org/repo/file.safetensors`. Raises `SeedUsage`."""
    try:
        return Sources.read(models=what).manifest()
    except ManifestInvalid as exc:
        raise SeedUsage(f"The argument {what} is wrong: {'; '.join(exc.problems)}") from exc


def _is_manifest(what: str) -> bool:
    """Return whether a WHAT's file is a list of models, not a workflow: any file outside JSON, and JSON with such a list."""
    if "://" in what or what == "-":
        return False
    try:
        data = Path(what).read_bytes()
        document: Any = json.loads(data.decode(json.detect_encoding(data))) if is_text(data) else None
    except (OSError, RecursionError):
        return False
    except ValueError:
        return not what.lower().endswith(".json")
    if isinstance(document, list):
        return True
    if not isinstance(document, dict) or any(key in document for key in ("nodes", "input", "workflow", "prompt")):
        return False
    models = document.get("models", document.get("model"))
    return isinstance(models, (list, dict)) and not (isinstance(models, dict) and "class_type" in models)
