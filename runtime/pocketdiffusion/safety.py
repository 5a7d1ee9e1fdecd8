"""The safety checker of Stable Diffusion: which pictures it takes for unsafe, by CLIP's view of them.

Its graph gives how much nearer a picture is to each concept than that concept's threshold allows. Graphs of Diffusers'
old exporter decide themselves and give only the flags, without the rounding that Diffusers does in torch.
Limit: square crops as large as the shorter side of the scaled picture, which is what CLIP's preprocessing does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pocketdiffusion.bundle import Bundle
from pocketdiffusion.bundle.foreign.configs import PREPROCESSOR
from pocketdiffusion.component import Component
from pocketdiffusion.errors import BundleUnsupported
from pocketdiffusion.image import to_uint8
from pocketdiffusion.tensors import AnyArray, Array
from pocketdiffusion.timing import Timings

COMPONENT = "safety_checker"
CARE = 0.01
"""How much the concepts' thresholds are lowered for a picture that one of the special concepts shows; Diffusers'."""
_SIDE = 224
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's own, for configs that leave them out."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What CLIP's image processor does: bicubic scaling of the shorter side, a crop from the middle, normalising."""

    side: int = _SIDE
    mean: tuple[float, ...] = _MEAN
    deviation: tuple[float, ...] = _DEVIATION

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Preprocessing:
        """From a `preprocessor_config.json`. Raises BundleUnsupported for sizes and values of another kind."""
        sides = {_side(config.get("size", _SIDE), "shortest_edge"), _side(config.get("crop_size", _SIDE), "height")}
        mean, deviation = (
            _three(config.get(key), own) for key, own in (("image_mean", _MEAN), ("image_std", _DEVIATION))
        )
        if len(sides) != 1 or None in sides or mean is None or deviation is None or min(deviation) <= 0:
            raise BundleUnsupported(
                f"{PREPROCESSOR} asks for size {config.get('size')} and crop {config.get('crop_size')}; "
                "only a square crop of the scaled size with three means and deviations is known"
            )
        return cls(sides.pop() or _SIDE, mean, deviation)

    def __call__(self, pixels: AnyArray) -> Array:
        """uint8 (height, width, 3) to float32 (1, 3, side, side)."""
        from PIL import Image

        height, width = pixels.shape[:2]
        short = min(height, width)
        scaled = (int(self.side * width / short), int(self.side * height / short))
        picture = np.asarray(Image.fromarray(pixels).resize(scaled, Image.Resampling.BICUBIC), np.float32)
        top, left = (picture.shape[0] - self.side) // 2, (picture.shape[1] - self.side) // 2
        crop = picture[top : top + self.side, left : left + self.side] / np.float32(255)
        normal = (crop - np.asarray(self.mean, np.float32)) / np.asarray(self.deviation, np.float32)
        return np.ascontiguousarray(normal.transpose(2, 0, 1)[np.newaxis], np.float32)


class SafetyChecker:
    """The checker of one bundle."""

    def __init__(self, component: Component, preprocessing: Preprocessing) -> None:
        self.component, self.preprocessing = component, preprocessing

    @classmethod
    def of(cls, bundle: Bundle, components: Mapping[str, Component]) -> SafetyChecker | None:
        """The checker of a bundle that holds one. Raises BundleUnsupported for an unknown preprocessing."""
        if COMPONENT not in components:
            return None
        return cls(components[COMPONENT], Preprocessing.of(bundle.read_json(PREPROCESSOR)))

    def black_out(self, images: Array, timings: Timings) -> list[bool]:
        """Paint unsafe ones of the pictures, (n, height, width, 3) in [-1, 1], black in place, and tell which."""
        with self.component.use() as component:
            component.wait(timings)
            with timings.span("safety_check"):
                flags = [self._unsafe(component, picture, timings) for picture in to_uint8(images)]
        images[flags] = -1
        return flags

    def _unsafe(self, component: Component, picture: AnyArray, timings: Timings) -> bool:
        feeds: dict[str, AnyArray] = {"clip_input": self.preprocessing(picture)}
        if "images" in component.entry.inputs:  # which the graph would paint black itself; nobody asks for them
            feeds["images"] = np.zeros((1, self.preprocessing.side, self.preprocessing.side, 3), np.float32)
        outputs = component.run(feeds, timings)
        if "has_nsfw_concepts" in outputs:
            return bool(outputs["has_nsfw_concepts"].any())
        return unsafe(outputs["special_scores"][0], outputs["concept_scores"][0])


def unsafe(special: Array, concepts: Array) -> bool:
    """Diffusers' decision from the scores of one picture: above 0 when rounded to three digits."""
    care = CARE if (np.round(special, 3) > 0).any() else 0.0
    return bool((np.round(concepts + np.float32(care), 3) > 0).any())


def _side(value: Any, key: str) -> int | None:
    """A number of pixels, or that of an object with one under `key` and no other under "width"."""
    if isinstance(value, dict):
        value = value.get(key) if value.get("width", value.get(key)) == value.get(key) else None
    return value if type(value) is int and 1 <= value <= 1024 else None


def _three(value: Any, default: tuple[float, ...]) -> tuple[float, ...] | None:
    if value is None:
        return default
    good = isinstance(value, list) and len(value) == 3 and all(type(item) in (int, float) for item in value)
    return tuple(value) if good else None
