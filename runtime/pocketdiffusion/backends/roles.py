"""A device, or an arithmetic, for each role: ``"unet=openvino:gpu,vae=onnxruntime:cpu"``, ``"denoiser=bfloat16"``."""

from __future__ import annotations

from collections.abc import Mapping

from pocketdiffusion.backends.base import PRECISIONS
from pocketdiffusion.errors import InvalidRequest

DEFAULT = "default"
ROLES = ("text_encoder", "denoiser", "vae", DEFAULT)
ALIASES = {"unet": "denoiser", "transformer": "denoiser"} | dict.fromkeys(
    ("vae_decoder", "tiny_vae_decoder", "vae_encoder"), "vae"
)


def parse_devices(devices: str | Mapping[str, str]) -> dict[str, str]:
    """Role -> device, with all `ROLES` in it.

    Takes one device for everything ("auto", "openvino:cpu"), "role=device" pairs between commas, of which one without
    a role is the default, or a mapping. Roles: text_encoder, denoiser (also called unet, transformer), vae, default.
    What is not named gets the default, and that is "auto". Devices are checked later, by `choose`.
    Raises InvalidRequest.
    """
    return _parse(devices, "device", "auto")


def parse_precisions(precisions: str | Mapping[str, str]) -> dict[str, str]:
    """Role -> arithmetic, given as for `parse_devices`; what is not named gets the default, and that is "float32".

    Whether an engine has it is found when a graph is opened. Raises InvalidRequest.
    """
    found = _parse(precisions, "precision", PRECISIONS[0])
    for role, precision in found.items():
        if precision not in PRECISIONS:
            raise InvalidRequest(
                "precision", f"precision of {role} is {precision!r}; choose from {', '.join(PRECISIONS)}"
            )
    return found


def role_value(values: Mapping[str, str], component: str) -> str:
    """What a component ("unet", "vae_decoder", "text_encoder_2") gets of what `parse_devices` and its like returned."""
    return values.get(role_of(component), values[DEFAULT])


def role_of(component: str) -> str:
    """What a component is for: text_encoder, denoiser, vae, or its own name."""
    return "text_encoder" if component.startswith("text_encoder") else ALIASES.get(component, component)


def _parse(given: str | Mapping[str, str], what: str, usual: str) -> dict[str, str]:
    pairs = list(given.items()) if isinstance(given, Mapping) else [_pair(part) for part in str(given).split(",")]
    if not isinstance(given, (str, Mapping)) or not all(isinstance(value, str) for _, value in pairs):
        raise InvalidRequest(what, f"{what} is {given!r}; give a text, e.g. {usual!r}, or a text for each role")
    named: dict[str, str] = {}
    for name, value in pairs:
        role = ALIASES.get(name, name)
        if role not in ROLES:
            raise InvalidRequest(what, f"unknown role '{name}'; choose from {', '.join([*ROLES, *ALIASES])}")
        if not value:
            raise InvalidRequest(what, f"no {what} is given for '{name}'; write e.g. {name}={usual}")
        if role in named:
            raise InvalidRequest(what, f"two {what}s are given for '{role}': {named[role]} and {value}; give one")
        named[role] = value
    default = named.get(DEFAULT, usual)
    return {role: named.get(role, default) for role in ROLES}


def _pair(part: str) -> tuple[str, str]:
    name, equals, value = part.partition("=")
    return (name.strip(), value.strip()) if equals else (DEFAULT, part.strip())
