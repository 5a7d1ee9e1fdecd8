"""Opening image files that come from strangers.

Only PNG, JPEG and WebP decoders are tried, the size is checked before a pixel is decoded, and whatever goes wrong is
one InvalidRequest. Limits: the first frame of animations; at most 4096 x 4096 pixels, in any proportion.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from pocketdiffusion.errors import InvalidRequest

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 4096 * 4096


@contextmanager
def opened_image(source: str | Path | BinaryIO) -> Iterator[Image]:
    """A lazily opened image. Errors in the block, such as those of decoding damaged data, become InvalidRequest too."""
    from PIL import Image, UnidentifiedImageError

    name = str(source) if isinstance(source, (str, Path)) else "image"
    try:
        with Image.open(source, formats=FORMATS) as picture:
            check_pixels(picture)
            yield picture
    except InvalidRequest:
        raise
    except FileNotFoundError:
        raise InvalidRequest("image", f"{name}: no such file") from None
    except UnidentifiedImageError:
        raise InvalidRequest("image", f"{name}: not a PNG, JPEG or WebP image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name) from None
    except Exception as error:  # decoders raise many kinds on damaged or hostile files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InvalidRequest("image", f"{name}: the image can't be read ({reason}); is the file complete?") from error


def check_pixels(picture: Image) -> None:
    """Refuse an image of more than 4096 x 4096 pixels."""
    if picture.width * picture.height > MAX_PIXELS:
        raise _too_large(f"image of {picture.width} x {picture.height}")


def _too_large(name: str) -> InvalidRequest:
    return InvalidRequest("image", f"{name}: too large; at most 4096 x 4096 pixels can be read, scale it down first")
