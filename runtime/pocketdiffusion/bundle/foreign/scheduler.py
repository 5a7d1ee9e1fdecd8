"""Checks the numbers of a foreign folder's `scheduler_config.json`, which sampling takes as they are.

Names (class, prediction type, spacing …) are judged where they are looked up; here they only have to be texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketdiffusion.bundle.foreign.configs import SCHEDULER
from pocketdiffusion.bundle.strict_json import short
from pocketdiffusion.errors import BundleCorrupt

_TEXTS = (
    *("_class_name", "algorithm_type", "beta_schedule", "final_sigmas_type", "interpolation_type", "prediction_type"),
    *("solver_type", "time_shift_type", "timestep_spacing", "timestep_type", "variance_type"),
)
_BETA = (1e-6, 0.999)
_POSITIVE = (1e-6, 1e6)
_REALS: Mapping[str, tuple[float, float]] = {
    **{"beta_start": _BETA, "beta_end": _BETA, "shift_terminal": _BETA, "dynamic_thresholding_ratio": (0, 1)},
    **dict.fromkeys(("sample_max_value", "clip_sample_range", "timestep_scaling", "sigma_min", "sigma_max"), _POSITIVE),
    **{"shift": _POSITIVE, "flow_shift": _POSITIVE, "base_shift": (-10, 10), "max_shift": (-10, 10)},
    "lambda_min_clipped": (-float("inf"), 100),
}
_WHOLE: Mapping[str, tuple[float, float]] = {
    **{"num_train_timesteps": (1, 10_000), "original_inference_steps": (1, 10_000), "steps_offset": (0, 1000)},
    **{"solver_order": (1, 3), "base_image_seq_len": (1, 1 << 20), "max_image_seq_len": (1, 1 << 20)},
}
_NEVER_NULL = ("_class_name", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
_SWITCHES = ("rescale_betas_zero_snr", "clip_sample", "thresholding", "use_flow_sigmas", "lower_order_final")


def check_scheduler(config: Mapping[str, Any]) -> None:
    """Raises BundleCorrupt for a value of the wrong kind or out of range. null is no key, mostly."""
    for key, value in config.items():
        if value is None and key not in _NEVER_NULL:
            continue
        if key in _TEXTS and not isinstance(value, str):
            _refuse(key, value, "a text")
        if key in _SWITCHES and not isinstance(value, bool):
            _refuse(key, value, "true or false")
        for table, kinds in ((_REALS, (int, float)), (_WHOLE, (int,))):
            if key in table and not (type(value) in kinds and table[key][0] <= value <= table[key][1]):
                _refuse(key, value, "a number from {:g} to {:g}".format(*table[key]))
    betas = config.get("trained_betas")
    if betas is not None and not _are_betas(betas):
        _refuse("trained_betas", betas, "up to 10000 numbers from {:g} to {:g}".format(*_BETA))


def _are_betas(value: Any) -> bool:
    low, high = _BETA
    return (
        isinstance(value, list)
        and 1 <= len(value) <= 10_000
        and all(type(beta) is float and low <= beta <= high for beta in value)
    )


def _refuse(key: str, value: Any, allowed: str) -> None:
    raise BundleCorrupt(SCHEDULER, f"{key} is {short(value)}, allowed: {allowed}")
