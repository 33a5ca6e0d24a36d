"""Nodes for ComfyUI that do on purpose what real ones do by accident: hang, die, run out of memory, write huge files.

ComfyUI loads this file from its custom_nodes folder; nothing of the project imports it.
"""

import os
import sys
import time

import folder_paths
import torch


class FaultSleep:
    """Passes an image on after a while, in which it looks for no interruption: a third-party node in a long computation."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = "faults"

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802 - ComfyUI's name
        """Return the image, the duration, and a number that keeps the node from being cached."""
        return {"required": {"image": ("IMAGE",), "seconds": ("FLOAT", {"default": 1.0}), "seed": ("INT", {"default": 0})}}

    def run(self, image: torch.Tensor, seconds: float, seed: int) -> tuple[torch.Tensor]:
        """Sleep in one piece."""
        del seed
        time.sleep(seconds)
        return (image,)


class FaultDie:
    """Ends ComfyUI's process, as a segmentation fault or the kernel's out-of-memory killer do.

    -1 is the GPU's memory. 0 is sys.exit(), which ends the thread that runs workflows and nothing else.
    """

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = "faults"

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802 - ComfyUI's name
        """Return the image, the signal, and a number that keeps the node from being cached."""
        return {
            "required": {"image": ("IMAGE",), "signal": ("INT", {"default": 9, "min": -1}), "seed": ("INT", {"default": 0})}
        }

    def run(self, image: torch.Tensor, signal: int, seed: int) -> tuple[torch.Tensor]:
        """Die of the signal. Never returns."""
        del seed
        if signal < 0:
            raise torch.OutOfMemoryError("Allocation on device 0 would exceed allowed memory.")
        if signal == 0:
            sys.exit("a node ended itself")
        os.kill(os.getpid(), signal)
        return (image,)


class FaultFile:
    """Writes a file of any size and reports it under any key, as third-party savers do."""

    RETURN_TYPES = ()
    FUNCTION = "run"
    CATEGORY = "faults"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802 - ComfyUI's name
        """Return the key of the history, the file's name and size."""
        return {
            "required": {
                "key": ("STRING", {"default": "gifs"}),
                "filename": ("STRING", {"default": "out.mp4"}),
                "size_bytes": ("INT", {"default": 16, "min": 0, "max": 1 << 40}),
            }
        }

    def run(self, key: str, filename: str, size_bytes: int) -> dict:
        """Write a sparse file: it costs no disk and is read like any other."""
        path = os.path.join(folder_paths.get_output_directory(), filename)
        with open(path, "wb") as file:
            file.truncate(size_bytes)
        return {"ui": {key: [{"filename": filename, "subfolder": "", "type": "output", "format": "video/h264-mp4"}]}}


class FaultGpu:
    """Reads beside a tensor on the GPU, as a wrong index in a kernel does: CUDA's context is broken from then on."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = "faults"

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802 - ComfyUI's name
        """Return the image."""
        return {"required": {"image": ("IMAGE",)}}

    def run(self, image: torch.Tensor) -> tuple[torch.Tensor]:
        """Break the GPU's context. Never returns: waiting for the kernel raises."""
        values = torch.zeros(1, device="cuda")
        beside = torch.tensor([1 << 20], device="cuda")
        print(values[beside])
        return (image,)


NODE_CLASS_MAPPINGS = {"FaultSleep": FaultSleep, "FaultDie": FaultDie, "FaultFile": FaultFile, "FaultGpu": FaultGpu}
