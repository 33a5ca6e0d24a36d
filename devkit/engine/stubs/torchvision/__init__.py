"""Stands in for torchvision: only the names that ComfyUI 0.3.75 and spandrel 0.4.2 import while they start.

ComfyUI: `import torchvision` (Stable Cascade), `from torchvision import transforms` (Cosmos), `import torchvision.transforms as
transforms` (ACE-Step). spandrel: normalize, rotate and InterpolationMode of torchvision.transforms.functional.
"""

from . import models, transforms

__version__ = "0.28.0+stub"
