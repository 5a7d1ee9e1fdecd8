"""Multistep and few-step samplers on targets with a known answer, and what all of them promise. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from pocketdiffusion.errors import InvalidRequest
from pocketdiffusion.sampling import load_sampler
from pocketdiffusion.sampling._multistep import phi
from pocketdiffusion.sampling.dpmpp_2m import dpmpp_2m, dpmpp_2m_sde
from pocketdiffusion.sampling.dpmpp_sde import brownian_sum, dpmpp_sde
from pocketdiffusion.sampling.dpmpp_singlestep import dpmpp_singlestep, singlestep_orders
from pocketdiffusion.sampling.tcd import tcd
from pocketdiffusion.sampling.training import training_levels
from pocketdiffusion.sampling.types import Denoise, Noise, Sigmas, Step
from pocketdiffusion.sampling.unipc import unipc
from pocketdiffusion.tensors import Array

MEAN, DEVIATION = 0.3, 0.5
TRAINING = training_levels({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
WITH_TRAINING = {"pndm": {"training": TRAINING}, "tcd": {"training": TRAINING}}
NAMES = (
    "dpm++ 2m",
    "dpm++ 2m sde",
    "dpm++ 3m sde",
    "dpm++ 2s",
    "dpm++ 2s a",
    "dpm++ sde",
    "unipc",
    "deis",
    "pndm",
    "plms",
    "lcm",
    "tcd",
)
DETERMINISTIC = ("dpm++ 2m", "dpm++ 2s", "unipc", "deis", "pndm", "plms")


def gaussian(x: Array, sigma: float) -> Array:
    """The ideal denoiser of N(MEAN, DEVIATION²)."""
    share = DEVIATION**2 / (DEVIATION**2 + sigma**2)
    return MEAN + share * (x - MEAN)


def exact(x: Array, sigma: float, sigma_next: float) -> Array:
    """The probability-flow ODE's solution for `gaussian`."""
    ratio = math.sqrt((DEVIATION**2 + sigma_next**2) / (DEVIATION**2 + sigma**2))
    return MEAN + ratio * (x - MEAN)


def source(seed: int, shape: tuple[int, ...] = (2, 3, 4)) -> Noise:
    generator = np.random.default_rng(seed)
    return lambda: generator.standard_normal(shape, dtype=np.float32)


def levels(steps: int, start: float = 10.0, end: float = 0.1, *, zero: bool = True) -> Sigmas:
    """Evenly spaced in log sigma; then 0."""
    sigmas = np.geomspace(start, end, steps if zero else steps + 1)
    return np.append(sigmas, 0.0) if zero else sigmas


def sample(
    name: str, sigmas: Sigmas, seed: int = 0, denoise: Denoise = gaussian, noise: Noise | None = None, **options: Any
) -> Iterator[Step]:
    x = source(seed)() * float(sigmas[0])
    options = {**WITH_TRAINING.get(name, {}), **options}
    return load_sampler(name)(denoise, x, sigmas, noise or source(seed + 1), **options)


