"""Requests that nobody means well with, through the whole handler and the real ComfyUI.

None may be answered with `internal`, none may hold an event loop for a second, none may leave a worker that serves no more.
The clocks are those of the process and of the loop's thread, so that a busy machine changes nothing. `FUZZ_S` seconds of
Hypothesis go beyond what each run of the tests has: `FUZZ_S=3600 python -m pytest tests/test_fuzz.py`.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import copy
import json
import os
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from devkit.engine.models import make_volume
from devkit.local_worker import engine_environ, free_port
from worker.boot import Worker
from worker.engine.process import EngineCommand, EngineProcess
from worker.settings import Settings
from worker.warmup.warmup import Warmup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from devkit.engine.build import Engine as Kit

CORPUS = {path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "fuzz_corpus").glob("*.json"))}
TINY = CORPUS["tiny"]["input"]["workflow"]
LOOP_S = 1.0
REQUEST_S = 10.0
"""Of the whole process, for a request of up to some megabytes; most take a hundredth."""
REQUEST_BYTES = 20_000_000
CHANGED_BYTES = 500_000
"""Larger than this a request is changed no further: each of its places is looked at, and a list of lists has many."""
SHALLOW = 100
FUZZ_S = float(os.environ.get("FUZZ_S", "0"))


class Fuzzed:
    """A worker in this process, and the clocks."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.codes: collections.Counter[str] = collections.Counter()
        self.loop_s = self.slowest_s = 0.0
        worker.loop.submit(self._tick())

    async def _tick(self) -> None:
        """Note the most that the loop's thread worked between two of its turns."""
        last_s = time.thread_time()
        while True:
            await asyncio.sleep(0.005)
            now_s = time.thread_time()
            self.loop_s, last_s = max(self.loop_s, now_s - last_s), now_s

    def send(self, job: Any) -> dict[str, Any]:
        """The result of a job, as JSON has it."""
        self.loop_s, began_s = 0.0, time.process_time()
        handling = self._worker.handler.handle({"id": "fuzz", **job})
        result = self._worker.loop.submit(handling).result(600)
        took_s = time.process_time() - began_s
        self.slowest_s = max(self.slowest_s, took_s)
        self.codes[result.get("code", "COMPLETED")] += 1
        json.dumps(result, ensure_ascii=False, allow_nan=False).encode()
        assert result.get("code") != "internal", result
        assert not result.get("refresh_worker"), result
        assert self.loop_s < LOOP_S, f"{self.loop_s:.2f} s on the loop"
        assert took_s < REQUEST_S, f"{took_s:.2f} s of the processor"
        return result

    def serves(self) -> bool:
        return bool(self.send({"input": {"workflow": TINY}}).get("images"))


@pytest.fixture(scope="module")
def fuzzed(engine: Kit, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    base = tmp_path_factory.mktemp("fuzz")
    make_volume(engine, base)
    environ = {
        **engine_environ(engine, base, free_port()),
        "VOLUME_PATH": str(base / "volume"),
        "HF_ENDPOINT": "http://127.0.0.1:9",  # nothing is fetched from anywhere
        "MODEL_HOSTS": "none",
        "INPUT_URL_HOSTS": "none",
        "JOB_TIMEOUT_S": "60",
    }
    configured = Settings.from_env(environ)
    command = EngineCommand.of(configured, dict(os.environ))
    worker = Worker(configured, command, EngineProcess.spawn(command), Warmup(configured))
    worker.start(lambda: None, time.monotonic())
    yield Fuzzed(worker)
    worker.stop()


def nested(levels: int, kind: type = list) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value] if kind is list else {"a": value}
    return value


def with_input(name: str, value: Any, **fields: Any) -> dict[str, Any]:
    graph = copy.deepcopy(TINY)
    graph["2"]["inputs"][name] = value
    return {"input": {"workflow": graph, **fields}}


