"""optimum-onnx: Diffusers' pipelines with their graphs on ONNX Runtime.

From a source it runs what `optimum-cli export onnx` makes of it; a bundle of ours in ONNX it reads as it is, and the
configuration says which.
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
from pocketdiffusion_bench.peers.venv import Environment

OPTIMUM = ("optimum==2.1.0", "optimum-onnx==0.1.0")
ENVIRONMENT = Environment("optimum-onnx", (TORCH, (*OPTIMUM, *PINS, "onnx==1.23.2", "onnxruntime==1.31.1")))


def optimum_cli(environment: Environment, kind: str, source: Path, *options: str) -> list[str]:
    """The command that converts a Diffusers folder, but for the folder to write."""
    tool = [str(environment.python()), "-E", "-s", "-W", "ignore", "-m", "optimum.commands.optimum_cli", "export", kind]
    return [*tool, "--model", str(source), "--task", "text-to-image", *options]


def _prepare(peer: Peer, case: Case) -> Mapping[str, Any]:
    settings: dict[str, Any] = {"scheduler": peer.sampler(case)}
    if not models.is_source(case.model):
        return settings | peer.bundle(case, "onnx")
    source = models.source(case)

    def command(folder: Path) -> Sequence[str]:
        return [*optimum_cli(peer.environment, "onnx", source), str(folder)]

    key = [models.identity(case.model), str(source), repr(peer.environment.installs)]
    model = make_once(f"optimum-onnx-{models.slug(case.model)}", key, command)
    return {**settings, "model": str(model), "graphs": "optimum-cli export onnx", "recipe": peer.recipe(case)}


PEER = Peer(
    name="optimum-onnx",
    description="optimum-onnx: ORTDiffusionPipeline on ONNX Runtime",
    environment=ENVIRONMENT,
    runner="run_optimum_onnx.py",
    devices=("cpu", "onnxruntime:cpu"),
    precisions=("float32",),
    recipes=("fp32",),
    samplers=SCHEDULERS,
    prepare=_prepare,
)
