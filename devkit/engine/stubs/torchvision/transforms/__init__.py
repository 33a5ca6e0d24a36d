import torch

from ..missing import missing
from . import functional
from .functional import InterpolationMode


class Compose:
    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, x):
        for transform in self.transforms:
            x = transform(x)
        return x


class Normalize(torch.nn.Module):
    def __init__(self, mean, std, inplace=False):
        super().__init__()
        self.mean, self.std, self.inplace = mean, std, inplace

    def forward(self, x):
        return functional.normalize(x, self.mean, self.std, self.inplace)


class Resize(torch.nn.Module):
    def __init__(self, size, *args, **kwargs):
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else tuple(size)

    def forward(self, x):
        batch = x[None] if x.ndim == 3 else x
        resized = torch.nn.functional.interpolate(batch, self.size, mode="bilinear", antialias=True)
        return resized[0] if x.ndim == 3 else resized


__getattr__ = missing(__name__)
