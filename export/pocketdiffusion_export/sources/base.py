"""What every kind of source shares: the loaded value, the classes that may be loaded, checks of weight files."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketdiffusion.judge import COMPONENTS as JUDGE
from pocketdiffusion_export.errors import ExportError

LOADERS = {
    "StableDiffusionPipeline": "diffusers",
    "StableDiffusionInpaintPipeline": "diffusers",
    "StableDiffusionInstructPix2PixPipeline": "diffusers",
    "StableDiffusionXLPipeline": "diffusers",
    "StableDiffusionXLInpaintPipeline": "diffusers",
    "LatentConsistencyModelPipeline": "diffusers",
    "UNet2DConditionModel": "diffusers",
    "AutoencoderKL": "diffusers",
    "AutoencoderTiny": "diffusers",
    "DDIMScheduler": "diffusers",
    "PNDMScheduler": "diffusers",
    "EulerDiscreteScheduler": "diffusers",
    "EulerAncestralDiscreteScheduler": "diffusers",
    "DPMSolverMultistepScheduler": "diffusers",
    "UniPCMultistepScheduler": "diffusers",
    "LCMScheduler": "diffusers",
    "CLIPTextModel": "transformers",
    "CLIPTextModelWithProjection": "transformers",
    "ResNetForImageClassification": "transformers",
    "CLIPTokenizer": "transformers",
    "CLIPTokenizerFast": "transformers",
    "StableDiffusionSafetyChecker": "diffusers.pipelines.stable_diffusion.safety_checker",
    "CLIPImageProcessor": "transformers",
    "CLIPFeatureExtractor": "transformers",
}
"""Class -> the library that it is loaded from. Which pipelines are exported is said by `families.PIPELINES`."""

RENAMED = {"CLIPFeatureExtractor": "CLIPImageProcessor"}
"""Old names of classes in `LOADERS`."""

WEIGHTED = ("text_encoder", "text_encoder_2", "unet", "vae", "safety_checker", *JUDGE)

TRANSFORMERS = ("text_encoder", "text_encoder_2", "safety_checker", *JUDGE)
"""Those whose classes are made as transformers' are."""

CHECKING = ("safety_checker", "feature_extractor")
"""Parts that a pipeline may have or not."""

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
    origin: str | None = None
    """Where it comes from, exactly, if it says so itself; None leaves that to the plan."""
    scheduler: Mapping[str, Any] | None = None
    """The scheduler's config where a preset changed it; None is the folder's."""


def parts_of(pipeline: str) -> tuple[str, ...]:
    """The parts that a pipeline of this class is made of."""
    second = ("tokenizer_2", "text_encoder_2") if "XL" in pipeline else ()
    return ("tokenizer", "text_encoder", *second, "unet", "vae", "scheduler")


def class_named(name: str) -> Any:
    """A class of `LOADERS`."""
    return getattr(importlib.import_module(LOADERS[name]), RENAMED.get(name, name))


def assemble(pipeline: str, parts: Mapping[str, Any]) -> Any:
    """A Diffusers pipeline of loaded parts, without progress bars."""
    made = class_named(pipeline)
    unused = {name: None for name in CHECKING} | {"requires_safety_checker": "safety_checker" in parts}
    known = inspect.signature(made).parameters
    own = {name: part for name, part in parts.items() if name not in JUDGE}  # Diffusers' pipelines know none
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks about old configs are for the source's author
        pipe = made(**{name: value for name, value in unused.items() if name in known} | own)
    for name in JUDGE:
        if name in parts:
            setattr(pipe, name, parts[name])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_safetensors(file: Path) -> None:
    """Raise ExportError unless the content is safetensors: a length, then a JSON header that fits in the file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(9)
    sound = head[8:9] == b"{"  # a header may be 0x80 bytes long, or 0x280: then the file begins as a pickle does
    if not sound and (head[:1] == b"\x80" or head[:4] == b"PK\x03\x04"):
        raise ExportError(f"{file} holds a pickle, which can run code when read; convert it to safetensors first")
    if not sound:
        raise ExportError(f"{file} is not safetensors; take the model's safetensors files")
    (length,) = struct.unpack("<Q", head[:8])
    if length > MAX_HEADER or length + 8 > size:
        raise ExportError(f"{file} is cut short or damaged (header of {length} bytes, file of {size}); get it again")


def sha256(file: Path) -> str:
    """The file's hash in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
