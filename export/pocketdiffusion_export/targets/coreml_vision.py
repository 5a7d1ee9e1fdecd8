"""The operators of convolutional picture encoders as ML programs; see `coreml_ops`, whose table takes them in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from coremltools.converters.mil.mil import Builder as mb

from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.targets.coreml_values import Values


def max_pool(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    """The largest of each window."""
    sizes = list(facts["kernel_shape"])
    strides, pads = facts.get("strides", [1] * len(sizes)), facts.get("pads", [0] * 2 * len(sizes))
    if facts.get("ceil_mode") or set(facts.get("dilations", [1])) != {1}:
        raise ExportError("a maximum over spread or cut windows can't be written for Core ML")
    pad = [pads[axis + side * len(sizes)] for axis in range(len(sizes)) for side in (0, 1)]
    return mb.max_pool(x=given[0], kernel_sizes=sizes, strides=list(strides), pad_type="custom", pad=pad)


def mean_pool(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    """The mean of each channel."""
    return mb.reduce_mean(x=given[0], axes=list(range(2, given[0].rank)), keep_dims=True)


def batch_norm(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    """What was learnt of the mean and the variance, as a factor and an offset for each channel."""
    x, gamma, beta, mean, variance = given
    factor = gamma / np.sqrt(variance + np.float32(facts.get("epsilon", 1e-5)))
    wide = (-1, *(1 for _ in range(x.rank - 2)))
    scaled = mb.mul(x=at.layer(x), y=at.constant(factor.reshape(wide)))
    return mb.add(x=scaled, y=at.constant((beta - mean * factor).reshape(wide)))


def flatten(at: Values, given: Sequence[Any], facts: Mapping[str, Any]) -> Any:
    """Two axes of all."""
    shape, axis = given[0].shape, facts.get("axis", 1)
    return mb.reshape(x=given[0], shape=[int(np.prod(shape[:axis])), int(np.prod(shape[axis:]))])


VISION = {"BatchNormalization": batch_norm, "Flatten": flatten, "GlobalAveragePool": mean_pool, "MaxPool": max_pool}
