"""Files that come with a job: there while it runs, gone afterwards, never outside their folder."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import resource
import signal
import tracemalloc
import unicodedata
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from worker.editor.embedded_workflow import embedded_workflow
from worker.errors import (
    ImageNotBase64,
    InputNameInvalid,
    InputNotServed,
    InputNotStored,
    InputTooLarge,
    InputUrlRefused,
    UnsafePath,
    WorkerError,
)
from worker.job import InputFile
from worker.media import inputs
from worker.media.address_guard import AddressRules
from worker.media.inputs import InputFiles, base64_pieces, clear_leftover_inputs
from worker.media.url_inputs import UrlFetcher, UrlFetchLimits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

RunAsync = Callable[[Coroutine[Any, Any, Any]], Any]

A, B = base64.b64encode(b"first").decode(), base64.b64encode(b"second").decode()
LOOPBACK = AddressRules(private=("127.0.0.1",))


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def entries(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@contextlib.asynccontextmanager
async def placed(folder: InputFiles, files: Sequence[InputFile]) -> AsyncIterator[None]:
    with folder.of_job(files) as job:
        async with job.placed():
            yield


class Placing:
    """Places files for as long as one body runs, and gives the body's result."""

    def __init__(self, run_async: RunAsync) -> None:
        self._run_async = run_async

    def __call__(
        self,
        folder: Path,
        files: Sequence[InputFile],
        body: Callable[[], object] = lambda: None,
        fetcher: UrlFetcher | None = None,
    ) -> Any:
        async def scenario() -> object:
            async with placed(InputFiles(folder, fetcher), files):
                return body()

        return self._run_async(scenario())

    def refused(
        self, error: type[WorkerError], folder: Path, files: Sequence[InputFile], fetcher: UrlFetcher | None = None
    ) -> str:
        """The sentence that the files are refused with, before the job runs and with the folder untouched."""
        before = sorted(folder.rglob("*"))
        with pytest.raises(error) as caught:
            self(folder, files, lambda: pytest.fail("the job must not run"), fetcher)
        assert sorted(folder.rglob("*")) == before
        return str(caught.value)


@pytest.fixture
def placing(run_async: RunAsync) -> Placing:
    return Placing(run_async)


def test_files_are_there_for_the_job_and_gone_after_it(placing: Placing, tmp_path: Path) -> None:
    folder = tmp_path / "input"
    files = [InputFile("a.png", A), InputFile("deep/er/b.bin", B), InputFile("c.png", A, subfolder="deep/")]
    there = placing(folder, files, lambda: listing(folder))
    assert there == {"a.png": b"first", "deep/er/b.bin": b"second", "deep/c.png": b"first"}
    assert list(folder.iterdir()) == []


def test_a_job_without_files_touches_nothing(placing: Placing, tmp_path: Path) -> None:
    placing(tmp_path / "input", [])
    assert list(tmp_path.iterdir()) == []


def test_of_two_files_with_one_name_the_later_counts(placing: Placing, tmp_path: Path) -> None:
    files = [InputFile("x/a", A), InputFile("a", B, subfolder="x"), InputFile("./x//b", A)]
    assert placing(tmp_path, files, lambda: listing(tmp_path)) == {"x/a": b"second", "x/b": b"first"}


def test_a_file_of_the_image_is_put_aside_and_comes_back(placing: Placing, tmp_path: Path) -> None:
    (tmp_path / "example.png").write_bytes(b"baked")
    (tmp_path / "dangling").symlink_to("nowhere")
    files = [InputFile("example.png", B), InputFile("dangling", A)]
    placing(tmp_path, files, lambda: (tmp_path / "example.png").read_bytes() == b"second" or pytest.fail("not there"))
    assert listing(tmp_path) == {"example.png": b"baked"}
    assert (tmp_path / "dangling").readlink().name == "nowhere"


