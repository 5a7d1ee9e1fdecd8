"""Sizes of pictures and latents, and which of them a bundle takes."""

from __future__ import annotations

from collections.abc import Sequence

from pocketdiffusion.bundle.manifest import Manifest, Numbers
from pocketdiffusion.errors import InvalidRequest
from pocketdiffusion.request import Request


def latent_shape(request: Request, numbers: Numbers) -> tuple[int, int, int, int]:
    """(images, channels, height, width) of a request's latents."""
    height, width = request.height or numbers.height, request.width or numbers.width
    return request.batch, numbers.latent_channels, height // numbers.vae_factor, width // numbers.vae_factor


def check(request: Request, manifest: Manifest, denoiser: str) -> None:
    """Raises InvalidRequest for latents of another shape and for sizes that no graph of the denoiser takes."""
    numbers, shape = manifest.numbers, latent_shape(request, manifest.numbers)
    if request.latents is not None and request.latents.shape != shape:
        raise InvalidRequest("latents", f"latents are {request.latents.shape}; this request needs {shape}")
    multiple = numbers.size_multiple
    for name, size in (("height", request.height), ("width", request.width)):
        if size is not None and size % multiple:
            nearest = max(multiple, round(size / multiple) * multiple)
            raise InvalidRequest(
                name, f"{name} is {size}; {manifest.name} takes multiples of {multiple}: try {nearest}"
            )
    sizes = [graph.inputs["sample"].shape[2:] for graph in manifest.components[denoiser].graphs]
    if not any(_fits(size, shape[2:]) for size in sizes):
        allowed = ", ".join(pixels(size, numbers.vae_factor) for size in sizes)
        raise InvalidRequest(
            "width", f"{request.width}x{request.height} was asked; {manifest.name} is fixed to {allowed}"
        )


def pixels(axes: Sequence[int | str | None], factor: int) -> str:
    """WIDTHxHEIGHT in pixels of latent axes (height, width)."""
    return "x".join(str(axis * factor) if isinstance(axis, int) else "any" for axis in reversed(axes))


def _fits(declared: Sequence[int | str | None], size: Sequence[int]) -> bool:
    return all(axis == want for axis, want in zip(declared, size, strict=True) if isinstance(axis, int))
