"""Trajectories of Diffusers' schedulers and of ours on one synthetic network, in the network's own coordinates.

Both sides start from the same noise, draw the same noise in each step and call the same numpy function. `worst_error`
is the figure: the largest difference in any step, relative to that step's largest value.
"""

from __future__ import annotations

import copy
import importlib
import json
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch

from pocketdiffusion.sampling.denoise import denoiser
from pocketdiffusion.sampling.scheduler import sampling_plan

SHAPE = (2, 4, 8, 8)
SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""The training table of Stable Diffusion."""

MODULES = {
    "EulerDiscreteScheduler": "euler_discrete",
    "EulerAncestralDiscreteScheduler": "euler_ancestral_discrete",
    "HeunDiscreteScheduler": "heun_discrete",
    "LMSDiscreteScheduler": "lms_discrete",
    "KDPM2DiscreteScheduler": "k_dpm_2_discrete",
    "KDPM2AncestralDiscreteScheduler": "k_dpm_2_ancestral_discrete",
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "FlowMatchEulerDiscreteScheduler": "flow_match_euler_discrete",
    "DPMSolverMultistepScheduler": "dpmsolver_multistep",
    "DPMSolverSinglestepScheduler": "dpmsolver_singlestep",
    "DPMSolverSDEScheduler": "dpmsolver_sde",
    "UniPCMultistepScheduler": "unipc_multistep",
    "DEISMultistepScheduler": "deis_multistep",
    "PNDMScheduler": "pndm",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
}
TWO_CALLS = (
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
)
EXPLODING = (
    *TWO_CALLS,
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
)
"""Classes whose state is clean + sigma * noise; the others keep the network's coordinates."""

_MADE: dict[str, Any] = {}

Network = Callable[[np.ndarray, float], np.ndarray]


def network(prediction_type: str) -> Network:
    """A smooth, nonlinear network: the ideal answer for a Gaussian data set, bent, with neighbours mixed in."""

    def output(x: np.ndarray, timestep: float) -> np.ndarray:
        z, time = x.astype(np.float64), float(timestep) / 1000
        if prediction_type == "flow_prediction":
            a, b = 1 - time, max(time, 1e-3)
        else:
            a = math.exp(-0.5 * (0.002 + 0.8 * time + 4.5 * time**2))
            b = math.sqrt(1 - a * a)
        mean, variance = 0.3, 0.36
        clean = mean + a * variance / (a * a * variance + b * b) * (z - a * mean)
        clean = clean + 0.15 * b * np.tanh(z + 0.5 * np.roll(z, 1, axis=-1) + time)
        noise = (z - a * clean) / b
        answers = {
            "epsilon": noise,
            "v_prediction": a * noise - b * clean,
            "sample": clean,
            "flow_prediction": noise - clean,
        }
        return answers[prediction_type].astype(np.float32)

    return output


def draws(seed: int) -> Iterator[np.ndarray]:
    """Standard-normal arrays: the start, then the noise of the steps."""
    generator = np.random.default_rng(seed)
    while True:
        yield generator.standard_normal(SHAPE, dtype=np.float32)


def our_trajectory(
    class_name: str,
    config: Mapping[str, Any],
    steps: int,
    prediction_type: str = "epsilon",
    seed: int = 0,
    *,
    options: Mapping[str, Any] | None = None,
    **levels_arguments: Any,
) -> list[np.ndarray]:
    """The state after each step. `levels_arguments` go to `SamplingPlan.levels`."""
    plan = sampling_plan(_full(class_name, config, prediction_type), options=options or {})
    levels = plan.levels(steps, **levels_arguments)
    parameterization = plan.parameterization(levels)
    noise = draws(seed)
    x = next(noise) * levels.initial_scale
    denoise = denoiser(network(prediction_type), parameterization)
    run = plan.run(denoise, x, levels, lambda: next(noise))
    states = [parameterization.latent(step.x, step.sigma_next) for step in run]
    assert all(state.dtype == np.float32 for state in states)
    return states


