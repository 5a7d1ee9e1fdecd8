"""Single-step samplers, LMS and the schedules against Diffusers' classes, through `scheduler_config.json`.

Not compared, because Diffusers' own result can't be met or does not exist:

- DDIM with linspace: Diffusers steps to ``t - T // n`` but evaluates next at ``timesteps[i + 1]``, which differs for
  that spacing. Ours steps to the level that it evaluates next.
- "fixed_large" DDPM whose last timestep is above 0: Diffusers adds noise in the last step, algorithm 2 does not.
- Epsilon with a terminal SNR of zero in DDIM and DDPM, trailing: Diffusers divides by alpha = 0 and gives NaN.
- v with zero SNR in Euler's classes at 1 and 2 steps: ``x + d * dt`` at sigma 4096 in float32 costs Diffusers 1e-3.
"""

from __future__ import annotations

import itertools

import pytest

from pocketdiffusion.sampling.denoise import guided

torch = pytest.importorskip("torch")

from .oracle import diffusers_trajectory, draws, our_trajectory, worst_error  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    # Diffusers 0.39 hands torch tensors to numpy 2.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context and return_scalar:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]

STEPS = (1, 2, 4, 10, 25, 50)
PREDICTIONS = ("epsilon", "v_prediction")
SPACINGS = ("linspace", "leading", "trailing")
CONVERSIONS = ({}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True})
TOLERANCE = 1e-4
KARRAS_DIFFUSION = (
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)
FLOW = "FlowMatchEulerDiscreteScheduler"


def check(class_name, config, prediction_type, steps=STEPS, *, ours=None, theirs=None):
    errors = {}
    for count in steps:
        reference = diffusers_trajectory(class_name, config, count, prediction_type, **(theirs or {}))
        found = our_trajectory(class_name, config, count, prediction_type, **(ours or {}))
        errors[count] = worst_error(found, reference)
    assert all(error <= TOLERANCE for error in errors.values()), errors


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("conversion", CONVERSIONS, ids=lambda conversion: "-".join(conversion) or "spaced")
@pytest.mark.parametrize("class_name", KARRAS_DIFFUSION)
def test_k_diffusion(class_name, conversion, spacing, prediction_type):
    check(class_name, {"timestep_spacing": spacing, "steps_offset": 1, **conversion}, prediction_type)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_euler_ancestral(spacing, prediction_type):
    check("EulerAncestralDiscreteScheduler", {"timestep_spacing": spacing, "steps_offset": 1}, prediction_type)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("table", ["linear", "squaredcos_cap_v2", "trained"])
def test_tables(table, prediction_type):
    trained = [0.001 + 0.00002 * index for index in range(1000)]
    change = {"trained_betas": trained} if table == "trained" else {"beta_schedule": table}
    check("EulerDiscreteScheduler", {**change, "timestep_spacing": "leading", "steps_offset": 1}, prediction_type)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_last_level_of_the_table(prediction_type):
    check("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, prediction_type)


@pytest.mark.parametrize("class_name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_zero_snr_of_euler(class_name, prediction_type):
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    check(class_name, config, prediction_type, STEPS if prediction_type == "epsilon" else STEPS[2:])


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize(
    ("spacing", "offset", "zero_snr"),
    [
        ("leading", 1, False),
        ("leading", 0, False),
        ("leading", 1, True),
        ("trailing", 0, False),
        ("trailing", 0, True),
    ],
)
def test_ddim(spacing, offset, zero_snr, to_one, eta, prediction_type):
    if zero_snr and spacing == "trailing" and prediction_type == "epsilon":
        pytest.skip("Diffusers divides by alpha = 0")
    config = {
        "timestep_spacing": spacing,
        "steps_offset": offset,
        "rescale_betas_zero_snr": zero_snr,
        "set_alpha_to_one": to_one,
        "clip_sample": False,
    }
    ours, theirs = {"options": {"eta": eta}}, {"step_arguments": {"eta": eta}}
    check("DDIMScheduler", config, prediction_type, ours=ours, theirs=theirs)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_ddim_with_clipping(prediction_type):
    # Diffusers takes the noise from before the clipping unless it is told otherwise; ours clips the estimate.
    theirs = {"step_arguments": {"use_clipped_model_output": True}}
    config = {"timestep_spacing": "leading", "steps_offset": 1, "clip_sample": True, "clip_sample_range": 0.8}
    check("DDIMScheduler", config, prediction_type, theirs=theirs)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(
    "change",
    [
        *[{"timestep_spacing": spacing} for spacing in SPACINGS],
        {"variance_type": "fixed_large"},
        {"variance_type": "fixed_small_log"},
        {"rescale_betas_zero_snr": True},
        {"clip_sample": True},
        {"thresholding": True, "sample_max_value": 1.5},
    ],
    ids=str,
)
def test_ddpm(change, prediction_type):
    check("DDPMScheduler", {"clip_sample": False, **change}, prediction_type)


@pytest.mark.parametrize("prediction_type", ["v_prediction"])
def test_ddpm_from_zero_snr(prediction_type):
    config = {"clip_sample": False, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    check("DDPMScheduler", config, prediction_type)


@pytest.mark.parametrize("class_name", ["DDIMScheduler", "EulerDiscreteScheduler", "LMSDiscreteScheduler"])
def test_networks_that_answer_with_the_clean_latent(class_name):
    config = {"timestep_spacing": "leading", "steps_offset": 1, "clip_sample": False}
    check(class_name, config, "sample")


@pytest.mark.parametrize(
    "config",
    [{**conversion, "shift": shift} for conversion, shift in itertools.product(CONVERSIONS, (1.0, 3.0))],
    ids=str,
)
def test_flow(config):
    check(FLOW, config, "flow_prediction")


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_guidance_rescale(rescale):
    pipeline = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    noise = draws(5)
    unconditional, conditional = next(noise), next(noise)
    found = guided(lambda x, t: (unconditional, conditional), lambda x, t: x, 7.5, rescale=rescale)(conditional, 1.0)
    full = torch.from_numpy(unconditional + 7.5 * (conditional - unconditional))
    expected = pipeline.rescale_noise_cfg(full, torch.from_numpy(conditional), guidance_rescale=rescale).numpy()
    assert abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("time_shift_type", ["exponential", "linear"])
def test_flow_with_dynamic_shift(time_shift_type):
    config = {"use_dynamic_shifting": True, "time_shift_type": time_shift_type}
    mu = 0.5 + (1.15 - 0.5) * (1024 - 256) / (4096 - 256)
    check(FLOW, config, "flow_prediction", ours={"image_tokens": 1024}, theirs={"mu": mu})


def test_flow_with_terminal_shift():
    check(FLOW, {"shift": 3.0, "shift_terminal": 0.1}, "flow_prediction", STEPS[1:])
