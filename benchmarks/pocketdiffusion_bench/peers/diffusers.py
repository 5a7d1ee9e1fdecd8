"""Hugging Face Diffusers on torch: as it comes, and as its own guide makes it fastest on a CPU.

The guide: bfloat16, channels_last, torch.compile (Diffusers, docs/source/en/optimization/fp16.md). torch is installed
first and alone, because whatever else asks for it without a version may take a build with several GB of CUDA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketdiffusion_bench import models
from pocketdiffusion_bench.case import Case
from pocketdiffusion_bench.peers.base import SCHEDULERS, Peer
from pocketdiffusion_bench.peers.venv import Environment

TORCH = ("torch==2.13.0",)
PINS = ("diffusers==0.39.0", "transformers==4.57.6")
ENVIRONMENT = Environment("diffusers", (TORCH, (*PINS, "accelerate==1.15.0", "numpy", "pillow")))


def _prepare(peer: Peer, case: Case) -> Mapping[str, Any]:
    return {
        "model": str(models.source(case)),
        "precision": peer.precision(case),
        "scheduler": peer.sampler(case),
        "optimized": peer.name == "diffusers-best",
    }


EAGER = Peer(
    name="diffusers",
    description="Diffusers on torch, eager",
    environment=ENVIRONMENT,
    runner="run_diffusers.py",
    devices=("cpu",),
    precisions=("float32", "bfloat16"),
    recipes=("fp32",),
    samplers=SCHEDULERS,
    prepare=_prepare,
)
BEST = Peer(
    name="diffusers-best",
    description="Diffusers on torch, compiled, channels last, bfloat16",
    environment=ENVIRONMENT,
    runner="run_diffusers.py",
    devices=("cpu",),
    precisions=("bfloat16", "float32"),
    recipes=("fp32",),
    samplers=SCHEDULERS,
    prepare=_prepare,
)
