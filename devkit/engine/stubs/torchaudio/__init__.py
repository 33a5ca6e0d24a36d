"""Stands in for torchaudio: only the names that ComfyUI 0.3.75 imports while it starts, and `resample` for its audio nodes."""

from . import functional, transforms

__version__ = "2.11.0+stub"