def counted(function: Callable[..., Array]) -> tuple[Callable[..., Array], list[int]]:
    calls: list[int] = []

    def wrapper(*arguments: Any) -> Array:
        calls.append(1)
        return function(*arguments)

    return wrapper, calls


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", (1, 2, 3, 5, 16))
def test_steps_are_described_and_end_in_a_clean_float32_latent(name: str, steps: int) -> None:
    sigmas = levels(steps)
    result = list(sample(name, sigmas))
    assert [step.index for step in result] == list(range(steps))
    assert {step.total for step in result} == {steps}
    assert [step.sigma for step in result] == sigmas[:-1].tolist()
    assert [step.sigma_next for step in result] == sigmas[1:].tolist()
    assert all(step.x.dtype == step.denoised.dtype == np.float32 for step in result)
    assert all(np.isfinite(step.x).all() for step in result)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_draws_give_the_same_bytes(name: str) -> None:
    runs = [b"".join(step.x.tobytes() for step in sample(name, levels(6))) for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_start_at_infinity_stays_finite(name: str) -> None:
    sigmas = np.append(np.geomspace(80.0, 0.1, 5), 0.0)
    result = list(sample(name, np.concatenate([[1e8], sigmas])))
    assert all(np.isfinite(step.x).all() for step in result)
    assert np.abs(result[-1].x - MEAN).max() < 8 * DEVIATION


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("start", (0, 2))
def test_goes_on_from_a_replaced_state(name: str, start: int) -> None:
    """A shift of the state at a level shifts all that follow as the denoiser and the linear part carry it."""
    outcomes = []
    for shift in (0.0, 1.0):
        for step in sample(name, levels(6)):
            if step.index == start:
                step.x = step.x + np.float32(shift)
        outcomes.append(step.x)
    moved = np.abs(outcomes[1] - outcomes[0])
    assert moved.min() > 0.01, "the replaced state was forgotten"
    assert moved.max() < 1.0


@pytest.mark.parametrize("name", ("dpm++ 2m", "dpm++ 2s", "unipc"))
def test_a_replaced_state_decays_with_the_level_where_the_estimate_is_constant(name: str) -> None:
    sigmas = levels(6)
    plain = list(sample(name, sigmas, denoise=lambda x, sigma: np.zeros_like(x)))[1].x
    run = sample(name, sigmas, denoise=lambda x, sigma: np.zeros_like(x))
    first = next(run)
    first.x = first.x + np.float32(1)
    assert next(run).x - plain == pytest.approx(np.full_like(plain, sigmas[2] / sigmas[1]), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_an_equal_state_put_back_changes_nothing(name: str) -> None:
    plain = [step.x for step in sample(name, levels(6))]
    copied = []
    for step in sample(name, levels(6)):
        step.x = step.x.copy()
        copied.append(step.x)
    assert np.array_equal(plain, copied)


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("dpm++ 2m", 6),
        ("dpm++ 2m sde", 6),
        ("dpm++ 3m sde", 6),
        ("dpm++ 2s", 6),
        ("dpm++ 2s a", 11),
        ("dpm++ sde", 11),
        ("unipc", 6),
        ("deis", 6),
        ("pndm", 15),
        ("plms", 7),
        ("lcm", 6),
        ("tcd", 6),
    ],
)
def test_network_calls_of_six_steps(name: str, calls: int) -> None:
    denoise, made = counted(gaussian)
    list(sample(name, levels(6), denoise=denoise))
    assert len(made) == calls


@pytest.mark.parametrize(
    ("name", "options", "draws"),
    [
        *((name, {}, 0) for name in DETERMINISTIC),
        ("dpm++ 2m sde", {}, 5),
        ("dpm++ 2m sde", {"eta": 0.0}, 0),
        ("dpm++ 3m sde", {}, 5),
        ("dpm++ 2s", {"algorithm_type": "sde-dpmsolver++"}, 5),
        ("dpm++ 2s a", {}, 5),
        ("dpm++ 2s a", {"eta": 0.0}, 0),
        ("dpm++ sde", {}, 10),
        ("dpm++ sde", {"eta": 0.0}, 0),
        ("lcm", {}, 5),
        ("tcd", {}, 5),
        ("tcd", {"eta": 0.0}, 0),
    ],
)
def test_draws_of_six_steps(name: str, options: dict[str, Any], draws: int) -> None:
    noise, made = counted(source(3))
    list(sample(name, levels(6), noise=noise, **options))
    assert len(made) == draws


def double(steps: int, sampler: Callable[..., Iterator[Step]], **options: Any) -> float:
    """The error at the end against the exact solution, in double precision so that rounding doesn't hide the rate."""
    sigmas = levels(steps, zero=False)
    x = np.array([[2.0, -1.0, 0.5]]) * sigmas[0]
    for step in sampler(gaussian, x, sigmas, source(0), **options):
        last = step.x
    return float(np.abs(last - exact(x, sigmas[0], sigmas[-1])).max())


