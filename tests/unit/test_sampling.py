"""Samplers, schedules, wrappers and the scheduler border, without torch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pocketdiffusion.errors import BundleUnsupported, InvalidRequest
from pocketdiffusion.sampling import SAMPLERS, SCHEDULES, load_sampler
from pocketdiffusion.sampling._beta import beta_quantile
from pocketdiffusion.sampling.denoise import denoiser
from pocketdiffusion.sampling.scheduler import SamplingPlan, dynamic_shift, sampling_plan
from pocketdiffusion.sampling.schedules import Levels
from pocketdiffusion.sampling.training import TrainingLevels, training_levels
from pocketdiffusion.tensors import Array

MEAN, DEVIATION = 1.5, 0.4
SD = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "timestep_spacing": "trailing",
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
CONFIGS = {
    "eps": {**SD, "prediction_type": "epsilon"},
    "v": {**SD, "prediction_type": "v_prediction"},
    "sample": {**SD, "prediction_type": "sample"},
    "flow": FLOW,
}
RAW = {
    "eps": lambda z, a, b, clean: (z - a * clean) / b,
    "v": lambda z, a, b, clean: a * (z - a * clean) / b - b * clean,
    "sample": lambda z, a, b, clean: clean,
    "flow": lambda z, a, b, clean: (z - a * clean) / b - clean,
}
NOT_FOR_FLOW = (
    "linspace",
    "leading",
    "trailing",
    "distilled",
    "align_your_steps",
    "align_your_steps_sdxl",
    "align_your_steps_svd",
)
ONE_CALL_DISTILLED = ("lcm", "tcd")
"""Each step draws from the whole distribution anew; the Gaussian is not a fixed point of their large steps."""


def source(seed: int, shape: tuple[int, ...] = (1, 4, 64, 64)):
    generator = np.random.default_rng(seed)
    return lambda: generator.standard_normal(shape, dtype=np.float32)


def gaussian_network(plan: SamplingPlan, levels: Levels):
    """The ideal network for the data distribution N(MEAN, DEVIATION**2), called at the run's levels and others."""
    parameterization = plan.parameterization(levels)
    exact = {timestep: sigma for sigma, timestep in parameterization.timesteps.items()}

    def network(z: Array, timestep: float) -> Array:
        sigma = exact.get(timestep, plan.training.sigma(timestep))
        scale = 1 / (1 + sigma) if plan.kind == "flow" else 1 / math.sqrt(1 + sigma**2)
        x = z.astype(np.float64) / scale
        share = DEVIATION**2 / (DEVIATION**2 + sigma**2)
        clean = MEAN + share * (x - MEAN)
        return RAW[plan.kind](z, scale, scale * sigma, clean).astype(np.float32)

    return network


def sample(plan: SamplingPlan, steps: int, seed: int = 0) -> Array:
    levels = plan.levels(steps)
    noise = source(seed)
    parameterization = plan.parameterization(levels)
    denoise = denoiser(gaussian_network(plan, levels), parameterization)
    # the data's distribution at the first level; noise alone would lack the mean
    start = MEAN + noise() * math.hypot(DEVIATION, levels.sigmas[0])
    *_, last = plan.run(denoise, start.astype(np.float32), levels, noise)
    return parameterization.latent(last.x, last.sigma_next)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ONE_CALL_DISTILLED])
def test_every_sampler_reaches_a_gaussian(name: str, kind: str) -> None:
    result = sample(sampling_plan(CONFIGS[kind], sampler=name, schedule="karras"), 40)
    assert result.dtype == np.float32
    assert result.mean() == pytest.approx(MEAN, abs=0.03)
    # first-order steps with full fresh noise contract the distribution
    assert result.std() == pytest.approx(DEVIATION, rel=0.15 if name in ("euler a", "ddpm") else 0.1)


