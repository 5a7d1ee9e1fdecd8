"""A checkpoint in one `.safetensors` file with the original (LDM, A1111) names of tensors.

The architecture follows from names and shapes. What shapes can't say is whether a model predicts noise or v: taken from
the `v_pred` and `ztsnr` marks, from `modelspec.prediction_type` in the file's metadata, or from `parameterization` in
the .yaml file that A1111 keeps beside a checkpoint. SD 2.x exists in both kinds, so there one of these is needed.
Limits: the architectures of `LAYOUTS`; no EMA weights; the VAE and the text encoders must be in the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.sources.architectures import ARCHITECTURES, Architecture
from pocketdiffusion_export.sources.base import Loaded, check_safetensors, sha256
from pocketdiffusion_export.sources.build import build, empty_modules, require_family

LAYOUTS = {
    (4, 768): "sd15",
    (9, 768): "sd15-inpaint",
    (8, 768): "sd15-pix2pix",
    (4, 1024): "sd21",
    (4, 2048): "sdxl",
}
"""(channels into the UNet, width of the text states) -> architecture."""

UNET = "model.diffusion_model."
CONTEXT = re.compile(re.escape(UNET) + r"input_blocks\.\d+\.1\.transformer_blocks\.0\.attn2\.to_k\.weight")
PREDICTIONS = {"v": "v_prediction", "v_prediction": "v_prediction", "eps": "epsilon", "epsilon": "epsilon"}

Tensors = dict[str, Any]


def load(source: str) -> Loaded:
    """Load a checkpoint as float32. Raises ExportError in one line for everything that is wrong with it."""
    file = Path(source)
    check_safetensors(file)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
            architecture = detect(shapes, opened.metadata() or {}, file)
            family = require_family(architecture, source)
            tensors = {key: opened.get_tensor(key) for key in shapes}
    except SafetensorError as error:
        raise ExportError(f"{file} is cut short or damaged ({error}); get it again") from None
    modules = empty_modules(architecture)
    for part, module in modules.items():
        _fill(module, convert(part, module, tensors), part, file)
    return build(architecture, modules, family, {file.name: sha256(file)})


def detect(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], file: Path) -> Architecture:
    """The architecture of a checkpoint. Raises ExportError when it is none of `LAYOUTS`."""
    first = shapes.get(f"{UNET}input_blocks.0.0.weight", ())
    contexts = sorted(key for key in shapes if CONTEXT.fullmatch(key))
    if len(first) != 4 or not contexts:
        raise ExportError(
            f"{file} holds no checkpoint in the original layout (no {UNET}* of a known kind); "
            "give a whole checkpoint, or the Diffusers folder that a component belongs to"
        )
    found = first[1], shapes[contexts[0]][-1]
    if found not in LAYOUTS:
        raise ExportError(
            f"{file}: a UNet with {found[0]} input channels and {found[1]}-wide text states is not known; "
            f"known: {', '.join(sorted(LAYOUTS.values()))}"
        )
    name, prediction = LAYOUTS[found], _prediction(shapes, metadata, file)
    if name == "sd21" and prediction is None:
        raise ExportError(
            f"{file}: SD 2.x models predict noise or v and this file does not say which; "
            f"put {file.stem}.yaml with 'parameterization: v' or 'parameterization: eps' beside it"
        )
    if name == "sd21" and prediction == "epsilon":
        return ARCHITECTURES["sd21-base"]
    architecture = ARCHITECTURES[name]
    settings: dict[str, Any] = {} if prediction is None else {"prediction_type": prediction}
    if "ztsnr" in shapes:
        settings |= {"rescale_betas_zero_snr": True}
    return replace(architecture, scheduler=architecture.scheduler | settings)


def convert(part: str, module: Any, tensors: Tensors) -> Tensors:
    """The tensors of one part of a checkpoint under Diffusers' names; `module` is the part they are for."""
    from diffusers.loaders import single_file_utils as ldm

    if part == "unet":
        return dict(ldm.convert_ldm_unet_checkpoint(_below(tensors, UNET), module.config))
    if part == "vae":
        return dict(ldm.convert_ldm_vae_checkpoint(_below(tensors, "first_stage_model."), module.config))
    prefix = "conditioner.embedders.1.model." if part == "text_encoder_2" else "cond_stage_model.model."
    if open_clip := _below(tensors, prefix):
        found = dict(ldm.convert_open_clip_checkpoint(module, open_clip, prefix=prefix))
        if not hasattr(module, "text_projection"):
            found.pop("text_projection.weight", None)
        return found
    found = ldm.convert_ldm_clip_checkpoint(tensors)
    found = {key if key.startswith("text_model.") else f"text_model.{key}": found[key] for key in found}
    found.pop("text_model.embeddings.position_ids", None)  # counts from 0; newer models make it themselves
    return found


def _below(tensors: Tensors, prefix: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _fill(module: Any, tensors: Tensors, part: str, file: Path) -> None:
    """Give a module its weights as float32, those that are float32 already without a copy."""
    wanted = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if wanted != found:
        wrong = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        raise ExportError(
            f"{file}: {len(wrong)} tensors of the {part} do not fit, first {wrong[0]}: found "
            f"{found.get(wrong[0], 'none')}, needed {wanted.get(wrong[0], 'none')}; the file is no complete checkpoint"
        )
    module.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, assign=True)
    module.requires_grad_(False)


def _prediction(shapes: Mapping[str, object], metadata: Mapping[str, str], file: Path) -> str | None:
    if "v_pred" in shapes:
        return "v_prediction"
    notes = file.with_suffix(".yaml")
    text = notes.read_text(encoding="utf-8", errors="replace") if notes.is_file() else ""
    beside = re.search(r"^\s*parameterization:\s*[\"']?(\w+)", text, re.MULTILINE)
    said = metadata.get("modelspec.prediction_type") or (beside.group(1) if beside else None)
    if said is not None and said not in PREDICTIONS:
        raise ExportError(f"{file}: prediction '{said}' is not known; known: {', '.join(sorted(PREDICTIONS))}")
    return PREDICTIONS[said] if said else None
