"""Few steps without guidance: latent consistency distillation (arXiv:2310.04378) of a guided teacher.

The student's answer at one timestep must be that of its own average at the timestep that one guided DDIM step of the
teacher leads to. Limit: one guidance scale, which the student takes in; it has no input for others.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from sticker_train.denoiser import Denoiser, Material, levels
from sticker_train.judge import token_ids

GUIDANCE = 3.5
SOLVER_STEPS = 50
"""DDIM steps of the teacher's whole way; the student learns to be consistent from each to the next."""
HUBER = 1e-3
"""Width of the loss's round bottom."""
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0
"""Of the boundary condition, as Diffusers' LCMScheduler has them."""
FOLLOW = 0.95
"""Decay of the average that the student must agree with."""


class DistilTask:
    """A student that begins as its teacher. Only its UNet changes: the text encoder stays the teacher's."""

    def __init__(self, teacher: Denoiser, material: Material, scheduler: Any) -> None:
        self.model = copy.deepcopy(teacher.unet)
        self._teacher = teacher.to(material.device).eval().requires_grad_(False)
        self._target: Any = None
        self._material = material
        self._alphas = scheduler.alphas_cumprod.float().to(material.device)
        stride = len(self._alphas) // SOLVER_STEPS
        self._timesteps = torch.arange(SOLVER_STEPS, device=material.device) * stride + stride - 1

    def loss(self, step: int, size: int) -> torch.Tensor:
        """Pseudo-Huber distance between the student's two estimates of the clean latents."""
        self._follow()
        latents, ids = self._material.batch(step, size, empty=0.0)
        places = torch.randint(0, SOLVER_STEPS, (len(latents),), device=latents.device)
        start = self._timesteps[places]
        stop = torch.where(places > 0, self._timesteps[places - 1], 0)
        signal, spread = levels(self._alphas, start)
        noisy = signal * latents + spread * torch.randn_like(latents)
        with torch.no_grad():
            states = self._teacher.text(ids).last_hidden_state
            expected = self._estimate(self._target, self._teach(noisy, start, stop, states), stop, states)
        difference = self._estimate(self.model, noisy, start, states) - expected
        return ((difference.float() ** 2 + HUBER**2).sqrt() - HUBER).mean()

    def _follow(self) -> None:
        """The target begins as the student, also in a resumed run, and is its short average from then on."""
        if self._target is None:
            self._target = copy.deepcopy(self.model).requires_grad_(False)
        with torch.no_grad():
            for kept, tensor in zip(self._target.parameters(), self.model.parameters(), strict=True):
                kept.lerp_(tensor, 1 - FOLLOW)

    def _teach(
        self, noisy: torch.Tensor, start: torch.Tensor, stop: torch.Tensor, states: torch.Tensor
    ) -> torch.Tensor:
        """One DDIM step of the teacher with guidance."""
        empty = token_ids(self._material.tokenizer, [""], self._material.device)
        without = self._teacher.text(empty).last_hidden_state.expand_as(states)
        both = self._teacher.unet(
            torch.cat([noisy, noisy]), torch.cat([start, start]), encoder_hidden_states=torch.cat([without, states])
        ).sample
        blank, wanted = both.chunk(2)
        clean, noise = self._split(noisy, blank + GUIDANCE * (wanted - blank), start)
        signal, spread = levels(self._alphas, stop)
        return signal * clean + spread * noise

    def _split(
        self, noisy: torch.Tensor, answer: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The clean latents and the noise that an answer v stands for."""
        signal, spread = levels(self._alphas, timesteps)
        return signal * noisy - spread * answer, spread * noisy + signal * answer

    def _estimate(self, unet: Any, noisy: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The consistency function: the clean latents, and at timestep 0 the input itself."""
        clean, _ = self._split(noisy, unet(noisy, timesteps, encoder_hidden_states=states).sample, timesteps)
        scaled = timesteps[:, None, None, None] * TIMESTEP_SCALING
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        out = scaled / (scaled**2 + SIGMA_DATA**2).sqrt()
        return skip * noisy + out * clean
