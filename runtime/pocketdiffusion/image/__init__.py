"""Pictures: arrays to files and back, names of files, and what a file says about itself."""

from pocketdiffusion.image.files import (
    check_pattern,
    check_quality,
    from_image,
    mask_to_latent,
    resize,
    save,
    save_all,
    to_pil,
    to_uint8,
)

__all__ = [
    "check_pattern",
    "check_quality",
    "from_image",
    "mask_to_latent",
    "resize",
    "save",
    "save_all",
    "to_pil",
    "to_uint8",
]
