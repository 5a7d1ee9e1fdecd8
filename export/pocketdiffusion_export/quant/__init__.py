"""Recipes: how weights are stored, as data.

To add one, add a line to `RECIPES`; to add a method, add a file and a line to `QUANTIZERS`.
"""

from __future__ import annotations

from dataclasses import dataclass

QUANTIZERS = {
    "half": "pocketdiffusion_export.quant.half:quantize",
    "int4": "pocketdiffusion_export.quant.int4:quantize",
    "mixed": "pocketdiffusion_export.quant.mixed:quantize",
    "palette": "pocketdiffusion_export.quant.palette:quantize",
    "w8a8": "pocketdiffusion_export.quant.w8a8:quantize",
    "weight_only": "pocketdiffusion_export.quant.weight_only:quantize",
}
"""Method -> function (onnx.ModelProto, Recipe, inputs to calibrate with) -> QuantReport; it changes the model."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way to store a model, and what is demanded of the result."""

    name: str
    weights: str
    """Storage of the weights, as the manifest says it: "float32", "float16", "int8", "int4", "mixed"."""
    min_sqnr_db: float
    """Least signal to noise ratio of every component against torch float32."""
    min_psnr_db: float
    """Least PSNR of the whole golden image against Diffusers."""
    method: str | None = None
    """Key of `QUANTIZERS`; None leaves the weights as they are."""
    min_elements: int = 0
    """Weights with fewer elements stay float."""
    min_weight_sqnr_db: float = 0.0
    """Weights that come back with less than this as int8 stay float."""
    group: int = 0
    """Inputs that share one scale of an int4 weight; 0 where there are none."""
    min_int4_sqnr_db: float = 0.0
    """Weights that come back with less than this as int4 become int8."""
    target_sqnr_db: float = 0.0
    """Layers keep float activations (w8a8) or more bits (mixed) until the choice leaves each component this much."""
    bits: float = 0.0
    """Average bits of a weight, scales included, that a component of mixed bits may have; 0: its error decides."""
    palette: int = 0
    """Bits of the indices of a weight's palette, the fewest where they differ; 0 where there are none."""


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp32", weights="float32", min_sqnr_db=60.0, min_psnr_db=50.0),
        Recipe(
            "int8",
            weights="int8",
            min_sqnr_db=25.0,
            min_psnr_db=25.0,
            method="weight_only",
            min_elements=1024,
            min_weight_sqnr_db=32.0,
        ),
        Recipe("fp16", weights="float16", min_sqnr_db=50.0, min_psnr_db=40.0, method="half", min_elements=1024),
        Recipe(
            "int4",
            weights="int4",
            min_sqnr_db=20.0,
            min_psnr_db=15.0,
            method="int4",
            min_elements=1024,
            min_weight_sqnr_db=32.0,
            group=32,
            min_int4_sqnr_db=15.0,
        ),
        Recipe(
            "w8a8",
            weights="int8",
            min_sqnr_db=22.0,
            min_psnr_db=15.0,
            method="w8a8",
            min_elements=1024,
            min_weight_sqnr_db=32.0,
            target_sqnr_db=25.0,
        ),
        Recipe(
            "mixed",
            weights="mixed",
            min_sqnr_db=28.0,
            min_psnr_db=20.0,
            method="mixed",
            min_elements=1024,
            group=32,
            target_sqnr_db=38.0,
        ),
        Recipe(
            "mixed-5bit",
            weights="mixed",
            min_sqnr_db=20.0,
            min_psnr_db=15.0,
            method="mixed",
            min_elements=1024,
            group=32,
            bits=5.0,
        ),
        Recipe(
            "palette4",
            weights="palette4",
            min_sqnr_db=10.0,
            min_psnr_db=10.0,
            method="palette",
            min_elements=1024,
            min_weight_sqnr_db=15.0,
            palette=4,
        ),
        Recipe(
            "palette6",
            weights="palette6",
            min_sqnr_db=20.0,
            min_psnr_db=18.0,
            method="palette",
            min_elements=1024,
            min_weight_sqnr_db=25.0,
            palette=6,
        ),
        Recipe(
            "palette-mixed",
            weights="palette-mixed",
            min_sqnr_db=20.0,
            min_psnr_db=18.0,
            method="mixed",
            min_elements=1024,
            target_sqnr_db=28.0,
            palette=2,
        ),
    )
}
