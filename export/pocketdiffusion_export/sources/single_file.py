"""A checkpoint in one `.safetensors` file with the original (LDM, A1111) names of tensors.

The architecture follows from names and shapes. What shapes can't say is whether a model predicts noise or v: taken from
the `v_pred` and `ztsnr` marks, from `modelspec.prediction_type` in the file's metadata, or from `parameterization` in
the .yaml file that A1111 keeps beside a checkpoint. SD 2.x exists in both kinds, so there one of these is needed.
Nor do they say that a model was distilled to few steps (Turbo, Lightning): its scheduler is that of the base model
unless a preset gives another, with steps and guidance. LCM is known by its guidance embedding.
Limits: the architectures of `KNOWN`; no EMA weights; the VAE and the text encoders must be in the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.sources.architectures import ARCHITECTURES, Architecture
from pocketdiffusion_export.sources.base import Loaded, check_safetensors, sha256
from pocketdiffusion_export.sources.build import build, empty_modules, require_family

KNOWN = (
    *("sd15", "sd15-inpaint", "sd15-pix2pix", "bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny", "lcm", "sd21"),
    *("sdxl", "sdxl-inpaint", "ssd-1b", "segmind-vega"),
)
"""Architectures that can be told from each other by their `Layout`."""

UNET = "model.diffusion_model."
CONTEXT = re.compile(re.escape(UNET) + r"input_blocks\.\d+\.1\.transformer_blocks\.(\d+)\.attn2\.to_k\.weight")
GUIDANCE = "time_embedding.cond_proj.weight"
"""LCM's guidance embedding, which Diffusers' conversion passes over."""
GUIDANCES = (f"{UNET}time_embed.cond_proj.weight", f"{UNET}{GUIDANCE}")
"""Names of it in checkpoints."""
PREDICTIONS = {"v": "v_prediction", "v_prediction": "v_prediction", "eps": "epsilon", "epsilon": "epsilon"}

Tensors = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Layout:
    """What of a UNet tells its architecture."""

    channels: int
    """That go in."""
    width: int
    """Of the text states."""
    inputs: int
    """Blocks on the way down, with convolutions and downsamplers."""
    middles: int
    depth: int
    """Transformer blocks of the deepest attention on the way down."""
    guidance: int
    """Width of the guidance embedding, 0 where there is none."""

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Layout:
        """The layout that an architecture's UNet has."""
        middles = {None: 0, "UNetMidBlock2D": 1}.get(config.get("mid_block_type", "UNetMidBlock2DCrossAttn"), 3)
        inputs = len(config["block_out_channels"]) * (config.get("layers_per_block", 2) + 1)
        depth = _deepest(config.get("transformer_layers_per_block", 1))
        guidance = config.get("time_cond_proj_dim", 0)
        return cls(config.get("in_channels", 4), config["cross_attention_dim"], inputs, middles, depth, guidance)

    @classmethod
    def of_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> Layout | None:
        """The layout of a checkpoint; None where it holds no UNet of the original kind."""
        first = shapes.get(f"{UNET}input_blocks.0.0.weight", ())
        contexts = [(int(found[1]), shapes[key][-1]) for key in shapes if (found := CONTEXT.fullmatch(key))]
        if len(first) != 4 or not contexts:
            return None
        inputs, middles = (
            len({key.removeprefix(UNET).split(".")[1] for key in shapes if key.startswith(f"{UNET}{kind}.")})
            for kind in ("input_blocks", "middle_block")
        )
        depth = max(index for index, _ in contexts) + 1
        guidance = next((shapes[key][-1] for key in GUIDANCES if key in shapes), 0)
        return cls(first[1], contexts[0][1], inputs, middles, depth, guidance)


def _deepest(depth: int | Sequence[Any]) -> int:
    return depth if isinstance(depth, int) else max(map(_deepest, depth))


def load(file: Path, prediction: str | None = None) -> Loaded:
    """Load a checkpoint as float32. `prediction`, in Diffusers' words, wins over what the file says.

    Raises ExportError in one line for everything that is wrong with it.
    """
    check_safetensors(file)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
            said = _prediction(shapes, opened.metadata() or {}, file) if prediction is None else prediction
            architecture = detect(shapes, said, file)
            family = require_family(architecture, str(file))
            tensors = {key: opened.get_tensor(key) for key in shapes}
    except SafetensorError as error:
        raise ExportError(f"{file} is cut short or damaged ({error}); get it again") from None
    modules = empty_modules(architecture)
    for part, module in modules.items():
        found = convert(part, module, tensors)
        if part == "unet":
            _check_whole(found, _below(tensors, UNET), file)
        _fill(module, found, part, file)
    return build(architecture, modules, family, {file.name: sha256(file)})


def detect(shapes: Mapping[str, tuple[int, ...]], prediction: str | None, file: Path) -> Architecture:
    """The architecture of a checkpoint that predicts what `prediction` says, None if that is not known.

    Raises ExportError when it is none of `KNOWN`.
    """
    found = Layout.of_shapes(shapes)
    if found is None:
        raise ExportError(
            f"{file} holds no checkpoint in the original layout (no {UNET}* of a known kind); "
            "give a whole checkpoint, or the Diffusers folder that a component belongs to"
        )
    name = next((name for name in KNOWN if Layout.of_config(ARCHITECTURES[name].unet) == found), None)
    if name is None:
        raise ExportError(
            f"{file}: a UNet with {found.channels} input channels, {found.width}-wide text states, {found.inputs} "
            f"blocks down and {found.middles} in the middle, attention {found.depth} deep and a guidance embedding "
            f"{found.guidance} wide is not known; known: {', '.join(KNOWN)}"
        )
    if name == "sd21" and prediction is None:
        raise ExportError(
            f"{file}: SD 2.x models predict noise or v and this file does not say which; put {file.stem}.yaml with "
            "'parameterization: v' or 'parameterization: eps' beside it, or prediction_type in a preset's [scheduler]"
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
        found = dict(ldm.convert_ldm_unet_checkpoint(_below(tensors, UNET), module.config))
        guidance = [tensors[key] for key in GUIDANCES if key in tensors]
        return found | {GUIDANCE: guidance[0]} if guidance else found
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


def _check_whole(converted: Tensors, given: Tensors, file: Path) -> None:
    """Raise ExportError for tensors of the UNet that conversion passes over: they belong to another kind of model."""
    used = {id(tensor) for tensor in converted.values()}
    if unused := sorted(key for key, tensor in given.items() if id(tensor) not in used):
        raise ExportError(
            f"{file}: {len(unused)} tensors of the UNet are of no known use, first {unused[0]}; export the model from "
            "its Diffusers folder"
        )


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