def png(*chunks: tuple[bytes, bytes]) -> str:
    body = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        body += len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    return base64.b64encode(body).decode()


def carried(data: str) -> dict[str, Any]:
    return {"input": {"workflow_from": "a.png", "images": [{"name": "a.png", "image": data}]}}


def proxied(name: str) -> dict[str, Any]:
    job: dict[str, Any] = copy.deepcopy(CORPUS["subgraph"])
    job["input"]["workflow"]["nodes"][0]["properties"]["proxyWidgets"] = [["1", name]]
    return job


def many_nodes(count: int, **node: Any) -> dict[str, Any]:
    return {
        "input": {"workflow": {**{str(at): {"class_type": "Nope", "inputs": {}, **node} for at in range(3, count)}, **TINY}}
    }


# What was found to disable a worker, to hold its loop, or to be called a defect of it.
FOUND: dict[str, Callable[[], dict[str, Any]]] = {
    "nested undeclared input": lambda: with_input("more", nested(500)),
    "nested object": lambda: with_input("more", nested(900, dict)),
    "nested pnginfo": lambda: with_input("more", 1, extra_pnginfo={"workflow": nested(490)}),
    "nested saved workflow": lambda: {"input": {"workflow": {**CORPUS["ui"]["input"]["workflow"], "extra": nested(500)}}},
    "nested set": lambda: with_input("more", 1, set={"2.more": nested(480)}),
    "nested text": lambda: {"input": "[" * 200_000},
    "digits": lambda: {"input": '{"workflow": ' + "9" * 5_000 + "}"},
    "addresses in an error": lambda: with_input("images", "https://a" * 7_000),
    "colons in an error": lambda: {"input": {"workflow": {"http://" + "a:" * 30_000: {"class_type": "X"}}}},
    "many set keys": lambda: {
        "input": {
            "workflow": {**TINY, "1": {**TINY["1"], "inputs": {**TINY["1"]["inputs"], **{f"i{n}": 1 for n in range(40_000)}}}},
            "set": {f"1.i{n}": 2 for n in range(40_000)},
        }
    },
    "many dots": lambda: with_input("more", 1, set={"a." * 450 + str(n): 1 for n in range(2_000)}),
    "many files": lambda: with_input("more", 1, files=[{"name": f"{n}.txt", "data": "QQ=="} for n in range(30_000)]),
    "some files": lambda: with_input("more", 1, files=[{"name": f"{n}/a/b/c.txt", "data": "QQ=="} for n in range(2_000)]),
    "deep file names": lambda: with_input(
        "more", 1, files=[{"name": f"{n}" + "/a" * 500, "data": "QQ=="} for n in range(2_000)]
    ),
    "packed texts": lambda: carried(png(*[(b"zTXt", b"prompt\0\0" + zlib.compress(bytes(16 << 20)))] * 100)),
    "long proxy": lambda: proxied("1:" * 100_000),
    "many proxies": lambda: {
        "input": {
            "workflow": {
                **CORPUS["subgraph"]["input"]["workflow"],
                "nodes": [
                    {
                        **CORPUS["subgraph"]["input"]["workflow"]["nodes"][0],
                        "properties": {"proxyWidgets": json.dumps([["1", f"{n}"] for n in range(20_000)])},
                    }
                ],
            }
        }
    },
    "half a character": lambda: {"input": {"workflow": {"1": TINY["1"], "2\ud800": TINY["2"]}, "return_timings": True}},
    "padded path": lambda: with_input("filename_prefix", "a/../" * 3_000 + "../etc/passwd"),
    "long prefix": lambda: with_input("filename_prefix", "a" * 5_000),
    "nan in pnginfo": lambda: with_input("more", 1, extra_pnginfo={"workflow": float("nan")}),
    "nan in a saved workflow": lambda: {"input": {"workflow": {**CORPUS["ui"]["input"]["workflow"], "extra": float("inf")}}},
    "nan in a node": lambda: {"input": {"workflow": {**TINY, "2": {**TINY["2"], "x": float("nan")}}}},
    "long names": lambda: {
        "input": {"workflow": {**TINY, "3": {"class_type": "A" * 100_000, "inputs": {"b" * 100_000: ["x"] * 9}}}}
    },
    "many classes": lambda: {"input": {"workflow": {str(n): {"class_type": f"C{n}", "inputs": {}} for n in range(5_000)}}},
    "many nodes of an unknown class": lambda: many_nodes(20_000),
    "many nodes that fail": lambda: many_nodes(3_000, class_type="SaveImage", inputs={"images": ["1", 7]}),
    "many choices": lambda: many_nodes(1_500, class_type="KSampler", inputs={"sampler_name": "x" * 200, "scheduler": "y"}),
    "many models": lambda: with_input("more", [f"{n}.safetensors" for n in range(100_000)]),
    "absent models": lambda: many_nodes(
        600, class_type="LoraLoaderModelOnly", inputs={"lora_name": "no\u00e9\n.safetensors" * 9}
    ),
    "broken links": lambda: (
        with_input("more", 1) | many_nodes(2_000, class_type="PreviewAny", inputs={"source": ["nowhere", 0]})
    ),
    "brackets in a prompt": lambda: with_input("text", "embedding:a " + "(" * 99_000),
    "embeddings": lambda: with_input("text", "embedding:a " * 100_000),
    "line breaks": lambda: with_input("x\n\x1b[31m", 1, outputs=["\n\x1b[2J\r"]),
    "a long output": lambda: with_input("x", 1, outputs=["9" * 100_000]),
    "bucket": lambda: {
        "input": {"workflow": TINY},
        "s3Config": {**CORPUS["bucket"]["s3Config"], "endpointUrl": "https://[::1"},
    },
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_once(name: str, fuzzed: Fuzzed) -> None:
    fuzzed.send(FOUND[name]())
    assert fuzzed.serves()


@pytest.mark.parametrize("name", CORPUS)
def test_the_corpus_itself_is_answered(name: str, fuzzed: Fuzzed) -> None:
    fuzzed.send(CORPUS[name])


# --- changed at random ----------------------------------------------------------------------------

# No number that would make a picture of gigabytes.
NUMBERS = st.sampled_from(
    [0, -1, 1, 7, 8.0, 0.5, 2**31, 2**53 + 1, 2**64, -(2**63), 10**400, 1e308, 1e-308, float("nan"), float("inf")]
)
WORDS = st.sampled_from(
    [
        *(
            "",
            " ",
            "\0",
            "\n",
            "\x1b[31m",
            "\ud800",
            "é",
            "..",
            "../x",
            "/etc/passwd",
            "a/../../b",
            "C:\\x",
            "~/x",
            "-1",
            "-10",
        ),
        *(
            "1",
            "2",
            "1.value",
            "Out.images",
            "input",
            "output",
            "workflow",
            "nodes",
            "links",
            "class_type",
            "inputs",
            "images",
            "image",
        ),
        *("PreviewAny", "SaveImage", "LoadImage", "PrimitiveNode", "Reroute", "Nope", "__value__", "__class__", "self", "on"),
        *("x.safetensors", "sub\\x.safetensors", "embedding:x", "(embedding:x:1.1)", "%date:yyyy%", "{a|b", "a.png [output]"),
        *(
            "https://example.com/a?token=x",
            "http://127.0.0.1:1/",
            "file:///etc/passwd",
            "data:,x",
            "[object Object]",
            "random",
            "next",
        ),
    ]
)
LEAVES = st.none() | st.booleans() | NUMBERS | WORDS | st.text(max_size=8)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any) -> list[tuple[Any, ...]]:
    """Where something can be changed: nowhere deep, since copying a deep value takes the interpreter's stack."""
    found: list[tuple[Any, ...]] = []
    left: list[tuple[Any, tuple[Any, ...]]] = [(value, ())]
    while left:
        value, path = left.pop()
        if path:
            found.append(path)
        if len(path) < SHALLOW:
            inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
            left += [(each, (*path, key)) for key, each in inner]
    return found


