"""One weight in several forms, of which a recipe picks: float16, and int8 per output channel with int4 in groups of
inputs, or palettes of several sizes.

int4 needs an input axis that is a multiple of a group. Scales and palettes are searched once; codes are made again when
wanted.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from pocketdiffusion.tensors import Array
from pocketdiffusion_export.quant.int4 import LEVELS as LEVELS4
from pocketdiffusion_export.quant.int4 import blocks_form, quantize_blocks
from pocketdiffusion_export.quant.palette import BITS, find_palette, indices_of, palette_form
from pocketdiffusion_export.quant.weight_only import LEVELS as LEVELS8
from pocketdiffusion_export.quant.weight_only import channels_form, quantize_array
from pocketdiffusion_export.quant.weights import Form, along, half

FLOAT_BITS = 16
SCALE_BYTES = {8: 4, 4: 2}
VALUE_BYTES = 2
"""Of one value of a palette."""


@dataclass(frozen=True, slots=True)
class Option:
    """One form of one weight."""

    bits: int
    size: int
    """Bytes, with the scales."""
    noise: float
    """Energy of an error over energy of what it is an error of: of the weight, or as measured of the outputs."""
    scale: Array | None = field(default=None, compare=False)
    """Of int8 per channel, of int4 per group of inputs."""
    palette: Array | None = field(default=None, compare=False)
    """The values that indices stand for."""


def options(weight: Array, axis: int, group: int) -> list[Option]:
    """Forms of a weight whose output channels lie along `axis`, the largest first.

    float16 counts as free of noise: it is what others are compared with.
    """
    found = [_half(weight), _scaled(weight, axis, 8, quantize_array(weight, axis)[1])]
    if weight.shape[1 - axis] % group == 0:
        found.append(_scaled(weight, axis, 4, quantize_blocks(weight, 1 - axis, group)[1]))
    return found


def palettes(weight: Array, least: int) -> list[Option]:
    """float16, and palettes of at least `least` bits, the largest first."""
    sizes = [bits for bits in reversed(BITS) if bits >= least]
    return [_half(weight), *(_with_palette(weight, bits) for bits in sizes)]


def _half(weight: Array) -> Option:
    return Option(FLOAT_BITS, 2 * weight.size, 0.0)


def _with_palette(weight: Array, bits: int) -> Option:
    palette, _ = find_palette(weight, bits)
    size = -(-weight.size * bits // 8) + palette.size * VALUE_BYTES
    return _measured(weight, 0, Option(bits, size, 0.0, palette=palette))


def _scaled(weight: Array, axis: int, bits: int, scale: Array) -> Option:
    size = weight.size * bits // 8 + scale.size * SCALE_BYTES[bits]
    return _measured(weight, axis, Option(bits, size, 0.0, scale))


def _measured(weight: Array, axis: int, made: Option) -> Option:
    error, signal = (
        float(np.square(array, dtype=np.float64).sum()) for array in (weight - restored(weight, axis, made), weight)
    )
    return replace(made, noise=error / signal if signal else 0.0)


def restored(weight: Array, axis: int, option: Option) -> Array:
    """The weight as engines compute with it."""
    if option.palette is not None:
        return np.asarray(option.palette[indices_of(weight, option.palette)], np.float32)
    if option.scale is None:
        return weight
    scale = _spread(weight, axis, option.scale)
    return _codes(weight, scale, option) * scale


def _spread(weight: Array, axis: int, scale: Array) -> Array:
    """Scales in a shape that multiplies the weight."""
    if scale.ndim == 1:
        return along(scale, axis, weight.ndim)
    return scale.repeat(weight.shape[1 - axis] // scale.shape[1 - axis], 1 - axis)


def _codes(weight: Array, scale: Array, option: Option) -> NDArray[np.int8]:
    levels = LEVELS4 if option.bits == 4 else LEVELS8
    return np.asarray(np.clip(np.rint(weight / scale), -levels, levels), np.int8)


def stored(tensor: onnx.TensorProto, axis: int, option: Option) -> Form:
    """The initializers and nodes of this form."""
    weight = numpy_helper.to_array(tensor)
    if option.palette is not None:
        return palette_form(tensor.name, option.palette, indices_of(weight, option.palette))
    if option.scale is None:
        return half(tensor)
    codes = _codes(weight, _spread(weight, axis, option.scale), option)
    if option.bits == 4:
        return blocks_form(tensor.name, codes, option.scale, 1 - axis)
    return channels_form(tensor.name, codes, option.scale, axis)
