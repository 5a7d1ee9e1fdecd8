"""A device for each role: ``"unet=openvino:gpu,vae=onnxruntime:cpu"``."""

from __future__ import annotations

from collections.abc import Mapping

from pocketdiffusion.errors import InvalidRequest

DEFAULT = "default"
ROLES = ("text_encoder", "denoiser", "vae", DEFAULT)
ALIASES = {"unet": "denoiser", "transformer": "denoiser", "vae_decoder": "vae", "vae_encoder": "vae"}


def parse_devices(devices: str | Mapping[str, str]) -> dict[str, str]:
    """Role -> device, with all `ROLES` in it.

    Takes one device for everything ("auto", "openvino:cpu"), "role=device" pairs between commas, of which one without
    a role is the default, or a mapping. Roles: text_encoder, denoiser (also called unet, transformer), vae, default.
    What is not named gets the default, and that is "auto". Devices are checked later, by `choose`.
    Raises InvalidRequest.
    """
    pairs = list(devices.items()) if isinstance(devices, Mapping) else [_pair(part) for part in devices.split(",")]
    named: dict[str, str] = {}
    for name, device in pairs:
        role = ALIASES.get(name, name)
        if role not in ROLES:
            raise InvalidRequest("device", f"unknown role '{name}'; choose from {', '.join([*ROLES, *ALIASES])}")
        if not device:
            raise InvalidRequest("device", f"no device is given for '{name}'; write e.g. {name}=auto")
        if role in named:
            raise InvalidRequest("device", f"two devices are given for '{role}': {named[role]} and {device}; give one")
        named[role] = device
    default = named.get(DEFAULT, "auto")
    return {role: named.get(role, default) for role in ROLES}


def device_for(devices: Mapping[str, str], component: str) -> str:
    """The device of a component ("unet", "vae_decoder", "text_encoder_2"), from the result of `parse_devices`."""
    role = "text_encoder" if component.startswith("text_encoder") else ALIASES.get(component, component)
    return devices.get(role, devices[DEFAULT])


def _pair(part: str) -> tuple[str, str]:
    name, equals, device = part.partition("=")
    return (name.strip(), device.strip()) if equals else (DEFAULT, part.strip())
