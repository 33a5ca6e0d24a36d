"""The operator's settings, read once from an environment that is passed in. Pure.

Each field of `Settings` is one environment variable: the field's name in capitals. The same definitions make the table in
docs/settings.md (`markdown_table`), so the documentation cannot differ from the code.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from worker.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


_RUNPOD_VOLUME = re.compile(r"s3api-[a-z0-9-]+\.runpod\.io")
_HOST_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-.:")


def _setting(parse: Callable[[str], Any], default: str, text: str, *, secret: bool = False) -> Any:  # noqa: ANN401 - as dataclasses.field
    """Return a field of the settings for one variable. `default` is the value of an unset or empty variable."""
    metadata = {"parse": parse, "default": default, "text": text, "secret": secret}
    return field(repr=not secret, metadata=metadata)


def _flag(text: str) -> bool:
    value = text.strip().lower()
    if value in {"true", "1", "yes", "on"}:
        return True
    if value in {"false", "0", "no", "off"}:
        return False
    raise ValueError("must be true or false")


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        for value in allowed:
            if text.strip().lower() == value.lower():
                return value
        raise ValueError("must be one of " + ", ".join(allowed))

    return parse


def _number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise ValueError(f"must be a number from {low:g} to {high:g}")
        return value

    return parse


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.strip().isdecimal() or not low <= int(text) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(text)

    return parse


def _path(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute():
        raise ValueError("must be an absolute path")
    return path


def _arguments(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as exc:
        raise ValueError("must be command line flags with matching quotes") from exc


def _hosts(text: str) -> tuple[str, ...]:
    hosts = tuple(host.strip().lower() for host in text.split(",") if host.strip())
    if any(not set(host) <= _HOST_CHARACTERS for host in hosts):
        raise ValueError("must be host names separated by commas")
    return hosts


def _model_hosts(text: str) -> tuple[str, ...]:
    return () if text.strip().lower() == "none" else _hosts(text)


def _input_hosts(text: str) -> tuple[str, ...] | None:
    """Parse a setting with hosts: None for any host, () for none."""
    if text.strip().lower() in {"any", "none"}:
        return None if text.strip().lower() == "any" else ()
    hosts = _hosts(text)
    if not hosts:
        raise ValueError("must be any, none, or host names separated by commas")
    return hosts


def _hosts_and_networks(text: str) -> tuple[str, ...]:
    """Parse a setting with host names, IP addresses, and networks such as 10.1.0.0/16."""
    places = tuple(place.strip().lower() for place in text.split(",") if place.strip())
    try:
        for place in places:
            if "/" in place:
                ipaddress.ip_network(place)
            else:
                _hosts(place)
    except ValueError as exc:
        raise ValueError("must be host names, IP addresses or networks such as 10.1.0.0/16, separated by commas") from exc
    return places


def _address(text: str) -> str:
    if not text.startswith(("https://", "http://")):
        raise ValueError("must be an address that begins with https:// or http://")
    return text.rstrip("/")


def _object_store(text: str) -> str:
    """Parse a setting with the address of an object store: a host, perhaps a port and a path, and nothing else."""
    address = _address(text)
    parts = urlsplit(address)
    try:
        usable = bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.username is not None or parts.query or parts.fragment:
        raise ValueError("must be an address with a valid host and port, without a user and without a query")
    return address


def _warm_models(text: str) -> tuple[str, ...] | None:
    """Parse a setting with a list of models: `auto` is None, `none` is empty."""
    if text.strip().lower() == "auto":
        return None
    names = tuple(name.strip() for name in text.replace("\n", ",").split(",") if name.strip())
    if [name.lower() for name in names] == ["none"]:
        return ()
    for name in names:
        if any(part in {"", ".", ".."} for part in name.split("/")):
            raise ValueError("must be auto, none, or names of models such as checkpoints/flux1-dev-fp8.safetensors")
    return names


def _workflow_file(text: str) -> Path | Literal["auto"] | None:
    if text.strip().lower() == "auto":
        return "auto"
    return _path(text) if text else None


def _optional(text: str) -> str | None:
    return text.strip() or None


@dataclass(frozen=True, slots=True)
class Settings:
    """The worker's settings. Every value of an instance is valid."""

    volume_path: Path = _setting(
        _path, "/runpod-volume", "Where the network volume is mounted. In a Pod the default is `/workspace`."
    )
    require_volume: bool = _setting(
        _flag,
        "false",
        "Fail when the volume is missing, read-only or full. Otherwise models are then kept on the container's disk.",
    )
    volume_keep_gb: float | None = _setting(
        lambda text: _number(0, 1_000_000)(text) if text else None,
        "",
        "How many GB all models on the volume may take. If a download does not fit, the worker removes the models used least: "
        "only what a worker or the seeder downloaded, what no job uses, what no manifest names, and what it could download "
        "again. When not set, it removes nothing.",
    )
    volume_free_gb: float | None = _setting(
        lambda text: _number(0, 1_000_000)(text) if text else None,
        "",
        "How many GB are to stay free on the volume. The worker removes models for it as for `VOLUME_KEEP_GB`. Use that where "
        "`df` does not show the volume's quota.",
    )
    models_manifest: str | None = _setting(
        _optional,
        "",
        "A manifest of models: the path of a file in the image, or the manifest's text. `models.toml` on the volume "
        "takes precedence.",
    )
    models: str | None = _setting(
        _optional, "", "Models as short lines, one model a line: `checkpoints=hf://org/repo/file.safetensors@revision`."
    )
    model_loading: str = _setting(
        _choice("background", "eager", "on_demand"),
        "background",
        "When missing models of the manifests are downloaded. `background`: jobs start immediately, and the models "
        "download in the background. `eager`: before the first job. `on_demand`: when a workflow names them.",
    )
    model_hosts: tuple[str, ...] = _setting(
        _model_hosts,
        "huggingface.co,civitai.com",
        "The hosts that a request, or a workflow's own metadata, may have models downloaded from, or `none`.",
    )
    hf_token: str | None = _setting(_optional, "", "Hugging Face token for private and gated repositories.", secret=True)
    hf_endpoint: str = _setting(
        _address,
        "https://huggingface.co",
        "Another address of the Hugging Face hub, such as a mirror. The mirror receives `HF_TOKEN`.",
    )
    civitai_token: str | None = _setting(_optional, "", "Civitai API key for downloads that need one.", secret=True)
    download_connections: int = _setting(_whole(1, 32), "8", "How many connections one download uses.")
    warm_models: tuple[str, ...] | None = _setting(
        _warm_models,
        "auto",
        "The models that are read into memory while ComfyUI boots. `auto`: those that the endpoint's last jobs used (the "
        "volume remembers their names). Or a list, such as `checkpoints/a.safetensors, b.safetensors`. `none` also turns "
        "off reading a job's own models ahead of ComfyUI.",
    )
    warm_memory_share: float = _setting(
        _number(0, 1),
        "0.5",
        "The share of the container's free memory that this may use. ComfyUI needs the rest for its own copy of the weights.",
    )
    warmup_workflow: Path | Literal["auto"] | None = _setting(
        _workflow_file,
        "",
        "A workflow that runs before the first job, so that its models are on the GPU: the path of a file in ComfyUI's "
        "API format, or `auto` for the loaders and one step of the last job (the volume remembers them without texts, "
        "seeds and files). Each start takes longer. Use it where workers wait for jobs.",
    )
    warmup_timeout_s: float = _setting(
        _number(1, 3600), "120", "How long the warm-up run may take. After that the worker takes jobs without it."
    )
    comfyui_dir: Path = _setting(_path, "/comfyui", "The folder that contains ComfyUI's `main.py`.")
    comfyui_base_dir: Path | None = _setting(
        lambda text: _path(text) if text else None,
        "",
        "The folder of ComfyUI's `models`, `input`, `output` and `custom_nodes`. When not set: `COMFYUI_DIR`.",
    )
    comfyui_python: str = _setting(str, "python3", "The Python that runs ComfyUI: a path, or a name on `PATH`.")
    start_files: Path | None = _setting(
        lambda text: None if text == "none" else _path(text),
        "/opt/worker/start-files",
        "The list of files that ComfyUI's start reads, recorded when the image was built. The worker has the kernel read them "
        "ahead, without those that only a GPU needs: the list is recorded without one. `none`: it does not.",
    )
    comfyui_port: int = _setting(_whole(1, 65535), "8188", "The port that ComfyUI listens on inside the container.")
    comfy_args: tuple[str, ...] = _setting(
        _arguments, "", "More command line flags for ComfyUI, such as `--cpu`, `--disable-metadata` or `--novram`."
    )
    comfy_log_level: str = _setting(_choice("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"), "INFO", "How much ComfyUI logs.")
    comfy_start_timeout_s: float = _setting(_number(1, 3600), "400", "How long ComfyUI may take to answer its first request.")
    comfy_org_api_key: str | None = _setting(
        _optional, "", "Key for ComfyUI's paid API nodes. A job's own `comfy_org_api_key` takes precedence.", secret=True
    )
    job_timeout_s: float = _setting(
        _number(1, 86400),
        "3600",
        "How long ComfyUI may run a workflow before it is interrupted. A request can ask for less. RunPod's own limit "
        "also applies.",
    )
    comfy_hang_timeout_s: float = _setting(
        _number(1, 86400),
        "180",
        "ComfyUI is replaced when it has a job and has sent no event and given no answer for this long.",
    )
    input_url_hosts: tuple[str, ...] | None = _setting(
        _input_hosts,
        "any",
        "The hosts that a request may name in `images[].url` and `files[].url`: `any`, `none`, or a list such as "
        "`cdn.example.com,.amazonaws.com`. A leading dot allows all subdomains.",
    )
    input_url_allow_private: tuple[str, ...] = _setting(
        _hosts_and_networks,
        "",
        "Private hosts, IP addresses and networks that those addresses, and a job's `s3Config`, may lead to, such as "
        "`minio.internal,10.1.0.0/16`. All other private, local and reserved networks are refused.",
    )
    input_max_mb: int = _setting(_whole(1, 100_000), "512", "The largest input file of a job, decoded, in MB.")
    input_timeout_s: float = _setting(
        _number(1, 86400), "120", "How long all files that a job names by address may take together."
    )
    websocket_reconnect_attempts: int = _setting(
        _whole(0, 1000), "5", "How often the worker reconnects to a living ComfyUI before the job fails."
    )
    websocket_reconnect_delay_s: float = _setting(
        _number(0, 60), "3", "The pause between those attempts. The first is immediate."
    )
    bucket_endpoint_url: str | None = _setting(
        lambda text: _object_store(text) if text else None,
        "",
        "The address of an S3-compatible store for results, with or without the bucket in it, such as "
        "`https://ACCOUNT.r2.cloudflarestorage.com/results` or `https://results.s3.eu-central-1.amazonaws.com`.",
    )
    bucket_access_key_id: str | None = _setting(_optional, "", "The store's access key id.", secret=True)
    bucket_secret_access_key: str | None = _setting(_optional, "", "The store's secret access key.", secret=True)
    bucket_name: str | None = _setting(
        _optional,
        "",
        "The bucket, if the address does not contain it. Without both, the bucket is named after the month, such as `11-26`.",
    )
    bucket_prefix: str | None = _setting(_optional, "", "What the keys of results begin with, before the job's id.")
    bucket_region: str | None = _setting(
        _optional, "", "The bucket's region, if the address does not contain it. Amazon S3 requires the right one."
    )
    bucket_addressing: str = _setting(
        _choice("auto", "virtual", "path"),
        "auto",
        "How addresses name the bucket: `virtual`, as a host name; `path`, as the first part of the path; `auto`, as the "
        "provider requires, and `path` for unknown hosts.",
    )
    bucket_url_expiry_s: int = _setting(
        _whole(1, 604_800), "604800", "How long the signed addresses of results are valid. The protocol allows at most 7 days."
    )
    result_limit_mb: float | None = _setting(
        lambda text: _number(0.01, 10_000)(text) if text else None,
        "",
        "The largest result as JSON, in MB. When not set: a little less than what RunPod accepts, 10 or 20 through "
        "`/runsync`. The largest files of a larger result are written to the volume, as `outputs/<job id>/<name>`.",
    )
    output_keep_mb: int = _setting(
        _whole(0, 1_000_000),
        "2048",
        "How many MB of ComfyUI's outputs stay on the disk, so that cached runs can return them again. The oldest are "
        "removed first.",
    )
    serve_api_locally: bool = _setting(
        _flag, "false", "Serve RunPod's local API on port 8000, and ComfyUI on its port, both on all interfaces."
    )
    take_jobs: str = _setting(
        _choice("booting", "ready"),
        "booting",
        "When a new worker takes its first job. `booting`: while ComfyUI starts, so that the job's files and models come "
        "meanwhile. `ready`: when ComfyUI is there. `MODEL_LOADING=eager` implies `ready`.",
    )
    refresh_worker: bool = _setting(_flag, "false", "Have RunPod replace the worker after each job.")
    network_volume_debug: bool = _setting(_flag, "false", "Log the contents of each model folder of the volume at start.")
    runpod_pod_id: str | None = _setting(
        _optional, "", "Set by RunPod. Other workers show this name while they wait for this one."
    )
    runpod_endpoint_id: str | None = _setting(
        _optional, "", "Set by RunPod. Names the endpoint's list of recent models on the volume."
    )
    worker_log_level: str = _setting(_choice("DEBUG", "INFO", "WARNING", "ERROR"), "INFO", "How much the worker itself logs.")

    @property
    def request_hosts(self) -> tuple[str, ...]:
        """Return `MODEL_HOSTS`. If the hub is one of them, add the host of its mirror."""
        mirror = urlsplit(self.hf_endpoint).hostname or ""
        is_hub = "huggingface.co" in self.model_hosts and mirror not in self.model_hosts
        return (*self.model_hosts, mirror) if is_hub else self.model_hosts

    @property
    def base_dir(self) -> Path:
        """Return the folder under which ComfyUI keeps its models, inputs and outputs."""
        return self.comfyui_base_dir or self.comfyui_dir

    @property
    def local_store(self) -> Path:
        """Return the folder on the container's disk for models that the volume cannot take, laid out as a volume."""
        return self.base_dir / "container-volume"

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read the settings. Raises `SettingsError` with every problem found, each naming its variable."""
        problems: list[str] = []
        values: dict[str, Any] = {}
        for item in dataclasses.fields(cls):
            name = item.name.upper()
            default = item.metadata["default"]
            if item.name == "volume_path" and _is_pod(environ):
                default = "/workspace"
            text = _lenient(name, environ.get(name, "").strip()) or default
            try:
                values[item.name] = item.metadata["parse"](text)
            except ValueError as exc:
                shown = "its value" if item.metadata["secret"] else f"'{text}'"
                problems.append(f"{name} {exc}, not {shown}")
        problems += _bucket_problems(values)
        if problems:
            raise SettingsError(problems)
        return cls(**values)

    def secrets(self) -> tuple[str, ...]:
        """Return every secret value that is set, so that no log line shows one."""
        fields = (item for item in dataclasses.fields(self) if item.metadata["secret"])
        return tuple(value for item in fields if (value := getattr(self, item.name)))


# worker-comfyui accepts these; larger numbers mean no more than the largest one here.
_LARGEST = {"WEBSOCKET_RECONNECT_ATTEMPTS": 1000, "WEBSOCKET_RECONNECT_DELAY_S": 60}
_BUCKET_KEYS = ("BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY", "BUCKET_NAME", "BUCKET_PREFIX", "BUCKET_REGION")


def _lenient(name: str, text: str) -> str:
    return str(_LARGEST[name]) if _is_too_large(name, text) else text


def _is_too_large(name: str, text: str) -> bool:
    if name not in _LARGEST:
        return False
    try:
        return float(text) > _LARGEST[name]
    except ValueError:
        return False


def remarks(environ: Mapping[str, str]) -> list[str]:
    """Return remarks about settings: variables of worker-comfyui that have no effect, or another effect, here."""
    found = [
        f"{name} is {environ[name].strip()}; {most} is used, the largest that makes sense"
        for name, most in _LARGEST.items()
        if _is_too_large(name, environ.get(name, ""))
    ]
    idle = [name for name in _BUCKET_KEYS if environ.get(name, "").strip()]
    if idle and not environ.get("BUCKET_ENDPOINT_URL", "").strip():
        found.append(f"{', '.join(idle)} without BUCKET_ENDPOINT_URL: nothing is uploaded; set it, or remove them")
    return found


def _bucket_problems(values: dict[str, Any]) -> list[str]:
    """Return contradictions and missing parts of the settings for the bucket, but not wrong single values."""
    needed = ("bucket_endpoint_url", "bucket_access_key_id", "bucket_secret_access_key")
    if "bucket_endpoint_url" in values and not values["bucket_endpoint_url"]:
        values.update(dict.fromkeys((*needed, "bucket_name", "bucket_prefix", "bucket_region")))
        return []
    optional = ("bucket_name", "bucket_prefix", "bucket_region")
    if not any(values.get(name) for name in (*needed, *optional)):
        return []
    problems = [
        f"{name.upper()} must be set too, as other BUCKET_ variables are"
        for name in needed
        if name in values and not values[name]
    ]
    bucket = values.get("bucket_name")
    path = [part for part in urlsplit(values.get("bucket_endpoint_url") or "").path.split("/") if part]
    if len(path) == 1 and bucket and path[0] != bucket:
        problems.append(
            f"BUCKET_NAME must be the bucket that BUCKET_ENDPOINT_URL names, '{path[0]}', or be left out, not '{bucket}'"
        )
    if _RUNPOD_VOLUME.fullmatch(urlsplit(values.get("bucket_endpoint_url") or "").hostname or ""):
        problems.append(
            "BUCKET_ENDPOINT_URL must be a store that signs addresses, not a RunPod volume's S3 API, which does not: "
            "leave the BUCKET_ variables out, and results too large to send are written to the volume"
        )
    if len(path) > 1 and not bucket:
        problems.append("BUCKET_NAME must be set, because BUCKET_ENDPOINT_URL has a path of several parts")
    return problems


def _is_pod(environ: Mapping[str, str]) -> bool:
    """Return whether the environment is a RunPod Pod's, whose setting of the volume's mount differs from a worker's."""
    return "RUNPOD_POD_ID" in environ and "RUNPOD_ENDPOINT_ID" not in environ


def markdown_table() -> str:
    """Return the table of all settings, as docs/settings.md shows it."""
    rows = ["| Variable | Default | What it does |", "| --- | --- | --- |"]
    for item in dataclasses.fields(Settings):
        default = item.metadata["default"]
        rows.append(f"| `{item.name.upper()}` | {f'`{default}`' if default else ''} | {item.metadata['text']} |")
    return "\n".join(rows) + "\n"
