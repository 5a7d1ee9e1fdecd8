"""Does this bundle compute here what its float32 source computed at export? Answered without torch.

The bundle carries golden inputs and outputs of each component and one golden picture; see `manifest.Manifest`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.bundle import Bundle
from pocketdiffusion.components import choose_devices, open_components
from pocketdiffusion.errors import BackendError, BundleUnsupported, NonFinite
from pocketdiffusion.golden import golden_inputs, golden_tensors, sqnr_db
from pocketdiffusion.image import from_image, to_uint8
from pocketdiffusion.pipeline import Pipeline
from pocketdiffusion.tensors import AnyArray
from pocketdiffusion.timing import Timings


@dataclass(frozen=True, slots=True)
class Check:
    """One figure against its limit, in decibels."""

    subject: str
    """Component, or "image"."""
    device: str
    figure: float | None
    """SQNR of a component, PSNR of the picture; None where it could not be run."""
    wanted: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the figure reaches the limit."""
        return self.figure is not None and self.figure >= self.wanted


def psnr_db(reference: AnyArray, found: AnyArray) -> float:
    """Peak signal to noise ratio of two uint8 pictures in dB; inf where they are equal."""
    error = float(np.mean((np.asarray(reference, np.float64) - np.asarray(found, np.float64)) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def verify(bundle: Bundle, device: str, options: SessionOptions) -> Iterator[Check]:
    """All checks of a bundle on one device. Raises BundleUnsupported when it carries nothing to check against."""
    if not bundle.hashed:
        raise BundleUnsupported(
            f"{bundle.manifest.name} comes from another exporter: its files are sound in structure, but it holds no "
            "hashes and no golden tensors to check against; `pocketdiffusion export` makes a bundle that does"
        )
    if bundle.manifest.golden is None:
        raise BundleUnsupported(
            f"{bundle.manifest.name} carries no golden tensors; export it again to be able to verify it"
        )
    pipe = Pipeline(bundle, open_components(bundle, choose_devices(bundle, device), options, "release"))
    yield from _components(pipe, device)
    yield from _picture(pipe, device)


def _components(pipe: Pipeline, device: str) -> Iterator[Check]:
    file = pipe.bundle.file(pipe.bundle.manifest.golden or "")
    for name, entry in pipe.bundle.manifest.components.items():
        wanted = 0.0 if entry.min_sqnr_db is None else entry.min_sqnr_db
        feeds, expected = golden_tensors(file, name)
        if not expected:
            yield Check(name, device, None, wanted, "the bundle holds no golden output for it")
            continue
        try:
            with pipe.components[name].use() as component:
                outputs = component.run(feeds, Timings())
        except (BackendError, NonFinite) as error:
            yield Check(name, device, None, wanted, str(error))
            continue
        yield Check(name, device, min(sqnr_db(value, outputs[key]) for key, value in expected.items()), wanted)


def _picture(pipe: Pipeline, device: str) -> Iterator[Check]:
    manifest = pipe.bundle.manifest
    golden = manifest.golden_image
    if golden is None:
        return
    pipe.safety_checker = None  # the golden picture was not checked either
    try:
        result = pipe.stream(
            golden.prompt,
            seed=golden.seed,
            num_inference_steps=golden.steps,
            guidance_scale=golden.guidance,
            **golden_inputs(manifest.tasks, manifest.numbers.width, manifest.numbers.height),
        ).result
    except (BackendError, NonFinite) as error:
        yield Check("image", device, None, golden.min_psnr_db, str(error))
        return
    expected = to_uint8(from_image(pipe.bundle.file(golden.file)))[0]
    if result.pixels is None:
        raise ValueError("a run with pictures gave none")
    yield Check("image", device, psnr_db(expected, result.pixels[0]), golden.min_psnr_db)
