"""Bundles: one spelling of the manifest, what opening checks and remembers, links, places, real writers' files."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketdiffusion.bundle import Bundle, dump_manifest, file_entries, integrity, parse_manifest, write_manifest
from pocketdiffusion.bundle import bundle as bundle_module
from pocketdiffusion.bundle.manifest import FORMAT_VERSION
from pocketdiffusion.bundle.paths import cache_dir, models_dir, path_problem
from pocketdiffusion.bundle.strict_json import load_json
from pocketdiffusion.errors import (
    BundleCorrupt,
    BundleUnsafe,
    BundleUnsupported,
)

from . import bundle_maker as maker
from . import bundle_mutations as damage

links = pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path: Path = maker.make_bundle(tmp_path / "bundle")
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were hashed, in the order of hashing."""
    names: list[str] = []

    def record(root: Path, files: Any, original: Any = bundle_module.check_hashes) -> None:
        names.extend(entry.path for entry in files)
        original(root, files)

    monkeypatch.setattr(bundle_module, "check_hashes", record)
    return names


def settle() -> None:
    """Wait until the files' times lie far enough back to be trusted."""
    time.sleep(0.15)


# The manifest


def test_dump_and_parse_are_inverse(folder: Path) -> None:
    manifest = maker.make_manifest(folder)
    data = dump_manifest(manifest)
    assert parse_manifest(data) == manifest
    assert dump_manifest(parse_manifest(data)) == data
    assert data == (folder / "manifest.json").read_bytes()


def test_whole_numbers_in_float_fields_have_one_spelling(folder: Path) -> None:
    manifest = maker.make_manifest(folder)
    whole = replace(manifest, numbers=replace(manifest.numbers, default_guidance=np.float32(7), latent_shift=0))
    exact = replace(manifest, numbers=replace(manifest.numbers, default_guidance=7.0, latent_shift=0.0))
    assert dump_manifest(whole) == dump_manifest(exact)


def test_every_byte_of_the_manifest_matters(folder: Path) -> None:
    data = (folder / "manifest.json").read_bytes()
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        with pytest.raises(BundleCorrupt, match=r"^manifest\.json: "):
            parse_manifest(bytes(changed))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"width": 10**9}, "numbers.width is 1000000000, allowed: a number from 1 to 16384"),
        ({"vae_factor": 0}, "numbers.vae_factor is 0"),
        ({"width": True}, "numbers.width is True, allowed: an integer"),
        ({"latent_scale": float("nan")}, "numbers.latent_scale is nan"),
        ({"height": 72}, "72 is no multiple of 16"),
        ({"latent_rgb": ((1.0, 1.0, 1.0),)}, "latent_rgb has 1 rows"),
    ],
)
def test_a_writer_learns_at_once_what_a_reader_would_refuse(folder: Path, change: Any, reason: str) -> None:
    manifest = maker.make_manifest(folder)
    with pytest.raises(BundleCorrupt, match=reason):
        dump_manifest(replace(manifest, numbers=replace(manifest.numbers, **change)))


def test_newer_format_asks_for_an_upgrade(folder: Path) -> None:
    maker.rehash(folder, lambda all: all.update(format_version=FORMAT_VERSION + 1, something_new=[1]))
    with pytest.raises(BundleUnsupported, match=rf"format {FORMAT_VERSION + 1} is newer.*upgrade pocketdiffusion"):
        Bundle.open(folder)


@given(st.binary(max_size=200) | st.text(alphabet='{}[]",:\\u019eE.-+ntf', max_size=60).map(str.encode))
def test_json_reader_raises_nothing_else(data: bytes) -> None:
    try:
        value = load_json(data, "x.json")
    except BundleCorrupt:
        return
    assert value == json.loads(data)


# Opening


