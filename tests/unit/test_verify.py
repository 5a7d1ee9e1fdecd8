"""Verification of a bundle against its golden tensors and picture, on the fake engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pocketdiffusion import verify as module
from pocketdiffusion.backends import Choice
from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.backends.fake import FakeBackend
from pocketdiffusion.bundle import Bundle, file_entries, write_manifest
from pocketdiffusion.bundle.manifest import GoldenImage
from pocketdiffusion.errors import BundleUnsupported
from pocketdiffusion.golden import sqnr_db
from pocketdiffusion.image import save
from pocketdiffusion.pipeline import Pipeline
from pocketdiffusion.verify import Check, psnr_db, verify


@pytest.fixture(autouse=True)
def _fake_engine(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocketdiffusion.components.load", lambda name: backend)
    monkeypatch.setattr(
        module,
        "choose_devices",
        lambda bundle, device: dict.fromkeys(bundle.manifest.components, Choice("fake", "cpu", "")),
    )


def checks(bundle: Bundle) -> dict[str, Check]:
    return {check.subject: check for check in verify(bundle, "fake:cpu", SessionOptions())}


def test_a_sound_bundle_passes(tiny_bundle: Bundle) -> None:
    found = checks(tiny_bundle)
    assert set(found) == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    assert all(check.passed and check.figure == float("inf") for check in found.values())


def test_a_graph_that_computes_something_else_fails_with_its_figure(tiny_bundle: Bundle, backend: FakeBackend) -> None:
    graphs = dict(backend.graphs)
    right = graphs["unet/model.fake"]
    graphs["unet/model.fake"] = replace(
        right, function=lambda feeds: {"out_sample": 1.01 * np.asarray(right.function(feeds)["out_sample"])}
    )
    backend.graphs = graphs
    found = checks(tiny_bundle)
    assert not found["unet"].passed and found["unet"].figure == pytest.approx(40, abs=0.1)
    assert found["vae_decoder"].passed


def test_a_graph_that_does_not_run_fails_with_the_reason(tiny_bundle: Bundle, backend: FakeBackend) -> None:
    graphs = dict(backend.graphs)
    graphs["unet/model.fake"] = replace(graphs["unet/model.fake"], fail_at_open="out of memory")
    backend.graphs = graphs
    found = checks(tiny_bundle)["unet"]
    assert found.figure is None and not found.passed and "out of memory" in found.note


@pytest.mark.parametrize(("change", "passed"), [(0, True), (20, False)])
def test_the_golden_picture_is_made_again(pipe: Pipeline, tiny_bundle: Bundle, change: int, passed: bool) -> None:
    pixels = pipe("a cat", seed=4, num_inference_steps=3, guidance_scale=2.0).pixels
    assert pixels is not None
    folder: Path = tiny_bundle.path
    save((pixels[0] // 2 + change).astype(np.uint8) if change else pixels[0], folder / "golden.png", metadata=None)
    golden = GoldenImage("a cat", 4, 3, 2.0, "golden.png", 90.0, 40.0)
    write_manifest(folder, replace(tiny_bundle.manifest, golden_image=golden, files=file_entries(folder)))
    assert checks(Bundle.open(folder))["image"].passed is passed


def test_nothing_to_check_against_is_said(tiny_bundle: Bundle) -> None:
    bare = replace(tiny_bundle, manifest=replace(tiny_bundle.manifest, golden=None))
    with pytest.raises(BundleUnsupported, match="no golden tensors"):
        checks(bare)


def test_decibels() -> None:
    assert sqnr_db(np.array([1.0, 1.0]), np.array([1.1, 1.0])) == pytest.approx(10 * np.log10(2 / 0.01))
    assert psnr_db(np.array([0]), np.array([255])) == 0
    assert psnr_db(np.array([7]), np.array([7])) == float("inf")