def measured(value: Any) -> tuple[int, int]:
    """About how long a value is as JSON, up to what RunPod takes, and how deep."""
    size, deepest, left = 0, 0, [(value, 0)]
    while left and size < REQUEST_BYTES:
        value, depth = left.pop()
        size, deepest = size + 2 + (len(value) if isinstance(value, str) else 4), max(deepest, depth)
        inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
        left += [(each, depth + 1) for each in inner]
    return size, deepest


def repeated(value: Any, count: int) -> Any:
    if isinstance(value, str):
        return value * min(count, 200_000 // max(1, len(value)))
    if isinstance(value, list):
        return value * min(count, 20_000 // max(1, len(value)))
    if isinstance(value, dict) and value:
        few = min(count, 20_000 // len(value))
        return {f"{key}{n or ''}": inner for n in range(few) for key, inner in value.items()}
    return [value] * count


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """A request of the corpus, changed in up to five places, and no larger than RunPod takes one."""
    job: dict[str, Any] = copy.deepcopy(CORPUS[draw(st.sampled_from(sorted(CORPUS)))])
    for _ in range(draw(st.integers(1, 5))):
        change(draw, job)
        size, _ = measured(job)
        assume(size < REQUEST_BYTES)
        if size > CHANGED_BYTES:
            break
    return job


def change(draw: st.DrawFn, job: dict[str, Any]) -> None:
    where = places(job) or [("input",)]
    *path, last = draw(st.sampled_from(where))
    holder = at(job, path)
    held = holder.get(last) if isinstance(holder, dict) else holder[last]
    match draw(st.sampled_from(["drop", "value", "value", "value", "repeat", "nest", "rename", "copy", "add"])):
        case "drop":
            holder.pop(last, None) if isinstance(holder, dict) else holder.pop(last)
        case "repeat":
            holder[last] = repeated(held, draw(st.sampled_from([2, 30, 1_000, 20_000])))
        case "nest":
            holder[last] = nested(draw(st.sampled_from([1, 50, 99, 200, 500, 900])), draw(st.sampled_from([list, dict])))
        case "rename" if isinstance(holder, dict):
            holder[draw(WORDS)] = holder.pop(last, None)
        case "copy":
            copied = at(job, draw(st.sampled_from(where)))
            holder[last] = copy.deepcopy(copied) if measured(copied)[1] < SHALLOW else None
        case "add" if isinstance(held, dict):
            held[draw(WORDS)] = draw(VALUES)
        case _:
            holder[last] = draw(VALUES)


def at(value: Any, path: Sequence[Any]) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else value[key]
    return value


def fuzz(fuzzed: Fuzzed, examples: int) -> None:
    @settings(
        max_examples=examples,
        deadline=None,  # of the wall clock, which a busy machine stretches
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(requests())
    def once(job: dict[str, Any]) -> None:
        fuzzed.send(job)

    once()


def test_no_change_of_a_request_is_a_defect(fuzzed: Fuzzed) -> None:
    fuzz(fuzzed, 150)
    assert fuzzed.serves()


@pytest.mark.skipif(not FUZZ_S, reason="FUZZ_S says how many seconds to go on")
@pytest.mark.timeout(FUZZ_S + 900)
def test_for_as_long_as_asked(fuzzed: Fuzzed) -> None:
    end_s = time.monotonic() + FUZZ_S
    while time.monotonic() < end_s:
        fuzz(fuzzed, 500)
        assert fuzzed.serves()
        told = f"{fuzzed.codes.total()} requests, at most {fuzzed.slowest_s:.2f} s each: {dict(fuzzed.codes.most_common())}"
        print(told, flush=True)  # noqa: T201 - what the run is for
