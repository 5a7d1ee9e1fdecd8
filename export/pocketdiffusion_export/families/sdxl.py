"""SDXL: two text encoders, pooled text and size ids as further inputs of the UNet. Limit: base models, no refiner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketdiffusion_export.component import ComponentSpec
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.families.clip import layered_text_encoder
from pocketdiffusion_export.families.parts import IDS
from pocketdiffusion_export.families.sd import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """The family; see `base.Family`."""

    name = "sdxl"
    tokenizers: Mapping[str, str] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}

    def check(self, pipe: Any) -> None:
        """Raise ExportError for refiners, whose ids hold an aesthetic score, and for UNets of another shape."""
        super().check(pipe)
        config = pipe.unet.config
        expected = IDS * config.addition_time_embed_dim + pipe.text_encoder_2.config.projection_dim
        if config.projection_class_embeddings_input_dim != expected:
            raise ExportError(
                f"this SDXL UNet takes {config.projection_class_embeddings_input_dim} added values, a base model "
                f"{expected}; refiners can't be exported: give the base model"
            )
        pipe.watermark = None  # where its library is installed, Diffusers would change the reference images

    def text_encoders(self, pipe: Any) -> tuple[ComponentSpec, ...]:
        """Their graphs, with the states of all layers."""
        return tuple(layered_text_encoder(name, getattr(pipe, name)) for name in self.tokenizers)

    def defaults(self, pipe: Any) -> tuple[int, float]:
        """Steps, and Diffusers' guidance for SDXL."""
        return (25, 5.0) if pipe.unet.config.time_cond_proj_dim is None else super().defaults(pipe)


FAMILY = StableDiffusionXL()
