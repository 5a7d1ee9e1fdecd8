"""One running generation: an iterator over sampler steps that the caller drives, watches and may end."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

import numpy as np

from pocketdiffusion import vae
from pocketdiffusion.bundle.manifest import Numbers
from pocketdiffusion.errors import BundleUnsupported
from pocketdiffusion.image import to_uint8
from pocketdiffusion.request import Request
from pocketdiffusion.result import Result
from pocketdiffusion.sampling.denoise import Parameterization
from pocketdiffusion.sampling.scheduler import SamplingPlan
from pocketdiffusion.sampling.schedules import Levels
from pocketdiffusion.sampling.types import Step
from pocketdiffusion.tensors import AnyArray, Array
from pocketdiffusion.timing import Timings
from pocketdiffusion.tuning.plan import Plan


@dataclass(slots=True)
class Run:
    """What belongs to one call: the resolved request and everything derived from it before a graph runs."""

    request: Request
    plan: SamplingPlan
    levels: Levels
    parameterization: Parameterization
    numbers: Numbers
    timings: Timings = field(default_factory=Timings)
    messages: list[str] = field(default_factory=list)
    """What the result says about the run."""
    memory: Plan | None = None
    """By which graphs are held; None without a memory limit."""
    finish_early: bool = False
    """Set to decode what is there after the current step."""


class Generation(Iterator[Step]):
    """Iterate for progress, `close` to cancel, read `result` for the pictures (runs what is left to run)."""

    def __init__(self, run: Run, steps: Generator[Step, None, Result]) -> None:
        self._run = run
        self._steps = steps
        self._result: Result | None = None

    def __next__(self) -> Step:
        start = time.perf_counter()
        try:
            return next(self._steps)
        except StopIteration as stop:
            if stop.value is not None:
                self._result = stop.value
            raise
        finally:
            # Only the time spent in here counts: what the consumer does between steps is not ours.
            self._run.timings.add("active", time.perf_counter() - start)

    @property
    def request(self) -> Request:
        """The request with the model's defaults filled in."""
        return self._run.request

    @property
    def memory_plan(self) -> Plan | None:
        """How the memory limit is to be kept, and the predicted peak; None without a limit."""
        return self._run.memory

    @property
    def result(self) -> Result:
        """The pictures; runs the generation to its end. Raises RuntimeError after `close`."""
        for _ in self:
            pass
        if self._result is None:
            raise RuntimeError("the generation was closed before its end; it has no result")
        return self._result

    def close(self) -> None:
        """Cancel: nothing more is run."""
        self._steps.close()

    def finish_early(self) -> None:
        """Take no further step; the result is what the latest one left."""
        self._run.finish_early = True

    def timestep(self, step: Step) -> float:
        """The training timestep at which the step started."""
        return self._run.parameterization.timestep(step.sigma)

    def latents(self, step: Step) -> Array:
        """The step's state in the denoiser's coordinates (Diffusers' "latents"), (n, channels, h, w) float32."""
        return self._run.parameterization.latent(step.x, step.sigma_next)

    def replace_latents(self, step: Step, latents: Array) -> None:
        """Let sampling go on from other latents, in the denoiser's coordinates."""
        step.x = self._run.parameterization.state(np.asarray(latents, np.float32), step.sigma_next)

    def preview(self, step: Step) -> AnyArray:
        """A rough picture of where the step is heading: uint8 (n, h, w, 3), one pixel per latent cell."""
        matrix = self._run.numbers.latent_rgb
        if matrix is None:
            raise BundleUnsupported("this bundle holds no preview matrix (numbers.latent_rgb); export it again")
        return to_uint8(vae.preview(step.denoised, matrix))
