"""Kinds of models by how they are conditioned; the counterpart of `pocketdiffusion.families`.

A family is one file that offers what `base.Family` lists. Which family a Diffusers pipeline belongs to follows from
the class named in its `model_index.json`.
"""

from __future__ import annotations

FAMILIES = {
    "sd": "pocketdiffusion_export.families.sd:FAMILY",
    "sdxl": "pocketdiffusion_export.families.sdxl:FAMILY",
}

TINY_VAE = "tiny_vae"
"""A loaded pipeline's part besides those that Diffusers knows: a tiny VAE for the latents of its own."""

PIPELINES = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionInpaintPipeline": "sd",
    "StableDiffusionInstructPix2PixPipeline": "sd",
    "LatentConsistencyModelPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLInpaintPipeline": "sdxl",
}
"""Diffusers pipeline class -> family."""

HINTS = {
    "StableDiffusionXLImg2ImgPipeline": "an SDXL refiner only refines what a base model made: export the base model; a "
    "base model saved under this class is exported when model_index.json says StableDiffusionXLPipeline",
    "StableDiffusionImg2ImgPipeline": "the same model is exported when model_index.json says StableDiffusionPipeline: "
    "its bundle does image-to-image too",
}
"""Pipeline classes that are not exported -> what to do instead."""
