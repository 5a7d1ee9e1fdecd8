"""Lazy registries: literal dicts of "module:attribute" strings, imported on use."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from pocketdiffusion_export.errors import ExportError


def lookup(registry: Mapping[str, str], kind: str, name: str) -> Any:
    """The object registered under `name`. Raises ExportError naming the choices when there is none."""
    if name not in registry:
        raise ExportError(f"unknown {kind} '{name}'; choose one of: {', '.join(sorted(registry))}")
    module, _, attribute = registry[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
