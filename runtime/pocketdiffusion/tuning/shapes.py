"""What one call of a component is fed, at an image size: shapes of all inputs, and arrays to time it with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pocketdiffusion.bundle import Bundle
from pocketdiffusion.bundle.manifest import ComponentEntry, Numbers
from pocketdiffusion.errors import BundleUnsupported, InvalidRequest
from pocketdiffusion.families.guidance import INPUT as GUIDANCE_INPUT
from pocketdiffusion.tensors import AnyArray, TensorSpec

Shape = tuple[int, ...]
SEED = 0
MIDDLE_TIMESTEP = 500
CHECKER_SIDE = 224
"""Pixels along a side of what CLIP sees, where a safety checker leaves that free."""


def input_shapes(bundle: Bundle, component: str, *, width: int, height: int, rows: int) -> dict[str, Shape]:
    """Shape of each input of a component for images of `width` x `height` pixels, `rows` of them in a batch.

    A guided step runs the denoiser on two rows. Raises InvalidRequest for a size that the model can't draw, and
    BundleUnsupported: no such component, or as `graph_shapes`.
    """
    manifest, entry = bundle.manifest, entry_at(bundle, component, (width, height))
    multiple = manifest.numbers.size_multiple
    if width % multiple or height % multiple:
        raise InvalidRequest(
            "width", f"{manifest.name}: {width}x{height} was asked; both must be multiples of {multiple}"
        )
    factor = manifest.numbers.vae_factor
    return graph_shapes(component, entry, manifest.numbers, (height // factor, width // factor), rows)


def entry_at(bundle: Bundle, component: str, size: tuple[int, int] | None) -> ComponentEntry:
    """The graph for images of a size (width, height): one made for it, or else the first. Raises BundleUnsupported."""
    bundle.graph(component)
    entry = bundle.manifest.components[component]
    first, *others = entry.graphs
    made = {(sized.width, sized.height): graph for sized, graph in zip(entry.sizes, others, strict=True)}
    return first if size is None else made.get(size, first)


def graph_shapes(
    component: str, entry: ComponentEntry, numbers: Numbers, cells: tuple[int, int], rows: int
) -> dict[str, Shape]:
    """Shape of each input of one graph for `cells` (height, width) of the latents, of a picture or of a tile.

    Raises BundleUnsupported: a size that the graph is not made for, an input whose free axes are not known here.
    """
    return {
        name: _shape(f"{component}: input '{name}'", spec, _axes(component, name, numbers, cells, rows))
        for name, spec in entry.inputs.items()
    }


def denoiser_rows(entry: ComponentEntry, guidance: float) -> int:
    """Rows that a component is fed for one image: two for a denoiser with classifier-free guidance in one batch.

    Models that hold their guidance run on one, and so do all other components.
    """
    return 2 if guidance > 1 and "timestep" in entry.inputs and GUIDANCE_INPUT not in entry.inputs else 1


def _axes(component: str, name: str, numbers: Numbers, cells: tuple[int, int], rows: int) -> Mapping[int, int]:
    """Axis -> what its size is where the graph leaves it free."""
    if name in ("input_ids", "attention_mask", "encoder_hidden_states"):
        return {0: rows, 1: numbers.text_length}
    if name in ("sample", "latent_sample"):
        unit = numbers.vae_factor if component == "vae_encoder" else 1
        return {0: rows, 2: cells[0] * unit, 3: cells[1] * unit}
    if name == "clip_input":
        return {0: rows, 1: 3, 2: CHECKER_SIDE, 3: CHECKER_SIDE}
    return {0: rows}


def _shape(what: str, spec: TensorSpec, free: Mapping[int, int]) -> Shape:
    for axis, fixed in enumerate(spec.shape):
        if axis not in free and not isinstance(fixed, int):
            raise BundleUnsupported(f"{what} has shape {list(spec.shape)}, and what axis {axis} means is not known")
        if axis > 0 and isinstance(fixed, int) and free.get(axis, fixed) != fixed:
            raise BundleUnsupported(
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
            feeds[name] = random.standard_normal(shape, np.float32).astype(dtype)
        else:
            feeds[name] = random.integers(0, 2, shape).astype(dtype)
    return feeds
