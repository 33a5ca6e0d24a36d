"""Write every workflow of this folder, and the picture that some of them load. Touches only the files beside it.

`python3 -m devkit.workflows.generate` writes them; a test keeps them equal to what this makes. They are in the format of
ComfyUI's "Export (API)" and name the files that devkit.engine.models lays out on a volume.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent
PICTURE = "in.png"
PROMPT = "a red fox in the snow, morning light"

Link = list[str | int]
Value = str | int | float | bool | Link


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a graph; `node[slot]` is the link to one of its outputs."""

    number: str

    def __getitem__(self, slot: int) -> Link:
        return [self.number, slot]


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph in ComfyUI's API format, grown node by node."""

    nodes: dict[str, dict[str, str | dict[str, Value]]] = field(default_factory=dict)

    def add(self, class_type: str, **inputs: Value) -> Node:
        """Add a node and return it, for others to link to."""
        number = str(len(self.nodes) + 1)
        self.nodes[number] = {"class_type": class_type, "inputs": inputs}
        return Node(number)


@dataclass(frozen=True, slots=True)
class Loaded:
    """Links to the three parts of a diffusion model."""

    model: Link
    clip: Link
    vae: Link


def separate_files(
    graph: Graph,
    unet: str = "tiny_sd3.safetensors",
    clip: str = "tiny_clip_l.pt",
    vae: str = "tiny_taesd3_vae.safetensors",
) -> Loaded:
    """Load a model from a file for each of its parts."""
    return Loaded(
        model=graph.add("UNETLoader", unet_name=unet, weight_dtype="default")[0],
        clip=graph.add("CLIPLoader", clip_name=clip, type="sd3")[0],
        vae=graph.add("VAELoader", vae_name=vae)[0],
    )


def checkpoint(graph: Graph, name: str = "tiny_sd3_full.ckpt") -> Loaded:
    """Load a model from one file with all its parts."""
    loader = graph.add("CheckpointLoaderSimple", ckpt_name=name)
    return Loaded(model=loader[0], clip=loader[1], vae=loader[2])


def noise(graph: Graph) -> Link:
    """Start from an empty picture."""
    return graph.add("EmptySD3LatentImage", width=128, height=128, batch_size=1)[0]


def draw(graph: Graph, loaded: Loaded, prefix: str, *, prompt: str = PROMPT, start: Link | None = None) -> Graph:
    """Add what every text-to-image graph ends with: prompts, the sampler, the decoder, the file."""
    positive = graph.add("CLIPTextEncode", clip=loaded.clip, text=prompt)
    negative = graph.add("CLIPTextEncode", clip=loaded.clip, text="")
    samples = graph.add(
        "KSampler",
        latent_image=start or noise(graph),
        model=loaded.model,
        positive=positive[0],
        negative=negative[0],
        seed=1,
        steps=4,
        cfg=4.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=0.6 if start else 1.0,
    )
    picture = graph.add("VAEDecode", samples=samples[0], vae=loaded.vae)
    graph.add("SaveImage", images=picture[0], filename_prefix=prefix)
    return graph


def text_to_image() -> Graph:
    """Return the usual graph: UNET, text encoder and VAE in their own files."""
    graph = Graph()
    return draw(graph, separate_files(graph), "text_to_image")


def text_to_image_subfolder() -> Graph:
    """Return a graph with a model name that contains folders, and a VAE that is two files under one name."""
    graph = Graph()
    return draw(graph, separate_files(graph, unet="sub/dir/tiny_sd3_b.safetensors", vae="taesd3"), "text_to_image_subfolder")


def text_to_image_clip_fp8() -> Graph:
    """Return a graph with a text encoder in 8 bits. Its 124 MB are only in the large set of weights."""
    graph = Graph()
    return draw(graph, separate_files(graph, clip="clip_l_fp8_full.safetensors"), "text_to_image_clip_fp8")


def text_to_image_lora() -> Graph:
    """Return a graph with a LoRA between the loaders and the sampler."""
    graph = Graph()
    base = separate_files(graph, vae="taesd3")
    lora = graph.add(
        "LoraLoader",
        model=base.model,
        clip=base.clip,
        lora_name="tiny_sd3_lora.safetensors",
        strength_model=1.0,
        strength_clip=1.0,
    )
    return draw(graph, Loaded(model=lora[0], clip=lora[1], vae=base.vae), "text_to_image_lora")


def text_to_image_embedding() -> Graph:
    """Return a graph with an embedding that only the prompt names."""
    graph = Graph()
    return draw(graph, separate_files(graph, vae="taesd3"), "text_to_image_embedding", prompt="a embedding:tinyemb fox")


def text_to_image_checkpoint() -> Graph:
    """Return a graph with all parts from one file."""
    graph = Graph()
    return draw(graph, checkpoint(graph), "text_to_image_checkpoint")


