"""One graph to be: the torch wrapper that is traced, the source that it must equal, names and axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from pocketdiffusion.tensors import AnyArray

Feeds = dict[str, AnyArray]
"""One call of a component: input name -> array."""


FREE = frozenset({"batch", "length"})
"""Axes that stay free in graphs of one image size: prompts differ in number and length."""


class Call(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """A function of tensors around a source module, in the shape that the tracer wants."""

    def __init__(self, source: torch.nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.source, self.function = source, function

    def forward(self, *inputs: torch.Tensor) -> Any:
        """What the function returns."""
        return self.function(*inputs)


@dataclass(frozen=True)
class ComponentSpec:
    """One component of a family, ready to be exported."""

    name: str
    """Diffusers' name, which is also its folder in the bundle."""
    module: torch.nn.Module
    """Takes the inputs in order, returns the outputs in order (a tuple, or one tensor). This is what is traced."""
    reference: Callable[..., tuple[torch.Tensor, ...]]
    """The source itself, untouched: same arguments and outputs as `module`. Verification compares with this."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axes: Mapping[str, Mapping[int, str]]
    """Free axes of inputs and outputs by name; what is not listed is fixed."""
    example: tuple[torch.Tensor, ...]
    """Inputs for tracing; no free axis may have length 1, which torch treats as a constant."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The component's `config.json`, without paths."""
    form: Callable[[], AbstractContextManager[None]] = nullcontext
    """Puts the source into the form that engines run fastest while it is traced, and restores it."""

    def run_reference(self, feeds: Feeds) -> dict[str, AnyArray]:
        """The source's float32 outputs for one call."""
        with torch.inference_mode():
            outputs = self.reference(*(torch.from_numpy(feeds[name]) for name in self.inputs))
        return {name: tensor.numpy() for name, tensor in zip(self.outputs, outputs, strict=True)}

    def fixed(self, feeds: Feeds) -> ComponentSpec:
        """The same component for the image size of `feeds` alone."""
        axes = {name: {axis: kind for axis, kind in free.items() if kind in FREE} for name, free in self.axes.items()}
        example = []
        for name, old in zip(self.inputs, self.example, strict=True):
            free = axes.get(name, {})
            shape = [old.shape[axis] if axis in free else length for axis, length in enumerate(feeds[name].shape)]
            example.append(old if list(old.shape) == shape else torch.zeros(shape, dtype=old.dtype))
        return replace(self, axes=axes, example=tuple(example))

    def fitting(self, samples: Sequence[Feeds]) -> list[Feeds]:
        """The samples that the fixed axes allow, and the last of them three times over in one batch."""
        fixed = {
            name: {axis: length for axis, length in enumerate(tensor.shape) if axis not in self.axes.get(name, {})}
            for name, tensor in zip(self.inputs, self.example, strict=True)
        }
        kept = [
            feeds
            for feeds in samples
            if all(feeds[name].shape[axis] == length for name in fixed for axis, length in fixed[name].items())
        ]
        batched = {name: self.axes.get(name, {}).get(0) == "batch" for name in self.inputs}
        return [*kept, {name: np.repeat(a, 3, 0) if batched[name] else a for name, a in kept[-1].items()}]
