"""The embedded model by the command line: pictures, repeats, engines, verification."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pocketdiffusion.backends import available
from pocketdiffusion.verify import psnr_db

from .conftest import Run

pytest.importorskip("onnxruntime")

BUNDLE = Path(__file__).resolve().parents[2] / "models/sticker/bundle"


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_the_default_command_draws_the_models_own_golden_apple(run: Run, tmp_path: Path) -> None:
    printed = run("generate", "a", "red", "apple", "--seed", "0").stdout
    assert printed == "sticker-0.png\n"
    assert psnr_db(pixels(BUNDLE / "golden.png"), pixels(tmp_path / "sticker-0.png")) > 30


def test_twice_the_same_command_gives_the_same_bytes(run: Run, tmp_path: Path) -> None:
    for name in ("a.webp", "b.webp"):
        run("generate", "a blue book", "--seed", "5", "--steps", "6", "--sampler", "dpm++ 2m sde", "-o", name)
    assert (tmp_path / "a.webp").read_bytes() == (tmp_path / "b.webp").read_bytes()


def test_the_best_of_several_is_the_one_with_the_highest_score(run: Run) -> None:
    words = ("generate", "a red heart", "--seed", "0", "--steps", "4", "-n", "4", "--json")
    every, best = (json.loads(run(*words, "--best", count).stdout) for count in ("4", "1"))
    assert every["scores"] == sorted(every["scores"], reverse=True) and len(set(every["scores"])) == 4
    assert len(best["images"]) == 1 and best["images"][0]["seed"] == every["images"][0]["seed"]


def test_engines_agree_within_45_db(run: Run, tmp_path: Path) -> None:
    devices = {f"{info.backend}:{info.device}" for info in available()} & {"onnxruntime:cpu", "openvino:cpu"}
    if len(devices) < 2:
        pytest.skip("needs onnxruntime and openvino")
    for device in devices:
        run("generate", "a red car", "--seed", "2", "-o", device.replace(":", "-") + ".png", "--device", device)
    assert psnr_db(pixels(tmp_path / "onnxruntime-cpu.png"), pixels(tmp_path / "openvino-cpu.png")) >= 45


def test_components_can_run_on_different_engines(run: Run) -> None:
    pytest.importorskip("openvino")
    words = (
        "generate",
        "a cat",
        "--seed",
        "2",
        "--steps",
        "2",
        "--json",
        "--device",
        "vae=openvino:cpu,onnxruntime:cpu",
    )
    used = json.loads(run(*words).stdout)["configuration"]
    assert used["unet"]["device"] == "onnxruntime:cpu"
    assert used["vae_decoder"]["device"] == "openvino:cpu"


def test_the_bundle_verifies_on_every_device_here(run: Run) -> None:
    report = json.loads(run("verify", "sticker", "--json").stdout)
    assert report["passed"] and {check["subject"] for check in report["checks"]} > {"unet", "image"}


def test_an_absent_device_is_refused_with_what_is_here(run: Run, tmp_path: Path) -> None:
    done = run("generate", "a cat", "--device", "onnxruntime:qnn", code=1)
    assert "onnxruntime:cpu" in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))


def test_devices_and_models_are_listed(run: Run) -> None:
    assert "onnxruntime:cpu" in run("devices").stdout
    assert [model["name"] for model in json.loads(run("models", "--json").stdout)] == ["sticker"]


def test_without_its_manifest_the_bundle_is_refused_and_not_taken_for_another_exporters(
    run: Run, tmp_path: Path
) -> None:
    shutil.copytree(BUNDLE, tmp_path / "copy")
    (tmp_path / "copy/manifest.json").unlink()
    done = run("generate", "a cat", "--model", "./copy", code=1)
    assert "manifest.json: missing" in done.stderr and done.stderr.count("\n") == 1