def test_a_failing_job_leaves_the_folder_as_it_was(placing: Placing, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(ZeroDivisionError):
        placing(tmp_path, [InputFile("sub/a", A), InputFile("new/b", B)], lambda: 1 // 0)
    assert [path.name for path in tmp_path.rglob("*")] == ["sub"]


def test_one_bad_file_and_none_appears(placing: Placing, tmp_path: Path) -> None:
    assert "'b.png'" in placing.refused(ImageNotBase64, tmp_path, [InputFile("a", A), InputFile("b.png", "?")])


@pytest.mark.parametrize("subfolder", ["", "sub"])
@pytest.mark.parametrize(
    "name", ["../a", "/etc/a", "a/../../b", "..", "a\\..\\b", "a\0b", "//a", "\\a", "C:\\a", "\\\\host\\a"]
)
def test_a_name_that_leaves_the_folder_is_refused(name: str, subfolder: str, placing: Placing, tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    placing.refused(UnsafePath, tmp_path / "input", [InputFile(name, A, subfolder=subfolder)])
    assert listing(tmp_path) == {}


def test_a_subfolder_that_leaves_the_folder_is_refused(placing: Placing, tmp_path: Path) -> None:
    for subfolder in ("..", "/", "/etc", "a/../..", "..\\a", "C:\\a"):
        placing.refused(UnsafePath, tmp_path, [InputFile("a", A, subfolder=subfolder)])


def test_a_name_as_windows_spells_it_is_placed_with_our_separators(placing: Placing, tmp_path: Path) -> None:
    files = [InputFile("refs\\in.png", A), InputFile("b", B, subfolder="sub\\deep")]
    assert placing(tmp_path, files, lambda: listing(tmp_path)) == {"refs/in.png": b"first", "sub/deep/b": b"second"}


def test_names_in_a_graph_as_windows_spells_them_are_those_of_files_that_are_here(tmp_path: Path) -> None:
    for name in ("input/there/x.png", "input/both/x.png", "input/both\\x.png", "output/made/y.png", "secret/z.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    asked = [
        "sent\\a.png",
        "sent\\a.png [input]",
        "there\\x.png",
        "both\\x.png",
        "made\\y.png [output]",
        "made\\y.png",
        "no\\x.png",
    ]
    asked += ["..\\secret\\z.png", "..\\secret\\z.png [input]", "\\secret\\z.png", "there\\x.png [models]", "x" * 5000 + "\\a"]
    with InputFiles(tmp_path / "input").of_job([InputFile("sent/a.png", A)]) as files:
        assert files.as_placed(asked) == {
            "sent\\a.png": "sent/a.png",
            "sent\\a.png [input]": "sent/a.png [input]",
            "there\\x.png": "there/x.png",
            "made\\y.png [output]": "made/y.png [output]",
        }


@pytest.mark.parametrize(("here", "there"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_a_graph_find_files_in_the_other_accent_spelling(here: Any, there: Any, tmp_path: Path) -> None:
    asked, sent = (unicodedata.normalize(form, "für/é.png") for form in (here, there))
    kept, called = (unicodedata.normalize(form, "à.png") for form in (there, here))
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / kept).write_bytes(b"x")
    names = [
        asked,
        asked.replace("/", "\\"),
        f"{asked} [input]",
        called,
        sent,
        kept,
        "猫.png",
        unicodedata.normalize(here, "ö"),
    ]
    with InputFiles(tmp_path / "input").of_job([InputFile(sent, A)]) as files:
        assert files.names == [sent]
        assert files.as_placed(names) == dict(zip(names, [sent, sent, f"{sent} [input]", kept], strict=False))


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([""], "no name"),
        (["."], "no name"),
        (["a/"], "no name"),
        (["a/."], "no name"),
        ([".job-abc/0"], "kept for the worker"),
        (["a" * 256], "too long"),
        (["ü" * 128 + "/a"], "too long"),
        (["/".join(["a" * 200] * 6)], "too long"),
        (["\ud800.png"], "no file name"),
        (["a", "b/c", "a/b/c"], "'a'"),
        (["a/b", "a"], "'a'"),
        (["baked.png/a"], "below a name that is a file"),
        (["baked.png/a/b"], "below a name that is a file"),
        (["link/a"], "below a name that is a file"),
        (["3d"], "is a folder"),
    ],
)
def test_a_name_that_no_file_can_have_there(names: list[str], reason: str, placing: Placing, tmp_path: Path) -> None:
    (tmp_path / "baked.png").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "3d").mkdir()
    said = placing.refused(InputNameInvalid, tmp_path, [InputFile(name, A) for name in names])
    assert said.startswith("Failed to upload one or more input images: the name '")
    assert reason in said


def test_a_link_that_leads_out_is_not_written_through(placing: Placing, tmp_path: Path) -> None:
    folder, outside = tmp_path / "input", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / "out").symlink_to(outside)
    (folder / "loop").symlink_to("loop")
    (folder / "in").symlink_to("real")
    (folder / "real").mkdir()
    placing.refused(UnsafePath, folder, [InputFile("out/a", A)])
    placing.refused(UnsafePath, folder, [InputFile("out/deep/a", A)])
    placing.refused(InputNameInvalid, folder, [InputFile("loop/a", A)])
    assert placing(folder, [InputFile("in/a", A)], lambda: listing(folder)) == {"real/a": b"first"}
    assert list(outside.iterdir()) == []


