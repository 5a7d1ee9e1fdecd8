"""Where bundles are found, and what is said of folders that are none."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from pocketdiffusion import cli
from pocketdiffusion.bundle import Bundle, models
from pocketdiffusion.bundle.foreign import GOLDEN
from pocketdiffusion.bundle.models import find_bundle, installed
from pocketdiffusion.errors import BundleCorrupt, BundleNotFound, BundleUnsupported

from . import bundle_maker as maker


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path: Path = maker.make_bundle(tmp_path / "bundle")
    return path


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package, a checkout and a user's folder that hold nothing yet."""
    package = tmp_path / "repo" / "runtime" / "pocketdiffusion"
    package.mkdir(parents=True)
    monkeypatch.setattr(models, "_PACKAGE", package)
    monkeypatch.setenv("POCKETDIFFUSION_MODELS", str(tmp_path / "user"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_names_are_looked_up_in_order(places: Path) -> None:
    user = maker.make_bundle(places / "user/one")
    assert find_bundle("one") == user
    checkout = maker.make_bundle(places / "repo/models/one/bundle")
    assert find_bundle("one") == checkout
    embedded = maker.make_bundle(places / "repo/runtime/pocketdiffusion/_models/one")
    other = maker.make_bundle(places / "user/two")
    assert find_bundle("one") == embedded
    assert [(model.name, model.path, model.kind) for model in installed()] == [
        ("one", embedded, "embedded"),
        ("two", other, "user"),
    ]


def test_what_exists_or_has_a_separator_is_a_path(places: Path) -> None:
    maker.make_bundle(places / "here")
    assert find_bundle("here") == Path("here")
    assert find_bundle(places / "here") == places / "here"
    maker.make_bundle(places / "user/here")
    assert find_bundle("here") == Path("here")
    with pytest.raises(BundleNotFound, match="no folder nowhere/at"):
        find_bundle("nowhere/at")


def test_a_folder_that_holds_no_model_does_not_hide_one_of_its_name(places: Path) -> None:
    (places / "one").mkdir()
    with pytest.raises(BundleUnsupported, match="an empty folder"):
        find_bundle("one")
    user = maker.make_bundle(places / "user/one")
    assert find_bundle("one") == user
    (places / "one" / GOLDEN).touch()
    with pytest.raises(BundleCorrupt, match="missing"):
        find_bundle("one")


def test_a_model_that_is_damaged_is_listed_with_the_reason_once(
    places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = maker.make_bundle(places / "user/one")
    next(bundle.glob("unet/*")).unlink()
    assert cli.main(["models"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("one ")]
    assert line.count("is missing") == 1 and line.split()[2] == str(bundle)


@pytest.mark.parametrize("name", ["nothing", "", "a\0b", "..\\x", "con", "x" * 300])
def test_unknown_names_list_what_is_there(places: Path, name: str) -> None:
    maker.make_bundle(places / "user/one")
    with pytest.raises(BundleNotFound) as caught:
        find_bundle(name)
    assert str(caught.value).isprintable()
    if name == "nothing":
        assert "installed: one; looked in " in str(caught.value) and str(places / "user") in str(caught.value)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "an empty folder"),
        (
            ["model_index.json", "unet/w.safetensors"],
            "a Diffusers folder of safetensors weights; run `pocketdiffusion export",
        ),
        (["model_index.json", "transformer/model.onnx"], "a Diffusers folder of ONNX graphs from another exporter"),
        (["v1.ckpt"], "never read"),
        (["notes.txt"], "no model that is known"),
    ],
)
def test_other_folders_are_named_for_what_they_are(tmp_path: Path, files: list[str], says: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(struct.pack("<Q", 0))
    for opener in (find_bundle, Bundle.open):
        with pytest.raises(BundleUnsupported, match=says):
            opener(tmp_path)


def test_a_file_is_no_bundle(folder: Path) -> None:
    with pytest.raises(BundleUnsupported, match="is a file"):
        Bundle.open(folder / "manifest.json")
