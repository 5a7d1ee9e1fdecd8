"""What of a request's steps is computed, and how: its preset, noise levels, guidance and forecasts."""

from __future__ import annotations

from dataclasses import replace

from pocketdiffusion.component import Component
from pocketdiffusion.denoiser import network, passes
from pocketdiffusion.errors import InvalidRequest
from pocketdiffusion.families import Conditioning
from pocketdiffusion.generation import Run
from pocketdiffusion.presets import PRESETS
from pocketdiffusion.request import Request
from pocketdiffusion.sampling.denoise import Network, guided, holding, interval
from pocketdiffusion.sampling.reuse import UNSUITED, Forecast
from pocketdiffusion.sampling.scheduler import SamplingPlan
from pocketdiffusion.sampling.schedules import Levels
from pocketdiffusion.sampling.types import Denoise


def answer(component: Component, run: Run, conditioning: Conditioning) -> Network:
    """The denoiser's raw answer: the conditional one, or all passes combined by guidance."""
    request = run.request
    conditional = network(component, conditioning.positive, run.timings)
    if conditioning.negative is None:
        return conditional
    each = passes(component, conditioning, batched=request.batched_guidance, timings=run.timings)
    if request.guidance_hold is not None:
        guiding = interval(0, request.guidance_hold, run.plan.train_timesteps)
        each = holding(each, conditional, guiding, run.parameterization.noise_share)
    active = interval(*request.guidance_interval, run.plan.train_timesteps)
    return guided(each, conditional, *request.guidance_scales, rescale=request.guidance_rescale, active=active)


def with_preset(request: Request, plan: SamplingPlan, *, guided: bool) -> Request:
    """The request with what it leaves open filled in from its preset, for such a sampler; `guided`: by two passes."""
    if plan.sampler in UNSUITED:
        if request.computed_steps is not None:
            raise InvalidRequest(
                "computed_steps", f"computed_steps was given; {plan.sampler} needs all of its steps: lower their number"
            )
        return request
    if plan.training.continuous and request.guidance_hold is not None:
        raise InvalidRequest(
            "guidance_hold", "guidance_hold was given; it needs a model of numbered timesteps: leave it out"
        )
    preset = PRESETS[request.preset]
    steps = request.computed_steps or preset.steps(stochastic=plan.stochastic)
    holds = guided and not plan.training.continuous and request.guidance_hold is None
    hold = preset.guidance_hold if holds else request.guidance_hold
    return replace(request, computed_steps=steps, guidance_hold=hold)


def forecasting(denoise: Denoise, run: Run, levels: Levels) -> Forecast | None:
    """The wrapper that computes only some of the steps, if that was asked; `levels` are those that the task leaves."""
    count = run.request.computed_steps
    if count is None and PRESETS[run.request.preset].steps(stochastic=run.plan.stochastic) is not None:
        run.messages.append(f"preset {run.request.preset} left out no step: {run.plan.sampler} needs all of its steps")
    return None if count is None else Forecast(denoise, levels.sigmas, count, stochastic=run.plan.stochastic)


def run_levels(plan: SamplingPlan, request: Request) -> Levels:
    """The noise levels that the request asks for."""
    if request.sigmas is not None or request.timesteps is not None:
        return plan.levels(sigmas=request.sigmas, timesteps=request.timesteps)
    return plan.levels(request.num_inference_steps)
