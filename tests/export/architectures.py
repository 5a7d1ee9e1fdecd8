"""Small twins of the real architectures, and the original (LDM, OpenCLIP) names of a Diffusers pipeline's tensors."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch

from pocketdiffusion_export.sources.architectures import ARCHITECTURES, CROSS, UP, Architecture

TEXT = {"intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 60}
VAE = {"block_out_channels": [8, 16], "norm_num_groups": 8, "sample_size": 32}
UNET = {
    "block_out_channels": [16, 32],
    "down_block_types": [CROSS, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", UP],
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "sample_size": 16,
}
RESNET = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
]
WHOLE = [
    ("conv_in", "input_blocks.0.0"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("time_embedding.cond_proj", "time_embed.cond_proj"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
]
VAE_NAMES = [
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
    ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
    ("mid_block.attentions.0.to_", "mid.attn_1."),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    (".resnets.", ".block."),
]
OPEN_CLIP = [
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.encoder.layers", "transformer.resblocks"),
    ("text_model.final_layer_norm", "ln_final"),
    ("layer_norm", "ln_"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn", "attn"),
]


def small(name: str) -> Architecture:
    """The architecture with the same kinds of layers, few and narrow, but for the width of its text states."""
    real = ARCHITECTURES[name]
    unet = real.unet | UNET
    if "transformer_layers_per_block" in unet:
        unet |= {"transformer_layers_per_block": 2}
    if "reverse_transformer_layers_per_block" in unet:
        unet |= {"transformer_layers_per_block": [[1, 3], 1], "reverse_transformer_layers_per_block": [1, [1, 2, 3]]}
    second = real.text_encoder_2 and real.text_encoder_2 | TEXT
    vae = real.vae | VAE | {key: real.vae[key][:2] for key in ("down_block_types", "up_block_types")}
    return replace(real, unet=unet, vae=vae, text_encoder=real.text_encoder | TEXT, text_encoder_2=second)


def original(pipe: Any) -> dict[str, Any]:
    """The tensors of a whole pipeline as a checkpoint in one file names them."""
    unet = {f"model.diffusion_model.{_unet(key, pipe.unet)}": t for key, t in pipe.unet.state_dict().items()}
    vae = dict(
        _vae(key, tensor, len(pipe.vae.config.block_out_channels)) for key, tensor in pipe.vae.state_dict().items()
    )
    text = pipe.text_encoder.state_dict()
    if pipe.text_encoder.config.hidden_size == 1024:
        extra = {"text_projection": torch.zeros(1024, 1024)}  # of no use to SD 2, but in its files
        return unet | vae | _open_clip(text, "cond_stage_model.model.") | _below("cond_stage_model.model.", extra)
    if hasattr(pipe, "text_encoder_2"):
        second = _open_clip(pipe.text_encoder_2.state_dict(), "conditioner.embedders.1.model.")
        return unet | vae | _below("conditioner.embedders.0.transformer.", text) | second
    return unet | vae | _below("cond_stage_model.transformer.", text)


def _below(prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {prefix + key: tensor for key, tensor in tensors.items()}


def _unet(key: str, unet: Any) -> str:
    for new, old in WHOLE:
        if key.startswith(new + "."):
            return key.replace(new, old, 1)
    place, rest = _unet_place(key, unet.config.layers_per_block + 1, unet.config.up_block_types)
    for new, old in RESNET if ".resnets." in key else []:
        rest = re.sub(rf"^{new}\.", f"{old}.", rest)
    return f"{place}.{rest}"


def _unet_place(key: str, layers: int, up_types: list[str]) -> tuple[str, str]:
    middle = re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", key)
    if middle:
        return f"middle_block.{2 * int(middle[2]) + (middle[1] == 'attentions')}", middle[3]
    found = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", key)
    assert found is not None, key
    way, block, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * layers}.0", rest.replace("conv", "op")
    if kind == "upsamplers":
        return f"output_blocks.{block * layers + layers - 1}.{2 if up_types[block] == UP else 1}", rest
    first = "input_blocks" if way == "down" else "output_blocks"
    return f"{first}.{(way == 'down') + block * layers + layer}.{int(kind == 'attentions')}", rest


def _vae(key: str, tensor: Any, levels: int) -> tuple[str, Any]:
    key = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{levels - 1 - int(found[1])}", key)
    key = key.replace("down_blocks", "down")
    for new, old in VAE_NAMES:
        key = key.replace(new, old)
    linear = ".attn_1." in key and key.endswith("weight") and tensor.ndim == 2
    return f"first_stage_model.{key}", tensor[:, :, None, None] if linear else tensor


def _open_clip(text: dict[str, Any], prefix: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, tensor in text.items():
        if ".k_proj." in key or ".v_proj." in key:
            continue
        if ".q_proj." in key:
            tensor = torch.cat([text[key.replace("q_proj", name)] for name in ("q_proj", "k_proj", "v_proj")])
            key = key.replace("q_proj.", "in_proj_")
        for new, old in OPEN_CLIP:
            key = key.replace(new, old)
        made[key.removesuffix(".weight") if "projection" in key else key] = tensor.T if "projection" in key else tensor
    return _below(prefix, made)
