"""The VAE, one grown around its latents for larger pictures, and a tiny decoder with a fraction of the work."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch.nn import functional

from sticker_train.batches import WeightedSampler, on_white
from sticker_train.pack import Pictures
from sticker_train.shapes import Shape

KL = 1e-6
"""Weight of the distance to the normal distribution: enough to keep the latents from running away."""
SMEARED = 0.05
"""Noise on the latents that a grown decoder learns from: the denoiser's are not exact either."""
CERTAIN = 0.01
"""Weight of the spread of a grown encoder's latents."""
COMPOSED = 0.2
MEASURED = 256
"""Pictures that the latents' scale is measured on."""


class VaeTask:
    """Pictures back from their latents: absolute and squared error, edges, and a little KL."""

    def __init__(self, pictures: Pictures, shape: Shape, seed: int, device: str) -> None:
        self.model = new_vae(shape, seed)
        self._sampler, self._device = WeightedSampler(pictures, seed, composed=COMPOSED), device

    def loss(self, step: int, size: int) -> torch.Tensor:
        """Mean over the pixels, in [-1, 1]."""
        pixels = on_white(self._sampler.batch(step, size).pixels, self._device)
        posterior = self.model.encode(pixels).latent_dist
        return picture_loss(self.model.decode(posterior.sample()).sample, pixels) + KL * posterior.kl().mean()


class GrownTask:
    """A VAE for larger pictures whose latents are a smaller one's, so that the same denoiser serves both.

    It begins as the old one with its picture enlarged; only what was added learns.
    """

    def __init__(self, pictures: Pictures, old: Any, shape: Shape, seed: int, device: str) -> None:
        self.model = new_vae(shape, seed)
        self._shrink = shape.factor // 2 ** (len(old.config.block_out_channels) - 1)
        finished = inherit(self.model, old)
        for name, weight in self.model.named_parameters():
            weight.requires_grad_(name not in finished)
        self._old = old.to(device).eval().requires_grad_(False)
        self._sampler, self._device = WeightedSampler(pictures, seed, composed=COMPOSED), device

    def loss(self, step: int, size: int) -> torch.Tensor:
        """Of the decoder against the pictures, of the encoder against the old one's answer to shrunk pictures."""
        pixels = on_white(self._sampler.batch(step, size).pixels, self._device)
        with torch.no_grad():
            latents = self._old.encode(functional.avg_pool2d(pixels, self._shrink)).latent_dist.mode().float()
        decoded = self.model.decode(latents + SMEARED * torch.randn_like(latents)).sample
        few = max(1, size // 4)  # the encoder learns as much from these: its answer is known
        posterior = self.model.encode(pixels[:few]).latent_dist
        taught = functional.mse_loss(posterior.mean.float(), latents[:few]) + CERTAIN * posterior.std.mean()
        return picture_loss(decoded.float(), pixels) + taught


def new_vae(shape: Shape, seed: int) -> Any:
    """Untrained."""
    torch.manual_seed(seed)
    levels = len(shape.vae)
    return AutoencoderKL(
        block_out_channels=shape.vae,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=shape.latent,
        layers_per_block=1,
        mid_block_add_attention=False,
        norm_num_groups=16,
        sample_size=shape.side,
    )


def inherit(model: Any, old: Any) -> set[str]:
    """Take the old model's weights, by their place counted from the latents; the names of those that need no learning.

    What is added between them and the picture begins by handing its input on.
    """
    further = len(model.config.block_out_channels) - len(old.config.block_out_channels)
    weights, kept = model.state_dict(), set()
    for name, tensor in old.state_dict().items():
        if name.startswith("encoder.down_blocks."):
            head, _, level, tail = name.split(".", 3)
            name = f"{head}.down_blocks.{int(level) + further}.{tail}"
        if weights[name].shape == tensor.shape:
            weights[name] = tensor
            kept.add(name)
    model.load_state_dict(weights)
    model.register_to_config(scaling_factor=old.config.scaling_factor)
    for block in [*model.encoder.down_blocks[:further], *model.decoder.up_blocks[-further:]]:
        for resnet in block.resnets:
            torch.nn.init.zeros_(resnet.conv2.weight)
            torch.nn.init.zeros_(resnet.conv2.bias)
    for block in model.encoder.down_blocks[:further]:
        weight = torch.zeros_like(block.downsamplers[0].conv.weight)
        weight[range(len(weight)), range(len(weight)), :2, :2] = 0.25  # the mean of what lies in a cell
        block.downsamplers[0].conv.load_state_dict({"weight": weight, "bias": torch.zeros(len(weight))})
    for block in model.decoder.up_blocks[-further - 1 : -1]:
        torch.nn.init.dirac_(block.upsamplers[0].conv.weight)
        torch.nn.init.zeros_(block.upsamplers[0].conv.bias)
    next_to_pixels = ("encoder.conv_in.", "decoder.conv_norm_out.", "decoder.conv_out.")
    return {name for name in kept if not name.startswith(next_to_pixels)}


class TinyTask:
    """Pictures from the full VAE's latents with little work, in Diffusers' class of a tiny autoencoder.

    Only its decoder learns: it stands beside the full VAE, whose encoder serves both.
    """

    def __init__(self, pictures: Pictures, vae: Any, shape: Shape, seed: int, device: str) -> None:
        torch.manual_seed(seed)
        levels = len(shape.vae)
        self.model = AutoencoderTiny(
            encoder_block_out_channels=(shape.tiny,) * levels,
            decoder_block_out_channels=(shape.tiny,) * levels,
            num_encoder_blocks=(1,) * levels,
            num_decoder_blocks=(2,) * (levels - 2) + (1, 1),
            latent_channels=shape.latent,
        )
        self.model.encoder.requires_grad_(False)
        self._vae = vae.to(device).eval().requires_grad_(False)
        self._sampler, self._device = WeightedSampler(pictures, seed, composed=COMPOSED), device

    def loss(self, step: int, size: int) -> torch.Tensor:
        """Mean over the pixels, in [-1, 1]."""
        pixels = on_white(self._sampler.batch(step, size).pixels, self._device)
        with torch.no_grad():
            latents = self._vae.encode(pixels).latent_dist.mode() * self._vae.config.scaling_factor
        return picture_loss(self.model.decode(latents).sample.float(), pixels)


def picture_loss(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Absolute and squared error, and that of the differences between neighbours, which keeps edges sharp."""
    edges = sum(functional.l1_loss(torch.diff(found, dim=axis), torch.diff(expected, dim=axis)) for axis in (-1, -2))
    return functional.l1_loss(found, expected) + functional.mse_loss(found, expected) + edges


def measure(vae: Any, pictures: Pictures) -> None:
    """Note the latents' scale, measured on the first pictures, in the VAE's config."""
    with torch.no_grad():
        latents = vae.cpu().eval().encode(on_white(pictures.pixels[:MEASURED], "cpu")).latent_dist.mode()
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
