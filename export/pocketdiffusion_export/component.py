"""One graph to be: the torch wrapper that is traced, the source that it must equal, names and axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

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