@pytest.mark.parametrize("kind", ["eps", "v", "sample"])
@pytest.mark.parametrize("name", ONE_CALL_DISTILLED)
def test_distilled_samplers_keep_the_mean(name: str, kind: str) -> None:
    result = sample(sampling_plan(CONFIGS[kind], sampler=name), 40)
    assert result.mean() == pytest.approx(MEAN, abs=0.05)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_seed_gives_one_result(name: str) -> None:
    plan = sampling_plan(CONFIGS["eps"], sampler=name)
    assert np.array_equal(sample(plan, 6), sample(plan, 6))
    assert not np.array_equal(sample(plan, 6), sample(plan, 6, seed=1))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_replaced_state_is_where_the_sampler_goes_on(name: str) -> None:
    plan = sampling_plan(CONFIGS["eps"], sampler=name)
    levels = plan.levels(8)
    denoise = denoiser(gaussian_network(plan, levels), plan.parameterization(levels))

    def final(replace: bool) -> Array:
        noise = source(3)
        for step in plan.run(denoise, noise() * levels.initial_scale, levels, noise):
            if replace and step.index == 3:
                step.x = step.x + 0.1 * step.sigma_next
        return step.x

    assert np.abs(final(True) - final(False)).max() > 1e-4


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_say_where_they_are(name: str) -> None:
    plan = sampling_plan(CONFIGS["v"], sampler=name)
    levels = plan.levels(5)
    denoise = denoiser(gaussian_network(plan, levels), plan.parameterization(levels))
    noise = source(0)
    steps = list(plan.run(denoise, noise() * levels.initial_scale, levels, noise))
    assert [(step.index, step.total) for step in steps] == [(index, 5) for index in range(5)]
    assert [step.sigma for step in steps] == levels.sigmas[:-1].tolist()
    assert [step.sigma_next for step in steps] == levels.sigmas[1:].tolist()


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 30, 50])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[(name, "eps") for name in SCHEDULES if name != "flow"],
        *[(name, "flow") for name in SCHEDULES if name not in NOT_FOR_FLOW],
    ],
)
def test_schedules_decrease(name: str, kind: str, steps: int) -> None:
    levels = sampling_plan(CONFIGS[kind], schedule=name).levels(steps)
    assert levels.sigmas.shape == (steps + 1,)
    assert levels.timesteps.shape == (steps,)
    assert np.all(np.diff(levels.sigmas) < 0)
    assert np.all(np.diff(levels.timesteps) <= 0)
    assert levels.sigmas[-1] == 0


def test_align_your_steps_is_the_papers_table_at_ten_steps() -> None:
    sigmas = sampling_plan(SD, schedule="Align Your Steps").levels(10).sigmas
    assert sigmas == pytest.approx([14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0])


@pytest.mark.parametrize(("name", "kind"), [("flow", "eps"), *[(name, "flow") for name in NOT_FOR_FLOW]])
def test_schedules_for_another_kind_of_model_are_refused(name: str, kind: str) -> None:
    with pytest.raises(InvalidRequest, match="flow model; choose another"):
        sampling_plan(CONFIGS[kind], schedule=name).levels(10)


def test_beta_quantile_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    at = np.linspace(0, 1, 201)
    for a, b in ((0.6, 0.6), (0.3, 2.0), (1.0, 1.0), (2.5, 0.7), (5.0, 5.0)):
        assert np.abs(beta_quantile(at, a, b) - stats.beta.ppf(at, a, b)).max() < 1e-9


def test_explicit_levels() -> None:
    plan = sampling_plan(SD)
    assert plan.levels(sigmas=[10.0, 1.0, 0.0]).sigmas.tolist() == [10.0, 1.0, 0.0]
    assert plan.levels(timesteps=[999, 500]).timesteps.tolist() == [999, 500]
    assert sampling_plan(FLOW).levels(sigmas=[1.0, 0.5]).timesteps.tolist() == pytest.approx([1000, 750])
    with pytest.raises(InvalidRequest, match="exactly one"):
        plan.levels(3, sigmas=[1.0, 0.0])
    with pytest.raises(InvalidRequest, match="fall"):
        plan.levels(sigmas=[1.0, 2.0, 0.0])


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_step_counts_outside_the_table_are_refused(steps: int) -> None:
    with pytest.raises(InvalidRequest, match="1 to 1000"):
        sampling_plan(SD).levels(steps)


def test_levels_tail() -> None:
    levels = sampling_plan(SD).levels(10)
    assert levels.tail(7).sigmas.tolist() == levels.sigmas[7:].tolist()
    assert len(levels.tail(7).timesteps) == 3