def test_the_folder_itself_may_be_a_link(placing: Placing, tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    (tmp_path / "input").symlink_to("volume")
    files = [InputFile("sub/a", A)]
    assert placing(tmp_path / "input", files, lambda: listing(tmp_path / "volume")) == {"sub/a": b"first"}
    assert list((tmp_path / "volume").iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        A,
        f"data:image/png;base64,{A}",
        f"{A[:4]}\n{A[4:]}\r\n",
        f"image/png;base64,{A}",
        f"base64,{A}",
        f" DATA:image/png;base64,{A}",
        f'"{A}"',
        f"data:image/png;base64, {A}=",
        f"{A}==\n",
    ],
)
def test_base64_as_clients_send_it(text: str) -> None:
    assert b"".join(base64_pieces("a", text)) == b"first"


@pytest.mark.parametrize(
    "text", ["", " ", "data:image/png;base64,", "not base64!", "QQ", "QQ=", "QQ==QQ==", "data:image/png", "ä", "="]
)
def test_what_is_not_base64(text: str) -> None:
    with pytest.raises(ImageNotBase64, match="Failed to upload one or more input images"):
        b"".join(base64_pieces("a", text))


@given(st.binary(min_size=1, max_size=64), st.integers(1, 9), st.lists(st.integers(0, 90), max_size=5))
def test_the_size_of_the_pieces_changes_nothing(data: bytes, piece: int, breaks: list[int]) -> None:
    text = base64.b64encode(data).decode()
    for at in sorted(breaks):
        text = f"{text[:at]}\n{text[at:]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "_PIECE_CHARACTERS", piece)
        assert b"".join(base64_pieces("a", text)) == data
        with pytest.raises(ImageNotBase64):
            b"".join(base64_pieces("a", text + "QQ==" if text.rstrip().endswith("=") else text + "Q"))


def test_large_data_is_decoded_piece_by_piece(placing: Placing, tmp_path: Path) -> None:
    data = os.urandom(7_000_000)
    files = [InputFile("a.bin", base64.b64encode(data).decode())]
    assert placing(tmp_path, files, lambda: listing(tmp_path)) == {"a.bin": data}
    fetcher = UrlFetcher(limits=UrlFetchLimits(max_bytes=6_999_999))
    assert "more than 7 MB" in placing.refused(InputTooLarge, tmp_path, files, fetcher)


