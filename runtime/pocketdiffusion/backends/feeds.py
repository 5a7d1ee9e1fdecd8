"""Checks the arrays that go into a graph against its declared inputs, the same way for every engine."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pocketdiffusion.errors import GraphFailed
from pocketdiffusion.tensors import AnyArray, TensorSpec

CASTABLE = frozenset({"int32", "int64", "float16", "float32", "float64"})
"""Types that are converted into each other when no value is lost but precision."""


def check_feeds(graph: str, feeds: Mapping[str, AnyArray], specs: Mapping[str, TensorSpec]) -> dict[str, AnyArray]:
    """The feeds as C-contiguous arrays of the declared types. A scalar fills an input of one axis.

    Raises GraphFailed for a missing or unknown input, a wrong rank or fixed axis, a type that can't be converted, and a
    value that the declared type can't hold: 499.5 or 2**40 as int32, 1e6 as float16.
    """
    unknown = [name for name in feeds if name not in specs]
    missing = [name for name in specs if name not in feeds]
    if unknown or missing:
        wrong = [f"input '{name}' is missing" for name in missing] + [f"input '{name}' is unknown" for name in unknown]
        raise GraphFailed(f"{graph}: {', '.join(wrong)}; expected {describe(specs)}")
    return {name: _checked(graph, name, feeds[name], spec) for name, spec in specs.items()}


def describe(specs: Mapping[str, TensorSpec]) -> str:
    """For messages: ``sample float32 [1, 4, h, w], timestep int64 []``."""
    return ", ".join(f"{name} {_tensor(spec.dtype, spec.shape)}" for name, spec in specs.items())


def _checked(graph: str, name: str, given: AnyArray, spec: TensorSpec) -> AnyArray:
    array = np.asarray(given)
    if array.ndim == 0 and len(spec.shape) == 1:
        array = np.full(spec.shape[0] if isinstance(spec.shape[0], int) else 1, array)
    dtype = array.dtype.name
    castable = dtype == spec.dtype or (dtype in CASTABLE and spec.dtype in CASTABLE)
    if not castable or not _fits(array.shape, spec.shape):
        raise _refused(graph, name, array, spec)
    try:
        with np.errstate(over="raise", invalid="ignore"):
            cast = np.asarray(array, spec.dtype, order="C")
    except FloatingPointError:
        raise _refused(graph, name, array, spec) from None
    if cast.dtype.kind == "i" and dtype != spec.dtype and not np.array_equal(cast, array):
        raise _refused(graph, name, array, spec)
    return cast


def _fits(shape: tuple[int, ...], declared: tuple[int | str | None, ...]) -> bool:
    return len(shape) == len(declared) and all(
        size == axis for size, axis in zip(shape, declared, strict=True) if isinstance(axis, int)
    )


def _refused(graph: str, name: str, array: AnyArray, spec: TensorSpec) -> GraphFailed:
    span = f" with values {array.min()} to {array.max()}" if array.size and array.dtype.name in CASTABLE else ""
    return GraphFailed(
        f"{graph}: input '{name}' got {_tensor(array.dtype.name, array.shape)}{span}, "
        f"expected {_tensor(spec.dtype, spec.shape)}"
    )


def _tensor(dtype: str, shape: tuple[int | str | None, ...]) -> str:
    return f"{dtype} [{', '.join('?' if axis is None else str(axis) for axis in shape)}]"
