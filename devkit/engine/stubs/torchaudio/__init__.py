"""Stands in for torchaudio: the names that ComfyUI imports while it starts, and `resample` for its audio nodes."""

from torchvision.missing import missing

from . import functional, transforms

__version__ = "2.11.0+stub"
__getattr__ = missing(__name__)
