"""What wraps a denoiser or its network: guidance, clipping, thresholding, consistency."""

from __future__ import annotations

import numpy as np
import pytest

from pocketdiffusion.sampling.denoise import (
    Parameterization,
    clipped,
    consistent,
    guided,
    holding,
    interval,
    thresholded,
)
from pocketdiffusion.sampling.training import training_levels
from pocketdiffusion.tensors import Array

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def source(seed: int, shape: tuple[int, ...]):
    generator = np.random.default_rng(seed)
    return lambda: generator.standard_normal(shape, dtype=np.float32)


def pair(x: Array, timestep: float) -> tuple[Array, Array]:
    return 0 * x, x


def test_guidance() -> None:
    x = source(0, (2, 4))()
    assert np.allclose(guided(pair, lambda x, t: x, 7.5)(x, 10.0), 7.5 * x)


def test_guidance_interval_skips_the_unconditional_pass() -> None:
    calls: list[float] = []

    def counting(x: Array, timestep: float) -> tuple[Array, Array]:
        calls.append(timestep)
        return pair(x, timestep)

    network = guided(counting, lambda x, t: x, 3.0, active=interval(0.2, 0.8, 1000))
    x = source(0, (1, 4))()
    results = {timestep: network(x, timestep) for timestep in (950.0, 800.0, 500.0, 200.0, 150.0)}
    assert calls == [800.0, 500.0, 200.0]
    assert np.array_equal(results[950.0], x)
    assert np.allclose(results[500.0], 3 * x)


def test_held_guidance_adds_what_it_last_did() -> None:
    x = source(0, (1, 4))()

    def passes(x: Array, timestep: float) -> tuple[Array, Array, Array]:
        return x + timestep, x + 2 * timestep, x

    each = holding(passes, lambda x, t: x, interval(0.2, 0.5, 1000), lambda t: 1 / t)
    # the distance grows with the timestep, and so does what is held
    for timestep, distance in ((900.0, 900.0), (700.0, 700.0), (400.0, 400.0), (100.0, 100.0)):
        first, second, last = each(2 * x, timestep)
        np.testing.assert_allclose((first, second, last), (2 * x + distance, 2 * x + 2 * distance, 2 * x), rtol=1e-6)


def test_guidance_rescale() -> None:
    x = source(0, (2, 4, 8, 8))()
    full = guided(pair, lambda x, t: x, 5.0, rescale=1.0)(x, 0.0)
    half = guided(pair, lambda x, t: x, 5.0, rescale=0.5)(x, 0.0)
    assert np.allclose(full.std(axis=(1, 2, 3)), x.std(axis=(1, 2, 3)), rtol=1e-5)
    assert np.allclose(half, 3 * x, rtol=1e-4)
    assert full.dtype == np.float32


def test_clipped() -> None:
    x = np.array([[-3.0, 0.5, 3.0]], np.float32)
    assert clipped(lambda x, sigma: x, 1.0)(x, 1.0).tolist() == [[-1.0, 0.5, 1.0]]


def test_thresholded_is_per_image() -> None:
    x = np.array([[-4.0, 2.0, 4.0], [0.2, 0.3, -0.5]], np.float32)
    result = thresholded(lambda x, sigma: x, 1.0, 10.0)(x, 1.0)
    assert result.tolist() == [[-1.0, 0.5, 1.0], pytest.approx([0.2, 0.3, -0.5])]
    assert result.dtype == np.float32


def test_consistent_is_the_identity_at_timestep_zero() -> None:
    parameterization = Parameterization("eps", training_levels(SD), {1.0: 0.0, 2.0: 500.0})
    x = source(0, (1, 4))()
    denoise = consistent(lambda x, sigma: 0 * x, parameterization, scaling=10.0)
    assert np.allclose(denoise(x, 1.0), parameterization.latent(x, 1.0))
    assert np.abs(denoise(x, 2.0)).max() < 1e-6
