"""The folders of ComfyUI's loaders, and what lies in a folder that may not be there. Touches the disk."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

FOLDERS: Final = frozenset(
    {
        *("audio_encoders", "background_removal", "checkpoints", "classifiers", "clip", "clip_vision", "configs", "controlnet"),
        *("detection", "diffusers", "diffusion_models", "embeddings", "frame_interpolation", "geometry_estimation", "gligen"),
        *("hypernetworks", "latent_upscale_models", "loras", "model_patches", "optical_flow", "photomaker", "style_models"),
        *("t2i_adapter", "text_encoders", "unet", "upscale_models", "vae", "vae_approx"),
    }
)
"""The folders that ComfyUI's own loaders read. Custom nodes add more, so that another name is no mistake by itself."""


def entries(folder: Path) -> list[Path]:
    """What lies in it, sorted; nothing where there is no such folder."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def names_in(folder: Path) -> list[str]:
    """The names in it; none where it cannot be read, for whatever reason."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return [entry.name for entry in entries]
    return []