def test_an_open_bundle_hands_out_what_it_lists(folder: Path, cache: Path) -> None:
    bundle = Bundle.open(str(folder), cache_dir=cache)
    assert bundle.path == folder.resolve()
    assert bundle.graph("unet") == bundle.file("unet/model.onnx") == bundle.path / "unet/model.onnx"
    assert bundle.read_json("scheduler/scheduler_config.json")["beta_start"] == 0.00085
    assert bundle.size_bytes == sum(entry.size for entry in file_entries(folder))
    assert bundle.digest == json.loads((folder / "manifest.json").read_bytes())["digest"]


@pytest.mark.parametrize("name", ["missing.json", "manifest.json", "../bundle/unet/model.onnx", "UNET/model.onnx"])
def test_unlisted_files_are_not_handed_out(folder: Path, cache: Path, name: str) -> None:
    bundle = Bundle.open(folder, cache_dir=cache)
    with pytest.raises(BundleUnsupported, match="has no file"):
        bundle.file(name)
    with pytest.raises(BundleUnsupported, match="has no file"):
        bundle.read_json(name)
    with pytest.raises(BundleUnsupported, match="no component 'vae_encoder', it has: unet, vae_decoder"):
        bundle.graph("vae_encoder")


def test_second_open_is_fast_and_hashes_nothing(folder: Path, cache: Path, hashed: list[str]) -> None:
    settle()
    first = Bundle.open(folder, cache_dir=cache)
    assert len(hashed) == len(first.manifest.files)
    hashed.clear()
    start = time.perf_counter()
    assert Bundle.open(folder, cache_dir=cache) == first
    assert time.perf_counter() - start < 0.05
    assert hashed == []
    first.verify_all()
    assert len(hashed) == len(first.manifest.files)


def test_a_touched_file_is_hashed_again(folder: Path, cache: Path, hashed: list[str]) -> None:
    settle()
    Bundle.open(folder, cache_dir=cache)
    os.utime(folder / "unet/model.onnx_data", ns=(1, 1))
    hashed.clear()
    Bundle.open(folder, cache_dir=cache)
    assert "unet/model.onnx_data" in hashed


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no change time")
def test_a_change_that_restores_size_and_time_is_found(folder: Path, cache: Path) -> None:
    settle()
    Bundle.open(folder, cache_dir=cache)
    file = folder / "unet/model.onnx_data"
    before = file.stat()
    with open(file, "r+b") as stream:
        stream.write(b"\xff")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BundleCorrupt, match=r"model\.onnx_data: sha256 is"):
        Bundle.open(folder, cache_dir=cache)


def test_a_copy_is_checked_on_its_own(folder: Path, cache: Path, hashed: list[str]) -> None:
    settle()
    Bundle.open(folder, cache_dir=cache)
    hashed.clear()
    Bundle.open(maker.make_bundle(folder.parent / "copy"), cache_dir=cache)
    assert hashed


def test_files_changed_just_now_are_not_remembered(
    folder: Path, cache: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity, "_SETTLED_NS", 10**12)
    Bundle.open(folder, cache_dir=cache)
    hashed.clear()
    Bundle.open(folder, cache_dir=cache)
    assert hashed


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"files": null}'])
def test_a_damaged_record_only_costs_time(folder: Path, cache: Path, hashed: list[str], damage: bytes) -> None:
    settle()
    Bundle.open(folder, cache_dir=cache)
    (record,) = (cache / "verified").iterdir()
    record.write_bytes(damage)
    hashed.clear()
    Bundle.open(folder, cache_dir=cache)
    assert hashed
    hashed.clear()
    Bundle.open(folder, cache_dir=cache)
    assert hashed == []


def test_a_cache_that_cannot_be_written_is_no_error(folder: Path, tmp_path: Path) -> None:
    settle()
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    assert Bundle.open(folder, cache_dir=blocked) == Bundle.open(folder, cache_dir=blocked)