def diffusers_trajectory(
    class_name: str,
    config: Mapping[str, Any],
    steps: int,
    prediction_type: str = "epsilon",
    seed: int = 0,
    *,
    step_arguments: Mapping[str, Any] | None = None,
    **timesteps_arguments: Any,
) -> list[np.ndarray]:
    """The same from a Diffusers class; `timesteps_arguments` go to `set_timesteps`, `step_arguments` to `step`."""
    module = _module(class_name)
    scheduler = _scheduler(module, class_name, _full(class_name, config, prediction_type))
    scheduler.set_timesteps(steps, **timesteps_arguments)
    noise = draws(seed)
    x = torch.from_numpy(next(noise)) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    if class_name == "DPMSolverSDEScheduler":
        scheduler.noise_sampler = _brownian(noise)
    # `create` because the deterministic classes don't import it
    with mock.patch.object(module, "randn_tensor", lambda *_, **__: torch.from_numpy(next(noise)), create=True):
        states = list(_loop(scheduler, class_name, x, network(prediction_type), step_arguments or {}))
    return _after_each_step(states, _calls(class_name, config, steps))


def worst_error(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """The largest difference in any step, relative to the largest value of that step."""
    assert len(ours) == len(theirs), (len(ours), len(theirs))
    errors = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, theirs, strict=True)]
    return float(np.max(errors))  # numpy's max lets a NaN through, Python's may hide it


def _full(class_name: str, config: Mapping[str, Any], prediction_type: str) -> dict[str, Any]:
    return {"_class_name": class_name, **SD, **config, "prediction_type": prediction_type}


def _scheduler(module: types.ModuleType, class_name: str, config: Mapping[str, Any]) -> Any:
    """A fresh scheduler. Making one takes some of the classes a second, so that they are made once and copied."""
    key = json.dumps(config, sort_keys=True)
    if key not in _MADE:
        _MADE[key], _ = getattr(module, class_name).from_config(dict(config), return_unused_kwargs=True)
    return copy.deepcopy(_MADE[key])


def _module(class_name: str) -> types.ModuleType:
    """The module of a class. DPMSolverSDE's imports torchsde, whose only use, the noise, is replaced here."""
    name = f"diffusers.schedulers.scheduling_{MODULES[class_name]}"
    if name in sys.modules or class_name != "DPMSolverSDEScheduler":
        return importlib.import_module(name)
    stub = sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
    module = importlib.import_module(name)
    if stub.__spec__ is None:
        del sys.modules["torchsde"]
    return module


def _loop(
    scheduler: Any, class_name: str, x: torch.Tensor, model: Network, step_arguments: Mapping[str, Any]
) -> Iterator[np.ndarray]:
    for timestep in scheduler.timesteps:
        scaled = x if class_name.startswith("FlowMatch") else scheduler.scale_model_input(x, timestep)
        output = torch.from_numpy(model(scaled.numpy(), float(timestep)))
        x = scheduler.step(output, timestep, x, **step_arguments).prev_sample
        scale = 1.0
        if class_name in EXPLODING:
            scale = math.sqrt(1 + float(scheduler.sigmas[scheduler.step_index]) ** 2)
        yield x.numpy() / scale


def _brownian(noise: Iterator[np.ndarray]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A Brownian path in sigma from the draws over a step's first part and its second."""
    first: list[tuple[float, np.ndarray]] = []

    def increment(start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        if not first:
            first.append((float(end), next(noise)))
            return torch.from_numpy(first[0][1])
        middle, begun = first.pop()
        share = (float(start) - middle) / (float(start) - float(end))
        return torch.from_numpy((math.sqrt(share) * begun + math.sqrt(1 - share) * next(noise)).astype(np.float32))

    return increment


def _calls(class_name: str, config: Mapping[str, Any], steps: int) -> list[int]:
    """Network calls of each step."""
    if class_name in TWO_CALLS:
        return [2] * (steps - 1) + [1]
    if class_name == "PNDMScheduler":
        first = [2] if config.get("skip_prk_steps") else [4] * 3
        return ([*first] + [1] * (steps - len(first))) if steps > 1 else [1]
    return [1] * steps


def _after_each_step(states: list[np.ndarray], calls: list[int]) -> list[np.ndarray]:
    assert sum(calls) == len(states), (calls, len(states))
    return [states[end - 1] for end in np.cumsum(calls)]
