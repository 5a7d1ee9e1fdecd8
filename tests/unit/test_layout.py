"""What the tree promises: folders, file lengths, public names, cheap imports, one registry line for each part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pocketdiffusion

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "runtime": "pocketdiffusion",
    "export": "pocketdiffusion_export",
    "benchmarks": "pocketdiffusion_bench",
}
RECIPE = ROOT / "models/sticker/train"
SOURCES = [path for folder in (*PACKAGES, "tests", RECIPE) for path in (ROOT / folder).rglob("*.py")]


def test_each_folder_holds_exactly_one_package_and_no_loose_module() -> None:
    for folder, package in PACKAGES.items():
        assert [path.name for path in (ROOT / folder).iterdir() if (path / "__init__.py").exists()] == [package]
        assert not list((ROOT / folder).glob("*.py"))
    outside = {path for path in (ROOT / "models").rglob("*.py") if RECIPE / "sticker_train" not in path.parents}
    assert outside == {RECIPE / "__main__.py"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_public_names_exist_and_are_all_listed() -> None:
    assert pocketdiffusion.__all__ == sorted(pocketdiffusion.__all__)
    for name in pocketdiffusion.__all__:
        assert getattr(pocketdiffusion, name) is not None
    assert dir(pocketdiffusion) == pocketdiffusion.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pocketdiffusion.nothing


def in_fresh_process(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in PACKAGES)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return done.stdout


def test_importing_the_package_loads_numpy_at_most_and_switches_telemetry_off() -> None:
    loaded = json.loads(
        in_fresh_process(
            "import json, os, sys, pocketdiffusion;"
            "print(json.dumps([sorted(sys.modules), os.environ.get('ORT_DISABLE_TELEMETRY')]))"
        )
    )
    heavy = {"torch", "onnxruntime", "openvino", "coremltools", "PIL", "tokenizers", "safetensors", "diffusers"}
    assert not heavy & {name.partition(".")[0] for name in loaded[0]}
    assert loaded[1] == "1"


def test_generating_loads_no_training_library() -> None:
    loaded = in_fresh_process(
        "import sys, pocketdiffusion.cli.generate, pocketdiffusion.pipeline, pocketdiffusion.families.sd,"
        "pocketdiffusion.verify; print(*sys.modules)"
    ).split()
    assert not {"torch", "transformers", "diffusers", "onnx", "optimum"} & {name.partition(".")[0] for name in loaded}
    assert "urllib.request" not in loaded  # takes 3 MB, and nothing here uses a network
