"""An ML program read back from its package and computed in torch, operation by operation.

Core ML runs on macOS only. Elsewhere this shows what a package holds: its names and shapes, the values of its weights
after their decompression, and what its operations compute. Results of float16 operations are rounded to float16, their
sums are float32, as on a GPU. It is no Core ML: how Apple's engines split and fuse the program is not seen.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil.frontend.milproto.load import load
from torch.nn import functional

from pocketdiffusion.tensors import AnyArray
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.targets.coreml_weights import unpack

Values = dict[str, Any]
"""Inputs of an operation by parameter: tensors, and plain values of constants."""

_LOADING = threading.Lock()
"""coremltools puts programs together on one stack for the whole process."""


class Program:
    """The program of one package."""

    def __init__(self, package: Path) -> None:
        model = ct.models.MLModel(str(package), skip_model_load=True)
        self.spec = model.get_spec()
        """The package's protobuf, `Model`."""
        with _LOADING:
            loaded = load(
                self.spec, specification_version=self.spec.specificationVersion, file_weights_dir=model.weights_dir
            )
        (self._function,) = loaded.functions.values()
        self._operations = list(self._function.operations)
        self._last_use = {value: i for i, operation in enumerate(self._operations) for value in _inputs(operation)}
        for variable in self._function.outputs:
            self._last_use.pop(variable, None)

    def weights(self) -> Iterator[tuple[str, AnyArray]]:
        """Name and decompressed values, in the program's type, of every constant with more than one axis."""
        packed = {value for operation in self._operations if _packed(operation) for value in operation.inputs.values()}
        for operation in self._operations:
            if _constant(operation) and operation.outputs[0] not in packed:
                array = _stored(operation)
                if isinstance(array, np.ndarray) and array.ndim > 1:
                    yield operation.outputs[0].name, array

    def run(self, feeds: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """All outputs. Raises ExportError for an operation that is not known here."""
        values: dict[Any, Any] = {}
        for name, variable in self._function.inputs.items():
            values[variable] = torch.from_numpy(np.ascontiguousarray(feeds[name]))
        with torch.inference_mode():
            for index, operation in enumerate(self._operations):
                if not _constant(operation):
                    values[operation.outputs[0]] = _compute(operation, values)
                    for used in [value for value in values if self._last_use.get(value) == index]:
                        del values[used]
        return {variable.name: values[variable].numpy() for variable in self._function.outputs}


def _packed(operation: Any) -> bool:
    return str(operation.op_type).startswith("constexpr_")


def _constant(operation: Any) -> bool:
    return operation.op_type == "const" or _packed(operation)


def _inputs(operation: Any) -> list[Any]:
    """Variables that an operation reads, those in lists too."""
    given = [value if isinstance(value, list | tuple) else [value] for value in operation.inputs.values()]
    return [variable for variables in given for variable in variables if variable is not None]


def _stored(operation: Any) -> Any:
    """The value of a constant, as an array of the type that the program gives it."""
    given = {name: value.val for name, value in operation.inputs.items()}
    if operation.op_type == "constexpr_affine_dequantize":
        codes, axis = given["quantized_data"], int(given["axis"])
        along = [-1 if index == axis else 1 for index in range(codes.ndim)]
        scale = np.asarray(given["scale"])
        shift = codes.astype(np.float32) - np.float32(given["zero_point"])
        return (shift * scale.astype(np.float32).reshape(along if scale.ndim else ())).astype(scale.dtype)
    if operation.op_type == "constexpr_lut_to_dense":
        bits = int(math.log2(len(given["lut"])))
        shape = tuple(int(size) for size in given["shape"])
        return given["lut"][unpack(given["indices"], bits, math.prod(shape))].reshape(shape)
    if operation.op_type == "constexpr_cast":
        return given["source_val"].astype(np.float32)
    if operation.op_type != "const":
        raise ExportError(f"a weight stored as {operation.op_type} can't be read back")
    return operation.outputs[0].val


def _compute(operation: Any, values: Mapping[Any, Any]) -> Any:
    if operation.op_type not in OPERATIONS:
        raise ExportError(f"the operation {operation.op_type} can't be checked; known: {', '.join(OPERATIONS)}")

    def value(variable: Any) -> Any:
        """float16 comes as float32, to compute in."""
        found = values[variable] if variable in values else _stored(variable.op)
        tensor = torch.from_numpy(np.array(found)) if isinstance(found, np.ndarray) else found
        return tensor.float() if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float16 else tensor

    given = {
        name: [value(item) for item in found] if isinstance(found, list | tuple) else value(found)
        for name, found in operation.inputs.items()
        if found is not None
    }
    kind = ct.converters.mil.mil.types.builtin_to_string(operation.outputs[0].dtype)
    return OPERATIONS[operation.op_type](given).to(_TYPES[kind])


_TYPES = {"fp16": torch.float16, "fp32": torch.float32, "int32": torch.int32, "bool": torch.bool}


def _numbers(value: Any) -> list[int]:
    return [int(item) for item in value]


def _conv(v: Values) -> Any:
    pad, rank = _numbers(v["pad"]), v["x"].ndim - 2
    x = functional.pad(v["x"], [pad[2 * axis + side] for axis in reversed(range(rank)) for side in (0, 1)])
    steps = {"stride": _numbers(v["strides"]), "dilation": _numbers(v["dilations"]), "groups": int(v["groups"])}
    if v["pad_type"] != "custom":
        raise ExportError(f"a convolution padded as '{v['pad_type']}' can't be checked")
    return functional.conv2d(x, v["weight"], v.get("bias"), **steps)


def _matmul(v: Values) -> Any:
    x, y = (v[name].mT if bool(v.get(f"transpose_{name}", False)) else v[name] for name in "xy")
    return x @ y


def _layer_norm(v: Values) -> Any:
    shape = [v["x"].shape[axis] for axis in _numbers(v["axes"])]
    return functional.layer_norm(v["x"], shape, v.get("gamma"), v.get("beta"), float(v["epsilon"]))


def _instance_norm(v: Values) -> Any:
    return functional.instance_norm(v["x"], weight=v.get("gamma"), bias=v.get("beta"), eps=float(v["epsilon"]))


def _slice(v: Values) -> Any:
    """Without masks, or with the masks that make an end count as the axis' own."""
    begin, end = _numbers(v["begin"]), _numbers(v["end"])
    steps = _numbers(v["stride"]) if "stride" in v else [1] * len(begin)
    free = [
        [bool(flag) for flag in v[name]] if name in v else [False] * len(begin) for name in ("begin_mask", "end_mask")
    ]
    spans = [
        slice(None if first else start, None if last else stop, step)
        for start, stop, step, first, last in zip(begin, end, steps, *free, strict=True)
    ]
    return v["x"][tuple(spans)]


def _gather(v: Values) -> Any:
    axis, indices = int(v["axis"]), torch.as_tensor(v["indices"]).long()
    picked = v["x"].index_select(axis, indices.reshape(-1))
    return picked.reshape(*v["x"].shape[:axis], *indices.shape, *v["x"].shape[axis + 1 :])


def _pad(v: Values) -> Any:
    pad = _numbers(v["pad"])
    pairs = [pad[index : index + 2] for index in range(0, len(pad), 2)]
    return functional.pad(v["x"], [size for pair in reversed(pairs) for size in pair], value=float(v["constant_val"]))


def _max_pool(v: Values) -> Any:
    pad = _numbers(v["pad"])
    x = functional.pad(v["x"], [*pad[2:], *pad[:2]], value=-torch.inf)
    return functional.max_pool2d(x, _numbers(v["kernel_sizes"]), _numbers(v["strides"]))


def _upsample(v: Values) -> Any:
    height, width = int(v["scale_factor_height"]), int(v["scale_factor_width"])
    return v["x"].repeat_interleave(height, -2).repeat_interleave(width, -1)


def _gelu(v: Values) -> Any:
    return functional.gelu(v["x"], approximate="none" if v["mode"] == "EXACT" else "tanh")


def _reduce_argmax(v: Values) -> Any:
    return v["x"].argmax(int(v["axis"]), keepdim=bool(v["keep_dims"]))


def _transpose(v: Values) -> Any:
    return v["x"].permute(_numbers(v["perm"]))


def _expand_dims(v: Values) -> Any:
    for axis in sorted(_numbers(v["axes"])):
        v["x"] = v["x"].unsqueeze(axis)
    return v["x"]


def _select(v: Values) -> Any:
    return torch.where(v["cond"], v["a"], v["b"])


OPERATIONS: Mapping[str, Callable[[Values], Any]] = {
    "add": lambda v: v["x"] + v["y"],
    "cast": lambda v: v["x"],
    "concat": lambda v: torch.cat(v["values"], int(v["axis"])),
    "conv": _conv,
    "cos": lambda v: torch.cos(v["x"]),
    "equal": lambda v: v["x"] == v["y"],
    "erf": lambda v: torch.erf(v["x"]),
    "exp": lambda v: torch.exp(v["x"]),
    "expand_dims": _expand_dims,
    "gather": _gather,
    "gather_along_axis": lambda v: v["x"].gather(int(v["axis"]), v["indices"].long()),
    "gelu": _gelu,
    "identity": lambda v: v["x"],
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "linear": lambda v: functional.linear(v["x"], v["weight"], v.get("bias")),
    "matmul": _matmul,
    "max_pool": _max_pool,
    "maximum": lambda v: torch.maximum(v["x"], torch.as_tensor(v["y"])),
    "minimum": lambda v: torch.minimum(v["x"], torch.as_tensor(v["y"])),
    "mul": lambda v: v["x"] * v["y"],
    "pad": _pad,
    "pow": lambda v: v["x"] ** v["y"],
    "real_div": lambda v: v["x"] / v["y"],
    "reduce_argmax": _reduce_argmax,
    "reduce_mean": lambda v: v["x"].mean(_numbers(v["axes"]), keepdim=bool(v["keep_dims"])),
    "reduce_l2_norm": lambda v: torch.linalg.vector_norm(v["x"], dim=_numbers(v["axes"]), keepdim=bool(v["keep_dims"])),
    "relu": lambda v: torch.relu(v["x"]),
    "reshape": lambda v: v["x"].reshape(_numbers(v["shape"])),
    "select": _select,
    "sigmoid": lambda v: torch.sigmoid(v["x"]),
    "silu": lambda v: functional.silu(v["x"]),
    "sin": lambda v: torch.sin(v["x"]),
    "slice_by_index": _slice,
    "softmax": lambda v: torch.softmax(v["x"], int(v["axis"])),
    "sqrt": lambda v: torch.sqrt(v["x"]),
    "squeeze": lambda v: v["x"].squeeze(_numbers(v["axes"])),
    "sub": lambda v: v["x"] - v["y"],
    "tanh": lambda v: torch.tanh(v["x"]),
    "tile": lambda v: v["x"].tile(_numbers(v["reps"])),
    "transpose": _transpose,
    "upsample_nearest_neighbor": _upsample,
}
