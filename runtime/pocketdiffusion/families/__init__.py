"""How kinds of models are conditioned: what their denoiser is fed besides the latents and the timestep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Protocol

import numpy as np

from pocketdiffusion.bundle import Bundle
from pocketdiffusion.component import Component
from pocketdiffusion.errors import BundleUnsupported
from pocketdiffusion.prompt import SplitPrompts
from pocketdiffusion.request import Request
from pocketdiffusion.tensors import Array
from pocketdiffusion.timing import Timings

FAMILIES = {
    "sd": "pocketdiffusion.families.sd:StableDiffusion",
    "sdxl": "pocketdiffusion.families.sdxl:StableDiffusionXL",
}


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Denoiser inputs by name, one row for each image. "sample" holds channels that follow those of the latents."""

    positive: Mapping[str, Array]
    negative: Mapping[str, Array] | None
    """None where guidance is off."""
    messages: tuple[str, ...] = ()
    """What the user should know, e.g. which part of a prompt was cut."""
    blank: Mapping[str, Array] | None = None
    """For guidance by a picture too: the negative with zeros in the picture's place."""

    def with_channels(self, channels: Array, *, guiding: bool = False) -> Conditioning:
        """The same with further channels of the denoiser's input, equal for both passes.

        `guiding` channels are a third thing to be guided by: with guidance, there is a pass without them too.
        """
        extra = {"sample": channels}
        negative = None if self.negative is None else {**self.negative, **extra}
        blank = {**negative, "sample": np.zeros_like(channels)} if guiding and negative is not None else None
        return replace(self, positive={**self.positive, **extra}, negative=negative, blank=blank)

    @property
    def sides(self) -> tuple[Mapping[str, Array], ...]:
        """The inputs of each pass of a guided step: (blank), (negative), positive."""
        return tuple(side for side in (self.blank, self.negative, self.positive) if side is not None)


class Family(Protocol):
    """Conditioning of one kind of model."""

    denoiser: str
    """Name of the component that the loop runs: "unet" or "transformer"."""
    schedules: Mapping[str, str]
    """Schedules that have a table of this family's own: general name -> name in SCHEDULES."""

    def prepare(self) -> None:
        """Read what no graph holds and `split` needs, tokenizers, which else happens on first use."""
        ...

    def split(self, request: Request, components: Mapping[str, Component]) -> SplitPrompts:
        """Tokenize the prompts of a resolved request, which needs no graph. Raises InvalidRequest."""
        ...

    def condition(
        self, request: Request, split: SplitPrompts, components: Mapping[str, Component], timings: Timings
    ) -> Conditioning:
        """Run what precedes the loop (text encoders, size ids ...) for a resolved request."""
        ...


def load_family(bundle: Bundle) -> Family:
    """The family object of a bundle. Raises BundleUnsupported for a family that this version does not know."""
    name = bundle.manifest.family
    if name not in FAMILIES:
        raise BundleUnsupported(
            f"{bundle.manifest.name} is of family {name!r}; this version knows {', '.join(FAMILIES)}: "
            "upgrade pocketdiffusion"
        )
    module, attribute = FAMILIES[name].split(":")
    family: Family = getattr(import_module(module), attribute)(bundle)
    return family
