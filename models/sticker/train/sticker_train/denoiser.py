"""The text encoder and the UNet, trained together to predict v (arXiv:2202.00512) with a last step of pure noise
(arXiv:2305.08891)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from sticker_train.batches import Batch, WeightedSampler, on_white
from sticker_train.judge import token_ids
from sticker_train.pack import Pictures
from sticker_train.shapes import Shape

EMPTY = 0.1
"""Share of prompts left out, for guidance (arXiv:2207.12598)."""
COMPOSED = 0.15
TIMESTEPS = 1000


class Denoiser(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """Both parts."""

    def __init__(self, text: Any, unet: Any) -> None:
        super().__init__()
        self.text, self.unet = text, unet
        unet.set_attn_processor(AttnProcessor())  # torch's fused attention is slow backwards in bfloat16 on a CPU

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """v for noisy latents (n, channels, h, w), timesteps (n,) and token ids (n, length)."""
        states = self.text(ids).last_hidden_state
        answer: torch.Tensor = self.unet(latents, timesteps, encoder_hidden_states=states).sample
        return answer


class Material:
    """What every batch of the denoiser's stages is made of: latents and token ids."""

    def __init__(self, pictures: Pictures, vae: Any, tokenizer: Any, seed: int, device: str) -> None:
        self._sampler = WeightedSampler(pictures, seed, composed=COMPOSED)
        self._vae = vae.to(device).eval().requires_grad_(False)
        self._encoded: dict[int | None, torch.Tensor] = {}
        self.tokenizer, self.device = tokenizer, device

    def batch(self, step: int, size: int, *, empty: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents in the denoiser's scale and ids; a share of the prompts is empty."""
        batch = self._sampler.batch(step, size)
        prompts = [text if torch.rand(()) >= empty else "" for text in batch.prompts]
        return self._latents(batch), token_ids(self.tokenizer, prompts, self.device)

    def _latents(self, batch: Batch) -> torch.Tensor:
        """A picture of the pack is encoded once, when it is first drawn; one made of others each time."""
        made: dict[int, torch.Tensor] = {}
        new = [index for index, place in enumerate(batch.places) if place not in self._encoded]
        if new:
            with torch.no_grad():
                modes = self._vae.encode(on_white(batch.pixels[new], self.device)).latent_dist.mode()
            made = dict(zip(new, modes.float() * self._vae.config.scaling_factor, strict=True))
            self._encoded |= {batch.places[i]: kept for i, kept in made.items() if batch.places[i] is not None}
        found = [made[i] if i in made else self._encoded[place] for i, place in enumerate(batch.places)]
        return torch.stack(found)


class DenoiserTask:
    """The error of v at a random noise level."""

    def __init__(self, model: Denoiser, material: Material, scheduler: Any) -> None:
        self.model, self._material = model, material
        self._alphas = scheduler.alphas_cumprod.float().to(material.device)

    def loss(self, step: int, size: int) -> torch.Tensor:
        """Mean squared error."""
        latents, ids = self._material.batch(step, size, empty=EMPTY)
        timesteps = torch.randint(0, TIMESTEPS, (len(latents),), device=latents.device)
        noise = torch.randn_like(latents)
        signal, spread = levels(self._alphas, timesteps)
        expected = signal * noise - spread * latents
        return functional.mse_loss(self.model(signal * latents + spread * noise, timesteps, ids).float(), expected)


def levels(alphas: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the latents and of the noise at timesteps, (n, 1, 1, 1) each."""
    kept = alphas[timesteps][:, None, None, None]
    return kept.sqrt(), (1 - kept).sqrt()


def new_denoiser(shape: Shape, tokenizer: Any, seed: int) -> Denoiser:
    """Untrained."""
    torch.manual_seed(seed)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.text_width,
            intermediate_size=4 * shape.text_width,
            num_hidden_layers=shape.text_layers,
            num_attention_heads=4,
            max_position_embeddings=shape.text_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    attending = len(shape.unet) - 1
    unet = UNet2DConditionModel(
        sample_size=shape.side // shape.factor,
        in_channels=shape.latent,
        out_channels=shape.latent,
        block_out_channels=shape.unet,
        down_block_types=("CrossAttnDownBlock2D",) * attending + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attending,
        cross_attention_dim=shape.text_width,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    return Denoiser(text, unet)


def new_scheduler() -> Any:
    """Diffusers' description of the noise; the last timestep is noise alone."""
    return DDIMScheduler(
        num_train_timesteps=TIMESTEPS,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def read_denoiser(folder: Path) -> Denoiser:
    """Both parts from a Diffusers folder."""
    text = CLIPTextModel.from_pretrained(str(folder / "text_encoder"), local_files_only=True)
    unet = UNet2DConditionModel.from_pretrained(str(folder / "unet"), local_files_only=True, low_cpu_mem_usage=False)
    return Denoiser(text, unet)
