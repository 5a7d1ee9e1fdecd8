"""Kinds of models by how they are conditioned; the counterpart of `pocketdiffusion.families`.

A family is one file that offers what `base.Family` lists. Which family a Diffusers pipeline belongs to follows from
the class named in its `model_index.json`.
"""

from __future__ import annotations

FAMILIES = {
    "sd": "pocketdiffusion_export.families.sd:FAMILY",
    "sdxl": "pocketdiffusion_export.families.sdxl:FAMILY",
}

PIPELINES = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionInpaintPipeline": "sd",
    "LatentConsistencyModelPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
}
"""Diffusers pipeline class -> family."""