def test_dynamic_shift_follows_the_resolution() -> None:
    config = {**FLOW, "use_dynamic_shifting": True}
    assert dynamic_shift(config, 256) == pytest.approx(math.exp(0.5))
    assert dynamic_shift(config, 4096) == pytest.approx(math.exp(1.15))
    plan = sampling_plan(config)
    assert np.all(plan.levels(8, image_tokens=4096).sigmas[1:-1] > plan.levels(8, image_tokens=256).sigmas[1:-1])
    with pytest.raises(InvalidRequest, match="image_tokens"):
        plan.levels(8)


@pytest.mark.parametrize(
    ("name", "sampler", "schedule"),
    [
        ("Euler a", "euler a", "trailing"),
        ("k_euler_a", "euler a", "trailing"),
        ("sample_euler_ancestral", "euler a", "trailing"),
        ("DPM++ 2M Karras", "dpm++ 2m", "karras"),
        ("DPM++ 2M SDE", "dpm++ 2m sde", "trailing"),
        ("DPM++ 2M SDE Exponential", "dpm++ 2m sde", "exponential"),
        ("sample_dpmpp_3m_sde", "dpm++ 3m sde", "trailing"),
        ("DPM2 a Karras", "dpm2 a", "karras"),
        ("k_dpm_2_ancestral", "dpm2 a", "trailing"),
        ("DPM++ 2S a", "dpm++ 2s a", "trailing"),
        ("PLMS", "plms", "trailing"),
        ("UniPC", "unipc", "trailing"),
        ("LCM", "lcm", "distilled"),
        ("Euler SGM Uniform", "euler", "sgm_uniform"),
        ("DPMSolverMultistepScheduler", "dpm++ 2m", "trailing"),
        *[(name, name, "distilled" if name in ONE_CALL_DISTILLED else "trailing") for name in SAMPLERS],
    ],
)
def test_names(name: str, sampler: str, schedule: str) -> None:
    plan = sampling_plan(SD, sampler=name)
    assert (plan.sampler, plan.schedule) == (sampler, schedule)


def test_a_label_and_a_schedule_that_differ_are_not_both_followed() -> None:
    assert sampling_plan(SD, sampler="DPM++ 2M Karras", schedule="Karras").schedule == "karras"
    with pytest.raises(InvalidRequest, match=r"schedule is 'beta', but sampler 'DPM\+\+ 2M Karras' says karras"):
        sampling_plan(SD, sampler="DPM++ 2M Karras", schedule="beta")


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("Karras", "karras"),
        ("SGM Uniform", "sgm_uniform"),
        ("Align Your Steps", "align_your_steps"),
        ("Automatic", "trailing"),
        ("leading", "leading"),
        ("Beta", "beta"),
    ],
)
def test_schedule_names(name: str, schedule: str) -> None:
    assert sampling_plan(SD, schedule=name).schedule == schedule


def test_unknown_names_list_the_choices() -> None:
    with pytest.raises(InvalidRequest, match=r"'eular'.*euler a.*tcd") as failure:
        sampling_plan(SD, sampler="eular")
    assert failure.value.parameter == "sampler"
    with pytest.raises(InvalidRequest, match=r"'kerras'.*automatic.*karras") as failure:
        sampling_plan(SD, schedule="kerras")
    assert failure.value.parameter == "schedule"
    with pytest.raises(InvalidRequest, match=r"etta was given, .* 'ddim' does not take \(its options: eta\)"):
        sampling_plan(SD, sampler="ddim", options={"etta": 1.0})
    with pytest.raises(InvalidRequest, match=r"leave it out, or choose one of: euler a, .*ddim") as failure:
        sampling_plan(SD, sampler="euler", options={"eta": 1.0})
    assert failure.value.parameter == "eta"


