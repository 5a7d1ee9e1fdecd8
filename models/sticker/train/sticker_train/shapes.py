"""How large the parts of the model are: one set of numbers for each picture size."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the tokenizer, the text encoder, the VAE and the UNet."""

    side: int
    """Of the pictures, in pixels."""
    vae: tuple[int, ...]
    """Channels of the VAE's levels; each after the first halves the side."""
    latent: int
    """Channels of the latents."""
    tiny: int
    """Channels of the tiny decoder."""
    unet: tuple[int, ...]
    """Channels of the UNet's levels; the last has no attention."""
    text_width: int
    text_layers: int
    text_length: int
    """Tokens, start and end included."""
    words: int
    """Tokens of the vocabulary."""

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along one side."""
        return int(2 ** (len(self.vae) - 1))


SHAPES = {
    64: Shape(64, (32, 64, 96), 4, 16, (64, 128, 192), 160, 4, 24, 3000),
    128: Shape(128, (32, 32, 64, 96), 4, 16, (64, 128, 192), 160, 4, 24, 3000),
}
"""They differ in the VAE's first level alone: a denoiser made at 64 serves a VAE that is grown to 128."""
