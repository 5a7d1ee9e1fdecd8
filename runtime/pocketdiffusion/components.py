"""All graphs of a bundle, each with the device that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from pocketdiffusion.backends import Choice, choose, device_for, load, parse_devices
from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.bundle import Bundle
from pocketdiffusion.component import Component, Residency
from pocketdiffusion.errors import InvalidRequest


def choose_devices(bundle: Bundle, device: str | Mapping[str, str]) -> dict[str, Choice]:
    """The engine and device of each component. Raises InvalidRequest and BackendUnavailable."""
    roles = parse_devices(device)
    return {
        name: choose(entry.format, device_for(roles, name), component=name)
        for name, entry in bundle.manifest.components.items()
    }


def open_components(
    bundle: Bundle, choices: Mapping[str, Choice], options: SessionOptions, residency: Residency
) -> dict[str, Component]:
    """A `Component` for each graph; nothing is opened yet."""
    if residency not in get_args(Residency):
        raise InvalidRequest(
            "residency", f"residency is {residency!r}; choose one of: {', '.join(get_args(Residency))}"
        )
    return {
        name: Component(
            name,
            bundle.graph(name),
            bundle.manifest.components[name],
            backend=load(choice.backend),
            device=choice.device,
            options=options,
            residency=residency,
        )
        for name, choice in choices.items()
    }


def describe_choices(choices: Mapping[str, Choice]) -> list[str]:
    """One line for each device in use: which components it runs and why."""
    lines: dict[str, list[str]] = {}
    for name, choice in choices.items():
        lines.setdefault(f"{choice} ({choice.reason})", []).append(name)
    return [f"{', '.join(names)}: {line}" for line, names in lines.items()]
