"""What one call of a component is fed, at an image size: shapes of all inputs, and arrays to time it with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pocketdiffusion.bundle import Bundle
from pocketdiffusion.bundle.manifest import ComponentEntry, Numbers
from pocketdiffusion.tensors import AnyArray, TensorSpec
from pocketdiffusion_bench.errors import BenchError

Shape = tuple[int, ...]
SEED = 0
MIDDLE_TIMESTEP = 500


def input_shapes(bundle: Bundle, component: str, *, width: int, height: int, rows: int) -> dict[str, Shape]:
    """Shape of each input of a component for images of `width` x `height` pixels, `rows` of them in a batch.

    A guided step runs the denoiser on two rows. Raises BenchError: no such component, a size that the graph does not
    take or that the model can't draw, an input whose free axes are not known here.
    """
    manifest, entry = bundle.manifest, entry_at(bundle, component, (width, height))
    multiple = manifest.numbers.size_multiple
    if width % multiple or height % multiple:
        raise BenchError(f"{manifest.name}: {width}x{height} was asked; both must be multiples of {multiple}")
    return {
        name: _shape(
            f"{component}: input '{name}'", spec, _axes(component, name, manifest.numbers, width, height, rows)
        )
        for name, spec in entry.inputs.items()
    }


def entry_at(bundle: Bundle, component: str, size: tuple[int, int] | None) -> ComponentEntry:
    """The graph for images of a size (width, height): one made for it, or else the first. Raises BenchError."""
    components = bundle.manifest.components
    if component not in components:
        raise BenchError(f"{bundle.manifest.name} has no component '{component}'; choose from {', '.join(components)}")
    entry = components[component]
    first, *others = entry.graphs
    made = {(sized.width, sized.height): graph for sized, graph in zip(entry.sizes, others, strict=True)}
    return first if size is None else made.get(size, first)


def _axes(component: str, name: str, numbers: Numbers, width: int, height: int, rows: int) -> Mapping[int, int]:
    """Axis -> what its size is where the graph leaves it free."""
    if name in ("input_ids", "attention_mask", "encoder_hidden_states"):
        return {0: rows, 1: numbers.text_length}
    if name in ("sample", "latent_sample"):
        factor = 1 if component == "vae_encoder" else numbers.vae_factor
        return {0: rows, 2: height // factor, 3: width // factor}
    return {0: rows}


def _shape(what: str, spec: TensorSpec, free: Mapping[int, int]) -> Shape:
    for axis, fixed in enumerate(spec.shape):
        if axis not in free and not isinstance(fixed, int):
            raise BenchError(f"{what} has shape {list(spec.shape)}, and what axis {axis} means is not known here")
        if axis > 0 and isinstance(fixed, int) and free.get(axis, fixed) != fixed:
            raise BenchError(
                f"{what}: axis {axis} is {fixed}, the asked size needs {free[axis]}; export it at that size"
            )
    return tuple(fixed if isinstance(fixed, int) else free[axis] for axis, fixed in enumerate(spec.shape))


def random_feeds(specs: Mapping[str, TensorSpec], shapes: Mapping[str, Shape]) -> dict[str, AnyArray]:
    """Seeded normal numbers, small token numbers, a timestep in the middle of the schedule."""
    random = np.random.default_rng(SEED)
    feeds: dict[str, AnyArray] = {}
    for name, shape in shapes.items():
        dtype = np.dtype(specs[name].dtype)
        if name == "timestep":
            feeds[name] = np.full(shape, MIDDLE_TIMESTEP, dtype)
        elif dtype.kind == "f":
            feeds[name] = random.standard_normal(shape).astype(dtype)
        else:
            feeds[name] = random.integers(0, 2, shape).astype(dtype)
    return feeds
