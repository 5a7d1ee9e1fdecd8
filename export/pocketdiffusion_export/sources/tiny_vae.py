"""A tiny VAE beside a source's own: Diffusers' AutoencoderTiny (TAESD's kind), from a folder or with random weights.

Of it only the decoder is exported, for fast pictures of less detail.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.families import TINY_VAE
from pocketdiffusion_export.sources.base import check_safetensors, class_named, sha256
from pocketdiffusion_export.sources.diffusers_folder import load_weighted, read_json, weight_files
from pocketdiffusion_export.sources.random import PREFIX, fill

KIND = "AutoencoderTiny"
RANDOM = f"{PREFIX}taesd"


def load(source: str) -> tuple[Any, dict[str, str]]:
    """The model, float32 and in evaluation mode, and the sha256 of its weight files.

    `source` is a folder with config.json and safetensors, or "random:taesd". Raises ExportError for anything else.
    """
    if source.startswith(PREFIX):
        return _random(source), {}
    folder = Path(source)
    if not (folder / "config.json").is_file():
        raise ExportError(
            f"the tiny VAE {source} is no folder with a config.json; give a Diffusers folder of an {KIND}, or {RANDOM}"
        )
    found = read_json(folder / "config.json").get("_class_name")
    if found != KIND:
        raise ExportError(f"the tiny VAE {source} is a {found}; give the folder of an {KIND}, or {RANDOM}")
    files = weight_files(folder, "diffusion_pytorch_model")
    for file in files:
        check_safetensors(file)
    return load_weighted(folder, KIND, "torch_dtype"), {f"{TINY_VAE}/{file.name}": sha256(file) for file in files}


def _random(source: str) -> Any:
    if source != RANDOM:
        raise ExportError(f"unknown tiny VAE '{source}'; choose {RANDOM}, or give the folder of an {KIND}")
    model = class_named(KIND)().eval().requires_grad_(False)  # the class's defaults are TAESD's
    fill(model, "vae")
    return model
