import torch
from torchvision.missing import missing


def resample(waveform, orig_freq, new_freq, **kwargs):
    if int(orig_freq) == int(new_freq):
        return waveform
    length = max(1, round(waveform.shape[-1] * new_freq / orig_freq))
    channels = waveform.reshape(-1, 1, waveform.shape[-1]).float()
    resampled = torch.nn.functional.interpolate(channels, size=length, mode="linear", align_corners=False)
    return resampled.reshape(*waveform.shape[:-1], length).to(waveform.dtype)


__getattr__ = missing(__name__)
