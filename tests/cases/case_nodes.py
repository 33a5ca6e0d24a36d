"""Stand-ins for widely used node classes, for tests/test_cases.py: their input schemas, and nothing of their code.

ComfyUI loads this file from its custom_nodes folder; nothing of the project imports it. Each run of a node adds its class to
`runs.log` in ComfyUI's user folder, and each file that a node puts outside ComfyUI's folders goes into the user folder as well.
"""

import json
import os

import comfy.sd
import comfy.utils
import folder_paths
import numpy as np
from PIL import Image


class AnyKind(str):
    def __ne__(self, other):
        return False


class Loose(dict):
    """An `optional` that takes any name: an empty object in /object_info."""

    def __contains__(self, key):
        return True

    def __getitem__(self, key):
        return (AnyKind("*"),)


def _apply(model, clip, name, strength):
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        return model, clip, False
    weights = comfy.utils.load_torch_file(path, safe_load=True)
    model, clip = comfy.sd.load_lora_for_models(model, clip, weights, strength, strength)
    return model, clip, True


class PowerLora:
    RETURN_TYPES = ("MODEL", "CLIP", "STRING")
    FUNCTION = "run"
    CATEGORY = "cases"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "clip": ("CLIP",)}, "optional": Loose()}

    def run(self, model, clip, **rows):
        listed = folder_paths.get_filename_list("loras")
        done = []
        for key, row in rows.items():
            if key.lower().startswith("lora_") and isinstance(row, dict) and row.get("on"):
                name = row["lora"]
                if name not in listed:  # the real one tries the bare name as well, then says "not found, skipping"
                    bare = [each for each in listed if os.path.basename(each) == os.path.basename(name)]
                    if not bare:
                        print(f"[cases] lora {name!r} not found, skipping")
                        continue
                    name = bare[0]
                model, clip, ok = _apply(model, clip, name, row["strength"])
                if ok:
                    done.append(name)
        return (model, clip, "applied: " + json.dumps(done, ensure_ascii=False))


class ManagerLora:
    RETURN_TYPES = ("MODEL", "CLIP", "STRING")
    FUNCTION = "run"
    CATEGORY = "cases"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "text": ("STRING", {"multiline": True})}, "optional": Loose()}

    def run(self, model, text, **more):
        rows = more.get("loras") or []
        rows = rows.get("__value__", []) if isinstance(rows, dict) else rows
        done = []
        clip = more.get("clip")
        for row in rows:
            if row.get("active"):
                found = [
                    n
                    for n in folder_paths.get_filename_list("loras")
                    if os.path.splitext(os.path.basename(n))[0] == row["name"]
                ]
                if found:
                    model, clip, _ = _apply(model, clip, found[0], float(row["strength"]))
                    done.append(found[0])
        return (model, clip, "applied: " + json.dumps(done, ensure_ascii=False))


FLUX = os.path.join(folder_paths.models_dir, "ipadapter-flux")
folder_paths.folder_names_and_paths["ipadapter-flux"] = ([FLUX], folder_paths.supported_pt_extensions)


class IPAFlux:
    RETURN_TYPES = ("STRING",)
    FUNCTION = "run"
    CATEGORY = "cases"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"ipadapter": (folder_paths.get_filename_list("ipadapter-flux"),), "provider": (["cuda", "cpu"],)}}

    def run(self, ipadapter, provider):
        path = folder_paths.get_full_path("ipadapter-flux", ipadapter)
        return (f"{ipadapter}: {os.path.getsize(path)} bytes",)


BBOX = os.path.join(folder_paths.models_dir, "ultralytics", "bbox")
folder_paths.folder_names_and_paths["ultralytics_bbox"] = ([BBOX], folder_paths.supported_pt_extensions)


class Ultra:
    RETURN_TYPES = ("STRING",)
    FUNCTION = "run"
    CATEGORY = "cases"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model_name": (["bbox/" + n for n in folder_paths.get_filename_list("ultralytics_bbox")],)}}

    def run(self, model_name):
        return (f"{model_name}: {os.path.getsize(os.path.join(folder_paths.models_dir, 'ultralytics', model_name))} bytes",)


class Tagger:
    RETURN_TYPES = ("STRING",)
    OUTPUT_IS_LIST = (True,)
    FUNCTION = "run"
    CATEGORY = "cases"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"image": ("IMAGE",), "model": (["wd-v1-4-moat-tagger-v2"],), "threshold": ("FLOAT", {"default": 0.35})}
        }

    def run(self, image, model, threshold):
        tags = ["1girl, solo, 国风" for _ in image]
        return {"ui": {"tags": tags}, "result": (tags,)}


class MathEx:
    RETURN_TYPES = ("INT", "FLOAT")
    FUNCTION = "run"
    CATEGORY = "cases"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"expression": ("STRING", {"multiline": True})}}

    def run(self, expression):
        return {"ui": {"value": [42]}, "result": (42, 42.0)}


class SaveS3:
    RETURN_TYPES = ()
    FUNCTION = "run"
    CATEGORY = "cases"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"images": ("IMAGE",), "filename_prefix": ("STRING", {"default": "Image"})}}

    def run(self, images, filename_prefix):
        # Stands for an upload: nothing is left in ComfyUI's folders.
        return {"ui": {"images": [{"filename": f"{filename_prefix}_00001_.png", "subfolder": "remote", "type": "output"}]}}


