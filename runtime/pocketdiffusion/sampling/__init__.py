"""Samplers and schedules: everything between a network's raw output and a clean latent. Never sees an engine.

To add a sampler: one file with a generator function of the protocol `types.Sampler`, and one line in SAMPLERS; its
name in STOCHASTIC if it draws noise.
To add a schedule: one function and one line in `schedules.SCHEDULES`.
"""

from __future__ import annotations

from importlib import import_module
from typing import cast

from pocketdiffusion.sampling.schedules import SCHEDULES
from pocketdiffusion.sampling.types import Sampler

__all__ = ["SAMPLERS", "SCHEDULES", "STOCHASTIC", "load_sampler"]

SAMPLERS = {
    "euler": "euler:euler",
    "euler a": "euler:euler_ancestral",
    "heun": "heun:heun",
    "lms": "lms:lms",
    "dpm2": "dpm2:dpm2",
    "dpm2 a": "dpm2:dpm2_ancestral",
    "dpm++ 2m": "dpmpp_2m:dpmpp_2m",
    "dpm++ 2m sde": "dpmpp_2m:dpmpp_2m_sde",
    "dpm++ 3m sde": "dpmpp_3m_sde:dpmpp_3m_sde",
    "dpm++ 2s": "dpmpp_singlestep:dpmpp_singlestep",
    "dpm++ 2s a": "dpmpp_singlestep:dpmpp_2s_ancestral",
    "dpm++ sde": "dpmpp_sde:dpmpp_sde",
    "unipc": "unipc:unipc",
    "deis": "deis:deis",
    "ddim": "ddim:ddim",
    "ddpm": "ddpm:ddpm",
    "pndm": "pndm:pndm",
    "plms": "pndm:plms",
    "lcm": "lcm:lcm",
    "tcd": "tcd:tcd",
}
"""Our name -> "module:function" in this package, imported on use."""

STOCHASTIC = frozenset(
    ("euler a", "dpm2 a", "dpm++ 2m sde", "dpm++ 3m sde", "dpm++ 2s a", "dpm++ sde", "ddpm", "lcm", "tcd")
)
"""Samplers that draw noise on the way, unless their eta is 0; DDIM does only with an eta above 0."""


def load_sampler(name: str) -> Sampler:
    """The function of a name in SAMPLERS."""
    module, function = SAMPLERS[name].split(":")
    return cast(Sampler, getattr(import_module(f"{__name__}.{module}"), function))
