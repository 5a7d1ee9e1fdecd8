"""What a family offers to the export stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pocketdiffusion.bundle.manifest import Numbers
from pocketdiffusion.tensors import AnyArray
from pocketdiffusion_export.component import ComponentSpec, Feeds
from pocketdiffusion_export.plan import ExportPlan, GoldenPlan

Samples = Mapping[str, Sequence[Feeds]]
"""Component -> inputs as they occur while the source generates, and one of another shape."""


class Family(Protocol):
    """One kind of model. `pipe` is the Diffusers pipeline that `source.py` loaded."""

    name: str

    def tasks(self, pipe: Any) -> tuple[str, ...]:
        """What the bundle can do: keys of `pocketdiffusion.tasks.TASKS`."""
        ...

    def components(self, pipe: Any) -> tuple[ComponentSpec, ...]:
        """The graphs to export."""
        ...

    def samples(self, pipe: Any, prompts: Sequence[str], plan: ExportPlan) -> Samples:
        """Inputs of every component from the source's own loop over all noise levels."""
        ...

    def numbers(self, pipe: Any, samples: Samples, plan: ExportPlan) -> Numbers:
        """The manifest's numbers."""
        ...

    def reference_image(self, pipe: Any, golden: GoldenPlan, numbers: Numbers) -> AnyArray:
        """The golden image from Diffusers' own pipeline in float32: uint8, [height, width, 3]."""
        ...
