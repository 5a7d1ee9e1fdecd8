"""Noise levels of a run: what Diffusers and A1111 call spacing, Karras, exponential, beta, align your steps ...

A schedule is a function ``(training, steps, layout) -> (levels, timesteps)``: both float64, from noise to image,
without the final level. For variance-preserving models a level is sigma; for flow models it is the flow time t in
(0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pocketdiffusion.errors import InvalidRequest
from pocketdiffusion.sampling._beta import beta_quantile
from pocketdiffusion.sampling.training import TrainingLevels, flow_sigma
from pocketdiffusion.sampling.types import Sigmas

Points = tuple[Sigmas, Sigmas]


@dataclass(frozen=True, slots=True)
class Levels:
    """The noise levels of a run of n steps."""

    sigmas: Sigmas
    """Shape (n + 1,), float64, decreasing; the last may be above 0, and then `Parameterization.latent` matters."""
    timesteps: Sigmas
    """Shape (n,), float64: what the network is given at each of the first n sigmas."""
    initial_scale: float
    """Standard-normal noise times this is the state at the first sigma."""

    def tail(self, start: int) -> Levels:
        """The levels from step `start` on, for a run that begins with a partly noised image."""
        return Levels(self.sigmas[start:], self.timesteps[start:], self.initial_scale)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a scheduler lays out its levels. The defaults are k-diffusion's habits, which Diffusers' Euler shares."""

    spacing: str = "linspace"
    offset: int = 0
    rounded: bool = False
    """Timesteps of a spacing are whole numbers."""
    fence: bool = False
    """A spacing makes one point more than there are steps and drops the last (DPM-Solver)."""
    full_range: bool = False
    """Karras, exponential and beta span the training table rather than the run's own spacing."""
    karras_rounded: bool = False
    truncated: bool = False
    """Timesteps are cut to whole numbers after everything else."""
    sigma_min: float | None = None
    sigma_max: float | None = None
    """Ends of Karras, exponential and beta, where the config states them."""
    lambda_min: float = -math.inf
    """Training levels with a smaller log-SNR half than this are left out (DPM-Solver's clipping for cosine tables)."""
    flow_points: Literal["match", "dpm", "unipc"] = "match"
    shift: float = 1.0
    """Flow shift: ``shift * t / (1 + (shift - 1) * t)`` (arXiv:2403.03206, section 5.3.2)."""
    shift_twice_at_end: bool = False
    """Diffusers' FlowMatchEuler shifts the smallest time once for its table and once more for a run."""
    shift_terminal: float | None = None
    """Stretch flow times so that the last is this."""
    original_steps: int = 50
    """Steps of the teacher of a distilled model."""


Schedule = Callable[[TrainingLevels, int, Layout], Points]


