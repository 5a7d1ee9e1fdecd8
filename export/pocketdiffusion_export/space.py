"""Whether what an export will write fits on the disk, asked before the long work.

The estimate is a lower bound: weights only, stored as the recipe says. A disk that fills up all the same ends the
export where it happens, with one line and without a bundle.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from pocketdiffusion_export.component import ComponentSpec
from pocketdiffusion_export.errors import ExportError

BYTES = {"float32": 4.0, "float16": 2.0, "int8": 1.0}
"""Of one weight, by `Recipe.weights`."""
LEAST_BYTES = 0.5
"""Of one weight in anything else."""


def check_space(folder: Path, specs: Iterable[ComponentSpec], weights: str, targets: int) -> None:
    """Raise ExportError when `targets` bundles of these components don't fit beside `folder`."""
    needed = int(_count(specs) * BYTES.get(weights, LEAST_BYTES)) * targets
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ExportError(
            f"the export needs {needed / 1e9:.1f} GB or more, {free / 1e9:.1f} GB are free at {folder.parent}; "
            "free space, choose another destination, or a recipe with smaller weights"
        )


def _count(specs: Iterable[ComponentSpec]) -> int:
    """Weights of all components, each once: VAE encoder and decoder hold the same module."""
    tensors = {id(tensor): tensor.numel() for spec in specs for tensor in spec.module.parameters()}
    return sum(tensors.values())