class SaveElsewhere:
    RETURN_TYPES = ()
    FUNCTION = "run"
    CATEGORY = "cases"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"images": ("IMAGE",)}}

    def run(self, images):
        elsewhere = os.path.join(folder_paths.get_user_directory(), "elsewhere")
        os.makedirs(elsewhere, exist_ok=True)
        Image.fromarray((images[0].cpu().numpy() * 255).astype(np.uint8)).save(os.path.join(elsewhere, "x.png"))
        return {"ui": {"images": [{"filename": "x.png", "subfolder": elsewhere, "type": "output"}]}}


class SaveUnlisted:
    RETURN_TYPES = ("IMAGE", "STRING")
    FUNCTION = "run"
    CATEGORY = "cases"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "images": ("IMAGE",),
                "output_path": ("STRING", {"default": "[time(%Y-%m-%d)]"}),
                "filename_prefix": ("STRING", {"default": "ComfyUI"}),
                "show_previews": (["true", "false"],),
            }
        }

    def run(self, images, output_path, filename_prefix, show_previews):
        name = f"{filename_prefix}_0001.jpg"
        path = os.path.join(folder_paths.get_output_directory(), name)
        Image.fromarray((images[0].cpu().numpy() * 255).astype(np.uint8)).save(path)
        if show_previews == "true":
            return {
                "ui": {"images": [{"filename": name, "subfolder": "", "type": "output"}], "files": [path]},
                "result": (images, [path]),
            }
        return {"ui": {"images": []}, "result": (images, [path])}


class Rife:
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = "cases"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"ckpt_name": (["rife40.pth", "rife47.pth"],), "frames": ("IMAGE",)}}

    def run(self, ckpt_name, frames):
        return (frames,)


H264 = [
    ["pix_fmt", ["yuv420p", "yuv420p10le"]],
    ["crf", "INT", {"default": 19, "min": 0, "max": 100}],
    ["save_metadata", "BOOLEAN", {"default": True}],
]


class VhsCombine:
    RETURN_TYPES = ("VHS_FILENAMES",)
    FUNCTION = "run"
    CATEGORY = "cases"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "images": ("IMAGE",),
                "frame_rate": ("FLOAT", {"default": 8, "min": 1, "step": 1}),
                "loop_count": ("INT", {"default": 0}),
                "filename_prefix": ("STRING", {"default": "AnimateDiff"}),
                "format": (["image/gif", "video/h264-mp4"], {"formats": {"video/h264-mp4": H264}}),
                "pingpong": ("BOOLEAN", {"default": False}),
                "save_output": ("BOOLEAN", {"default": True}),
            },
            "optional": {"audio": ("AUDIO",)},
            "hidden": Loose({"unique_id": "UNIQUE_ID"}),
        }

    def run(self, images, filename_prefix, format, save_output=True, **more):
        folder = folder_paths.get_output_directory() if save_output else folder_paths.get_temp_directory()
        os.makedirs(folder, exist_ok=True)
        name = f"{filename_prefix}_00001.mp4"
        with open(os.path.join(folder, name), "wb") as file:
            file.write(json.dumps({"crf": more.get("crf", "default"), "pix_fmt": more.get("pix_fmt", "default")}).encode())
        kind = "output" if save_output else "temp"
        more = {"format": format, "frame_rate": 8.0, "workflow": "x.png", "fullpath": "/x"}
        shown = {"filename": name, "subfolder": "", "type": kind, **more}
        return {"ui": {"gifs": [shown]}, "result": ((save_output, [name]),)}


class PickInput:
    """Lists the input folder itself and has no VALIDATE_INPUTS."""

    RETURN_TYPES = ("STRING",)
    FUNCTION = "run"
    CATEGORY = "cases"

    @classmethod
    def INPUT_TYPES(cls):
        folder = folder_paths.get_input_directory()
        return {"required": {"video": (sorted(f for f in os.listdir(folder) if os.path.isfile(os.path.join(folder, f))),)}}

    def run(self, video):
        return (f"{video}: {os.path.getsize(os.path.join(folder_paths.get_input_directory(), video))} bytes",)


NODE_CLASS_MAPPINGS = {
    "Power Lora Loader (rgthree)": PowerLora,
    "Lora Loader (LoraManager)": ManagerLora,
    "IPAdapterFluxLoader": IPAFlux,
    "UltralyticsDetectorProvider": Ultra,
    "WD14Tagger|pysssss": Tagger,
    "MathExpression|pysssss": MathEx,
    "SaveImageS3": SaveS3,
    "SaveElsewhere": SaveElsewhere,
    "Image Save": SaveUnlisted,
    "RIFE VFI": Rife,
    "VHS_VideoCombine": VhsCombine,
    "PickInput": PickInput,
}


def counted(kind, name):
    """The class, whose runs are noted."""
    run = kind.run

    def noted(self, **inputs):
        with open(os.path.join(folder_paths.get_user_directory(), "runs.log"), "a") as log:
            log.write(f"{name}\n")
        return run(self, **inputs)

    kind.run = noted
    return kind


NODE_CLASS_MAPPINGS = {name: counted(kind, name) for name, kind in NODE_CLASS_MAPPINGS.items()}
