"""The types of an ML program's values: what layers compute in, and constants and weights brought into it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types

from pocketdiffusion.tensors import AnyArray
from pocketdiffusion_export.targets.coreml_weights import Weight, constant, linear_name


class Values:
    """Makes values of one program. `name_of` gives the ONNX name of a constant."""

    def __init__(self, name_of: Callable[[AnyArray], str], *, half: bool) -> None:
        self.kind = "fp16" if half else "fp32"
        """The type that layers compute in."""
        self._name_of = name_of
        self._made: dict[tuple[int, bool], Any] = {}

    def layer(self, value: Any, *, transposed: bool = False) -> Any:
        """A value in the type that layers compute in; a weight is made once, under its name."""
        if not isinstance(value, np.ndarray | Weight):
            return value if kind_of(value) == self.kind else mb.cast(x=value, dtype=self.kind)
        key = (id(value), transposed)
        if key not in self._made:
            self._made[key] = self._weight(value, transposed)
        return self._made[key]

    def constant(self, array: AnyArray) -> AnyArray:
        """A constant in the type that layers compute in. Raises ExportError where float16 can't hold it."""
        return constant(array, self.kind)

    def alike(self, given: Sequence[Any]) -> list[Any]:
        """Values of one type: that of the variables, or of layers where these differ."""
        found = {kind_of(value) for value in given if not isinstance(value, np.ndarray)}
        kind = found.pop() if len(found) == 1 else self.kind
        return [
            constant(value, kind)
            if isinstance(value, np.ndarray)
            else value
            if kind_of(value) == kind
            else mb.cast(x=value, dtype=kind)
            for value in given
        ]

    def _weight(self, value: AnyArray | Weight, transposed: bool) -> Any:
        if isinstance(value, Weight):
            return value.make(self.kind, transposed=transposed)
        array, name = self.constant(value), self._name_of(value)
        return mb.const(val=array.T, name=linear_name(name)) if transposed else mb.const(val=array, name=name)


def kind_of(value: Any) -> str:
    """The type of a variable: "fp16", "fp32", "int32" or "bool"."""
    return str(types.builtin_to_string(value.dtype))
