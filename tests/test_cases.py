"""Requests that people really send, on the real ComfyUI: each case of tests/cases holds what is right for it."""

from __future__ import annotations

import base64
import json
import shlex
import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from devkit.engine.build import engine_args
from devkit.engine.models import make_volume
from devkit.hub import hub_process
from devkit.local_worker import PROJECT, LocalWorker
from worker.plan.plan_command import make_hub, make_plan
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from devkit.engine.build import Engine
    from worker.plan.items import Plan

FOLDER = PROJECT / "tests/cases"
LISTS = ("images", "videos", "audio", "files")

# Names of LoRAs that are on the volume, put there by hand.
LORA_NAMES = (
    "国风 v1.0,final #2 [fp16].safetensors",
    "国风　全角空格.safetensors",
    "emoji 😀.safetensors",
    " lead.safetensors",
    "trail .safetensors",
    "UPPER.SAFETENSORS",
    "100%25.safetensors",
    "a'b\"c$(x)`.safetensors",
    "~home.safetensors",
    "深/层/文件夹/子 lora.safetensors",
    "新" * 81 + ".safetensors",
    "caf\u00e9-nfc.safetensors",
    "cafe\u0301-nfd.safetensors",
    "semi;colon&amp=.safetensors",
    "plus+name@2x.safetensors",
    "back\\slash.safetensors",
)

# What the operator's manifest names: folder, name, and how many bytes the hub has of it (none: the tiny LoRA).
MANIFEST = (
    ("ipadapter-flux", "ip-adapter.bin", 2000),
    ("ultralytics/bbox", "face_yolov8m.pt", 3000),
    ("loras", "hub/known.safetensors", None),
)


class Kitchen:
    """A worker on a volume that has what the cases need, and the plan of the same volume."""

    def __init__(self, worker: LocalWorker, settings: Settings) -> None:
        self.worker = worker
        self._settings = settings

    def plan(self, job_input: object) -> Plan:
        """What `python -m worker plan` says of the request."""
        return make_plan({"input": job_input}, self._settings, make_hub(self._settings))

    def runs(self) -> Counter[str]:
        """How often nodes of the stand-ins' classes have run."""
        log = self.worker.base_dir / "user/runs.log"
        return Counter(log.read_text().splitlines() if log.is_file() else ())

    def code(self, job_id: str) -> str:
        """The code of the error that a job ended in: RunPod's local API passes on its sentence only."""
        (line,) = [line for line in self.worker.log().splitlines() if f"job {job_id}: failed after" in line]
        return line.rpartition("[")[2].rstrip("]")


def fill(volume: Path, lora: Path) -> None:
    """Put on a volume what the cases load, beside the tiny weights."""
    (volume / "custom_nodes").mkdir()
    shutil.copy(FOLDER / "case_nodes.py", volume / "custom_nodes")
    for name in ("style/ink.safetensors", *LORA_NAMES):
        target = volume / "models/loras" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(lora, target)
    embedding = volume / "models/embeddings/neg/easy.safetensors"
    embedding.parent.mkdir(parents=True)
    shutil.copy(volume / "models/embeddings/tinyemb.safetensors", embedding)
    (volume / "elsewhere").mkdir()
    shutil.copy(lora, volume / "elsewhere/only_in_yaml.safetensors")
    (volume / "extra.yaml").write_text(f"own:\n  base_path: {volume}\n  loras: elsewhere\n")
    entries = (f'[[model]]\nsource = "hf://org/cases/{name}"\nfolder = "{folder}"\n' for folder, name, _ in MANIFEST)
    named = (f'{entry}name = "{name}"\n' for entry, (_, name, _) in zip(entries, MANIFEST, strict=True))
    (volume / "models.toml").write_text("\n".join(named))


