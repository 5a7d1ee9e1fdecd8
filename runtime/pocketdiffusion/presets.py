"""Quality presets: how much of the work is left out, under one name. What each gains and loses is in the README.

A preset only fills in what a request leaves open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DECODERS = {"full": "vae_decoder", "tiny": "tiny_vae_decoder"}
"""What `Request.decoder` may say -> the component of a bundle that it means."""


@dataclass(frozen=True, slots=True)
class Preset:
    """Settings of one preset; None leaves nothing out."""

    computed_steps: int | None = None
    """Steps at which the denoiser runs, see `Request.computed_steps`."""
    computed_steps_stochastic: int | None = None
    """The same for samplers that draw noise on the way, whose answers are harder to forecast."""
    guidance_hold: float | None = None
    """Part of the run from which guidance needs no pass of its own, see `Request.guidance_hold`."""
    decoder: str | None = None
    """A key of `DECODERS`, which is taken where the bundle has it, see `Request.decoder`."""

    def steps(self, *, stochastic: bool) -> int | None:
        """The number of computed steps for a kind of sampler."""
        return self.computed_steps_stochastic if stochastic else self.computed_steps


PRESETS: Mapping[str, Preset] = {
    "exact": Preset(),
    "balanced": Preset(computed_steps=5, computed_steps_stochastic=10, guidance_hold=0.7),
    "fast": Preset(computed_steps=4, computed_steps_stochastic=8, guidance_hold=0.7, decoder="tiny"),
}
"""Chosen on the embedded model; `python -m pocketdiffusion_bench.presets` measures what they gain and lose, and the
README shows it.

What a cache of deep features (DeepCache, arXiv:2312.00858) could add is little: at 512x512 the outermost blocks of
Stable Diffusion 1.5, which it computes at every step, are 14.6 % of a pass, so that 20 such steps alone cost nearly as
much as all of "fast". Text keys and values, the same at every step, are 0.4 % of a pass, time embeddings nothing.
"""
