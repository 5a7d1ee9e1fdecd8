"""The denoiser graph as the functions that sampling knows: raw output from input and timestep."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pocketdiffusion.component import Component
from pocketdiffusion.errors import GraphFailed, InvalidRequest
from pocketdiffusion.families import Conditioning
from pocketdiffusion.sampling.denoise import Network, Passes
from pocketdiffusion.tensors import AnyArray, Array, TensorSpec
from pocketdiffusion.timing import Timings


def network(component: Component, inputs: Mapping[str, Array], timings: Timings) -> Network:
    """(x, timestep) -> raw output, with the conditioning inputs bound; see `Conditioning` for "sample" among them."""
    spec, channels = component.session.inputs["timestep"], inputs.get("sample")
    (output,) = component.entry.outputs
    _check_length(component, inputs)

    def run(x: Array, timestep: float) -> Array:
        sample = x if channels is None else np.concatenate([x, channels], axis=1)
        feeds = {**inputs, "sample": sample, "timestep": _timestep(spec, timestep, len(x))}
        result: Array = component.run(feeds, timings)[output]
        if result.shape != x.shape:
            raise GraphFailed(f"{component.name} gave {result.shape} for latents of {x.shape}; export the model again")
        return result

    return run


def passes(component: Component, conditioning: Conditioning, *, batched: bool, timings: Timings) -> Passes:
    """(x, timestep) -> the outputs for each of `Conditioning.sides`, from one batch or from runs in turn."""
    sides = conditioning.sides
    if not batched:
        networks = [network(component, side, timings) for side in sides]
        return lambda x, timestep: tuple(run(x, timestep) for run in networks)
    joined = {name: np.concatenate([side[name] for side in sides]) for name in conditioning.positive}
    together = network(component, joined, timings)
    return lambda x, timestep: tuple(np.split(together(np.concatenate([x] * len(sides)), timestep), len(sides)))


def _check_length(component: Component, inputs: Mapping[str, Array]) -> None:
    """Raise InvalidRequest for a prompt that is longer than the only length that a graph takes."""
    name = "encoder_hidden_states"
    length = component.entry.inputs[name].shape[1]
    if isinstance(length, int) and inputs[name].shape[1] > length:
        raise InvalidRequest(
            "prompt",
            f"a prompt fills {inputs[name].shape[1] // length} times {length} tokens; this model's graphs are fixed to "
            f"{length}: shorten it, or choose long_prompt='truncate'",
        )


def _timestep(spec: TensorSpec, timestep: float, rows: int) -> AnyArray:
    """The timestep as the graph wants it: a scalar or one for each row, rounded where it takes integers."""
    dtype = np.dtype(spec.dtype)
    value = round(timestep) if dtype.kind == "i" else timestep
    shape = tuple(size if isinstance(size, int) else rows for size in spec.shape)
    return np.full(shape, value, dtype)
