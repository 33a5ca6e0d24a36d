"""Load data/comfyui.json: node classes, model folders and editor rules of the recorded ComfyUI releases.

`scripts/make_comfyui.py` generates the file from recorded engines and from scripts/comfyui.toml, which has the reasons.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

KNOWN = Path(__file__).parent / "data" / "comfyui.json"


@dataclass(frozen=True, slots=True)
class EditorRules:
    """The rules of ComfyUI's frontend in `data/comfyui.json`. `modern` ones are for version 1.58, `classic` ones for 1.32.

    `virtual` classes exist only in the editor; `own_virtual` are those of them that are not custom nodes.
    """

    aliases: Mapping[str, str]
    audio_players: frozenset[str]
    broadcasters: frozenset[str]
    camera: Mapping[str, Any]
    classic_savers: frozenset[str]
    classic_titles: Mapping[str, str]
    classic_widgets: frozenset[str]
    defaults: Mapping[str, Any]
    made_by_browser: frozenset[str]
    modern_savers: frozenset[str]
    modern_titles: Mapping[str, str]
    modern_widgets: frozenset[str]
    not_saved: frozenset[str]
    reroutes: frozenset[str]
    seeds: frozenset[str]
    own_virtual: frozenset[str]
    uploads: frozenset[str]
    virtual: frozenset[str]

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> EditorRules:
        """Return the rules. 1.58 knows all that 1.32 knows."""
        savers, widgets, titles = raw["savers"], raw["widgets"], raw["titles"]
        names = ("audio_players", "broadcasters", "reroutes", "seeds", "uploads")
        return cls(
            aliases=raw["aliases"],
            camera=raw["camera"],
            classic_savers=frozenset(savers["classic"]),
            classic_titles=titles["classic"],
            classic_widgets=frozenset(widgets["classic"]),
            defaults=raw["defaults"],
            made_by_browser=frozenset(widgets["made_by_browser"]),
            modern_savers=frozenset(savers["classic"]).union(savers["modern"]),
            modern_titles=titles["modern"],
            modern_widgets=frozenset(widgets["classic"]).union(widgets["modern"]),
            not_saved=frozenset(widgets["not_saved"]),
            own_virtual=frozenset(raw["virtual"]),
            virtual=frozenset(raw["virtual"]).union(raw["foreign_virtual"]),
            **{name: frozenset(raw[name]) for name in names},
        )


@dataclass(frozen=True, slots=True)
class ComfyuiData:
    """The content of `data/comfyui.json`: what is known of ComfyUI without asking a running one.

    `same_folders` are those that ComfyUI reads as one, in its order: if both have a name, the first one's file is loaded.
    `one_folder` maps the folder for new files to them, that one first. `releases` has the classes by the oldest recorded
    release that has them, `gone` all that a release no longer has. `newer` are classes that no recorded release has, with the
    release that official templates were saved with ("" if they do not say). `lacking_templates` are official templates with
    classes that the newest release lacks, each with the id of a node. `judged_by_code` are classes whose own code checks their
    values; from `combos_checked_since` on ComfyUI holds COMBO inputs against their options.
    """

    class_folders: Mapping[str, str | Mapping[str, str]]
    combos_checked_since: str
    editor: EditorRules
    embedding_suffixes: tuple[str, ...]
    first_widgets: Mapping[str, list[str]]
    folders: frozenset[str]
    frontends: Mapping[str, str]
    gone: Mapping[str, list[str]]
    image_taes: frozenset[str]
    input_folders: tuple[tuple[str, str], ...]
    judged_by_code: frozenset[str]
    lacking_templates: Mapping[str, Mapping[str, str]]
    manager_folders: Mapping[str, str]
    newer: Mapping[str, str]
    one_folder: Mapping[str, tuple[str, ...]]
    output_model_folders: frozenset[str]
    outputs: frozenset[str]
    releases: Mapping[str, list[str]]
    same_folders: tuple[tuple[str, ...], ...]
    tae_suffixes: tuple[str, ...]
    video_taes: frozenset[str]
    warmup_fixed: Mapping[str, Any]
    warmup_kept: Mapping[str, frozenset[str]]

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> ComfyuiData:
        """Return the content of the file's JSON."""
        same, taes = raw["same_folders"], raw["vae_approx"]
        return cls(
            class_folders=raw["class_folders"],
            combos_checked_since=raw["checked_since"]["combos"],
            editor=EditorRules.of(raw["editor"]),
            embedding_suffixes=tuple(raw["embeddings"]["suffixes"]),
            first_widgets=raw["first_widgets"],
            folders=frozenset(raw["folders"]),
            frontends=raw["frontends"],
            gone=raw["gone"],
            image_taes=frozenset(taes["image"]),
            input_folders=tuple((pattern, folder) for pattern, folder in raw["input_folders"]),
            judged_by_code=frozenset(raw["judged_by_code"]),
            lacking_templates=raw["lacking_templates"],
            manager_folders=raw["manager_folders"],
            newer=raw["newer"],
            one_folder={folder: (folder, *(name for name in names if name != folder)) for folder, names in same.items()},
            output_model_folders=frozenset(raw["output_model_folders"]),
            outputs=frozenset(raw["outputs"]),
            releases=raw["classes"],
            same_folders=tuple(map(tuple, same.values())),
            tae_suffixes=tuple(taes["suffixes"]),
            video_taes=frozenset(taes["video"]),
            warmup_fixed=raw["warmup"]["fixed"],
            warmup_kept={name: frozenset(inputs) for name, inputs in raw["warmup"]["kept"].items()},
        )

    def folder_of(self, class_type: str, input_name: str) -> str | None:
        """Return the folder that a class's input reads, if the class is known."""
        found = self.class_folders.get(class_type)
        return found if isinstance(found, str) or found is None else found.get(input_name)

    def is_no_output(self, class_type: str) -> bool:
        """Return whether it is a class of ComfyUI that is not an output."""
        return class_type not in self.outputs and self.since(class_type) is not None

    def since(self, class_type: str) -> str | None:
        """Return the oldest recorded release that has the class, or None."""
        return next((release for release, names in self.releases.items() if class_type in names), None)

    def is_own(self, class_type: str) -> bool:
        """Return whether the class is known as ComfyUI's own, in any release."""
        return class_type in self.newer or self.since(class_type) is not None

    def has(self, class_type: str, release: str) -> bool:
        """Return whether a recorded release has the class."""
        since = self.since(class_type)
        return since is not None and is_older(since, release, or_same=True) and class_type not in self.gone.get(release, ())

    @property
    def newest(self) -> str:
        """Return the newest recorded release."""
        return list(self.releases)[-1]


def is_older(one: str, other: str, *, or_same: bool = False) -> bool:
    """Return whether a recorded release of ComfyUI came before another: `0.3.75` before `v0.33.0`."""
    first, second = (tuple(int(digits) for digits in re.findall(r"\d+", version)[:3]) for version in (one, other))
    return first < second or (or_same and first == second)


@cache
def known() -> ComfyuiData:
    """Return the content of `data/comfyui.json`. The first call reads it."""
    return ComfyuiData.of(json.loads(KNOWN.read_bytes()))
