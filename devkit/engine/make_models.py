# ruff: noqa: PLC0415 - ComfyUI can be imported only after its options are set, which needs the arguments
"""Write tiny random weights that a real ComfyUI loads and runs. Runs with the engine's python; touches only the given folder.

    python make_models.py COMFYUI_DIR tiny|large FOLDER

ComfyUI reads almost every size of a network from its file, so the networks are real ones, only narrow and shallow. The
values come from integers of a generator whose stream NumPy keeps stable (numpy.random.PCG64.random_raw) and from operations
that IEEE 754 rounds in one way only: torch's own generator gives other last bits with AVX-512 than with AVX2. So the files
have the same bytes on every machine, and models.sha256 can pin them.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors.torch
import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    Weights = dict[str, torch.Tensor]

SMALL_STD = 0.02
NORM_SCALES = ("norm.scale", "ln_q.weight", "ln_k.weight", "norm.weight", "norm1.weight", "norm2.weight", "gamma")


class Noise:
    """Random tensors; the same name gives the same ones, whatever else is made."""

    def __init__(self, name: str) -> None:
        self._bits = np.random.PCG64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "big"))

    def tensor(self, shape: tuple[int, ...], std: float, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        """Return values spread evenly around zero, with the given standard deviation."""
        raw = self._bits.random_raw(int(np.prod(shape))) >> np.uint64(40)
        evenly = raw.astype(np.float32) / np.float32(1 << 23) - np.float32(1)
        return torch.from_numpy(evenly * np.float32(std * 3**0.5)).reshape(shape).to(dtype)


def filled(name: str, network: torch.nn.Module, dtype: torch.dtype = torch.float16, gain: float = 1.0) -> Weights:
    """Return weights for a network that keep a signal's size: matrices scaled by fan-in, norms one, biases small."""
    noise = Noise(name)

    def values(key: str, like: torch.Tensor) -> torch.Tensor:
        if like.ndim >= 2:  # noqa: PLR2004 - a matrix or a kernel
            return noise.tensor(tuple(like.shape), gain / like[0].numel() ** 0.5, dtype)
        if key.endswith(NORM_SCALES):
            return torch.ones(like.shape, dtype=dtype)
        return noise.tensor(tuple(like.shape), SMALL_STD, dtype)

    return {key: values(key, like) for key, like in network.state_dict().items()}


def prefixed(prefix: str, weights: Mapping[str, torch.Tensor]) -> Weights:
    """Return the same weights under longer names, as a checkpoint holds its parts."""
    return {prefix + key: tensor for key, tensor in weights.items()}


def compact_upscaler(features: int = 8, convolutions: int = 2, scale: int = 2) -> Weights:
    """Real-ESRGAN's "compact" network (SRVGGNet): convolutions with a PReLU after each, by number."""
    noise = Noise("compact")
    inputs = [3] + [features] * (convolutions + 1)
    outputs = [features] * (convolutions + 1) + [3 * scale * scale]
    weights = {}
    for i, (n_in, n_out) in enumerate(zip(inputs, outputs, strict=True)):
        weights[f"body.{2 * i}.weight"] = noise.tensor((n_out, n_in, 3, 3), 0.2 if i == 0 else 0.1, torch.float32)
        weights[f"body.{2 * i}.bias"] = noise.tensor((n_out,), SMALL_STD, torch.float32)
        if i <= convolutions:
            weights[f"body.{2 * i + 1}.weight"] = noise.tensor((n_out,), 0.1, torch.float32)
    return weights


def esrgan_upscaler() -> Weights:
    """ESRGAN's network with one block of eight filters."""
    from spandrel.architectures.ESRGAN import ESRGAN

    return filled("esrgan", ESRGAN(in_nc=3, out_nc=3, num_filters=8, num_blocks=1, scale=4), torch.float32)


