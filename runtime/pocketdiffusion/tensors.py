"""Array types and the description of a graph's inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
AnyArray = NDArray[Any]

Noise = Callable[[], Array]
"""The next standard-normal draw, in the shape of the latents, float32; each image of a batch has its own source."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name-less description of one graph input or output.

    `dtype` is numpy's name ("float32", "int64"); `shape` holds an int for a fixed axis, a str or None for a free one.
    """

    dtype: str
    shape: tuple[int | str | None, ...]
