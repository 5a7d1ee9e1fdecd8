"""Forecast answers, on denoisers whose answers are known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketdiffusion.sampling import SAMPLERS
from pocketdiffusion.sampling.reuse import UNSUITED, Forecast, computed_steps
from pocketdiffusion.sampling.scheduler import SamplingPlan, sampling_plan
from pocketdiffusion.tensors import Array

CONFIG = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "timestep_spacing": "trailing",
}
MEAN, DEVIATION = 1.5, 0.4
SHAPE = (1, 4, 32, 32)


def gaussian(x: Array, sigma: float) -> Array:
    """The ideal denoiser for the data distribution N(MEAN, DEVIATION**2)."""
    share = DEVIATION**2 / (DEVIATION**2 + sigma**2)
    return np.asarray(MEAN + share * (x - MEAN), np.float32)


class Counted:
    """A source of noise that counts its draws."""

    def __init__(self) -> None:
        self.generator, self.draws = np.random.default_rng(0), 0

    def __call__(self) -> Array:
        self.draws += 1
        return self.generator.standard_normal(SHAPE, dtype=np.float32)


def sample(plan: SamplingPlan, steps: int, count: int | None, noise: Counted) -> tuple[Array, Forecast | None]:
    levels = plan.levels(steps)
    start = (MEAN + noise() * math.hypot(DEVIATION, levels.sigmas[0])).astype(np.float32)
    forecast = None if count is None else Forecast(gaussian, levels.sigmas, count, stochastic=plan.stochastic)
    *_, last = plan.run(forecast or gaussian, start, levels, noise)
    return plan.parameterization(levels).latent(last.x, last.sigma_next), forecast


@given(total=st.integers(1, 300), count=st.integers(2, 300), stochastic=st.booleans())
def test_computed_steps_are_as_many_as_asked_from_the_first(total: int, count: int, stochastic: bool) -> None:
    steps = computed_steps(total, count, stochastic=stochastic)
    assert len(steps) == min(total, count)
    assert steps == sorted(set(steps))
    assert steps[0] == 0 and steps[-1] < total


def test_computed_steps_lie_closer_together_early() -> None:
    assert computed_steps(20, 4) == [0, 4, 10, 17]
    assert computed_steps(20, 5, stochastic=True) == [0, 5, 10, 14, 19]


def test_a_single_answer_holds_and_a_line_in_log_sigma_is_forecast_exactly() -> None:
    slope, base = np.float32(0.7), np.full((1, 2), 0.3, np.float32)

    def denoise(x: Array, sigma: float) -> Array:
        return x - sigma * (base + slope * math.log(sigma))

    sigmas = np.array([14.0, 9.0, 5.0, 3.0, 1.0, 0.4, 0.1, 0.0])
    forecast = Forecast(denoise, sigmas, 3)
    for index, sigma in enumerate(sigmas[:-1].tolist()):
        x = np.full((1, 2), 1.0 + index, np.float32)
        held = x - sigma * (base + slope * math.log(sigmas[0]))
        expected = held if index == 1 else denoise(x, sigma)
        np.testing.assert_allclose(forecast(x, sigma), expected, rtol=1e-5, atol=1e-5)
    assert (forecast.ran, forecast.skipped) == (3, 4)


def test_fresh_noise_is_seen_by_the_stochastic_forecast_of_normal_data() -> None:
    noise = Counted()
    sigmas = np.array([14.0, 9.0, 5.0, 3.0, 1.0, 0.0])
    forecast = Forecast(lambda x, sigma: x / np.float32(1 + sigma**2), sigmas, 3, stochastic=True)
    for sigma in sigmas[:-1].tolist():
        x = noise() * np.float32(math.hypot(1, sigma))
        np.testing.assert_allclose(forecast(x, sigma), x / (1 + sigma**2), atol=1e-5)
    assert forecast.skipped == 2


def test_two_answers_at_one_level_count_as_one() -> None:
    forecast = Forecast(lambda x, sigma: x * 0, np.array([4.0, 3.0, 2.0, 1.0, 0.0]), 3)
    x = np.ones((1, 1), np.float32)
    for sigma in (4.0, 3.0, 3.0, 2.0):
        assert np.isfinite(forecast(x, sigma)).all()
    assert (forecast.ran, forecast.skipped) == (3, 1)


def test_a_late_start_computes_its_first_step() -> None:
    forecast = Forecast(gaussian, np.array([4.0, 3.0, 2.0, 1.0, 0.5, 0.0]), 3)
    for sigma in (2.0, 1.0, 0.5):
        forecast(np.ones((1, 1), np.float32), sigma)
    assert (forecast.ran, forecast.skipped) == (2, 1)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in UNSUITED])
def test_a_forecast_run_ends_near_the_full_one(name: str) -> None:
    plan = sampling_plan(CONFIG, sampler=name)
    exact, _ = sample(plan, 25, None, Counted())
    found, forecast = sample(plan, 25, 18 if plan.stochastic else 12, Counted())
    assert forecast is not None and forecast.skipped >= 7
    assert found.dtype == np.float32
    assert np.sqrt(np.mean((found - exact) ** 2)) < (0.5 if plan.stochastic else 0.15) * DEVIATION


@pytest.mark.parametrize("name", ["euler", "heun", "dpm++ 2m"])
def test_all_steps_computed_is_the_full_run(name: str) -> None:
    plan = sampling_plan(CONFIG, sampler=name)
    exact, _ = sample(plan, 10, None, Counted())
    found, forecast = sample(plan, 10, 10, Counted())
    assert forecast is not None and forecast.skipped == 0
    assert np.array_equal(found, exact)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[(name, {}) for name in SAMPLERS],
        ("ddim", {"eta": 0.5}),
        ("euler a", {"eta": 0.0}),
        ("dpm++ 2s", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_a_plan_knows_whether_noise_is_drawn(name: str, options: dict[str, object]) -> None:
    plan, noise = sampling_plan(CONFIG, sampler=name, options=options), Counted()
    sample(plan, 5, None, noise)
    assert plan.stochastic == (noise.draws > 1)
