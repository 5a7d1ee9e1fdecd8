"""Seeded noise, the same numbers as torch's generators, in numpy."""

from pocketdiffusion.noise.generator import (
    DEVICES,
    Generator,
    as_generator,
    checked_seed,
    image_generators,
    random_seed,
    stacked,
)

__all__ = ["DEVICES", "Generator", "as_generator", "checked_seed", "image_generators", "random_seed", "stacked"]
