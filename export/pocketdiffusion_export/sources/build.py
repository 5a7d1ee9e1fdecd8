"""A pipeline from an `Architecture`: modules without weights, tokenizer, scheduler, and the folder of light files."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.families import PIPELINES
from pocketdiffusion_export.sources.architectures import Architecture
from pocketdiffusion_export.sources.base import Loaded, assemble, class_named
from pocketdiffusion_export.sources.tokenizer import write_tokenizer


def require_family(architecture: Architecture, name: str) -> str:
    """The family that exports an architecture. Raises ExportError when there is none yet."""
    if architecture.pipeline not in PIPELINES:
        known = ", ".join(sorted(PIPELINES))
        raise ExportError(f"{name} is a {architecture.pipeline}, which can't be exported yet; known: {known}")
    return PIPELINES[architecture.pipeline]


def empty_modules(architecture: Architecture) -> dict[str, Any]:
    """Part -> module in evaluation mode whose weights hold whatever memory held; nothing is initialised."""
    from transformers import CLIPTextConfig
    from transformers.modeling_utils import no_init_weights

    vae = dict(architecture.vae)
    with no_init_weights():
        modules = {
            "text_encoder": class_named("CLIPTextModel")(CLIPTextConfig(**architecture.text_encoder)),
            "unet": class_named("UNet2DConditionModel")(**architecture.unet),
            "vae": class_named(vae.pop("_class_name", "AutoencoderKL"))(**vae),
        }
        if architecture.text_encoder_2 is not None:
            config = CLIPTextConfig(**architecture.text_encoder_2)
            modules["text_encoder_2"] = class_named("CLIPTextModelWithProjection")(config)
    return {part: module.eval().requires_grad_(False) for part, module in modules.items()}


def build(architecture: Architecture, modules: dict[str, Any], family: str, sha256: dict[str, str]) -> Loaded:
    """The loaded source of filled modules. Its folder is temporary: it goes with the pipeline, or at exit."""
    folder = Path(tempfile.mkdtemp(prefix="pocketdiffusion-"))
    try:
        scheduler = dict(architecture.scheduler)
        parts = {
            **modules,
            "scheduler": class_named(scheduler.pop("_class_name"))(**scheduler),
            "tokenizer": _tokenizer(folder / "tokenizer", architecture.pad_token),
        }
        if architecture.text_encoder_2 is not None:
            parts["tokenizer_2"] = _tokenizer(folder / "tokenizer_2", "!")
        pipe = assemble(architecture.pipeline, parts | architecture.extra)
        pipe.save_config(str(folder))
        pipe.scheduler.save_pretrained(str(folder / "scheduler"))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(pipe, shutil.rmtree, folder, ignore_errors=True)
    return Loaded(pipe, folder, family, sha256)


def _tokenizer(folder: Path, pad: str) -> Any:
    write_tokenizer(folder, pad)
    return class_named("CLIPTokenizer").from_pretrained(str(folder), local_files_only=True)
