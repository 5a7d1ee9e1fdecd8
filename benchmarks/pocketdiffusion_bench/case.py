"""What is measured: one frozen value for each combination of model, peer, device, size and settings.

Lists with commas become the product of cases, as in llama-bench.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

OURS = "pocketdiffusion"
EXACT = "exact"
"""The preset that leaves nothing out."""
PROMPT = "a photo of a cat on a sofa"

OURS_ONLY = ("downsample_keys", "preset", "decoder", "residency", "vae_tile", "memory_plan")
"""Fields that no peer has."""


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the result. None stands for the model's or the engine's own default."""

    model: str
    """A bundle's name or folder, or "random:NAME"."""
    peer: str = OURS
    """Key of `peers.PEERS`, or "pocketdiffusion"."""
    recipe: str | None = None
    """How weights are stored, of a "random:NAME" model; a bundle has its own."""
    downsample_keys: int | None = None
    """Ours only: of a source, the stride of the keys that its largest self-attention reads; a bundle has its own."""
    device: str | None = None
    precision: str | None = None
    """Arithmetic: "float32", "bfloat16", "float16"."""
    threads: int | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    sampler: str | None = None
    guidance: float | None = None
    preset: str | None = None
    """Ours only: how much work is left out, a name in `pocketdiffusion.presets.PRESETS`."""
    decoder: str | None = None
    """Ours only: "full", or a model's "tiny" one."""
    prompt: str = PROMPT
    seed: int = 0
    residency: str | None = None
    """Ours only: "keep", "release" or "stream"."""
    vae_tile: int | None = None
    """Ours only: the VAE computes at most so many pixels squared at a time."""
    memory_plan: int | None = None
    """Ours only: bytes for which it plans how to hold the model, as generate's --memory-limit; its own choice, where
    `memory_limit` is the system's."""
    memory_limit: int | None = None
    """Bytes of memory, without swap, that the process may use; None sets no limit."""

    @property
    def exact(self) -> bool:
        """Whether no work is left out, so that the picture is the model's own and its steps are alike."""
        return self.preset in (None, EXACT)

    @property
    def label(self) -> str:
        """The settings that are not at their defaults, in one line."""
        parts = [self.model if self.peer == OURS else f"{self.peer} {self.model}"]
        names = [item.name for item in fields(self) if item.name not in ("model", "peer", "prompt", "seed")]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if "width" in given and "height" in given:
            given["size"] = f"{given.pop('width')}x{given.pop('height')}"
        given |= {name: f"{given[name] / 1e6:.0f}MB" for name in ("memory_plan", "memory_limit") if name in given}
        plain = ("recipe", "device", "precision", "size")
        return " ".join([*parts, *(str(v) if k in plain else f"{k}={v}" for k, v in given.items())])

    def to_json(self) -> dict[str, Any]:
        """Every field by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Case:
        """The value that `to_json` wrote."""
        return cls(**data)


def product(choices: Mapping[str, Sequence[Any]]) -> Iterator[Case]:
    """A case for every combination of values, the first field varying slowest."""
    for values in itertools.product(*choices.values()):
        yield Case(**dict(zip(choices, values, strict=True)))
