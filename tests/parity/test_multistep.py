"""Multistep and few-step samplers against Diffusers' classes, over their options.

Not compared, because Diffusers' own result can't be met or does not exist:

- UniPC "bh1" with a last sigma of 0: infinity times zero, so its last state is NaN. Ours ends in the clean estimate.
- UniPC with `predict_x0` off, or `lower_order_final` off, with a last sigma of 0: NaN or infinity.
- PNDM with Runge-Kutta steps and fewer than 4 steps: `set_timesteps` fails to broadcast.
- "sde-dpmsolver" of order 3: not implemented, UnboundLocalError.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from diffusers.schedulers.scheduling_deis_multistep import DEISMultistepScheduler  # noqa: E402

from .oracle import diffusers_trajectory, our_trajectory, worst_error  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    # Diffusers 0.39 hands torch tensors to numpy 2.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context and return_scalar:DeprecationWarning"),
]

STEPS = (1, 2, 4, 10, 25, 50)
PREDICTIONS = ("epsilon", "v_prediction")
TOLERANCE = 1e-4

MULTISTEP = "DPMSolverMultistepScheduler"
SINGLESTEP = "DPMSolverSinglestepScheduler"


def errors(class_name, config, prediction_type, steps=STEPS, *, options=None, step_arguments=None):
    """The worst error by number of steps; NaN if either side isn't finite."""
    result = {}
    for count in steps:
        ours = our_trajectory(class_name, config, count, prediction_type, options=options)
        theirs = diffusers_trajectory(class_name, config, count, prediction_type, step_arguments=step_arguments)
        finite = np.isfinite(ours).all() and np.isfinite(theirs).all()
        result[count] = worst_error(ours, theirs) if finite else math.nan
    return result


def assert_equal(*arguments, **keywords):
    found = errors(*arguments, **keywords)
    assert all(error < TOLERANCE for error in found.values()), found