@pytest.fixture(scope="module")
def kitchen(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kitchen]:
    folder = tmp_path_factory.mktemp("cases")
    volume = make_volume(engine, folder / "volume")
    lora = volume / "models/loras/tiny_sd3_lora.safetensors"
    fill(volume, lora)
    # ComfyUI's own, which it looks for in its base folder.
    shutil.copy(engine.comfyui_dir / "custom_nodes/websocket_image_save.py", volume / "custom_nodes")
    for _, name, size in MANIFEST:
        target = folder / "hub/org/cases" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(lora.read_bytes() if size is None else bytes(size))
    with hub_process(folder / "hub") as hub:
        args = [argument for argument in engine_args(engine) if argument != "--disable-all-custom-nodes"]
        args += ["--extra-model-paths-config", str(volume / "extra.yaml")]
        environ = {"HF_ENDPOINT": hub.endpoint, "MODEL_LOADING": "on_demand", "COMFY_ARGS": shlex.join(args)}
        with LocalWorker(engine, folder, volume, environ) as local:
            earlier = local.base_dir / "output/earlier_00001_.png"
            earlier.parent.mkdir(parents=True)
            shutil.copy(PROJECT / "devkit/workflows/in.png", earlier)
            odd = local.base_dir / "input/odd\\name.png"
            odd.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / "devkit/workflows/in.png", odd)
            local.wait_ready()
            own = {"VOLUME_PATH": str(volume), "COMFYUI_DIR": str(local.base_dir), "HF_ENDPOINT": hub.endpoint}
            yield Kitchen(local, Settings.from_env(own))


def lora_case(name: str) -> dict[str, Any]:
    """A LoRA of that name, and its model, used for a conditioning that is shown."""
    graph = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "tiny_sd3.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "CLIPLoader", "inputs": {"clip_name": "tiny_clip_l.pt", "type": "sd3"}},
        "4": {
            "class_type": "LoraLoader",
            "inputs": {"model": ["1", 0], "clip": ["2", 0], "lora_name": name, "strength_model": 1, "strength_clip": 1},
        },
        "5": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": "x"}},
        "99": {"class_type": "PreviewAny", "inputs": {"source": ["5", 0]}},
    }
    return {"input": {"workflow": graph}, "right": {"text": True}}


CASES: dict[str, dict[str, Any]] = {
    **{path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))},
    **{f"lora-name-{at:02}": lora_case(name) for at, name in enumerate(LORA_NAMES)},
}


@pytest.mark.parametrize("name", CASES)
def test_a_case(name: str, kitchen: Kitchen) -> None:
    right = CASES[name]["right"]
    plan = kitchen.plan(CASES[name]["input"])
    assert plan.can_run is right.get("plan", "error" not in right), plan
    before, logged = kitchen.runs(), len(kitchen.worker.log())
    answer = kitchen.worker.runsync(CASES[name]["input"])
    ran = kitchen.runs() - before
    assert {kind: ran[kind] for kind in right.get("runs", {})} == right.get("runs", {})
    assert not [part for part in right.get("log_lacks", ()) if part in kitchen.worker.log()[logged:]]
    if "error" in right:
        assert answer["status"] == "FAILED", answer
        assert kitchen.code(answer["id"]) == right["error"], answer
        assert all(part in answer["error"] for part in right.get("says", ())), answer["error"]
    else:
        assert answer["status"] == "COMPLETED", answer
        check_output(answer["output"], right)


def check_output(output: dict[str, Any], right: dict[str, Any]) -> None:
    """The output has what is right, and nothing else."""
    assert output.get("status") == right.get("status"), output
    for kind in LISTS:
        items, starts = output.get(kind, []), right.get(kind, [])
        assert len(items) == len(starts), output
        assert all(item["filename"].startswith(start) for item, start in zip(items, starts, strict=True)), output
        assert all(base64.b64decode(item["data"], validate=True) for item in items), output
    texts = [item["data"] for item in output.get("text", ())]
    assert bool(texts) if right.get("text") is True else texts == right.get("text", []), output
    if "content" in right:
        assert json.loads(base64.b64decode(output["videos"][0]["data"])) == right["content"]
    sentences, parts = output.get("errors", []), right.get("errors", [])
    assert len(sentences) == len(parts), output
    assert all(part in sentence for part, sentence in zip(parts, sentences, strict=True)), output