@pytest.mark.parametrize(
    ("name", "options", "rate"),
    [
        ("dpm++ 2m", {"solver_order": 1}, 1),
        ("dpm++ 2m", {"solver_type": "midpoint"}, 2),
        ("dpm++ 2m", {"solver_type": "heun"}, 2),
        ("dpm++ 2m", {"algorithm_type": "dpmsolver"}, 2),
        ("dpm++ 2m", {"solver_order": 3}, 2),
        ("dpm++ 2m sde", {"eta": 0.0}, 2),
        ("dpm++ 3m sde", {"eta": 0.0}, 2),
        ("dpm++ 2s", {}, 2),
        ("dpm++ 2s", {"solver_order": 3, "solver_type": "heun"}, 3),
        ("dpm++ 2s", {"algorithm_type": "dpmsolver"}, 2),
        ("dpm++ 2s a", {"eta": 0.0}, 2),
        ("dpm++ sde", {"eta": 0.0}, 2),
        ("unipc", {"solver_order": 1}, 2),
        ("unipc", {"solver_order": 2}, 3),
        ("unipc", {"solver_order": 3, "solver_type": "bh1"}, 4),
        ("unipc", {"predict_x0": False}, 3),
        ("deis", {"solver_order": 2}, 2),
        ("deis", {"solver_order": 3}, 2),
        ("plms", {}, 2),
    ],
)
def test_converges_to_the_exact_solution_at_its_rate(name: str, options: dict[str, Any], rate: int) -> None:
    """The first step of order 1 bounds the rate of multistep methods without a corrector to 2."""
    sampler = load_sampler(name)
    if "lower_order_final" in (sampler.__kwdefaults__ or {}):
        options = {"lower_order_final": False, **options}
    coarse, fine = (double(steps, sampler, **options) for steps in (60, 120))
    assert math.log2(coarse / fine) > rate - 0.35
    assert fine < 0.02


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dpm++ 2m sde", {}),
        ("dpm++ 2m sde", {"solver_type": "heun", "eta": 0.5}),
        ("dpm++ 3m sde", {}),
        ("dpm++ 3m sde", {"eta": 0.5}),
        ("dpm++ 2s a", {}),
        ("dpm++ sde", {}),
    ],
)
def test_stochastic_samplers_reach_the_target_distribution(name: str, options: dict[str, Any]) -> None:
    noise = source(5, (20_000,))
    sigmas = levels(60, 20.0, 0.02)
    *_, last = load_sampler(name)(gaussian, noise() * np.float32(sigmas[0]), sigmas, noise, **options)
    assert last.x.mean() == pytest.approx(MEAN, abs=0.02)
    assert last.x.std() == pytest.approx(DEVIATION, rel=0.04)


def test_the_sde_follows_one_brownian_path() -> None:
    """Strong convergence: twice the steps with the same path, joined, end near the same state."""

    def ends(parts: int) -> Array:
        return np.concatenate([_on_path(parts, seed) for seed in range(20)])

    fine = ends(64)
    near, far = (float(np.sqrt(np.mean((ends(parts) - fine) ** 2))) for parts in (32, 8))
    assert near < far / 2
    assert near < 0.05


def _on_path(steps: int, seed: int) -> Array:
    """`dpmpp_sde` with `steps` steps whose draws are the increments of one path, given by `seed`."""
    sigmas = levels(steps, 5.0, 0.5, zero=False)
    knots = levels(128, 5.0, 0.5, zero=False)
    path = np.random.default_rng(seed).standard_normal((128, 50)) * np.sqrt(-np.diff(knots))[:, None]
    part = 128 // (2 * steps)
    joined = path.reshape(2 * steps, part, 50).sum(axis=1)
    widths = -np.diff(knots[::part])
    draws = iter((joined / np.sqrt(widths)[:, None]).astype(np.float32))
    x = np.random.default_rng(99).standard_normal(50, dtype=np.float32) * np.float32(5.0)
    *_, last = dpmpp_sde(gaussian, x, sigmas, lambda: next(draws))
    return last.x


def test_brownian_sum_is_standard_normal_and_tied_to_its_first_part() -> None:
    first, second = source(1, (100_000,))(), source(2, (100_000,))()
    whole = brownian_sum(first, second, 4.0, 3.0, 2.0)
    assert whole.std() == pytest.approx(1.0, abs=0.01)
    assert float(np.mean(whole * first)) == pytest.approx(math.sqrt(0.5), abs=0.01)


