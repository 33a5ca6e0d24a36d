"""Stands in for torchvision: what ComfyUI and spandrel import while they start. Any name is there; few can be used.

ComfyUI's own nodes use the real one for a few models (Stable Cascade, SAM 3, RT-DETR, RAFT, BiRefNet), which do not run here.
"""

from .missing import missing
from . import models, ops, transforms

__version__ = "0.28.0+stub"
__getattr__ = missing(__name__)
