"""The benchmark's Diffusers runner, on a tiny pipeline: its picture is Diffusers' own, and it tells what it used."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pocketdiffusion_bench.case import Case
from pocketdiffusion_bench.events import read_events
from pocketdiffusion_bench.peers import PEERS
from pocketdiffusion_bench.peers.base import RUNNERS

pytestmark = [pytest.mark.torch, pytest.mark.slow]

CASE = Case("tiny", "diffusers", width=32, height=32, steps=2, guidance=3.0, prompt="a cat", seed=5, threads=1)


def test_its_picture_is_diffusers_own(tiny: Path, tmp_path: Path) -> None:
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    settings = {"model": str(tiny), "precision": "float32", "scheduler": "EulerDiscreteScheduler", "optimized": False}
    command = [sys.executable, "-E", "-s", str(RUNNERS / PEERS["diffusers"].runner)]
    command += ["--case", json.dumps(CASE.to_json()), "--settings", json.dumps(settings)]
    command += ["--events", str(tmp_path / "events"), "--image", str(tmp_path / "picture.png"), "--images", "2"]
    subprocess.run(command, check=True, timeout=250)
    found = read_events(tmp_path / "events")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Diffusers' own, about its dependencies
        pipe = StableDiffusionPipeline.from_pretrained(str(tiny), local_files_only=True)
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        expected = pipe(
            CASE.prompt,
            width=32,
            height=32,
            num_inference_steps=2,
            guidance_scale=3.0,
            generator=torch.Generator("cpu").manual_seed(5),
        ).images[0]
    assert len(found.pictures) == 2 and found.done
    for file in found.pictures:
        difference = np.asarray(Image.open(file), int) - np.asarray(expected, int)
        assert np.abs(difference).max() <= 1  # threads may add up in another order
    used = found.configuration
    assert {key: used[key] for key in ("device", "precision", "threads", "width", "height", "steps", "guidance")} == {
        "device": "cpu",
        "precision": "float32",
        "threads": 1,
        "width": 32,
        "height": 32,
        "steps": 2,
        "guidance": 3.0,
    }
    assert (used["sampler"], used["evaluations"], used["noise"]) == ("EulerDiscreteScheduler", 2, "torch-cpu")
    one = ["text_encode", "step", "step", "vae_decode", "save", "image"]
    assert [span.name for span in found.spans] == ["import", "load", *one, *one]
