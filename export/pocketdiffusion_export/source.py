"""The only loader of torch pipelines: a Diffusers folder with safetensors weights.

Classes are taken from a literal table and never from what the folder names, weights are safetensors by content and
not by ending, and nothing is fetched from a network. Limits: Diffusers folders of the classes in `LOADERS`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.families import PIPELINES

LOADERS = {
    "StableDiffusionPipeline": "diffusers",
    "UNet2DConditionModel": "diffusers",
    "AutoencoderKL": "diffusers",
    "DDIMScheduler": "diffusers",
    "PNDMScheduler": "diffusers",
    "EulerDiscreteScheduler": "diffusers",
    "DPMSolverMultistepScheduler": "diffusers",
    "CLIPTextModel": "transformers",
    "CLIPTokenizer": "transformers",
    "CLIPTokenizerFast": "transformers",
}
"""Class -> the library that it is loaded from."""

PARTS = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
WEIGHTED = ("text_encoder", "unet", "vae")
MAX_HEADER = 100 << 20
"""Bytes; safetensors' own limit for its header."""


@dataclass(frozen=True)
class Loaded:
    """A source in memory."""

    pipe: Any
    """Diffusers pipeline, float32, on the CPU, in evaluation mode."""
    folder: Path
    """Diffusers folder that holds model_index.json, the scheduler's config and the tokenizer's files."""
    family: str
    """Key of `FAMILIES`."""
    sha256: dict[str, str]
    """Weight file -> sha256."""


def load(source: str) -> Loaded:
    """Load a Diffusers folder as float32. Raises ExportError in one line for everything that is wrong with it."""
    folder = Path(source)
    index = _read_index(folder)
    weights = [file for part in WEIGHTED for file in _weight_files(folder, part)]
    for file in weights:
        check_safetensors(file)
    pipeline = index["_class_name"]
    parts = {part: _load_part(folder, part, index) for part in PARTS}
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks about old configs are for the source's author
        pipe = _class(pipeline)(**parts, **extra)
    pipe.set_progress_bar_config(disable=True)
    hashes = {file.relative_to(folder).as_posix(): _sha256(file) for file in weights}
    return Loaded(pipe, folder, PIPELINES[pipeline], hashes)


def check_safetensors(file: Path) -> None:
    """Raise ExportError unless the content is safetensors: a length, then a JSON header that fits in the file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(9)
    if head[:1] == b"\x80" or head[:4] == b"PK\x03\x04":
        raise ExportError(f"{file} holds a pickle, which can run code when read; convert it to safetensors first")
    if len(head) < 9 or head[8:9] != b"{":
        raise ExportError(f"{file} is not safetensors; take the model's safetensors files")
    (length,) = struct.unpack("<Q", head[:8])
    if length > MAX_HEADER or length + 8 > size:
        raise ExportError(f"{file} is cut short or damaged (header of {length} bytes, file of {size}); get it again")


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / "model_index.json"
    if not folder.is_dir():
        raise ExportError(f"the source {folder} is not a folder; give a Diffusers folder, which holds model_index.json")
    if not path.is_file():
        raise ExportError(f"the source {folder} holds no model_index.json; give a Diffusers folder")
    index = _read_json(path)
    found = index.get("_class_name")
    if found not in PIPELINES:
        raise ExportError(f"{path}: pipeline class {found} can't be exported; known: {', '.join(sorted(PIPELINES))}")
    for part in PARTS:
        named = index.get(part)
        if not (isinstance(named, list) and len(named) == 2 and named[1] in LOADERS):
            known = ", ".join(sorted(LOADERS))
            raise ExportError(f"{path}: '{part}' names {named}, which can't be exported; known classes: {known}")
    return index


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} can't be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise ExportError(f"{path} must hold a JSON object")
    return data


def _weight_files(folder: Path, part: str) -> list[Path]:
    if not (folder / part / "config.json").is_file():
        raise ExportError(f"{folder / part}/config.json is missing; the source is not a complete Diffusers folder")
    stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    files = sorted((folder / part).glob(f"{stem}*.safetensors"))
    files = [file for file in files if ".fp16." not in file.name and ".non_ema." not in file.name]
    if not files:
        others = sorted(file.name for file in (folder / part).iterdir() if file.suffix in (".bin", ".pt", ".ckpt"))
        found = f"only {', '.join(others)} (pickle, never read)" if others else "none"
        raise ExportError(f"{folder / part} needs {stem}.safetensors; found {found}")
    return files


def _class(name: str) -> Any:
    return getattr(importlib.import_module(LOADERS[name]), name)


def _load_part(folder: Path, part: str, index: dict[str, Any]) -> Any:
    options: dict[str, Any] = {"local_files_only": True}
    if part in WEIGHTED:
        import torch

        options |= {"use_safetensors": True, "low_cpu_mem_usage": False}
        options["dtype" if part == "text_encoder" else "torch_dtype"] = torch.float32
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = _class(index[part][1]).from_pretrained(str(folder / part), **options)
    except Exception as error:  # the libraries raise many kinds for a bad folder; the user needs one line
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"{folder / part} can't be loaded as {index[part][1]}: {reason}") from error
    return loaded.eval() if part in WEIGHTED else loaded


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