@pytest.mark.parametrize(
    ("name", "given", "allowed"),
    [
        ("timesteps", [], "1 or more falling numbers, from 0 to 999"),
        ("timesteps", "x", "falling numbers"),
        ("timesteps", [100, 500], "falling numbers"),
        ("timesteps", [1000, 500], "from 0 to 999"),
        ("timesteps", [500, -1], "from 0 to 999"),
        ("sigmas", [], "2 or more falling numbers, 0 or above"),
        ("sigmas", [14.0], "2 or more"),
        ("sigmas", [math.nan, 0.0], "falling numbers"),
        ("sigmas", [[14.0, 0.0]], "falling numbers"),
        ("sigmas", [14.0, -1.0], "0 or above"),
    ],
)
def test_own_levels_are_checked(name: str, given: Any, allowed: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} are .*{allowed}") as failure:
        sampling_plan(SD).levels(**{name: given})
    assert failure.value.parameter == name


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": "RePaintScheduler"},
        {"beta_schedule": "laplace"},
        {"prediction_type": "score"},
        {"prediction_type": "flow_prediction"},
        {"timestep_spacing": "odd"},
        {"variance_type": "learned_range"},
        {"interpolation_type": "log_linear"},
        {"stochastic_sampling": True},
    ],
)
def test_configs_that_would_be_misread_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(BundleUnsupported, match=r"support"):
        sampling_plan({**SD, **change})


def test_unknown_keys_are_ignored() -> None:
    assert sampling_plan({**SD, "_diffusers_version": "0.1", "flavour": 3}).sampler == "euler"


def test_every_sampler_loads() -> None:
    assert all(callable(load_sampler(name)) for name in SAMPLERS)


def test_training_table_starts_and_ends_as_stable_diffusions_does() -> None:
    sigmas = training_levels(SD).sigmas
    assert (sigmas[0], sigmas[-1]) == (pytest.approx(0.0291675, rel=1e-4), pytest.approx(14.614646, rel=1e-5))


def test_zero_terminal_snr() -> None:
    sigmas = training_levels({**SD, "rescale_betas_zero_snr": True}).sigmas
    assert sigmas[-1] == pytest.approx(4096, rel=1e-6)
    assert sigmas[0] == pytest.approx(training_levels(SD).sigmas[0], rel=1e-4)
    assert training_levels({**SD, "rescale_betas_zero_snr": True}, zero_snr_alpha=0.0).sigmas[-1] == pytest.approx(1e8)


def test_timestep_and_sigma_are_inverse() -> None:
    for training in (training_levels(SD), TrainingLevels(np.empty(0), 1000, flow=True)):
        for timestep in (1.0, 250.0, 998.0):
            assert training.timestep(training.sigma(timestep)) == pytest.approx(timestep)


@pytest.mark.parametrize("kind", ["eps", "v", "sample", "flow"])
@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6, 4096.0])
def test_denoised_inverts_noised(kind: str, sigma: float) -> None:
    parameterization = sampling_plan(CONFIGS[kind]).parameterization(sampling_plan(CONFIGS[kind]).levels(3))
    clean, noise = source(1, (2, 3))(), source(2, (2, 3))()
    x = parameterization.noised(clean, noise, sigma)
    z = parameterization.model_input(x, sigma)
    scale = z[0, 0] / x[0, 0]
    output = RAW[kind](z.astype(np.float64), scale, scale * sigma, clean).astype(np.float32)
    # eps subtracts two numbers of the size of sigma
    tolerance = 3e-7 * max(sigma, 10) if kind == "eps" else 5e-6 * max(1.0, sigma / 10)
    assert np.abs(parameterization.denoised(x, sigma, output) - clean).max() < max(tolerance, 2e-5)
    assert np.allclose(parameterization.state(parameterization.latent(x, sigma), sigma), x, rtol=1e-6)


def test_a_run_knows_its_own_timesteps() -> None:
    plan = sampling_plan(SD, schedule="linspace")
    levels = plan.levels(7)
    parameterization = plan.parameterization(levels)
    assert [parameterization.timestep(sigma) for sigma in levels.sigmas[:-1].tolist()] == levels.timesteps.tolist()
    between = math.sqrt(levels.sigmas[0] * levels.sigmas[1])
    assert levels.timesteps[1] < parameterization.timestep(between) < levels.timesteps[0]


def test_clip_sample_is_never_ignored() -> None:
    config = {**SD, "_class_name": "DDIMScheduler", "timestep_spacing": "leading"}
    stated = {**config, "clip_sample": True, "clip_sample_range": 1.0}
    assert np.abs(sample(sampling_plan(stated), 10)).max() <= 1.0
    assert np.abs(sample(sampling_plan(config), 10)).max() <= 1.0
    assert np.abs(sample(sampling_plan({**config, "clip_sample": False}), 10)).max() > 1.5
