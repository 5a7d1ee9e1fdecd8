"""What each graph of a foreign folder must take and give, and what its file says that it does."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path

from pocketdiffusion.bundle.content import contents
from pocketdiffusion.bundle.foreign.graphs import PLAIN, Graph
from pocketdiffusion.bundle.manifest import ComponentEntry
from pocketdiffusion.bundle.onnx_wire import read_graph
from pocketdiffusion.bundle.openvino_xml import Port, read_ir, weights_name
from pocketdiffusion.bundle.paths import path_problem
from pocketdiffusion.bundle.strict_json import short
from pocketdiffusion.errors import BundleCorrupt, BundleUnsupported
from pocketdiffusion.tensors import TensorSpec

_RANKS = {"sample": (4,), "latent_sample": (4,), "encoder_hidden_states": (3,), "input_ids": (2,), "timestep": (0, 1)}
_RANKS |= {"text_embeds": (2,), "time_ids": (2,), "timestep_cond": (2,), "return_dict": (0, 1)}
_RANKS |= {"clip_input": (4,), "images": (4,)}
_TAKES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "text_encoder": (("input_ids",), ()),
    "text_encoder_2": (("input_ids",), ()),
    "unet": (("sample", "timestep", "encoder_hidden_states"), ("text_embeds", "time_ids", "timestep_cond")),
    "vae_decoder": (("latent_sample",), ()),
    "vae_encoder": (("sample",), ()),
    "safety_checker": (("clip_input",), ("images",)),
}
"""Component -> inputs that it has, inputs that it may have. Any may have "return_dict": see `component.UNUSED`."""
_GIVES: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("last_hidden_state", "hidden_states.0"),
    "text_encoder_2": ("text_embeds",),
    "unet": ("out_sample", "sample"),
    "vae_decoder": ("sample",),
    "vae_encoder": ("latent_parameters", "latent_sample"),
    "safety_checker": ("has_nsfw_concepts",),
}
"""Component -> outputs of which it has at least one."""
_MAX_AXIS = (1 << 31) - 1
_NAME = re.compile(r"[A-Za-z0-9_.:/ -]{1,200}")
_AXIS = re.compile(r"[A-Za-z0-9_ +*/.()-]{1,60}")


def component_entry(root: Path, name: str, graph: Graph) -> tuple[ComponentEntry, set[str]]:
    """A component's manifest entry, and the files of its weights that are there.

    Weights that lie elsewhere are not in the set, so that `check_content` refuses the graph that names them. Raises
    BundleCorrupt, BundleUnsafe, BundleUnsupported.
    """
    with contents(root, graph.path) as data:
        if graph.format == "openvino":
            ir = read_ir(data, graph.path)
            inputs, outputs = ir.inputs, ir.outputs
            locations = {weights_name(graph.path)} if ir.constants else set()
        else:
            onnx = read_graph(data, graph.path)
            inputs, outputs = onnx.inputs, onnx.outputs
            locations = {external.location for external in onnx.external}
    _check_names(graph.path, name, inputs, outputs)
    _, scale = inputs.get("timestep_cond", ("", (None, 0)))
    if scale is None or not isinstance(scale[-1], int):
        raise BundleUnsupported(f"{graph.path}: the last axis of timestep_cond must be fixed")
    entry = ComponentEntry(
        format=graph.format,
        graph=graph.path,
        inputs={key: _input(graph.path, key, port) for key, port in inputs.items()},
        outputs={key: _output(graph.path, key, port) for key, port in outputs.items()},
        weights="as found" if graph.variant in (PLAIN, "openvino") else graph.variant,
    )
    folder = posixpath.dirname(graph.path)
    weights = {f"{folder}/{location}" for location in locations if path_problem(location) is None}
    return entry, {path for path in weights if os.path.lexists(root / path)}


def _check_names(path: str, name: str, inputs: Mapping[str, Port], outputs: Mapping[str, Port]) -> None:
    if odd := [found for found in (*inputs, *outputs) if not _NAME.fullmatch(found)]:
        raise BundleCorrupt(path, f"an input or output is called {short(odd[0])}")
    needed, possible = _TAKES[name]
    unknown = inputs.keys() - {*needed, *possible, "return_dict"}
    if unknown or set(needed) - inputs.keys():
        wanted = ", ".join(needed) + (f" (and maybe {', '.join(possible)})" if possible else "")
        raise BundleUnsupported(f"{path} takes {', '.join(sorted(inputs)) or 'nothing'}; a {name} takes {wanted}")
    alone = name != "unet" or len(outputs) == 1
    if not alone or not outputs.keys() & set(_GIVES[name]):
        raise BundleUnsupported(
            f"{path} gives {', '.join(sorted(outputs)) or 'nothing'}; a {name} gives {' or '.join(_GIVES[name])}"
        )


def _input(path: str, name: str, port: Port) -> TensorSpec:
    ranks = _RANKS[name]
    dtype, shape = port
    if shape is not None and len(shape) not in ranks:
        raise BundleUnsupported(f"{path}: {name} has {len(shape)} axes, it should have {' or '.join(map(str, ranks))}")
    return _output(path, name, (dtype, (None,) * ranks[-1] if shape is None else shape))


def _output(path: str, name: str, port: Port) -> TensorSpec:
    """An output's undeclared shape counts as none: nobody asks for it."""
    dtype, shape = port
    if not dtype:
        raise BundleUnsupported(f"{path}: {short(name)} is of a type that numpy lacks; use a variant with float32 ends")
    return TensorSpec(dtype, tuple(_axis(path, axis) for axis in shape or ()))


def _axis(path: str, axis: int | str | None) -> int | str | None:
    if isinstance(axis, int) and not 1 <= axis <= _MAX_AXIS:
        raise BundleCorrupt(path, f"declares an axis of {axis}")
    return axis if isinstance(axis, int) or (isinstance(axis, str) and _AXIS.fullmatch(axis)) else None
