"""volume_layout.md says what layout.py does."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from devkit.local_worker import PROJECT
from worker.seed.s3_api import DATACENTERS, S3Api, S3Place
from worker.seed.s3_volume import S3Volume
from worker.store.layout import Layout
from worker.store.seals import Seal

TEXT = (PROJECT / "volume_layout.md").read_text("utf-8")
ROOT = Path("/v")
LAYOUT = Layout(ROOT)
ASIDE = "<time>-<nonce>-<size>-<mtime>-7-<digest>"


@pytest.mark.parametrize(
    ("documented", "path"),
    [
        ("models/<folder>/<name>", LAYOUT.model("F", "N")),
        ("models.toml", LAYOUT.manifest),
        ("workflows/<name>.json", LAYOUT.workflow("N")),
        (".worker/seals/<folder>/<name>.json", LAYOUT.seal("F", "N")),
        (".worker/seals/<folder>/<name>.json.pending", LAYOUT.pending_seal("F", "N")),
        (".worker/pending/<inode>.json", LAYOUT.pending(7)),
        (".worker/partial/<sha256>/<nonce>.part", LAYOUT.partial("K") / "<nonce>.part"),
        (".worker/partial/<sha256>/<nonce>.journal", LAYOUT.partial("K") / "<nonce>.journal"),
        (".worker/lookups/<digest>.json", LAYOUT.lookup("<digest>")),
        (".worker/lookups/<digest>.asking", LAYOUT.lookup_mark("<digest>")),
        (".worker/used/<endpoint>.json", LAYOUT.used("<endpoint>")),
        (".worker/leases/<worker>.json", LAYOUT.lease("<worker>")),
        (".worker/leases/began", LAYOUT.leases_began),
        (".worker/leases/clock", LAYOUT.leases_clock),
        (".worker/last_used.json", LAYOUT.last_used),
        (".worker/leases/<worker>.<nonce>.removing", LAYOUT.removal_mark("<worker>.<nonce>")),
        (".worker/removing/<time>-<nonce>-<size>-<mtime>-<inode>-<digest>", LAYOUT.removing / ASIDE),
        (".worker/removed/<folder>/<name>.json", LAYOUT.tombstone("F", "N")),
        ("huggingface-cache/hub/models--ORG--NAME/...", LAYOUT.host_cache_repo("ORG/NAME") / "..."),
    ],
)
def test_each_path_is_where_the_document_says(documented: str, path: Path) -> None:
    assert f"| `{documented}` |" in TEXT
    spelled = documented.replace("<folder>", "F").replace("<name>", "N").replace("<sha256>", "K").replace("<inode>", "7")
    assert str(path.relative_to(ROOT)) == spelled


def test_the_locks_are_where_the_document_says() -> None:
    assert str(LAYOUT.lock("<sha256>").relative_to(ROOT)) == ".worker/locks/<sha256>"
    assert LAYOUT.lock_progress("<sha256>").name == "<sha256>.json"
    assert "| `.worker/locks/<sha256>...` |" in TEXT


def test_the_seal_shown_has_the_fields_a_seal_has() -> None:
    shown = json.loads(re.search(r"```json\n(.*?)```", TEXT, re.DOTALL)[1])  # type: ignore[index]  # there is one
    assert set(shown) == {item.name for item in fields(Seal)}


def test_the_fields_of_a_seal_are_explained() -> None:
    section = TEXT.partition("## A seal")[2].partition("\n## ")[0].partition("```json")[2].partition("```")[2]
    assert [item.name for item in fields(Seal) if f"`{item.name}`" not in section] == []


def test_the_data_centres_are_those_that_the_seeder_takes() -> None:
    section = TEXT.partition("## Through S3")[2].partition("\n## ")[0]
    named = re.findall(r"\b[A-Z]{2,3}-[A-Z]{2,3}-\d\b", section.partition("The seeder writes")[0])
    assert tuple(named) == DATACENTERS


def test_a_key_is_the_path_on_the_mounted_volume() -> None:
    volume = S3Volume(S3Api(S3Place("v", "EU-RO-1", ""), None))
    assert volume.key("F", "sub/N") == str(LAYOUT.model("F", "sub/N").relative_to(ROOT))