def spaced(training: TrainingLevels, steps: int, layout: Layout) -> Points:
    """Evenly spaced timesteps: linspace, leading, trailing (arXiv:2305.08891, table 2)."""
    _require(training, layout.spacing, flow=False)
    last = training.steps - int(np.sum(-np.log(training.sigmas) < layout.lambda_min))
    points = steps + layout.fence
    if layout.spacing == "linspace":
        timesteps = np.linspace(0, last - 1, points, dtype=np.float64)[::-1]
    elif layout.spacing == "leading":
        timesteps = np.arange(points, dtype=np.float64)[::-1] * (last // points) + layout.offset
    else:
        timesteps = np.round(np.arange(last, 0, -training.steps / steps)) - 1
    timesteps = (np.round(timesteps) if layout.rounded else timesteps)[:steps]
    return np.interp(timesteps, np.arange(training.steps), training.sigmas), timesteps


def flow(training: TrainingLevels, steps: int, layout: Layout) -> Points:
    """Evenly spaced times of a rectified flow, shifted towards noise (arXiv:2403.03206, section 5.3.2)."""
    _require(training, "flow", flow=True)
    if layout.flow_points == "match":
        smallest = 1 / training.steps
        last = float(shifted(np.array(smallest), layout.shift)) if layout.shift_twice_at_end else smallest
        times = np.linspace(1, last, steps)
    elif layout.flow_points == "dpm":
        times = (1 - np.linspace(1, 1 / training.steps, steps + 1))[:0:-1]
    else:
        times = np.linspace(1, 1 / training.steps, steps + 1)[:-1]
    times = _shifted(times, layout)
    if layout.flow_points == "unipc" and times[0] > 1 - 1e-6:
        times[0] -= 1e-6
    return times, _whole(times * training.steps, layout)


def karras(training: TrainingLevels, steps: int, layout: Layout) -> Points:
    """Karras et al. 2022, arXiv:2206.00364, equation 5, with rho = 7."""
    first, last = _ends(training, steps, layout)
    ramp = np.linspace(0, 1, steps)
    levels = (first ** (1 / 7) + ramp * (last ** (1 / 7) - first ** (1 / 7))) ** 7
    timesteps = _timesteps(training, levels)
    return levels, _whole(np.round(timesteps) if layout.karras_rounded else timesteps, layout)


def exponential(training: TrainingLevels, steps: int, layout: Layout) -> Points:
    """Evenly spaced in log sigma."""
    levels = _log_uniform(training, steps, layout)
    return levels, _whole(_timesteps(training, levels), layout)


def lu(training: TrainingLevels, steps: int, layout: Layout) -> Points:
    """Evenly spaced in log sigma, at whole timesteps (Diffusers' `use_lu_lambdas`; arXiv:2206.00927, section 3.4)."""
    levels = _log_uniform(training, steps, layout)
    return levels, np.round(_timesteps(training, levels))


def beta(training: TrainingLevels, steps: int, layout: Layout) -> Points:
    """Quantiles of the beta distribution with a = b = 0.6 (arXiv:2407.12173)."""
    first, last = _ends(training, steps, layout)
    levels = last + beta_quantile(1 - np.linspace(0, 1, steps), 0.6, 0.6) * (first - last)
    return levels, _whole(_timesteps(training, levels), layout)


def sgm_uniform(training: TrainingLevels, steps: int, layout: Layout) -> Points:
    """Timesteps evenly spaced from the last training level, one more than there are steps, the final one dropped."""
    if training.flow:
        levels = _shifted(np.linspace(1, 1 / training.steps, steps + 1)[:-1], layout)
        return levels, _timesteps(training, levels)
    timesteps = np.linspace(training.steps - 1, 0, steps + 1)[:-1]
    return np.exp(np.interp(timesteps, np.arange(training.steps), np.log(training.sigmas))), timesteps


def simple(training: TrainingLevels, steps: int, layout: Layout) -> Points:
    """Every (training steps / steps)-th level of the training table, from its end."""
    indices = training.steps - 1 - (np.arange(steps) * (training.steps / steps)).astype(np.int64)
    if training.flow:
        levels = _shifted((indices + 1) / training.steps, layout)
        return levels, _timesteps(training, levels)
    return training.sigmas[indices], indices.astype(np.float64)


def distilled(training: TrainingLevels, steps: int, layout: Layout) -> Points:
    """A subset of the teacher's timesteps, evenly spaced (latent consistency models, arXiv:2310.04378, section 4.3)."""
    _require(training, "distilled", flow=False)
    teacher = np.arange(layout.original_steps, 0, -1) * (training.steps // layout.original_steps) - 1
    if steps > len(teacher):
        raise InvalidRequest("num_inference_steps", f"{steps} steps asked; this model allows 1 to {len(teacher)}")
    indices = np.floor(np.linspace(0, len(teacher), steps, endpoint=False)).astype(np.int64)
    return training.sigmas[teacher[indices]], teacher[indices].astype(np.float64)


AYS_SD15 = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
AYS_SDXL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)
AYS_SVD = (700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)


def align_your_steps(table: tuple[float, ...]) -> Schedule:
    """Sabour et al. 2024, arXiv:2404.14507: a table for 10 steps, interpolated linearly in log sigma for others."""

    def schedule(training: TrainingLevels, steps: int, layout: Layout) -> Points:
        _require(training, "align_your_steps", flow=False)
        at, known = np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(table))
        levels = np.exp(np.interp(at, known, np.log(table)))[:-1]
        return levels, _timesteps(training, levels)

    return schedule


SCHEDULES: Mapping[str, Schedule] = {
    "linspace": spaced,
    "leading": spaced,
    "trailing": spaced,
    "karras": karras,
    "exponential": exponential,
    "lu": lu,
    "beta": beta,
    "sgm_uniform": sgm_uniform,
    "simple": simple,
    "align_your_steps": align_your_steps(AYS_SD15),
    "align_your_steps_sdxl": align_your_steps(AYS_SDXL),
    "align_your_steps_svd": align_your_steps(AYS_SVD),
    "distilled": distilled,
    "flow": flow,
}


def _require(training: TrainingLevels, schedule: str, *, flow: bool) -> None:
    if training.flow != flow:
        model = "a flow" if training.flow else "no flow"
        choices = "flow, karras or beta" if training.flow else "leading, trailing or karras"
        message = f"schedule '{schedule}' was asked for {model} model; choose another, for example {choices}"
        raise InvalidRequest("schedule", message)


def to_sigmas(training: TrainingLevels, levels: Sigmas) -> Sigmas:
    """A schedule's levels as sigmas."""
    return np.array([flow_sigma(time) for time in levels.tolist()]) if training.flow else levels


def shifted(times: Sigmas, shift: float) -> Sigmas:
    """Flow times moved towards noise by `shift`."""
    return shift * times / (1 + (shift - 1) * times)


def _shifted(times: Sigmas, layout: Layout) -> Sigmas:
    times = shifted(times, layout.shift)
    if layout.shift_terminal is None:
        return times
    return np.asarray(1 - (1 - times) * (1 - layout.shift_terminal) / (1 - times[-1]))


def _log_uniform(training: TrainingLevels, steps: int, layout: Layout) -> Sigmas:
    first, last = _ends(training, steps, layout)
    return np.exp(np.linspace(math.log(first), math.log(last), steps))


def _ends(training: TrainingLevels, steps: int, layout: Layout) -> tuple[float, float]:
    full = layout.full_range and not training.flow
    levels = training.sigmas[::-1] if full else (flow if training.flow else spaced)(training, steps, layout)[0]
    first = float(levels[0]) if layout.sigma_max is None else layout.sigma_max
    return first, float(levels[-1]) if layout.sigma_min is None else layout.sigma_min


def _whole(timesteps: Sigmas, layout: Layout) -> Sigmas:
    return np.trunc(timesteps) if layout.truncated else timesteps


def _timesteps(training: TrainingLevels, levels: Sigmas) -> Sigmas:
    if training.flow:
        return levels * training.steps
    return np.array([training.timestep(level) for level in levels.tolist()])
