"""pocketdiffusion: image generation on the device, without torch.

Public names are loaded on first use, so that importing the package costs no more than numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pocketdiffusion._telemetry import disable
from pocketdiffusion._version import __version__

disable()  # engines read these switches once, when they are first imported

if TYPE_CHECKING:
    from pocketdiffusion.bundle import Bundle
    from pocketdiffusion.errors import PocketDiffusionError
    from pocketdiffusion.generation import Generation
    from pocketdiffusion.noise import Generator
    from pocketdiffusion.pipeline import Pipeline
    from pocketdiffusion.request import Request
    from pocketdiffusion.result import Result

_HOMES = {
    "Bundle": "bundle",
    "Generation": "generation",
    "Generator": "noise",
    "Pipeline": "pipeline",
    "PocketDiffusionError": "errors",
    "Request": "request",
    "Result": "result",
}

__all__ = [
    "Bundle",
    "Generation",
    "Generator",
    "Pipeline",
    "PocketDiffusionError",
    "Request",
    "Result",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