def text_to_image_checkpoint_clip() -> Graph:
    """Return a graph with a checkpoint without text encoder, which comes from its own file."""
    graph = Graph()
    base = checkpoint(graph, "tiny_sd3_noclip.safetensors")
    clip = graph.add("CLIPLoader", clip_name="tiny_clip_l.pt", type="sd3")
    return draw(graph, Loaded(model=base.model, clip=clip[0], vae=base.vae), "text_to_image_checkpoint_clip")


def image_to_image() -> Graph:
    """Return a graph that draws over a client's picture."""
    graph = Graph()
    loaded = separate_files(graph)
    picture = graph.add("LoadImage", image=PICTURE)
    start = graph.add("VAEEncode", pixels=picture[0], vae=loaded.vae)
    return draw(graph, loaded, "image_to_image", start=start[0])


def text_to_video() -> Graph:
    """Return a graph with nine frames of a video model, saved as mp4."""
    graph = Graph()
    unet = graph.add("UNETLoader", unet_name="tiny_hunyuanvideo.safetensors", weight_dtype="default")
    clip = graph.add("CLIPLoader", clip_name="tiny_clip_l.pt", type="stable_diffusion")
    positive = graph.add("CLIPTextEncode", clip=clip[0], text="a running dog")
    negative = graph.add("CLIPTextEncode", clip=clip[0], text="")
    start = graph.add("EmptyHunyuanLatentVideo", width=64, height=64, length=9, batch_size=1)
    samples = graph.add(
        "KSampler",
        model=unet[0],
        positive=positive[0],
        negative=negative[0],
        latent_image=start[0],
        seed=1,
        steps=2,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    vae = graph.add("VAELoader", vae_name="tiny_wan_vae.safetensors")
    pictures = graph.add("VAEDecode", samples=samples[0], vae=vae[0])
    video = graph.add("CreateVideo", images=pictures[0], fps=8.0)
    graph.add("SaveVideo", video=video[0], filename_prefix="video/text_to_video", format="auto", codec="auto")
    return graph


def empty_image() -> Graph:
    """Return a graph with a red picture: no weights, hardly any work. It measures the overhead of a job."""
    graph = Graph()
    picture = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0xFF0000)
    graph.add("SaveImage", images=picture[0], filename_prefix="empty_image")
    return graph


def scale_image() -> Graph:
    """Return a graph that scales a client's picture, saved in a subfolder."""
    graph = Graph()
    picture = graph.add("LoadImage", image=PICTURE)
    scaled = graph.add("ImageScale", image=picture[0], upscale_method="bicubic", width=96, height=48, crop="disabled")
    graph.add("SaveImage", images=scaled[0], filename_prefix="scaled/picture")
    return graph


def upscale(model: str, prefix: str) -> Graph:
    """Return a graph that enlarges a client's picture with a network."""
    graph = Graph()
    picture = graph.add("LoadImage", image=PICTURE)
    upscaler = graph.add("UpscaleModelLoader", model_name=model)
    enlarged = graph.add("ImageUpscaleWithModel", upscale_model=upscaler[0], image=picture[0])
    graph.add("SaveImage", images=enlarged[0], filename_prefix=prefix)
    return graph


def upscale_compact() -> Graph:
    """Return a graph that doubles the size with the compact network."""
    return upscale("tiny_compact_x2.safetensors", "upscale_compact")


def upscale_esrgan() -> Graph:
    """Return a graph that enlarges four times with ESRGAN."""
    return upscale("tiny_esrgan_x4.safetensors", "upscale_esrgan")


def decode_taesd() -> Graph:
    """Return a graph that loads two files by another name: `taesd` means its encoder and decoder in vae_approx."""
    graph = Graph()
    empty = graph.add("EmptyLatentImage", width=128, height=128, batch_size=1)
    vae = graph.add("VAELoader", vae_name="taesd")
    picture = graph.add("VAEDecode", samples=empty[0], vae=vae[0])
    graph.add("SaveImage", images=picture[0], filename_prefix="decode_taesd")
    return graph


def vae_round_trip() -> Graph:
    """Return a graph that encodes and decodes a client's picture."""
    graph = Graph()
    picture = graph.add("LoadImage", image=PICTURE)
    vae = graph.add("VAELoader", vae_name="tiny_taesd3_vae.safetensors")
    encoded = graph.add("VAEEncode", pixels=picture[0], vae=vae[0])
    decoded = graph.add("VAEDecode", samples=encoded[0], vae=vae[0])
    graph.add("SaveImage", images=decoded[0], filename_prefix="vae_round_trip")
    return graph


def frames(graph: Graph) -> Link:
    """Return eight frames in four colours, for everything that moves."""
    pairs = [
        graph.add("EmptyImage", width=64, height=64, batch_size=2, color=color)
        for color in (0x0000FF, 0x3D09FF, 0x7A13FF, 0xB71CFF)
    ]
    first = graph.add("ImageBatch", image1=pairs[0][0], image2=pairs[1][0])
    second = graph.add("ImageBatch", image1=pairs[2][0], image2=pairs[3][0])
    return graph.add("ImageBatch", image1=first[0], image2=second[0])[0]