def test_user_folders_follow_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETDIFFUSION_CACHE", str(tmp_path / "c"))
    monkeypatch.setenv("POCKETDIFFUSION_MODELS", str(tmp_path / "m"))
    assert (cache_dir(), models_dir()) == (tmp_path / "c", tmp_path / "m")
    monkeypatch.delenv("POCKETDIFFUSION_CACHE")
    monkeypatch.delenv("POCKETDIFFUSION_MODELS")
    monkeypatch.setenv("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "pocketdiffusion"


# Links and kinds of files


def hub_cache(folder: Path, root: Path) -> Path:
    """The same bundle as the Hugging Face cache keeps it: every file a relative link to a blob."""
    snapshot = root / "models--owner--tiny" / "snapshots" / ("0" * 40)
    blobs = root / "models--owner--tiny" / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(path for path in sorted(folder.rglob("*")) if path.is_file()):
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        (blobs / str(number)).write_bytes(file.read_bytes())
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    return snapshot


@links
def test_the_hub_cache_layout_opens(folder: Path, cache: Path, hashed: list[str]) -> None:
    snapshot = hub_cache(folder, folder.parent / "hub")
    settle()
    assert Bundle.open(snapshot, cache_dir=cache).manifest == Bundle.open(folder, cache_dir=cache).manifest
    hashed.clear()
    Bundle.open(snapshot, cache_dir=cache)
    assert hashed == []


@links
@pytest.mark.parametrize("target", ["models--owner--tiny/secret", "models--owner--tiny-2/blobs/0", "blobs/0"])
def test_only_the_blobs_of_the_same_repository_count(folder: Path, cache: Path, target: str) -> None:
    root = folder.parent / "hub"
    link = hub_cache(folder, root) / "golden/image.png"
    (root / target).parent.mkdir(parents=True, exist_ok=True)
    (root / target).write_bytes(link.read_bytes())
    link.unlink()
    link.symlink_to(root / target)
    with pytest.raises(BundleUnsafe, match=r"golden/image\.png: a link leads out"):
        Bundle.open(root / "models--owner--tiny/snapshots" / ("0" * 40), cache_dir=cache)


@links
def test_a_link_inside_the_bundle_is_fine(folder: Path, cache: Path) -> None:
    (folder / "unet/model.onnx_data").rename(folder / "unet/elsewhere")
    (folder / "unet/model.onnx_data").symlink_to("elsewhere")
    Bundle.open(folder, cache_dir=cache)


@links
def test_a_bundle_reached_by_a_link_opens(folder: Path, cache: Path) -> None:
    (folder.parent / "link").symlink_to(folder)
    assert Bundle.open(folder.parent / "link", cache_dir=cache) == Bundle.open(folder, cache_dir=cache)


@pytest.mark.parametrize(
    "path",
    ["a", "unet/model.onnx", "a b/c", ".hidden/x", "..x/y", "a..b", "日本/é", "console.txt", "com10", "x" * 240],
)
def test_ordinary_paths_are_allowed(path: str) -> None:
    assert path_problem(path) is None


@pytest.mark.parametrize("path", damage.ESCAPES)
def test_escaping_paths_are_not(path: str) -> None:
    assert path_problem(path) is not None


# Writing


def test_file_entries_are_sorted_and_leave_the_manifest_out(folder: Path) -> None:
    paths = [entry.path for entry in file_entries(folder)]
    assert paths == sorted(paths) and "manifest.json" not in paths and len(paths) == 8


@links
@pytest.mark.parametrize(
    "make", [lambda path: path.symlink_to("model.onnx"), lambda path: os.mkfifo(path)], ids=["link", "fifo"]
)
def test_writers_take_regular_files_only(folder: Path, make: Callable[[Path], None]) -> None:
    make(folder / "unet/extra")
    with pytest.raises(BundleUnsafe, match="not a regular file"):
        file_entries(folder)


def test_a_refused_manifest_leaves_the_old_one(folder: Path) -> None:
    before = sorted(folder.rglob("*")), (folder / "manifest.json").read_bytes()
    with pytest.raises(BundleCorrupt):
        write_manifest(folder, replace(maker.make_manifest(folder), name=""))
    assert (sorted(folder.rglob("*")), (folder / "manifest.json").read_bytes()) == before


def test_a_failed_write_leaves_no_trace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(folder.rglob("*"))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_manifest(folder, maker.make_manifest(folder))
    assert sorted(folder.rglob("*")) == before
