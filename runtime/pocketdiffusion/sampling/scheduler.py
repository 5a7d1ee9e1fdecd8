"""The border where a "scheduler" (a `scheduler_config.json`, a class name, an A1111 label) becomes a `SamplingPlan`.

Training facts (noise table, prediction type, shift) always come from the config. The sampler and the schedule come from
it too unless they are given by name; a sampler given by name keeps the config's spacing where that is stated, and
otherwise takes its own default, as Diffusers' ``from_config`` does.

Limits: of Diffusers' classes those in `CLASSES`; networks without a predicted variance; no stochastic flow sampling.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pocketdiffusion.errors import BundleUnsupported, InvalidRequest
from pocketdiffusion.sampling import SAMPLERS, SCHEDULES, STOCHASTIC, load_sampler
from pocketdiffusion.sampling.denoise import Kind, Parameterization, clipped, consistent, thresholded
from pocketdiffusion.sampling.habits import DPM, HABITS, Habits
from pocketdiffusion.sampling.names import CLASSES, sampler_and_schedule, schedule_name
from pocketdiffusion.sampling.schedules import Layout, Levels, shifted, to_sigmas
from pocketdiffusion.sampling.training import TrainingLevels, training_levels
from pocketdiffusion.sampling.types import Denoise, Noise, Sigmas, Step
from pocketdiffusion.tensors import Array

Config = Mapping[str, Any]

KINDS: Mapping[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "sample", "flow_prediction": "flow"}
SPACINGS = ("linspace", "leading", "trailing")
SWITCHES = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "lu",
}
FLOW_CLASS = "FlowMatchEulerDiscreteScheduler"
DPM_FOREIGN = {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint", "deis": "dpmsolver++"}
FOREIGN_VALUES: Mapping[str, Mapping[str, str]] = {
    "dpm++ 2m": DPM_FOREIGN,
    "dpm++ 2m sde": DPM_FOREIGN,
    "dpm++ 2s": DPM_FOREIGN,
    "unipc": {"midpoint": "bh2", "heun": "bh2", "logrho": "bh2"},
}
"""Values of `solver_type` and `algorithm_type` that Diffusers' classes replace when configs travel between them."""
REFUSED = {
    "invert_sigmas": (False,),
    "stochastic_sampling": (False,),
    "interpolation_type": ("linear",),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
    "solver_p": (),
}
"""Keys that change the result and are not supported beyond these values (None, or no key, is always fine)."""


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """How a model is sampled: made once per request, free of arrays."""

    sampler: str
    """A name in SAMPLERS."""
    schedule: str
    """A name in SCHEDULES."""
    training: TrainingLevels
    kind: Kind
    config: Config
    habits: Habits
    layout: Layout
    options: Mapping[str, Any]
    """Given to the sampler."""

    @property
    def train_timesteps(self) -> int:
        """Number of training timesteps T."""
        return self.training.steps

    @property
    def stochastic(self) -> bool:
        """Whether the sampler draws noise on the way."""
        eta = self.options.get("eta")
        if eta is not None:
            return bool(eta > 0)
        return self.sampler in STOCHASTIC or str(self.options.get("algorithm_type")).startswith("sde")

    def levels(
        self,
        steps: int | None = None,
        *,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        image_tokens: int | None = None,
    ) -> Levels:
        """The levels of a run of `steps` steps, or of the given `sigmas` or `timesteps`: exactly one of the three.

        `sigmas` are as in Diffusers' `set_timesteps`: with the final level, or for flow models flow times in (0, 1]
        without it, which the shift is then applied to. `image_tokens` (latent height times width over the patch area)
        is needed where the shift depends on the resolution. Raises InvalidRequest.
        """
        if [steps, sigmas, timesteps].count(None) != 2:
            raise InvalidRequest("num_inference_steps", "give exactly one of num_inference_steps, sigmas and timesteps")
        layout = replace(self.layout, shift=self._shift(image_tokens))
        flow = self.training.flow
        if sigmas is not None:
            fewest, most = (1, 1.0) if flow else (2, math.inf)
            return self._from_sigmas(_falling("sigmas", sigmas, fewest, most), layout)
        if timesteps is not None:
            most = self.train_timesteps if flow else self.train_timesteps - 1
            return self._from_timesteps(_falling("timesteps", timesteps, 1, most))
        if steps is None or not 1 <= steps <= self.train_timesteps:
            allowed = f"1 to {self.train_timesteps}"
            raise InvalidRequest("num_inference_steps", f"num_inference_steps is {steps}; allowed: {allowed}")
        points, at = SCHEDULES[self.schedule](self.training, steps, layout)
        return self._levels(to_sigmas(self.training, points), at)

    def parameterization(self, levels: Levels) -> Parameterization:
        """The meaning of the network's input and output, with the exact timesteps of `levels`."""
        exact = dict(zip(levels.sigmas.tolist(), levels.timesteps.tolist(), strict=False))
        return Parameterization(self.kind, self.training, exact)

    def run(self, denoise: Denoise, x: Array, levels: Levels, noise: Noise) -> Iterator[Step]:
        """Sample from state `x` at ``levels.sigmas[0]``: a start of pure noise is a draw times `initial_scale`."""
        wrapped = self._wrapped(denoise, self.parameterization(levels))
        return load_sampler(self.sampler)(wrapped, x, levels.sigmas, noise, **self.options)

    def _wrapped(self, denoise: Denoise, parameterization: Parameterization) -> Denoise:
        if self.habits.thresholds and _get(self.config, "thresholding", False):
            quantile = float(_get(self.config, "dynamic_thresholding_ratio", 0.995))
            denoise = thresholded(denoise, quantile, float(_get(self.config, "sample_max_value", 1.0)))
        elif self._clips():
            denoise = clipped(denoise, float(_get(self.config, "clip_sample_range", 1.0)))
        if self.sampler == "lcm" and not self.training.flow:
            denoise = consistent(denoise, parameterization, float(_get(self.config, "timestep_scaling", 10.0)))
        return denoise

    def _clips(self) -> bool:
        if self.habits.clips is None:
            return False
        default = self.habits.clips and _sampler_of(self.config) == self.sampler
        return bool(_get(self.config, "clip_sample", default))

    def _shift(self, image_tokens: int | None) -> float:
        if not (self.training.flow and _get(self.config, "use_dynamic_shifting", False)):
            return self.layout.shift
        if image_tokens is None:
            raise InvalidRequest("image_tokens", "this model's schedule depends on the resolution; give image_tokens")
        return dynamic_shift(self.config, image_tokens)

    def _from_sigmas(self, given: Sigmas, layout: Layout) -> Levels:
        if self.training.flow:
            times = shifted(given, layout.shift)
            return self._levels(to_sigmas(self.training, times), times * self.train_timesteps)
        at = np.array([self.training.timestep(sigma) for sigma in given[:-1].tolist()])
        return self._start(given, at)

    def _from_timesteps(self, at: Sigmas) -> Levels:
        return self._levels(np.array([self.training.sigma(timestep) for timestep in at.tolist()]), at)

    def _levels(self, sigmas: Sigmas, at: Sigmas) -> Levels:
        return self._start(np.append(sigmas, self._final(sigmas)), at)

    def _start(self, sigmas: Sigmas, at: Sigmas) -> Levels:
        if np.any(np.diff(sigmas) > 0) or sigmas[-1] < 0:
            raise InvalidRequest("sigmas", f"noise levels must fall and end at 0 or above; got {sigmas.tolist()}")
        first = float(sigmas[0])
        if self.training.flow:
            scale = 1 + first
        else:
            unit = self.habits.unit_start or self.layout.spacing == "leading"
            scale = math.sqrt(1 + first**2) if unit else first
        return Levels(sigmas, at, scale)

    def _final(self, sigmas: Sigmas) -> float:
        """The level after the last evaluation."""
        rule, spaced = self.habits.final, self.schedule in SPACINGS
        if rule == "final_sigmas_type":
            if _get(self.config, "final_sigmas_type", "zero") == "zero":
                return 0.0
            repeat = self.sampler == "unipc" and not spaced
        elif rule == "set_alpha_to_one":
            if self.training.flow or _get(self.config, "set_alpha_to_one", self.habits.alpha_to_one):
                return 0.0
            repeat = False
        elif rule == "zero" or (rule == "table" and self.training.flow):
            return 0.0
        else:
            repeat = rule == "deis" and not spaced
        return float(sigmas[-1] if repeat or self.training.flow else self.training.sigmas[0])


