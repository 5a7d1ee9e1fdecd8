"""Weights that a recipe stored as float16, int8 or palettes: how the ONNX graph has them, and an ML program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from coremltools.converters.mil.mil import Builder as mb

from pocketdiffusion.tensors import AnyArray
from pocketdiffusion_export.errors import ExportError

LINEAR = "_linear"
"""Ends the name of a weight that is stored [out, in] and was [in, out]."""
MASK = np.float32(-1e4)
"""Stands in float16 for the lowest float32, which attention masks are made of; Apple's converter takes the same."""
HALF_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight that the recipe stored in another form than float32."""

    name: str
    stored: AnyArray
    """float16 values, int8 codes, or uint8 indices of a palette."""
    axis: int = 0
    scale: AnyArray | None = None
    """Of codes: float32, one value or one for each index of `axis`."""
    palette: AnyArray | None = None
    """Of indices: float32, 2**bits values."""

    def make(self, kind: str, *, transposed: bool = False) -> Any:
        """The operations that hold it, in type `kind`: "fp16" or "fp32"."""
        name, stored = linear_name(self.name) if transposed else self.name, self.stored.T if transposed else self.stored
        if self.scale is not None:
            return mb.constexpr_affine_dequantize(
                quantized_data=stored,
                zero_point=np.int8(0),
                scale=constant(self.scale, kind),
                axis=np.int32(1 - self.axis if transposed else self.axis),
                name=name,
            )
        if self.palette is not None:
            return mb.constexpr_lut_to_dense(
                indices=pack(stored.ravel(), len(self.palette).bit_length() - 1),
                lut=constant(self.palette, kind),
                shape=np.array(stored.shape, np.uint32),
                name=name,
            )
        if kind == "fp16":
            return mb.const(val=stored, name=name)
        return mb.constexpr_cast(source_val=stored, output_dtype="fp32", name=name)


def constant(array: AnyArray, kind: str) -> AnyArray:
    """An array in a program's type; whole numbers are int32 there. Raises ExportError where float16 can't hold it."""
    if array.dtype.kind in "iub":
        return array.astype(bool) if array.dtype.kind == "b" else array.astype(np.int32)
    if kind == "fp32":
        return array.astype(np.float32, copy=False)
    array = np.where(array < -1e30, MASK, array)
    if array.size and np.abs(array).max() > HALF_MAX:
        raise ExportError("a constant of the graph is too large for float16; export with --recipe fp32")
    return array.astype(np.float16)


def pack(codes: AnyArray, bits: int) -> AnyArray:
    """Codes below 2**bits as bytes, the first code in the lowest bits: the form of `constexpr_lut_to_dense`."""
    flags = np.unpackbits(codes[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(flags.ravel(), bitorder="little")


def unpack(packed: AnyArray, bits: int, count: int) -> AnyArray:
    """The inverse of `pack`."""
    flags = np.unpackbits(packed, bitorder="little")[: count * bits].reshape(count, bits)
    return np.packbits(flags, axis=1, bitorder="little")[:, 0]


def linear_name(name: str) -> str:
    """The name of a MatMul's weight as that of a `linear` operation."""
    return f"{name}{LINEAR}"


def _half(name: str, given: Sequence[AnyArray], facts: Mapping[str, Any]) -> Any:
    """A Cast of float16 weights; indices of a palette stay what they are until the palette comes."""
    if given[0].dtype == np.float16:
        return Weight(name, given[0]) if given[0].ndim > 1 else given[0].astype(np.float32)
    return given[0] if given[0].dtype == np.uint8 else None


def _codes(name: str, given: Sequence[AnyArray], facts: Mapping[str, Any]) -> Weight:
    if given[0].dtype != np.int8 or given[1].ndim > 1:
        raise ExportError("int4 weights in groups can't be written for Core ML; choose --recipe palette4 or int8")
    return Weight(name, given[0], axis=facts.get("axis", 1) % given[0].ndim, scale=given[1])


def _palette(name: str, given: Sequence[AnyArray], facts: Mapping[str, Any]) -> Weight | None:
    """A Gather of a palette by the indices of a weight."""
    palette, indices = given
    return Weight(name, indices, palette=palette) if indices.dtype == np.uint8 else None


STORED: Mapping[str, Callable[[str, Sequence[AnyArray], Mapping[str, Any]], Any]] = {
    "Cast": _half,
    "DequantizeLinear": _codes,
    "Gather": _palette,
}
"""Operators of constants that make a `Weight`; other constants are computed."""