def animated_webp() -> Graph:
    """Return a graph with an animation that ComfyUI's history lists among the images."""
    graph = Graph()
    graph.add(
        "SaveAnimatedWEBP",
        images=frames(graph),
        filename_prefix="animated_webp",
        fps=6.0,
        lossless=False,
        quality=80,
        method="default",
    )
    return graph


def animated_png() -> Graph:
    """Return the same as PNG."""
    graph = Graph()
    graph.add("SaveAnimatedPNG", images=frames(graph), filename_prefix="animated_png", fps=6.0, compress_level=4)
    return graph


def video_mp4() -> Graph:
    """Return a graph with a silent video."""
    graph = Graph()
    video = graph.add("CreateVideo", images=frames(graph), fps=8.0)
    graph.add("SaveVideo", video=video[0], filename_prefix="video/silent", format="auto", codec="auto")
    return graph


def video_with_audio() -> Graph:
    """Return a graph with a video with a sound track."""
    graph = Graph()
    sound = silence(graph, duration=1.0)
    video = graph.add("CreateVideo", images=frames(graph), audio=sound, fps=8.0)
    graph.add("SaveVideo", video=video[0], filename_prefix="video/with_audio", format="mp4", codec="h264")
    return graph


def video_webm() -> Graph:
    """Return a graph with a video in the other container."""
    graph = Graph()
    graph.add("SaveWEBM", images=frames(graph), filename_prefix="video_webm", codec="vp9", fps=8.0, crf=32.0)
    return graph


def silence(graph: Graph, duration: float = 2.0) -> Link:
    """Make some seconds of stereo silence."""
    return graph.add("EmptyAudio", duration=duration, sample_rate=44100, channels=2)[0]


def audio_flac() -> Graph:
    """Return a graph with lossless sound."""
    graph = Graph()
    graph.add("SaveAudio", audio=silence(graph), filename_prefix="audio/lossless")
    return graph


def audio_mp3() -> Graph:
    """Return a graph with sound as mp3."""
    graph = Graph()
    graph.add("SaveAudioMP3", audio=silence(graph), filename_prefix="audio/mp3", quality="V0")
    return graph


def audio_opus() -> Graph:
    """Return a graph with sound as opus."""
    graph = Graph()
    graph.add("SaveAudioOpus", audio=silence(graph), filename_prefix="audio/opus", quality="128k")
    return graph


def preview_text() -> Graph:
    """Return a graph whose result is a text and no file."""
    graph = Graph()
    picture = graph.add("EmptyImage", width=8, height=8, batch_size=1, color=0)
    size = graph.add("GetImageSize", image=picture[0])
    graph.add("PreviewAny", source=size[0])
    return graph


def preview_image() -> Graph:
    """Return a graph with pictures of type `temp`, as preview nodes create them."""
    graph = Graph()
    pictures = graph.add("EmptyImage", width=8, height=8, batch_size=2, color=0)
    graph.add("PreviewImage", images=pictures[0])
    return graph


def save_latent() -> Graph:
    """Return a graph with a file that is neither picture nor video nor sound."""
    graph = Graph()
    latent = graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)
    graph.add("SaveLatent", samples=latent[0], filename_prefix="latents/empty")
    return graph


WORKFLOWS: tuple[Callable[[], Graph], ...] = (
    text_to_image,
    text_to_image_subfolder,
    text_to_image_clip_fp8,
    text_to_image_lora,
    text_to_image_embedding,
    text_to_image_checkpoint,
    text_to_image_checkpoint_clip,
    image_to_image,
    text_to_video,
    empty_image,
    scale_image,
    upscale_compact,
    upscale_esrgan,
    decode_taesd,
    vae_round_trip,
    animated_webp,
    animated_png,
    video_mp4,
    video_with_audio,
    video_webm,
    audio_flac,
    audio_mp3,
    audio_opus,
    preview_text,
    preview_image,
    save_latent,
)


def png(width: int = 64, height: int = 48) -> bytes:
    """Return a picture: sixteen colours from orange to blue, in diagonal bands.

    Stored, not deflated: each zlib deflates to other bytes, and the file is compared. 4 bits a pixel keep it small.
    """
    palette = b"".join(bytes((255 - 15 * i, 110 + 4 * i, 30 + 14 * i)) for i in range(16))
    colors = [[(x + y) * 16 // (width + height) for x in range(width)] for y in range(height)]
    lines = (b"\0" + bytes(row[x] << 4 | row[x + 1] for x in range(0, width, 2)) for row in colors)
    header = struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"PLTE", palette), (b"IDAT", zlib.compress(b"".join(lines), 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def files() -> dict[str, bytes]:
    """Return everything that belongs in this folder besides code: file name -> content."""
    graphs = {f"{make.__name__}.json": json.dumps(make().nodes, indent=2).encode() + b"\n" for make in WORKFLOWS}
    return graphs | {PICTURE: png()}


def main() -> None:
    """Write them."""
    for name, content in files().items():
        (HERE / name).write_bytes(content)
    print(f"{len(WORKFLOWS)} workflows and {PICTURE} in {HERE}")


if __name__ == "__main__":
    main()
