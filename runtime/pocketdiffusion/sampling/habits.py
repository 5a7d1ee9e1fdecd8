"""What belongs to a sampler by convention: how Diffusers' class of that sampler lays out levels, starts and ends.

One entry per sampler. Samplers that Diffusers lacks take k-diffusion's habits, which A1111 shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pocketdiffusion.sampling.schedules import Layout
from pocketdiffusion.sampling.training import NEAR_INFINITE_ALPHA

KARRAS_DIFFUSION = Layout()
WHOLE_STEPS = Layout(rounded=True)
DPM_SOLVER = Layout(rounded=True, fence=True, full_range=True, karras_rounded=True, truncated=True, flow_points="dpm")


@dataclass(frozen=True, slots=True)
class Habits:
    """The conventions of one sampler; keys in quotes are those of `scheduler_config.json`."""

    layout: Layout = KARRAS_DIFFUSION
    spacing: str = "linspace"
    """Default of "timestep_spacing"."""
    unit_start: bool = False
    """The start has unit variance in the network's coordinates; otherwise only with leading spacing."""
    final: Literal["zero", "final_sigmas_type", "set_alpha_to_one", "table", "deis"] = "zero"
    """The last level: 0, as a key of the config says, the training table's first, or DEIS's own rule."""
    alpha_to_one: bool = True
    """Default of "set_alpha_to_one"."""
    zero_snr_alpha: float = NEAR_INFINITE_ALPHA
    """What a terminal alpha_cumprod of 0 becomes; 0 leaves it."""
    options: tuple[str, ...] = ()
    """Keys that are the sampler's options of the same name."""
    clips: bool | None = None
    """Default of "clip_sample"; None where the class does not know the key."""
    thresholds: bool = False
    """Whether the class knows "thresholding"."""


SOLVER_OPTIONS = ("solver_order", "lower_order_final")
MULTISTEP_OPTIONS = (*SOLVER_OPTIONS, "solver_type", "algorithm_type", "euler_at_final")

K = Habits()
K_TYPED = Habits(final="final_sigmas_type")
DPM2 = Habits(replace(KARRAS_DIFFUSION, karras_rounded=True))
DDIM = Habits(WHOLE_STEPS, "leading", True, final="set_alpha_to_one", zero_snr_alpha=0.0, clips=True, thresholds=True)
DPM = Habits(DPM_SOLVER, unit_start=True, final="final_sigmas_type", thresholds=True, options=MULTISTEP_OPTIONS)
LCM = Habits(WHOLE_STEPS, "leading", True, zero_snr_alpha=0.0, clips=False, thresholds=True)

HABITS: Mapping[str, Habits] = {
    "euler": K_TYPED,
    "euler a": K,
    "heun": replace(K, clips=False),
    "lms": K,
    "dpm2": DPM2,
    "dpm2 a": DPM2,
    "dpm++ 2m": DPM,
    "dpm++ 2m sde": DPM,
    "dpm++ 3m sde": K,
    "dpm++ 2s": replace(DPM, options=(*SOLVER_OPTIONS, "solver_type", "algorithm_type")),
    "dpm++ 2s a": K,
    "dpm++ sde": K,
    "unipc": replace(
        DPM,
        layout=replace(DPM_SOLVER, flow_points="unipc"),
        options=(*SOLVER_OPTIONS, "solver_type", "predict_x0", "disable_corrector"),
    ),
    "deis": replace(DPM, final="deis", options=SOLVER_OPTIONS),
    "ddim": DDIM,
    "ddpm": replace(DDIM, final="zero"),
    "pndm": replace(DDIM, alpha_to_one=False, clips=None, thresholds=False),
    "plms": replace(DDIM, alpha_to_one=False, clips=None, thresholds=False),
    "lcm": LCM,
    "tcd": replace(LCM, final="table", clips=None, thresholds=False),
}