def test_eta_zero_of_the_sde_is_the_ode() -> None:
    ode = [step.x for step in sample("dpm++ 2m", levels(8))]
    sde = [step.x for step in sample("dpm++ 2m sde", levels(8), eta=0.0)]
    assert np.array_equal(ode, sde)


@pytest.mark.parametrize(
    ("steps", "order", "lower", "last", "orders"),
    [
        (6, 3, False, 0.1, [1, 2, 3, 1, 2, 3]),
        (6, 3, True, 0.1, [1, 2, 3, 1, 2, 1]),
        (6, 3, False, 0.0, [1, 2, 3, 1, 2, 1]),
        (5, 3, False, 0.1, [1, 2, 3, 1, 2]),
        (5, 3, False, 0.0, [1, 2, 3, 1, 1]),
        (4, 2, True, 0.1, [1, 2, 1, 1]),
        (3, 1, False, 0.0, [1, 1, 1]),
    ],
)
def test_order_list_of_the_singlestep_solver(
    steps: int, order: int, lower: bool, last: float, orders: list[int]
) -> None:
    assert singlestep_orders([*np.linspace(5, 1, steps), last], order, lower) == orders


@pytest.mark.parametrize("k", (1, 2, 3))
@pytest.mark.parametrize("z", (-40.0, -1.5, -0.1, 0.0, 0.1, 1.5))
def test_phi_functions_are_their_integrals(k: int, z: float) -> None:
    nodes, weights = np.polynomial.legendre.leggauss(60)
    tau = 0.5 * (nodes + 1)
    integrand = np.exp((1 - tau) * z) * tau ** (k - 1) / math.factorial(k - 1)
    assert phi(k, z) == pytest.approx(float(0.5 * weights @ integrand), rel=1e-9)


@pytest.mark.parametrize("name", ("dpm++ 2m", "deis"))
def test_the_third_order_is_more_accurate_than_the_second(name: str) -> None:
    sampler = load_sampler(name)
    second, third = (double(30, sampler, solver_order=order, lower_order_final=False) for order in (2, 3))
    assert third < second


@pytest.mark.parametrize("name", ("dpm++ 2m", "deis", "plms"))
def test_a_last_step_that_goes_nowhere_leaves_the_state(name: str) -> None:
    sigmas = levels(6, zero=False)
    *_, before, last = sample(name, np.append(sigmas, sigmas[-1]))
    assert np.allclose(before.x, last.x, atol=1e-6)


@pytest.mark.parametrize("lower_order_final", (True, False))
def test_unipc_only_corrects_in_a_last_step_that_goes_nowhere(lower_order_final: bool) -> None:
    sigmas = levels(6, zero=False)
    options = {"lower_order_final": lower_order_final}
    *_, before, last = sample("unipc", np.append(sigmas, sigmas[-1]), disable_corrector=(5,), **options)
    assert np.allclose(before.x, last.x, atol=1e-6)


@pytest.mark.parametrize(
    ("sampler", "options", "named"),
    [
        (dpmpp_2m, {"solver_order": 4}, "solver_order"),
        (dpmpp_2m, {"solver_type": "bh2"}, "solver_type"),
        (dpmpp_2m, {"algorithm_type": "deis"}, "algorithm_type"),
        (dpmpp_2m_sde, {"algorithm_type": "sde-dpmsolver"}, "algorithm_type"),
        (dpmpp_singlestep, {"algorithm_type": "sde-dpmsolver"}, "algorithm_type"),
        (unipc, {"solver_type": "midpoint"}, "solver_type"),
        (tcd, {"training": TRAINING, "eta": 1.5}, "eta"),
    ],
)
def test_unknown_options_are_refused(
    sampler: Callable[..., Iterator[Step]], options: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        next(sampler(gaussian, source(0)(), levels(4), source(1), **options))
    assert caught.value.parameter == named
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", ({"solver_order": 3}, {"eta": 0.5}))
def test_sde_dpm_solver_names_what_it_lacks(options: dict[str, Any]) -> None:
    sigmas = levels(4, zero=False)
    with pytest.raises(InvalidRequest) as caught:
        next(dpmpp_2m_sde(gaussian, source(0)(), sigmas, source(1), algorithm_type="sde-dpmsolver", **options))
    assert caught.value.parameter in options
