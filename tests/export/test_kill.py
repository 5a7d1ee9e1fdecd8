"""Real exports, killed at random moments: every bundle is whole or absent, and the next export succeeds.

The exports are forks of a process that has imported torch and the engines and used neither, so that the moments fall
into the export and not into imports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("openvino")

pytestmark = [pytest.mark.torch, pytest.mark.skipif(sys.platform != "linux", reason="fork and SIGKILL")]

KILLER = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from pocketdiffusion import backends
from pocketdiffusion.bundle import Bundle
from pocketdiffusion.bundle.manifest_json import MANIFEST
for name in ("onnxruntime", "openvino"):
    backends.load(name).version()
import pocketdiffusion_export.export
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizerFast
from pocketdiffusion_export.__main__ import main
torch.set_num_threads(1)
source, preset, folder, points, seed = sys.argv[1:]
folder, chance = Path(folder), random.Random(int(seed))

def start(name, target, recipe):
    child = os.fork()
    if child:
        return child
    with open(folder / "log.txt", "a") as log:
        sys.stdout = sys.stderr = log
        sys.argv = ["export", source, str(folder / name), "--preset", preset, "--target", target, "--recipe", recipe]
        os._exit(main())

def recipes(place):
    visible = [path for path in place.rglob(MANIFEST) if not any(part.startswith(".") for part in path.parts)]
    return [Bundle.open(path.parent).manifest.recipe for path in visible]

begin = time.monotonic()
_, status = os.waitpid(start("replaced", "onnx", "fp32"), 0)
assert status == 0 and recipes(folder / "replaced") == ["fp32"]
length, outcomes = time.monotonic() - begin, []
for point in range(int(points)):
    name, target, recipe = [("fresh", "onnx,openvino", "fp32"), ("replaced", "onnx", "int8")][point % 2]
    shutil.rmtree(folder / "fresh", ignore_errors=True)
    child = start(name, target, recipe)
    time.sleep(chance.uniform(0, 0.98) * length)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    found = recipes(folder / name)
    outcomes.append([name, status, found])
    assert found in ([], ["fp32"], ["fp32", "fp32"]) if name == "fresh" else found in (["fp32"], ["int8"])
for name, target in (("fresh", "onnx,openvino"), ("replaced", "onnx")):
    _, status = os.waitpid(start(name, target, "int8"), 0)
    assert status == 0 and set(recipes(folder / name)) == {"int8"}, (folder / "log.txt").read_text()
left = [file.name for file in folder.rglob(".*")]
assert not left, left
print(json.dumps(outcomes))
"""


def kill(tiny: Path, preset: Path, folder: Path, points: int, seed: int) -> list[list[object]]:
    """[destination, exit status, recipes of the bundles found] after each kill."""
    arguments = [str(tiny), str(preset), str(folder), str(points), str(seed)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", KILLER, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    outcomes: list[list[object]] = json.loads(done.stdout)
    return outcomes


def test_a_killed_export_leaves_whole_bundles(tiny: Path, preset: Path, tmp_path: Path) -> None:
    outcomes = kill(tiny, preset, tmp_path, points=6, seed=0)
    assert len(outcomes) == 6 and any(status == 9 for _, status, _ in outcomes)


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_exports_killed_at_fifty_moments(tiny: Path, preset: Path, tmp_path: Path) -> None:
    outcomes = kill(tiny, preset, tmp_path, points=56, seed=1)
    assert sum(status == 9 for _, status, _ in outcomes) >= 50
