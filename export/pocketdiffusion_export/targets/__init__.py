"""Graph formats that components are written in.

Every target starts from the cleaned (and quantized) ONNX model of a component, so that a source is traced once however
many are asked for. A target is an object with ``save(model, file, shapes, others)``, ``describe(model, shapes)``,
which gives the inputs and outputs, ``place(component)``, ``finish(folder)``, ``static``, and the names ``format`` and
``graph``.
"""

from __future__ import annotations

from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.quant import Recipe

TARGETS = {
    "coreml": "pocketdiffusion_export.targets.coreml:TARGET",
    "onnx": "pocketdiffusion_export.targets.onnx:TARGET",
    "openvino": "pocketdiffusion_export.targets.openvino:TARGET",
}

BAND_CUTTERS = {"onnx": "pocketdiffusion_export.targets.onnx_bands:cut_file"}
"""Graph format -> function (file) that writes the pieces of a decoder for bands beside it. Formats are named as their
targets."""

CUTTERS = {
    "onnx": "pocketdiffusion_export.targets.onnx_parts:cut_file",
    "openvino": "pocketdiffusion_export.targets.openvino_parts:cut_file",
}
"""Graph format -> function (file, bytes) that writes the parts of a graph beside it and returns them, () for none.
Formats are named as their targets."""

COREML_RECIPES = ("fp32", "fp16", "int8", "palette4", "palette6", "palette-mixed")
"""What Core ML's own forms of weights cover. Palettes are read by no other engine."""


def check_targets(targets: tuple[str, ...], recipe: Recipe, sizes: int) -> None:
    """Raise ExportError for a recipe or a number of image sizes (0 is any size) that a target can't have."""
    for target in targets:
        if target != "coreml" and recipe.palette:
            raise ExportError(f"recipe {recipe.name} is for the target coreml only; for {target} choose int4 or int8")
        if target == "coreml" and recipe.name not in COREML_RECIPES:
            raise ExportError(f"recipe {recipe.name} can't be written for coreml; choose {', '.join(COREML_RECIPES)}")
        if target == "coreml" and sizes != 1:
            asked = f"{sizes} sizes were asked for" if sizes else "the size is free"
            raise ExportError(f"coreml graphs are fixed to one image size, {asked}; give one, e.g. --size 512x512")


def check_bands(targets: tuple[str, ...], recipe: Recipe) -> None:
    """Raise ExportError for a target or a recipe whose decoder can't be cut into pieces for bands."""
    for target in targets:
        if target not in BAND_CUTTERS:
            able = ", ".join(BAND_CUTTERS)
            raise ExportError(f"{target} graphs can't be cut for bands; choose {able}, which OpenVINO opens too")
    if recipe.method == "w8a8":
        raise ExportError(
            f"recipe {recipe.name} rounds activations, so that bands would not give what the whole does; choose fp32, "
            "fp16 or int8, or use tiles at run time"
        )
