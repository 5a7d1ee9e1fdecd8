"""`random:NAME`: the true architecture of a known checkpoint with seeded random weights.

Latency, memory and numeric error can be measured on it without a download; the pictures mean nothing. Every weight
tensor is drawn from its own generator, seeded with its name, and scaled so that a layer keeps its input's variance:
activations stay finite through any depth. Only uniform numbers, one difference and one product make a weight, so that
every machine with the same torch gets the same bits.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.sources.architectures import ARCHITECTURES
from pocketdiffusion_export.sources.base import Loaded
from pocketdiffusion_export.sources.build import build, empty_modules, require_family

PREFIX = "random:"


def load(source: str) -> Loaded:
    """The pipeline of "random:NAME", float32. Raises ExportError for names without architecture or family."""
    name = source.removeprefix(PREFIX)
    if name not in ARCHITECTURES:
        raise ExportError(
            f"unknown architecture '{source}'; choose one of: {', '.join(map(PREFIX.__add__, ARCHITECTURES))}"
        )
    architecture = ARCHITECTURES[name]
    family = require_family(architecture, source)
    modules = empty_modules(architecture)
    for part, module in modules.items():
        fill(module, part)
    return build(architecture, modules, family, {})


def fill(module: Any, name: str) -> None:
    """Overwrite every parameter of a torch module; `name` is part of each one's seed."""
    import torch

    with torch.no_grad():
        for key, tensor in module.named_parameters():
            digest = hashlib.sha256(f"{name}.{key}".encode()).digest()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "little"))
            tensor.uniform_(generator=generator).sub_(0.5).mul_(2 * _bound(tensor.shape))
            if tensor.ndim < 2 and key.endswith("weight"):
                tensor.add_(1)  # the scale of a norm


def _bound(shape: tuple[int, ...]) -> float:
    """Largest value: variance 1 / inputs for matrices and kernels, a tenth for the vectors of norms and biases."""
    return math.sqrt(3 / math.prod(shape[1:])) if len(shape) > 1 else 0.1