def taesd_parts() -> dict[str, Weights]:
    """Encoders and decoders of the tiny autoencoder, for 4 (SD 1) and 16 latent channels (SD 3), by file name."""
    from comfy.taesd.taesd import Decoder, Encoder

    parts = {}
    for name, channels in (("taesd", 4), ("taesd3", 16)):
        parts[f"{name}_encoder"] = filled(f"{name} encoder", Encoder(channels), gain=1.2)
        parts[f"{name}_decoder"] = filled(f"{name} decoder", Decoder(channels), gain=1.2)
    return parts


def taesd_vae() -> Weights:
    """The 16-channel tiny autoencoder as one VAE file; ComfyUI knows it by the key taesd_decoder.1.weight."""
    from comfy.taesd.taesd import TAESD

    weights = filled("taesd vae", TAESD(latent_channels=16), gain=1.2)
    return weights | {"vae_scale": torch.tensor(1.5305), "vae_shift": torch.tensor(0.0609)}


def sd3_unet(name: str, depth: int = 2, positions: int = 32) -> Weights:
    """SD 3's MMDiT; its width is always 64 times its depth."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT

    network = MMDiT(
        input_size=None,
        patch_size=2,
        in_channels=16,
        depth=depth,
        adm_in_channels=2048,
        context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64 * depth}},
        num_patches=positions * positions,
        pos_embed_max_size=positions,
        qk_norm="rms",
        operations=comfy.ops.disable_weight_init,
    )
    return filled(name, network)


def hunyuan_video_unet() -> Weights:
    """HunyuanVideo's transformer with one block of each kind, taking the context of a CLIP-L."""
    import comfy.ops
    from comfy.ldm.hunyuan_video.model import HunyuanVideo, HunyuanVideoParams

    # Later releases of ComfyUI have more switches, for models that came after this one.
    switches = dict.fromkeys((field.name for field in dataclasses.fields(HunyuanVideoParams)), False)
    sizes = {
        "image_model": "hunyuan_video",
        "in_channels": 16,
        "patch_size": [1, 2, 2],
        "out_channels": 16,
        "vec_in_dim": 768,
        "context_in_dim": 768,
        "hidden_size": 128,
        "mlp_ratio": 4.0,
        "num_heads": 1,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [16, 56, 56],
        "theta": 256,
        "qkv_bias": True,
        "guidance_embed": True,
        "vision_in_dim": None,
    }
    network = HunyuanVideo(**{**switches, **sizes}, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
    # The published files have the names that ComfyUI had for these when it learned the model.
    return {key.replace("_norm.weight", "_norm.scale"): value for key, value in filled("hunyuan video", network).items()}


def wan_vae() -> Weights:
    """Wan 2.1's video VAE; ComfyUI reads its width from decoder.head.0.gamma."""
    from comfy.ldm.wan.vae import WanVAE

    network = WanVAE(
        dim=8,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        dropout=0.0,
    )
    return filled("wan vae", network)


def clip_l(comfyui_dir: Path) -> Weights:
    """CLIP-L, the one network here whose size is fixed (123 million values): all its tensors are views of one small store.

    The views overlap and start at different places, so that no two layers are the same. torch.save keeps them as views
    (2 MB in all); a safetensors file cannot, which is why the complete one belongs to the large set.
    """
    import comfy.clip_model
    import comfy.ops

    config = json.loads((comfyui_dir / "comfy" / "sd1_clip_config.json").read_text())
    network = comfy.clip_model.CLIPTextModel(config, torch.float16, "meta", comfy.ops.disable_weight_init)
    size = 1 << 20
    store = Noise("clip").tensor((size,), SMALL_STD)
    ones = torch.ones(768, dtype=torch.float16)

    def view(start: int, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return store.as_strided(shape, (1,), start)
        rows, columns = shape
        return store.as_strided(shape, (max(1, (size - start - columns) // rows), 1), start)

    shapes = {key: tuple(like.shape) for key, like in network.state_dict().items()} | {"text_projection.weight": (768, 768)}
    norms = ("layer_norm1.weight", "layer_norm2.weight", "final_layer_norm.weight")
    return {key: ones if key.endswith(norms) else view(i * 7919 % 4096, shape) for i, (key, shape) in enumerate(shapes.items())}


def sd3_lora(unet: Weights) -> Weights:
    """A LoRA of rank 4 for the attention of both blocks of the small SD 3."""
    noise = Noise("lora")
    weights = {}
    for layer in (f"joint_blocks.{block}.{side}.attn.qkv" for block in (0, 1) for side in ("x_block", "context_block")):
        n_out, n_in = unet[f"{layer}.weight"].shape
        weights[f"diffusion_model.{layer}.lora_A.weight"] = noise.tensor((4, n_in), 0.1)
        weights[f"diffusion_model.{layer}.lora_B.weight"] = noise.tensor((n_out, 4), 0.1)
    return weights


def write(path: Path, weights: Weights) -> None:
    """Write a safetensors file, or for any other suffix what torch.save writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in weights.items()}, path)
    else:
        torch.save(weights, path)


def tiny_set(comfyui_dir: Path) -> dict[str, Weights]:
    """Everything that the workflows need, 57 MB in all, by name below the models folder."""
    unet, vae, clip = sd3_unet("sd3"), taesd_vae(), clip_l(comfyui_dir)
    without_clip = prefixed("model.diffusion_model.", unet) | prefixed("first_stage_model.", vae)
    return {
        "checkpoints/tiny_sd3_full.ckpt": without_clip | prefixed("text_encoders.clip_l.transformer.", clip),
        "checkpoints/tiny_sd3_noclip.safetensors": without_clip,
        "diffusion_models/tiny_sd3.safetensors": unet,
        "diffusion_models/sub/dir/tiny_sd3_b.safetensors": sd3_unet("sd3 deeper", depth=3),
        "diffusion_models/tiny_hunyuanvideo.safetensors": hunyuan_video_unet(),
        "embeddings/tinyemb.safetensors": {"clip_l": Noise("embedding").tensor((2, 768), SMALL_STD, torch.float32)},
        "loras/tiny_sd3_lora.safetensors": sd3_lora(unet),
        "text_encoders/tiny_clip_l.pt": clip,
        "upscale_models/tiny_compact_x2.safetensors": compact_upscaler(),
        "upscale_models/tiny_esrgan_x4.safetensors": esrgan_upscaler(),
        "vae/tiny_taesd3_vae.safetensors": vae,
        "vae/tiny_wan_vae.safetensors": wan_vae(),
        **{f"vae_approx/{name}.safetensors": weights for name, weights in taesd_parts().items()},
    }


def large_set(comfyui_dir: Path) -> dict[str, Weights]:
    """A complete CLIP-L as a safetensors file, 124 MB even in 8 bits."""
    clip = {key: tensor.contiguous().to(torch.float8_e4m3fn) for key, tensor in clip_l(comfyui_dir).items()}
    return {"text_encoders/clip_l_fp8_full.safetensors": clip}


def prepare_comfyui(comfyui_dir: Path) -> None:
    """Make ComfyUI importable, as if it had been started with --cpu: it reads that while it is imported."""
    sys.path.insert(0, str(comfyui_dir))
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()


def main() -> None:
    """Write one set of weights."""
    sets = {"tiny": tiny_set, "large": large_set}
    parser = argparse.ArgumentParser(description="Tiny random weights that a real ComfyUI loads.")
    parser.add_argument("comfyui_dir", type=Path)
    parser.add_argument("which", choices=sets)
    parser.add_argument("folder", type=Path)
    chosen = parser.parse_args()
    prepare_comfyui(chosen.comfyui_dir)
    for name, weights in sets[chosen.which](chosen.comfyui_dir).items():
        write(chosen.folder / name, weights)
        print(f"{(chosen.folder / name).stat().st_size:>12,} B  {name}")


if __name__ == "__main__":
    main()
