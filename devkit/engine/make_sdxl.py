# ruff: noqa: PLC0415 - ComfyUI can be imported only after its options are set, which needs the arguments
"""Write random weights of SDXL's real size: 6.9 GB in four files. Runs with the engine's python; touches only the given folder.

    python make_sdxl.py COMFYUI_DIR FOLDER

What such a network computes is noise, but it takes as long, and as much of a GPU's memory, as the one that people use.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Callable

FILES = ("diffusion_models/sdxl_unet", "text_encoders/sdxl_clip_l", "text_encoders/sdxl_clip_g", "vae/sdxl_vae")


def unet() -> torch.nn.Module:
    """The 2.6 billion values that do the sampling."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        num_res_blocks=[2, 2, 2],
        channel_mult=[1, 2, 4],
        num_classes="sequential",
        adm_in_channels=2816,
        num_head_channels=64,
        use_spatial_transformer=True,
        use_linear_in_transformer=True,
        transformer_depth=[0, 0, 2, 2, 10, 10],
        transformer_depth_middle=10,
        transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
        context_dim=2048,
        legacy=False,
        dtype=torch.float16,
        device="meta",
        operations=comfy.ops.disable_weight_init,
    )


def clip(comfyui_dir: Path, config: str) -> Callable[[], torch.nn.Module]:
    """One of the two text encoders, by the name of its configuration in ComfyUI."""

    def build() -> torch.nn.Module:
        import comfy.clip_model
        import comfy.ops

        sizes = json.loads((comfyui_dir / "comfy" / config).read_text())
        return comfy.clip_model.CLIPTextModel(sizes, torch.float16, "meta", comfy.ops.disable_weight_init)

    return build


def vae() -> torch.nn.Module:
    """The autoencoder between pixels and latents."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    sizes = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "dropout": 0.0}
    layers = {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": []}
    with torch.device("meta"):
        return AutoencoderKL(ddconfig=sizes | layers, embed_dim=4)


def filled(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights that keep a signal's size: matrices scaled by fan-in, norms (the other weights) one, biases zero."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = {}
    for key, like in network.state_dict().items():
        if like.ndim >= 2:  # noqa: PLR2004 - a matrix or a kernel
            noise = torch.randn(like.shape, dtype=torch.float32, device=device)
            weights[key] = (noise / like[0].numel() ** 0.5).half().cpu()
        else:
            weights[key] = (torch.ones if key.endswith("weight") else torch.zeros)(like.shape, dtype=torch.float16)
    return weights


def main() -> None:
    """Write the four files."""
    parser = argparse.ArgumentParser(description="Random weights of SDXL's real size.")
    parser.add_argument("comfyui_dir", type=Path)
    parser.add_argument("folder", type=Path)
    chosen = parser.parse_args()
    sys.path.insert(0, str(chosen.comfyui_dir))
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    torch.manual_seed(0)
    encoders = (clip(chosen.comfyui_dir, "sd1_clip_config.json"), clip(chosen.comfyui_dir, "clip_config_bigg.json"))
    for name, build in zip(FILES, (unet, *encoders, vae), strict=True):
        path = chosen.folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = filled(build())
        if "clip" in name:
            width = weights["text_model.final_layer_norm.weight"].shape[0]
            weights["text_projection.weight"] = torch.eye(width, dtype=torch.float16)
        save_file(weights, path)
        print(f"{path.stat().st_size:>14,} B  {name}")


if __name__ == "__main__":
    main()
