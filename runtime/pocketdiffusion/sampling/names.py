"""Names as users bring them: ours, Diffusers' classes, A1111's labels, k-diffusion's functions."""

from __future__ import annotations

import re
from collections.abc import Collection

from pocketdiffusion.errors import InvalidRequest

AUTOMATIC = "automatic"
"""A1111's word for the schedule that belongs to the sampler."""

CLASSES = {
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler a",
    "HeunDiscreteScheduler": "heun",
    "LMSDiscreteScheduler": "lms",
    "KDPM2DiscreteScheduler": "dpm2",
    "KDPM2AncestralDiscreteScheduler": "dpm2 a",
    "DPMSolverMultistepScheduler": "dpm++ 2m",
    "DPMSolverSinglestepScheduler": "dpm++ 2s",
    "DPMSolverSDEScheduler": "dpm++ sde",
    "UniPCMultistepScheduler": "unipc",
    "DEISMultistepScheduler": "deis",
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "pndm",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
    "FlowMatchEulerDiscreteScheduler": "euler",
}
"""Diffusers' classes and the samplers in them."""

SAMPLER_ALIASES = {
    **{name.lower(): sampler for name, sampler in CLASSES.items()},
    "euler ancestral": "euler a",
    "dpm 2": "dpm2",
    "dpm 2 a": "dpm2 a",
    "dpm 2 ancestral": "dpm2 a",
    "dpm2 ancestral": "dpm2 a",
    "dpm++ 2s ancestral": "dpm++ 2s a",
    "uni pc": "unipc",
}

SCHEDULE_ALIASES = {
    "ays": "align_your_steps",
    "ays_sdxl": "align_your_steps_sdxl",
    "ays_svd": "align_your_steps_svd",
    "normal": "linspace",
    "uniform": "linspace",
    "lcm": "distilled",
}


SAMPLER_LABELS = {
    "euler": "Euler",
    "euler a": "Euler a",
    "heun": "Heun",
    "lms": "LMS",
    "dpm2": "DPM2",
    "dpm2 a": "DPM2 a",
    "dpm++ 2m": "DPM++ 2M",
    "dpm++ 2m sde": "DPM++ 2M SDE",
    "dpm++ 3m sde": "DPM++ 3M SDE",
    "dpm++ 2s a": "DPM++ 2S a",
    "dpm++ sde": "DPM++ SDE",
    "unipc": "UniPC",
    "ddim": "DDIM",
    "plms": "PLMS",
    "lcm": "LCM",
}

SCHEDULE_LABELS = {
    "linspace": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
    "beta": "Beta",
    "sgm_uniform": "SGM Uniform",
    "simple": "Simple",
    "align_your_steps": "Align Your Steps",
}


def sampler_and_schedule(name: str, samplers: Collection[str], schedules: Collection[str]) -> tuple[str, str | None]:
    """Our sampler name, and the schedule's where the label holds one, as A1111's "DPM++ 2M Karras" does.

    Raises InvalidRequest with the choices.
    """
    words = re.sub(r"[\s_-]+", " ", name.strip().lower())
    words = re.sub(r"^(k|sample) ", "", words).replace("dpmpp", "dpm++")
    found = SAMPLER_ALIASES.get(words, words)
    if found in samplers:
        return found, None
    for schedule in (*schedules, *SCHEDULE_ALIASES):
        head = words.removesuffix(" " + schedule.replace("_", " "))
        if head != words and SAMPLER_ALIASES.get(head, head) in samplers:
            return SAMPLER_ALIASES.get(head, head), SCHEDULE_ALIASES.get(schedule, schedule)
    raise InvalidRequest("sampler", f"unknown sampler '{name}'; choose from: {', '.join(samplers)}")


def schedule_name(name: str, schedules: Collection[str]) -> str | None:
    """Our schedule name, None for "Automatic". Raises InvalidRequest with the choices."""
    words = re.sub(r"[\s_-]+", "_", name.strip().lower())
    found = SCHEDULE_ALIASES.get(words, words)
    if found == AUTOMATIC:
        return None
    if found in schedules:
        return found
    raise InvalidRequest("schedule", f"unknown schedule '{name}'; choose from: {', '.join((AUTOMATIC, *schedules))}")


def sampler_label(name: str) -> str:
    """What A1111 calls our sampler; our own name where it has none."""
    return SAMPLER_LABELS.get(name, name)


def schedule_label(name: str) -> str:
    """What A1111 calls our schedule; our own name where it has none."""
    return SCHEDULE_LABELS.get(name, name)
