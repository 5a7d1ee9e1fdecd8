"""The graphs of a component: one of free axes, or one for each image size, and the inputs to verify each with.

Graphs of different sizes are one graph with other lengths of its inputs and outputs: tracing leaves no length inside,
so they share every weight, and engines compute what follows from the lengths when they open one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pocketdiffusion.tensors import AnyArray
from pocketdiffusion_export.component import FREE, ComponentSpec, Feeds
from pocketdiffusion_export.errors import ExportError

Size = tuple[int, int]
"""Width and height in pixels."""
Shapes = Mapping[str, tuple[int | str, ...]]
"""Input or output -> its axes: lengths of fixed ones, names of free ones. What is missing stays as it was traced."""

_MORE = 3
"""Rows of the sample that shows that a batch is free."""


@dataclass(frozen=True)
class GraphPlan:
    """One graph to be."""

    size: Size | None
    """None for a component's first graph, which may take any size, or be about no picture."""
    samples: Sequence[Feeds]
    """Inputs that fit it."""


def graph_plans(
    spec: ComponentSpec, samples: Sequence[Feeds], sizes: Sequence[Size], batch: int | None
) -> list[GraphPlan]:
    """The graphs of a component, the one for the first size first. `samples` are of that size, but for the last.

    Without sizes there is one graph, which takes all samples. `batch` rows go into graphs of fixed batch.
    """
    if not sizes:
        return [GraphPlan(None, samples)]
    native = samples[0]
    kept = [feeds for feeds in samples if _alike(spec, feeds, native, fixed_length=batch is not None)]
    if batch is None:
        first = [*kept, _with_rows(spec, kept[-1], np.zeros(_MORE, int))]
    else:
        first = [_with_rows(spec, feeds, np.arange(index, index + batch)) for index, feeds in enumerate(kept)]
    if not pictures(spec):
        return [GraphPlan(None, first)]
    middle = first[(len(kept) - 1) // 2]
    others = [GraphPlan(size, [_resized(spec, middle, sizes[0], size)]) for size in sizes[1:]]
    return [GraphPlan(None, first), *others]


def pictures(spec: ComponentSpec) -> bool:
    """Whether an image size is among a component's free axes."""
    return any(kind not in FREE for free in spec.axes.values() for kind in free.values())


def fixed_shapes(spec: ComponentSpec, tensors: Mapping[str, AnyArray], *, batch: bool) -> Shapes:
    """The axes of a graph for one image size, from the inputs and outputs of one call.

    Batch and text length stay free, or with `batch` are those of the call.
    """

    def axis(name: str, index: int, length: int) -> int | str:
        kind = spec.axes.get(name, {}).get(index)
        return kind if kind in FREE and kind is not None and not batch else length

    return {
        name: tuple(axis(name, index, length) for index, length in enumerate(array.shape))
        for name, array in tensors.items()
    }


def check_sizes(sizes: Sequence[Size], multiple: int) -> None:
    """Raise ExportError for a size that the denoiser can't halve as often as it does."""
    for width, height in sizes:
        if width % multiple or height % multiple:
            raise ExportError(
                f"size {width}x{height} can't be exported; this model takes multiples of {multiple} pixels"
            )


def _alike(spec: ComponentSpec, feeds: Feeds, native: Feeds, *, fixed_length: bool) -> bool:
    """Whether both have the same lengths along axes that will be fixed."""
    loose = {"batch"} if fixed_length else FREE
    return all(
        array.ndim == native[name].ndim
        and all(
            length == native[name].shape[axis] or spec.axes.get(name, {}).get(axis) in loose
            for axis, length in enumerate(array.shape)
        )
        for name, array in feeds.items()
    )


def _with_rows(spec: ComponentSpec, feeds: Feeds, rows: AnyArray) -> Feeds:
    """These rows of a call's batch, counted round and round."""
    return {name: a[rows % len(a)] if spec.axes.get(name, {}).get(0) == "batch" else a for name, a in feeds.items()}


def _resized(spec: ComponentSpec, feeds: Feeds, old: Size, new: Size) -> Feeds:
    """The inputs of a call for another image size: repeated, or cut off."""
    return {name: _tiled(array, spec.axes.get(name, {}), old, new) for name, array in feeds.items()}


def _tiled(array: AnyArray, axes: Mapping[int, str], old: Size, new: Size) -> AnyArray:
    for axis, kind in axes.items():
        side = 0 if kind.startswith("width") else 1
        if kind not in FREE:
            length = array.shape[axis]
            array = np.take(array, np.arange(length * new[side] // old[side]) % length, axis)
    return array
