"""Kinds of models by how they are conditioned; the counterpart of `pocketdiffusion.families`.

A family is one file that offers what `base.Family` lists. Which family a Diffusers pipeline belongs to follows from
the class named in its `model_index.json`.
"""

from __future__ import annotations

FAMILIES = {"sd": "pocketdiffusion_export.families.sd:FAMILY"}

PIPELINES = {"StableDiffusionPipeline": "sd"}
"""Diffusers pipeline class -> family."""
