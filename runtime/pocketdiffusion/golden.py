"""The picture and mask that a golden image starts from, for models that do not draw from text alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pocketdiffusion.tensors import AnyArray


def golden_inputs(tasks: Sequence[str], width: int, height: int) -> dict[str, AnyArray]:
    """`Request` fields besides the prompt, uint8 (height, width, 3) and (height, width); {} for text-to-image models.

    A ramp of colours, and a mask that is white in the middle; the same everywhere, so that no bundle has to hold them.
    """
    if "text-to-image" in tasks:
        return {}
    rows, columns = np.mgrid[:height, :width]
    red, green = columns * 255 // max(width - 1, 1), rows * 255 // max(height - 1, 1)
    picture = np.stack([red, green, np.full_like(red, 128)], axis=-1).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height - height // 4, width // 4 : width - width // 4] = 255
    return {"image": picture, "mask_image": mask} if "inpaint" in tasks else {"image": picture}