def sampling_plan(
    config: Config,
    *,
    sampler: str | None = None,
    schedule: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> SamplingPlan:
    """Read a Diffusers `scheduler_config.json`; `sampler`, `schedule` and the sampler's `options` override it.

    Names: those of SAMPLERS and SCHEDULES, Diffusers' class names, A1111's labels, k-diffusion's functions. Unknown
    keys of the config are ignored. Raises InvalidRequest for names and options, BundleUnsupported for the config.
    """
    _refuse(config)
    name, labelled = _sampler_of(config), None
    if sampler is not None:
        name, labelled = sampler_and_schedule(sampler, SAMPLERS, SCHEDULES)
    chosen = labelled if schedule is None else schedule_name(schedule, SCHEDULES)
    if labelled is not None and chosen != labelled:
        raise InvalidRequest(
            "schedule", f"schedule is {schedule!r}, but sampler {sampler!r} says {labelled}; give one of the two"
        )
    habits = HABITS[name]
    kind = _kind(config)
    training = _training(config, kind, habits)
    spacing = chosen if chosen in SPACINGS else _spacing(config, habits)
    plan_schedule = chosen or _schedule_of(config, name, spacing, training.flow)
    layout = _layout(config, habits, spacing)
    merged = {**_options(config, name, habits, kind, training), **(options or {})}
    _check_options(name, merged)
    return SamplingPlan(name, plan_schedule, training, kind, config, habits, layout, merged)


def dynamic_shift(config: Config, image_tokens: int) -> float:
    """The flow shift at a resolution: linear in the number of image tokens, in log shift unless "linear" is asked."""
    low, high = float(_get(config, "base_shift", 0.5)), float(_get(config, "max_shift", 1.15))
    few, many = int(_get(config, "base_image_seq_len", 256)), int(_get(config, "max_image_seq_len", 4096))
    mu = low + (high - low) * (image_tokens - few) / (many - few)
    return math.exp(mu) if _get(config, "time_shift_type", "exponential") == "exponential" else mu


def _falling(name: str, given: Sequence[float], fewest: int, most: float) -> Sigmas:
    """A caller's own levels as an array. Raises InvalidRequest."""
    try:
        levels = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        levels = np.empty(0)
    usable = levels.ndim == 1 and len(levels) >= fewest and np.isfinite(levels).all()
    if not usable or np.any(np.diff(levels) > 0) or levels[0] > most or levels[-1] < 0:
        span = "0 or above" if most == math.inf else f"from 0 to {most:g}"
        raise InvalidRequest(name, f"{name} are {given!r}; give {fewest} or more falling numbers, {span}")
    return levels


def _get(config: Config, key: str, default: Any) -> Any:
    value = config.get(key)
    return default if value is None else value


def _refuse(config: Config) -> None:
    for key, allowed in REFUSED.items():
        value = config.get(key)
        if value is not None and value not in allowed:
            listed = ", ".join(str(item) for item in allowed) or "none"
            raise BundleUnsupported(f"the scheduler config asks for {key}={value!r}; supported: {listed}")


def _sampler_of(config: Config) -> str:
    class_name = config.get("_class_name")
    if class_name not in CLASSES:
        raise BundleUnsupported(f"scheduler class '{class_name}' is not supported; supported: {', '.join(CLASSES)}")
    if class_name == "DPMSolverMultistepScheduler" and str(_get(config, "algorithm_type", "")).startswith("sde"):
        return "dpm++ 2m sde"
    if class_name == "PNDMScheduler" and _get(config, "skip_prk_steps", False):
        return "plms"
    return CLASSES[class_name]


def _kind(config: Config) -> Kind:
    if config.get("_class_name") == FLOW_CLASS:
        return "flow"
    prediction = _get(config, "prediction_type", "epsilon")
    kind = KINDS.get(prediction)
    if kind is None or (kind == "flow") != bool(_get(config, "use_flow_sigmas", False)):
        pairs = "epsilon, v_prediction, sample, or flow_prediction together with use_flow_sigmas"
        raise BundleUnsupported(f"the scheduler config asks for prediction_type={prediction!r}; supported: {pairs}")
    return kind


def _training(config: Config, kind: Kind, habits: Habits) -> TrainingLevels:
    if kind == "flow":
        return TrainingLevels(np.empty(0), int(_get(config, "num_train_timesteps", 1000)), flow=True)
    return training_levels(config, zero_snr_alpha=habits.zero_snr_alpha)


def _spacing(config: Config, habits: Habits) -> str:
    unknown = config.get("_class_name") == "DPMSolverSinglestepScheduler"  # the class does not have the key
    spacing = habits.spacing if unknown else _get(config, "timestep_spacing", habits.spacing)
    if spacing not in SPACINGS:
        raise BundleUnsupported(f"timestep_spacing '{spacing}' is not supported; supported: {', '.join(SPACINGS)}")
    return str(spacing)


def _schedule_of(config: Config, sampler: str, spacing: str, flow: bool) -> str:
    for key, name in SWITCHES.items():
        if _get(config, key, False):
            return name
    if flow:
        return "flow"
    return "distilled" if sampler in ("lcm", "tcd") else spacing


def _layout(config: Config, habits: Habits, spacing: str) -> Layout:
    match = config.get("_class_name") == FLOW_CLASS
    layout = replace(
        habits.layout,
        spacing=spacing,
        offset=int(_get(config, "steps_offset", 0)),
        sigma_min=config.get("sigma_min"),
        sigma_max=config.get("sigma_max"),
        lambda_min=float(_get(config, "lambda_min_clipped", -math.inf)),
        shift=float(_get(config, "shift" if match else "flow_shift", 1.0)),
        shift_terminal=config.get("shift_terminal"),
        original_steps=int(_get(config, "original_inference_steps", 50)),
    )
    if habits is DPM and config.get("beta_schedule") == "squaredcos_cap_v2":
        return replace(layout, karras_rounded=False)
    if match:
        twice = not _get(config, "use_dynamic_shifting", False)
        return replace(layout, flow_points="match", truncated=False, shift_twice_at_end=twice)
    return layout


def _options(config: Config, sampler: str, habits: Habits, kind: Kind, training: TrainingLevels) -> dict[str, Any]:
    """What the config and the model tell the sampler. Another sampler's options are not this one's."""
    options: dict[str, Any] = {}
    if sampler == _sampler_of(config):
        options = {key: _known(sampler, config[key]) for key in habits.options if config.get(key) is not None}
        if sampler == "ddpm" and config.get("variance_type") == "fixed_large":
            options["variance"] = "large"
    if sampler in ("pndm", "plms"):
        options["prediction_type"] = "v_prediction" if kind == "v" else "epsilon"
    if sampler in ("pndm", "tcd"):
        options["training"] = training
    return options


def _known(sampler: str, value: Any) -> Any:
    """An option's value, or what Diffusers' class takes for a value of a related class found in a shared config."""
    return FOREIGN_VALUES.get(sampler, {}).get(value, value) if isinstance(value, str) else value


def _check_options(sampler: str, options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in _options_of(sampler):
            takers = ", ".join(other for other in SAMPLERS if name in _options_of(other)) or "none"
            listed = ", ".join(_options_of(sampler)) or "none"
            raise InvalidRequest(
                name,
                f"{name} was given, which sampler '{sampler}' does not take (its options: {listed}); leave it out, or "
                f"choose one of: {takers}",
            )


def _options_of(sampler: str) -> list[str]:
    parameters = inspect.signature(load_sampler(sampler)).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
