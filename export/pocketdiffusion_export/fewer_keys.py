"""Token downsampling (ToDo, arXiv:2402.13573): the denoiser's largest self-attention reads fewer keys and values.

Neighbours in a large map are much alike, so every Nth of them along both sides stands for all; each position still asks
its own question. It is the answer to token merging (ToMe, arXiv:2303.17421) that needs no matching and no way back: a
slice in front of two projections, which engines run at the cost of a copy. The nearest neighbour is taken and not the
mean, which was worse: on the embedded model 24.3 dB PSNR to the pictures with all keys, and 22.2 dB.

The source itself is changed, so that Diffusers' own pipeline makes the samples and pictures that a bundle is held to.
Limits: UNets only; the first level that has attention, whose cost grows with the fourth power of a picture's side.
"""

from __future__ import annotations

from typing import Any

import torch

from pocketdiffusion_export.errors import ExportError

_ALL = (1 << 31) - 1


class _Thinned(torch.autograd.Function):  # type: ignore[misc]  # torch is not followed by mypy
    """[batch, height * width, channels] of a map [batch, any, height, width] -> every `stride`th along both sides."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, image: torch.Tensor, stride: int, channels: int) -> torch.Tensor:
        return tokens.unflatten(1, image.shape[2:])[:, ::stride, ::stride].flatten(1, 2)

    @staticmethod
    def symbolic(g: Any, tokens: Any, image: Any, stride: int, channels: int) -> Any:
        def constant(*values: int) -> Any:
            return g.op("Constant", value_t=torch.tensor(values))

        shape = g.op("Concat", constant(0), g.op("Shape", image, start_i=2), constant(channels), axis_i=0)
        rows = g.op("Reshape", tokens, shape)
        kept = g.op("Slice", rows, constant(0, 0), constant(_ALL, _ALL), constant(1, 2), constant(stride, stride))
        return g.op("Reshape", kept, constant(0, -1, channels))


class _Thinning:
    """The hooks around one Diffusers transformer: what comes in is the map whose sides its tokens have."""

    def __init__(self, transformer: Any, stride: int) -> None:
        self._stride = stride
        self._image: torch.Tensor | None = None
        self.hooks = [
            transformer.register_forward_pre_hook(self._keep),
            transformer.register_forward_hook(self._drop),
        ]
        for block in transformer.transformer_blocks:
            for layer in (block.attn1.to_k, block.attn1.to_v):
                self.hooks.append(layer.register_forward_pre_hook(self._thin))

    def _keep(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        self._image = args[0]

    def _drop(self, module: Any, args: tuple[torch.Tensor, ...], answer: Any) -> None:
        self._image = None

    def _thin(self, module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (_Thinned.apply(args[0], self._image, self._stride, module.in_features),)


def fewer_keys(unet: Any, stride: int) -> list[Any]:
    """Change a Diffusers UNet. Returns handles, each of which has `remove()`. Raises ExportError where it can't be."""
    return [hook for transformer in _largest(unet) for hook in _Thinning(transformer, stride).hooks]


def described(stride: int, psnr_db: float) -> str:
    """The change in words, for the bundle's manifest."""
    return (
        f"self-attention of the UNet's largest maps reads 1 key in {stride * stride} (arXiv:2402.13573); with it the "
        f"source's own golden image is {psnr_db:.1f} dB PSNR from the one without"
    )


def _largest(unet: Any) -> list[Any]:
    """The transformers of the first level that has any, on both ways."""
    down, up = (
        [kept for block in blocks if (kept := _transformers(block))] for blocks in (unet.down_blocks, unet.up_blocks)
    )
    if not down or not up:
        raise ExportError("this UNet has no transformers to leave keys out of; leave --downsample-keys out")
    found = [*down[0], *up[-1]]
    if any(block.only_cross_attention for transformer in found for block in transformer.transformer_blocks):
        raise ExportError("this UNet's attention reads the text alone; leave --downsample-keys out")
    return found


def _transformers(block: Any) -> list[Any]:
    return [each for each in getattr(block, "attentions", None) or () if hasattr(each, "transformer_blocks")]
