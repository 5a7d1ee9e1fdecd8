"""The denoiser graph as the functions that sampling knows: raw output from input and timestep."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pocketdiffusion.component import Component
from pocketdiffusion.errors import GraphFailed
from pocketdiffusion.families import Conditioning
from pocketdiffusion.sampling.denoise import Network, Pair
from pocketdiffusion.tensors import AnyArray, Array, TensorSpec
from pocketdiffusion.timing import Timings


def network(component: Component, inputs: Mapping[str, Array], timings: Timings) -> Network:
    """(x, timestep) -> raw output, with the conditioning inputs bound; see `Conditioning` for "sample" among them."""
    spec, channels = component.entry.inputs["timestep"], inputs.get("sample")
    (output,) = component.entry.outputs

    def run(x: Array, timestep: float) -> Array:
        sample = x if channels is None else np.concatenate([x, channels], axis=1)
        feeds = {**inputs, "sample": sample, "timestep": _timestep(spec, timestep, len(x))}
        result: Array = component.run(feeds, timings)[output]
        if result.shape != x.shape:
            raise GraphFailed(f"{component.name} gave {result.shape} for latents of {x.shape}; export the model again")
        return result

    return run


def both(component: Component, conditioning: Conditioning, *, batched: bool, timings: Timings) -> Pair:
    """(x, timestep) -> (unconditional, conditional) outputs, from one batch or from two runs in turn."""
    negative, positive = conditioning.negative, conditioning.positive
    if negative is None:
        raise ValueError("guidance needs a negative conditioning")
    if batched:
        joined = {name: np.concatenate([negative[name], positive[name]]) for name in positive}
        together = network(component, joined, timings)

        def pair(x: Array, timestep: float) -> tuple[Array, Array]:
            output = together(np.concatenate([x, x]), timestep)
            return output[: len(x)], output[len(x) :]

        return pair
    unconditional, conditional = (network(component, side, timings) for side in (negative, positive))
    return lambda x, timestep: (unconditional(x, timestep), conditional(x, timestep))


def _timestep(spec: TensorSpec, timestep: float, rows: int) -> AnyArray:
    """The timestep as the graph wants it: a scalar or one for each row, rounded where it takes integers."""
    dtype = np.dtype(spec.dtype)
    value = round(timestep) if dtype.kind == "i" else timestep
    shape = tuple(size if isinstance(size, int) else rows for size in spec.shape)
    return np.full(shape, value, dtype)
