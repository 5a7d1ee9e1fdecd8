"""The judge: how well a picture shows a prompt, by a small contrastive model (CLIP, arXiv:2103.00020).

A ResNet (arXiv:1512.03385) of pictures of 64x64 pixels and a CLIP text transformer that reads the model's own tokens,
both in transformers' classes, so that the export stage knows them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
)

from sticker_train.batches import Sampler, on_white
from sticker_train.pack import Pictures

SIDE = 64
WIDTH = 128
"""Of the space in which pictures and prompts are compared."""
COMPOSED = 0.25
HARSHEST = 100.0
"""Largest factor on the cosines, as in CLIP."""


class Judge(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """Both encoders and the factor on their cosines."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.text = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=96,
                intermediate_size=384,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=tokenizer.model_max_length,
                projection_dim=WIDTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        self.image = ResNetForImageClassification(
            ResNetConfig(
                embedding_size=32,
                hidden_sizes=[32, 64, 128, 160],
                depths=[2, 2, 2, 2],
                layer_type="basic",
                num_labels=WIDTH,
                image_size=SIDE,
            )
        )
        self.factor = torch.nn.Parameter(torch.tensor(14.0).log())

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 3, 64, 64) in [-1, 1] to unit vectors (n, 128)."""
        return functional.normalize(self.image(pixels).logits, dim=-1)

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """(n, length) to unit vectors (n, 128)."""
        return functional.normalize(self.text(ids).text_embeds, dim=-1)


class JudgeTask:
    """Each picture of a batch finds its prompt, and each prompt its picture."""

    def __init__(self, pictures: Pictures, tokenizer: Any, seed: int, device: str) -> None:
        torch.manual_seed(seed)
        self.model: Judge = Judge(tokenizer)
        self._tokenizer, self._device = tokenizer, device
        self._sampler = Sampler(pictures, seed, composed=COMPOSED)

    def loss(self, step: int, size: int) -> torch.Tensor:
        """Cross-entropy over the rows and the columns of the table of cosines."""
        batch = self._sampler.batch(step, size)
        pixels = varied(on_white(batch.pixels, self._device))
        ids = token_ids(self._tokenizer, batch.prompts, self._device)
        factor = self.model.factor.exp().clamp(max=HARSHEST)
        table = factor * self.model.see(pixels) @ self.model.read(ids).t()
        own = torch.arange(len(table), device=table.device)
        return (functional.cross_entropy(table, own) + functional.cross_entropy(table.t(), own)) / 2


def token_ids(tokenizer: Any, prompts: list[str], device: str) -> torch.Tensor:
    """(n, length) int64: cut or filled up to the tokenizer's length."""
    made = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    ids: torch.Tensor = made.input_ids.to(device)
    return ids


def varied(pixels: torch.Tensor) -> torch.Tensor:
    """Moved, scaled, mirrored, tinted and blurred a little: what a picture may be without showing something else."""
    n, device = len(pixels), pixels.device
    scale = torch.empty(n, 1, device=device).uniform_(0.8, 1.25)
    mirror = torch.where(torch.rand(n, 1, device=device) < 0.3, -1.0, 1.0)
    shift = torch.empty(n, 2, device=device).uniform_(-0.15, 0.15)
    zero = torch.zeros_like(scale)
    matrix = torch.cat([scale * mirror, zero, shift[:, :1], zero, scale, shift[:, 1:]], 1).view(n, 2, 3)
    grid = functional.affine_grid(matrix, list(pixels.shape), align_corners=False)
    moved = 1 + functional.grid_sample(pixels - 1, grid, align_corners=False)  # what comes in at the edges is white
    soft = functional.avg_pool2d(functional.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, 1)
    much = torch.rand(n, 1, 1, 1, device=device) * (torch.rand(n, 1, 1, 1, device=device) < 0.4)
    tint = 1 + 0.1 * torch.randn(n, 3, 1, 1, device=device)
    result: torch.Tensor = ((moved + (soft - moved) * much) * tint).clamp(-1, 1)
    return result


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder."""
    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
