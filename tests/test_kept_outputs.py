"""ComfyUI's outputs stay for cached re-runs, up to a size, and nobody else's files are touched."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.errors import OutputGone, ResultTooLarge
from worker.media.delivery import Delivery
from worker.media.kept_outputs import KeptOutputs

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path


def write(path: Path, size: int, age_s: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, (1_700_000_000 - age_s, 1_700_000_000 - age_s))
    return path


def kept_in(base: Path, limit_bytes: int, **options: Any) -> KeptOutputs:
    kept = KeptOutputs(base / "output", base / "temp", limit_bytes, **options)
    kept.start()
    with kept.using({}):  # a first job
        pass
    return kept


def there(base: Path) -> set[str]:
    found = (path for folder in ("output", "temp") for path in (base / folder).rglob("*"))
    return {path.name for path in found if path.is_file() and not path.name.startswith(".")}


def test_the_oldest_go_first_in_both_folders_and_only_down_to_the_limit(tmp_path: Path) -> None:
    kept = kept_in(tmp_path, 100)
    write(tmp_path / "output/a.png", 40, age_s=1)
    write(tmp_path / "output/sub/b.png", 40, age_s=30)
    write(tmp_path / "temp/c.png", 40, age_s=20)
    kept.sweep()
    assert there(tmp_path) == {"a.png", "c.png"}
    kept.sweep()
    assert there(tmp_path) == {"a.png", "c.png"}


def test_files_of_jobs_being_delivered_and_of_the_last_one_stay(tmp_path: Path) -> None:
    kept = kept_in(tmp_path, 0)
    older, last, current = (write(tmp_path / f"output/{name}.png", 10, age_s=9) for name in ("older", "last", "current"))
    with kept.using({older: 10}):
        pass
    with kept.using({last: 10}):
        pass
    with kept.using({current: 10}):
        kept.sweep()
        assert there(tmp_path) == {"last.png", "current.png"}


def test_what_was_delivered_again_is_young_again(tmp_path: Path) -> None:
    kept = kept_in(tmp_path, 25)
    old, new, last = (
        write(tmp_path / f"output/{name}.png", 10, age_s=age) for name, age in (("old", 99), ("new", 9), ("last", 1))
    )
    for path in (old, last):
        with kept.using({path: 10}):
            pass
    kept.sweep()
    assert there(tmp_path) == {"old.png", "last.png"}
    assert not new.exists()


def test_nothing_is_walked_until_the_sum_of_what_was_delivered_passes_the_limit(tmp_path: Path) -> None:
    kept = kept_in(tmp_path, 100)
    path, other = write(tmp_path / "output/a.png", 60, age_s=1), write(tmp_path / "output/b.png", 60, age_s=1)
    for _ in range(3):  # a cached file counts once
        with kept.using({path: 60}):
            pass
    assert not kept.due()
    with kept.using({other: 60}):
        pass
    assert kept.due()
    kept.sweep()
    assert not kept.due()
    assert there(tmp_path) == {"b.png"}


def test_files_that_no_node_listed_are_found_now_and_then(tmp_path: Path) -> None:
    kept = kept_in(tmp_path, 100)
    write(tmp_path / "output/unlisted.png", 200, age_s=1)
    for _ in range(100):
        assert not kept.due()
        kept.count_job()
    assert kept.due()
    kept.sweep()
    assert there(tmp_path) == set()


def test_files_from_before_the_first_worker_are_somebodys(tmp_path: Path) -> None:
    write(tmp_path / "output/mine.png", 200, age_s=99)
    kept = kept_in(tmp_path, 0)
    write(tmp_path / "output/made.png", 200, age_s=1)
    kept.sweep()
    assert there(tmp_path) == {"mine.png"}


def test_a_worker_that_starts_again_knows_its_own_files(tmp_path: Path) -> None:
    write(tmp_path / "output/_output_images_will_be_put_here", 0, age_s=99)
    kept_in(tmp_path, 0)
    write(tmp_path / "output/made.png", 200, age_s=1)
    kept_in(tmp_path, 0).sweep()
    assert there(tmp_path) == {"_output_images_will_be_put_here"}


def test_on_the_network_volume_only_previews_are_removed(tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    (volume / "output").mkdir(parents=True)
    (tmp_path / "output").symlink_to(volume / "output")
    kept = kept_in(tmp_path, 0, spare=[volume])
    write(tmp_path / "output/a.png", 10, age_s=1)
    write(tmp_path / "temp/b.png", 10, age_s=1)
    kept.sweep()
    assert there(tmp_path) == {"a.png"}


def test_what_a_running_job_writes_meanwhile_stays(tmp_path: Path) -> None:
    kept = kept_in(tmp_path, 0)
    write(tmp_path / "output/a.png", 10, age_s=1)
    (tmp_path / "output/running.mp4").write_bytes(b"just written")
    kept.sweep()
    assert there(tmp_path) == {"running.mp4"}


def test_the_highest_number_stays_taken_so_that_no_name_is_used_again(tmp_path: Path) -> None:
    kept = kept_in(tmp_path, 0)
    paths = [write(tmp_path / f"output/a_{number:05}_.png", 10, age_s=9 - number) for number in (1, 2, 3)]
    other = write(tmp_path / "output/sub/a_00002_.png", 10, age_s=1)
    kept.sweep()
    assert there(tmp_path) == {"a_00003_.png", "a_00002_.png"}
    assert [path.exists() for path in (*paths, other)] == [False, False, True, True]
    assert all(path.stat().st_size == 0 and kept.is_gone(path, 0) for path in (paths[2], other))
    write(tmp_path / "output/a_00004_.png", 10, age_s=1)
    kept.sweep()  # the new one holds the number now
    assert there(tmp_path) == {"a_00004_.png", "a_00002_.png"}


def test_an_empty_holder_that_is_written_again_is_a_file_again(tmp_path: Path) -> None:
    kept = kept_in(tmp_path, 15)
    path = write(tmp_path / "output/a_00001_.png", 20, age_s=1)
    kept.sweep()
    assert kept.is_gone(path, path.stat().st_size)
    write(path, 10, age_s=1)
    kept.sweep()
    assert path.stat().st_size == 10
    assert not kept.is_gone(path, 10)


def test_only_so_many_numbers_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.media.kept_outputs._MOST_HELD", 2)
    kept = kept_in(tmp_path, 0)
    for age in range(5):
        write(tmp_path / f"output/job{age}_00001_.png", 10, age_s=age)
    kept.sweep()
    assert there(tmp_path) == {"job0_00001_.png", "job1_00001_.png"}


def test_models_that_a_workflow_saved_are_models_and_links_are_not_followed(tmp_path: Path) -> None:
    kept = kept_in(tmp_path, 0)
    write(tmp_path / "elsewhere/c.png", 10, age_s=1)
    write(tmp_path / "output/checkpoints/merged.safetensors", 10, age_s=1)
    write(tmp_path / "output/sub/checkpoints/a.png", 10, age_s=1)
    (tmp_path / "output/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "output/link.png").symlink_to(tmp_path / "elsewhere/c.png")
    kept.sweep()
    assert there(tmp_path) == {"merged.safetensors", "link.png"}
    assert (tmp_path / "elsewhere/c.png").exists()


@settings(deadline=None, max_examples=40)
@given(
    jobs=st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 50)), max_size=3), max_size=12),
    limit_bytes=st.integers(0, 150),
)
def test_whatever_jobs_write_the_sweep_never_takes_the_last_jobs_files(
    jobs: list[list[tuple[int, int]]], limit_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.mktemp("kept")
    kept = kept_in(base, limit_bytes)
    for job in jobs:
        files = {write(base / f"output/{name}.png", size, age_s=0): size for name, size in job}
        with kept.using(files):
            pass
        kept.sweep()
        assert all(path.exists() for path in files)
        others = sum(path.stat().st_size for path in (base / "output").glob("*.png") if path not in files)
        assert others <= limit_bytes


@pytest.mark.parametrize("name", ["{index}.png", "a_{index:05}_.png", "p{index}_00001_.png"])
def test_a_cached_rerun_gets_its_files_and_one_that_is_too_old_is_said_to_be_gone(
    name: str, tmp_path: Path, run_async: Callable[[Coroutine[Any, Any, Any]], Any]
) -> None:
    delivery = Delivery(tmp_path / "output", tmp_path / "temp", keep_bytes=1_000)
    delivery._kept.start()
    outputs = [
        {"9": {"images": [{"filename": name.format(index=index), "subfolder": "", "type": "output"}]}} for index in range(3)
    ]

    async def jobs() -> None:
        for index, cached in ((0, False), (0, True), (1, False), (2, False)):
            if not cached:
                write(tmp_path / "output" / name.format(index=index), 900, age_s=9 - index)
            assert len((await delivery.deliver("j", outputs[index])).images) == 1
            delivery.job_ended()
            # The sweep runs beside the next job; here it is waited for.
            for thread in threading.enumerate():
                if thread.name == "keep-outputs":
                    await asyncio.to_thread(thread.join, 30)
        with pytest.raises(OutputGone):
            await delivery.deliver("j", outputs[0])
        assert len((await delivery.deliver("j", outputs[2])).images) == 1

    run_async(jobs())


def test_what_nobody_could_take_goes_as_well(tmp_path: Path, run_async: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
    delivery = Delivery(tmp_path / "output", tmp_path / "temp", keep_bytes=10_000, result_limit_bytes=6_000)
    delivery._kept.start()

    async def jobs() -> None:
        for index in range(10):
            path = write(tmp_path / f"output/{index}.png", 9_000, age_s=20 - index)
            outputs = {"9": {"images": [{"filename": path.name, "subfolder": "", "type": "output"}]}}
            with pytest.raises(ResultTooLarge):
                await delivery.deliver("j", outputs)
            delivery.job_ended()
            for thread in threading.enumerate():
                if thread.name == "keep-outputs":
                    await asyncio.to_thread(thread.join, 30)

    run_async(jobs())
    assert there(tmp_path) == {"9.png"}
