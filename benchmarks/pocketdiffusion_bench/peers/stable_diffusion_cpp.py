"""stable-diffusion.cpp: C++ on ggml, by its Python binding, which pip compiles here (needs a C++ compiler and cmake).

It reads the source's Diffusers folder and stores weights as a recipe says when it loads them. Its arithmetic follows
from that type. It gets the noise levels that ours would take, so that both make the same picture; its own samplers are
fewer, and a model whose config names another one needs a sampler asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pocketdiffusion.sampling.scheduler import sampling_plan
from pocketdiffusion_bench import models
from pocketdiffusion_bench.case import Case
from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.peers.base import Peer
from pocketdiffusion_bench.peers.venv import Environment

TYPES = {"fp32": "f32", "fp16": "f16", "int8": "q8_0", "int4": "q4_0"}
"""Our recipes -> ggml's types of weights: int8 and int4 in blocks of 32 with one scale."""
SAMPLERS = {"euler": "euler", "heun": "heun", "dpm2": "dpm2", "dpm++ 2m": "dpm++2m"}


def _prepare(peer: Peer, case: Case) -> Mapping[str, Any]:
    folder = models.source(case)
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text(encoding="utf-8"))
    plan = sampling_plan(config, sampler=case.sampler)
    if plan.sampler not in SAMPLERS:
        allowed = ", ".join(SAMPLERS)
        raise BenchError(
            f"{peer.name} has no sampler '{plan.sampler}', which is the model's; ask for one of: {allowed}"
        )
    return {
        "model": str(folder),
        "sampler": SAMPLERS[plan.sampler],
        "sigmas": plan.levels(models.settled(case).steps).sigmas.tolist(),
        "type": TYPES[peer.recipe(case)],
        "recipe": peer.recipe(case),
    }


PEER = Peer(
    name="stable-diffusion-cpp",
    description="stable-diffusion.cpp on ggml, by stable-diffusion-cpp-python",
    environment=Environment("stable-diffusion-cpp", (("stable-diffusion-cpp-python==0.4.7", "pillow"),)),
    runner="run_stable_diffusion_cpp.py",
    devices=("cpu",),
    precisions=(),
    recipes=tuple(TYPES),
    samplers=SAMPLERS,
    prepare=_prepare,
)
