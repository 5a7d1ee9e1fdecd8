"""Arrays to image files and back.

Inside the package a picture is float32 in [-1, 1] with axes (image, height, width, channel); in files it is uint8 RGB.
Limits: 8 bits and three channels; colour profiles are not applied; metadata of given pictures is not kept.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from pocketdiffusion.atomic import replace_file
from pocketdiffusion.errors import InvalidRequest, OutputFailed
from pocketdiffusion.image.metadata import Metadata, Parameters
from pocketdiffusion.image.naming import check_pattern, image_format, output_path, output_paths
from pocketdiffusion.image.opening import check_pixels, opened_image
from pocketdiffusion.tensors import AnyArray, Array

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "check_pattern",
    "check_quality",
    "from_image",
    "mask_to_latent",
    "output_path",
    "output_paths",
    "resize",
    "save",
    "save_all",
    "to_pil",
    "to_uint8",
]

Pixels = NDArray[np.uint8]
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""ITU-R BT.601, as Pillow and Diffusers turn colours into grey."""


class Pictures(Protocol):
    """What `save_all` needs of a result."""

    @property
    def pixels(self) -> AnyArray | None: ...
    @property
    def seeds(self) -> Sequence[int]: ...
    @property
    def parameters(self) -> Sequence[Parameters]: ...
    @property
    def digital_source(self) -> str: ...


def to_uint8(images: Array) -> Pixels:
    """Finite values in [-1, 1], others clipped, to 0..255, rounded half to even as in Diffusers' VaeImageProcessor."""
    unit = np.clip(images * np.float32(0.5) + np.float32(0.5), 0, 1)
    return np.round(unit * np.float32(255)).astype(np.uint8)


def to_pil(images: Pixels) -> list[Image]:
    """uint8 (n, height, width, 3) to n Pillow images."""
    from PIL import Image

    return [Image.fromarray(image) for image in images]


def from_image(source: str | Path | BinaryIO | Image | Pixels) -> Array:
    """A picture as float32 (1, height, width, 3) in [-1, 1].

    `source` is a PNG, JPEG or WebP file, a Pillow image, or a uint8 array (height, width) or (height, width, 1, 3 or
    4). The EXIF orientation is applied; what is transparent shows white. Raises InvalidRequest.
    """
    from PIL import Image

    if isinstance(source, np.ndarray):
        source = Image.fromarray(_checked_pixels(source))
    if isinstance(source, Image.Image):
        check_pixels(source)
        pixels = _rgb(source)
    elif not isinstance(source, (str, Path)) and not hasattr(source, "read"):
        raise InvalidRequest(
            "image",
            f"a {type(source).__name__} is no picture; give one PNG, JPEG or WebP file (its path, or opened), "
            "Pillow image or uint8 array (height, width, 3)",
        )
    else:
        with opened_image(source) as picture:
            pixels = _rgb(picture)
    return (pixels.astype(np.float32) / np.float32(127.5) - np.float32(1))[np.newaxis]


def resize(images: Array, width: int, height: int) -> Array:
    """(n, h, w, 3) in [-1, 1] to (n, height, width, 3), by 8-bit Lanczos as in Diffusers."""
    from PIL import Image

    if images.shape[1:3] == (height, width):
        return images
    return np.concatenate(
        [from_image(picture.resize((width, height), Image.Resampling.LANCZOS)) for picture in to_pil(to_uint8(images))]
    )


def mask_to_latent(mask: Array, factor: int) -> Array:
    """A mask (1, h, w, 3) in [-1, 1] to float32 (1, 1, h/factor, w/factor): 1 where it is white (repaint), else 0.

    Greys from the middle up count as white; each latent cell takes its top left pixel, as in Diffusers.
    Raises InvalidRequest where the size is no multiple of `factor`.
    """
    _, height, width, _ = mask.shape
    if height % factor or width % factor:
        raise InvalidRequest("mask_image", f"mask of {width} x {height}; both sides must be multiples of {factor}")
    grey = to_uint8(mask[:, ::factor, ::factor]).astype(np.float32) @ _LUMA
    return (np.round(grey) >= 128).astype(np.float32)[:, np.newaxis]


def check_quality(quality: int) -> None:
    """Raise InvalidRequest for a quality that `save` would refuse; for callers to use before minutes of work."""
    if not 1 <= quality <= 100:
        raise InvalidRequest("quality", f"quality is {quality}; it must be from 1 to 100")


def save(image: Pixels, path: str | Path, *, metadata: Metadata | None, quality: int = 95) -> Path:
    """Write uint8 (height, width, 3) as PNG, JPEG or WebP, by the suffix; gives the path back.

    The file appears whole or not at all, and replaces one of that name. The same input gives the same bytes with the
    same Pillow. `quality` is 1 to 100, for JPEG and WebP. Raises InvalidRequest, and OutputFailed when writing fails.
    """
    from PIL import Image

    path, format_name = Path(path), image_format(path)
    check_quality(quality)
    options: dict[str, Any] = {} if metadata is None else metadata.pillow_options(format_name)
    if format_name != "PNG":
        options["quality"] = quality
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, format_name, **options)
    try:
        replace_file(path, encoded.getvalue())
    except OSError as error:
        raise OutputFailed(f"{path}: can't be written ({error.strerror or error})") from error
    return path


def save_all(result: Pictures, pattern: str, *, with_prompt: bool = True, quality: int = 95) -> list[Path]:
    """Write all images of a result, named as by `output_paths`.

    `with_prompt=False` leaves both prompts out of the files; the other parameters and the mark stay.
    """
    if result.pixels is None:
        raise InvalidRequest(
            "output_type", "the result holds latents only; generate with output_type 'pil' or 'np' to save it"
        )
    first = result.parameters[0]
    height, width = result.pixels.shape[1:3]
    paths = output_paths(
        pattern, result.seeds, width=width, height=height, steps=first.steps or 0, model=first.model or ""
    )
    for image, path, known in zip(result.pixels, paths, result.parameters, strict=True):
        parameters = known if with_prompt else known.without_prompts()
        save(
            image, path, metadata=Metadata(parameters=parameters, digital_source=result.digital_source), quality=quality
        )
    return paths


def _checked_pixels(array: AnyArray) -> Pixels:
    if (
        array.dtype != np.uint8
        or array.ndim not in (2, 3)
        or array.size == 0
        or array.shape[2:] not in ((), (1,), (3,), (4,))
    ):
        raise InvalidRequest(
            "image",
            f"an array of {array.dtype} {array.shape} is no picture; give uint8 (height, width, 3), "
            "from values in [0, 1] by (x * 255).round().astype('uint8')",
        )
    return array[:, :, 0] if array.shape[2:] == (1,) else array


def _rgb(picture: Image) -> Pixels:
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow would clip instead of scale
        picture = Image.fromarray((np.asarray(picture).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("RGB"))
