"""Two runtimes on OpenVINO: optimum-intel (Diffusers' pipelines) and openvino-genai (C++, without torch).

From a source both run what `optimum-cli export openvino` makes of it, with weights as the case's recipe says; a bundle
of ours in OpenVINO's format they read as it is, and the configuration says which. optimum-intel 1.27 is the newest that
fits Diffusers 0.39 without torchvision, of which there is no build that goes with a torch without CUDA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocketdiffusion_bench import models
from pocketdiffusion_bench.case import Case
from pocketdiffusion_bench.once import make_once
from pocketdiffusion_bench.peers.base import SCHEDULERS, Peer
from pocketdiffusion_bench.peers.diffusers import PINS, TORCH
from pocketdiffusion_bench.peers.optimum_onnx import OPTIMUM, optimum_cli
from pocketdiffusion_bench.peers.venv import Environment

ENGINE = ("openvino==2026.4.1", "openvino-tokenizers==2026.4.1.0")
CONVERTER = Environment("optimum-intel", (TORCH, ("optimum-intel==1.27.0", "nncf==3.4.0", *OPTIMUM, *PINS, *ENGINE)))
WEIGHTS = {"fp32": "fp32", "fp16": "fp16", "int8": "int8"}
"""Our recipes -> the converter's names; int8 is of the weights only, in both."""
GENAI_SCHEDULERS = {
    "ddim": "DDIM",
    "euler": "EULER_DISCRETE",
    "euler a": "EULER_ANCESTRAL_DISCRETE",
    "lcm": "LCM",
    "pndm": "PNDM",
}


def _prepare(peer: Peer, case: Case) -> Mapping[str, Any]:
    settings: dict[str, Any] = {"scheduler": peer.sampler(case), "precision": peer.precision(case)}
    if not models.is_source(case.model):
        return settings | peer.bundle(case, "openvino")
    source, recipe = models.source(case), peer.recipe(case)

    def command(folder: Path) -> Sequence[str]:
        return [*optimum_cli(CONVERTER, "openvino", source, "--weight-format", WEIGHTS[recipe]), str(folder)]

    key = [models.identity(case.model), str(source), repr(CONVERTER.installs)]
    model = make_once(f"optimum-intel-{recipe}-{models.slug(case.model)}", key, command)
    return {**settings, "model": str(model), "graphs": "optimum-cli export openvino", "recipe": recipe}


OPTIMUM_INTEL = Peer(
    name="optimum-intel",
    description="optimum-intel: OVDiffusionPipeline on OpenVINO",
    environment=CONVERTER,
    runner="run_optimum_intel.py",
    devices=("cpu", "openvino:cpu"),
    precisions=("float32", "bfloat16"),
    recipes=tuple(WEIGHTS),
    samplers=SCHEDULERS,
    prepare=_prepare,
)
GENAI = Peer(
    name="openvino-genai",
    description="openvino-genai: Text2ImagePipeline",
    environment=Environment("openvino-genai", (("openvino-genai==2026.4.1.0", *ENGINE, "numpy", "pillow"),)),
    runner="run_openvino_genai.py",
    devices=("cpu", "openvino:cpu"),
    precisions=("float32", "bfloat16"),
    recipes=tuple(WEIGHTS),
    samplers=GENAI_SCHEDULERS,
    prepare=_prepare,
    converters=(CONVERTER,),
)