def configs(**choices):
    """All combinations, as dicts."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def name(config):
    return "-".join(str(value) for value in config.values()) if isinstance(config, dict) else None


SOLVERS = {"solver_order": (1, 2, 3), "solver_type": ("midpoint", "heun"), "lower_order_final": (True, False)}


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("config", configs(**SOLVERS, final_sigmas_type=("zero", "sigma_min")), ids=name)
@pytest.mark.parametrize("class_name", (MULTISTEP, SINGLESTEP))
def test_dpm_solver_pp(class_name, config, prediction_type):
    assert_equal(class_name, config, prediction_type)


@pytest.mark.filterwarnings("ignore:.*algorithm_type dpmsolver.*:FutureWarning", "ignore:.*dpmsolver.*deprecated.*")
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("config", configs(**SOLVERS), ids=name)
@pytest.mark.parametrize("class_name", (MULTISTEP, SINGLESTEP))
def test_dpm_solver_integrates_the_noise_estimate(class_name, config, prediction_type):
    # Diffusers refuses a last sigma of 0 here.
    extra = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    assert_equal(class_name, {**config, **extra}, prediction_type)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(
    "config",
    configs(solver_order=(1, 2), solver_type=("midpoint", "heun"), final_sigmas_type=("zero", "sigma_min")),
    ids=name,
)
@pytest.mark.parametrize("class_name", (MULTISTEP, SINGLESTEP))
def test_sde_dpm_solver_pp(class_name, config, prediction_type):
    assert_equal(class_name, {**config, "algorithm_type": "sde-dpmsolver++"}, prediction_type)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("solver_type", ("midpoint", "heun"))
@pytest.mark.parametrize("class_name", (MULTISTEP, SINGLESTEP))
def test_sde_dpm_solver_pp_of_order_three(class_name, solver_type, prediction_type):
    # Few steps only: with more of them Diffusers' formula multiplies its own rounding errors. Changing its start by
    # 1e-7 changes its result at 50 steps by up to 1e-1 (singlestep, heun).
    config = {"solver_order": 3, "solver_type": solver_type, "algorithm_type": "sde-dpmsolver++"}
    assert_equal(class_name, config, prediction_type, steps=(1, 2, 4, 10))


@pytest.mark.filterwarnings("ignore:.*sde-dpmsolver.*deprecated.*")
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("config", configs(solver_order=(1, 2), solver_type=("midpoint", "heun")), ids=name)
def test_sde_dpm_solver(config, prediction_type):
    extra = {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}
    assert_equal(MULTISTEP, {**config, **extra}, prediction_type)


def test_euler_at_final():
    config = {"euler_at_final": True, "lower_order_final": False, "final_sigmas_type": "sigma_min"}
    assert_equal(MULTISTEP, config, "epsilon")


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("config", configs(solver_order=(1, 2, 3), lower_order_final=(True, False)), ids=name)
def test_deis(config, prediction_type):
    # Order 3 with many steps: Diffusers' float32 coefficients are off by more than the tolerance (see the next test).
    steps = STEPS if config["solver_order"] < 3 else STEPS[:-2]
    assert_equal("DEISMultistepScheduler", config, prediction_type, steps=steps)


@pytest.mark.parametrize(
    ("config", "prediction_type"),
    [
        ({"solver_order": 3}, "epsilon"),
        ({"solver_order": 3}, "v_prediction"),
        ({"use_flow_sigmas": True, "flow_shift": 3.0}, "flow_prediction"),
    ],
)
def test_deis_with_coefficients_in_double_precision(monkeypatch, config, prediction_type):
    # In float32 the differences of Diffusers' antiderivatives cancel, to errors of 1e-4 to 3e-4.
    rounded = DEISMultistepScheduler.set_timesteps

    def set_timesteps(self, *arguments, **keywords):
        rounded(self, *arguments, **keywords)
        self.sigmas = self.sigmas.double()

    monkeypatch.setattr(DEISMultistepScheduler, "set_timesteps", set_timesteps)
    assert_equal("DEISMultistepScheduler", config, prediction_type)


UNIPC = "UniPCMultistepScheduler"
UNIPC_ORDERS = {"solver_order": (1, 2, 3), "disable_corrector": ([], [0, 2])}


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("config", configs(**UNIPC_ORDERS), ids=name)
def test_unipc(config, prediction_type):
    assert_equal(UNIPC, config, prediction_type)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(
    "config",
    configs(**UNIPC_ORDERS, solver_type=("bh1", "bh2"), predict_x0=(True, False), lower_order_final=(True, False)),
    ids=name,
)
def test_unipc_to_a_level_above_zero(config, prediction_type):
    assert_equal(UNIPC, {**config, "final_sigmas_type": "sigma_min"}, prediction_type, steps=(1, 2, 4, 25))


@pytest.mark.parametrize("class_name", (MULTISTEP, UNIPC))
def test_zero_terminal_snr(class_name):
    assert_equal(class_name, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "v_prediction")


@pytest.mark.parametrize(
    ("class_name", "config"),
    [
        (MULTISTEP, {}),
        (MULTISTEP, {"solver_order": 3}),
        (MULTISTEP, {"algorithm_type": "sde-dpmsolver++"}),
        (SINGLESTEP, {}),
        (UNIPC, {}),
        (UNIPC, {"solver_order": 3}),
    ],
)
def test_flow(class_name, config):
    assert_equal(class_name, {**config, "use_flow_sigmas": True, "flow_shift": 3.0}, "flow_prediction")


@pytest.mark.parametrize("class_name", (MULTISTEP, SINGLESTEP, UNIPC, "DEISMultistepScheduler"))
def test_karras_levels(class_name):
    # DEIS repeats its last level: a step that goes nowhere.
    assert_equal(class_name, {"use_karras_sigmas": True}, "epsilon", steps=(2, 10, 25))


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("config", configs(set_alpha_to_one=(True, False), steps_offset=(0, 1)), ids=name)
@pytest.mark.parametrize("skip", (True, False))
def test_pndm(config, skip, prediction_type):
    steps = STEPS if skip else STEPS[2:]
    assert_equal("PNDMScheduler", {**config, "skip_prk_steps": skip}, prediction_type, steps=steps)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_dpm_solver_sde(prediction_type):
    assert_equal("DPMSolverSDEScheduler", {}, prediction_type)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_lcm(prediction_type):
    assert_equal("LCMScheduler", {}, prediction_type)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("eta", (0.0, 0.3, 0.7, 1.0))
def test_tcd(eta, prediction_type):
    assert_equal("TCDScheduler", {}, prediction_type, options={"eta": eta}, step_arguments={"eta": eta})