@pytest.mark.parametrize("size", [70_000, 7_000_000])
def test_a_disk_that_takes_no_more(size: int, placing: Placing, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the system call fails in the same place."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        said = placing.refused(InputNotStored, tmp_path, [InputFile("a.bin", base64.b64encode(bytes(size)).decode())])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "'a.bin' could not be written to ComfyUI's input folder (File too large)" in said


async def _serve(answer: Callable[[web.BaseRequest], Any]) -> tuple[web.ServerRunner, str]:
    runner = web.ServerRunner(web.Server(answer, handler_cancellation=True, access_log=None), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


def test_files_from_addresses_beside_files_in_the_request(run_async: RunAsync, tmp_path: Path) -> None:
    async def answer(request: web.BaseRequest) -> web.Response:
        return web.Response(body=request.path.encode(), status=404 if request.path == "/gone" else 200)

    async def scenario() -> None:
        runner, at = await _serve(answer)
        folder = InputFiles(tmp_path, UrlFetcher(LOOPBACK))
        files = [InputFile("a.png", A), InputFile("b.mp4", url=f"{at}/b?c", subfolder="x"), InputFile("c", url=f"{at}/c")]
        async with placed(folder, files):
            assert listing(tmp_path) == {"a.png": b"first", "x/b.mp4": b"/b", "c": b"/c"}
        assert entries(tmp_path) == []
        with pytest.raises(InputNotServed, match="'d'"):
            async with placed(folder, [*files, InputFile("d", url=f"{at}/gone")]):
                pytest.fail("the job must not run")
        assert entries(tmp_path) == []
        with pytest.raises(InputUrlRefused, match="private"):
            async with placed(InputFiles(tmp_path), files):
                pytest.fail("the job must not run")
        await runner.cleanup()

    run_async(scenario())


# --- files that are looked into first -----------------------------------------------------------


def test_a_file_that_was_looked_into_is_fetched_once_and_is_in_place_later(run_async: RunAsync, tmp_path: Path) -> None:
    asked: list[str] = []

    async def answer(request: web.BaseRequest) -> web.Response:
        asked.append(request.path)
        return web.Response(body=request.path.encode())

    async def scenario() -> None:
        runner, at = await _serve(answer)
        files = [InputFile("a", url=f"{at}/a"), InputFile("b", url=f"{at}/b"), InputFile("b", url=f"{at}/later")]
        with InputFiles(tmp_path, UrlFetcher(LOOPBACK)).of_job(files) as job:
            assert await job.look_into("b", lambda data: (len(data), data[:3], data[3:100])) == (6, b"/la", b"ter")
            assert asked == ["/later"]
            assert list(listing(tmp_path).values()) == [b"/later"], "staged, not placed"
            async with job.placed():
                assert listing(tmp_path) == {"a": b"/a", "b": b"/later"}
            assert sorted(asked) == ["/a", "/later"]
            async with job.placed():
                assert listing(tmp_path) == {"a": b"/a", "b": b"/later"}, "a second run has them as well"
        assert entries(tmp_path) == []
        await runner.cleanup()

    run_async(scenario())


def test_a_file_that_was_looked_into_is_gone_when_the_job_fails_before_its_turn(run_async: RunAsync, tmp_path: Path) -> None:
    async def scenario() -> None:
        with InputFiles(tmp_path).of_job([InputFile("a", A)]) as job:
            await job.look_into("a", len)
            assert entries(tmp_path) != []
        assert entries(tmp_path) == []

    run_async(scenario())


VIDEO_BYTES = 64_000_000


def test_of_a_large_video_only_the_metadata_is_in_memory(run_async: RunAsync, tmp_path: Path) -> None:
    video = tmp_path / "video.mp4"
    with video.open("wb") as stream:
        stream.write(box(b"ftyp", b"isom") + (VIDEO_BYTES + 8).to_bytes(4, "big") + b"mdat")
        stream.seek(VIDEO_BYTES, os.SEEK_CUR)
        keys = box(b"keys", bytes(4) + (1).to_bytes(4, "big") + box(b"mdta", b"prompt"))
        items = box(b"ilst", box((1).to_bytes(4, "big"), box(b"data", bytes(8) + b'{"1": {"class_type": "A"}}')))
        stream.write(box(b"moov", box(b"udta", box(b"meta", bytes(4) + keys + items))))

    async def answer(_: web.BaseRequest) -> web.StreamResponse:
        return web.FileResponse(video)

    async def scenario() -> None:
        runner, at = await _serve(answer)
        with InputFiles(tmp_path / "input", UrlFetcher(LOOPBACK)).of_job([InputFile("v.mp4", url=at)]) as job:
            tracemalloc.start()
            try:
                found = await job.look_into("v.mp4", embedded_workflow)
                peak_bytes = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
        await runner.cleanup()
        assert found is not None
        assert found.prompt == {"1": {"class_type": "A"}}
        assert peak_bytes < VIDEO_BYTES / 4, "some pieces on their way to the disk"

    run_async(scenario())


def box(kind: bytes, content: bytes) -> bytes:
    return (len(content) + 8).to_bytes(4, "big") + kind + content


def test_a_cancelled_job_ends_its_fetch_and_leaves_nothing(run_async: RunAsync, tmp_path: Path) -> None:
    async def scenario() -> None:
        sent, let_go = asyncio.Event(), asyncio.Event()

        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            try:
                while True:
                    await response.write(bytes(100_000))
                    sent.set()
                    await asyncio.sleep(0)
            finally:
                let_go.set()

        async def job() -> None:
            folder = InputFiles(tmp_path, UrlFetcher(LOOPBACK, UrlFetchLimits(max_bytes=1 << 40)))
            async with placed(folder, [InputFile("a.png", A), InputFile("b", url=at)]):
                pytest.fail("the job must not run")

        runner, at = await _serve(answer)
        task = asyncio.create_task(job())
        await sent.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert entries(tmp_path) == []
        await let_go.wait()
        await runner.cleanup()

    run_async(scenario())


def test_what_a_killed_worker_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".job-x").mkdir()
    (tmp_path / ".job-x" / "0").touch()
    (tmp_path / "keep.png").touch()
    clear_leftover_inputs(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["keep.png"]
    clear_leftover_inputs(tmp_path / "absent")
