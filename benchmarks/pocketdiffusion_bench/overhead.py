"""`python -m pocketdiffusion_bench.overhead`: what Python and numpy cost per denoising step, without any graph.

The denoiser is a session that returns a ready array at once, so all the time that is left is this package's own: feeds,
guidance, sampler arithmetic, checks for NaN. Shapes are Stable Diffusion 1.5's at 512x512, guided in one batch of two.
The share is of a real guided step of that model, whose seconds `--step-seconds` states (default: 1.4, W8A8 on OpenVINO
with two cores: the fastest known here, hence the largest share).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np

from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.backends.session import EngineSession
from pocketdiffusion.bundle.manifest import ComponentEntry
from pocketdiffusion.component import Component
from pocketdiffusion.denoiser import network, passes
from pocketdiffusion.families import Conditioning
from pocketdiffusion.noise import Generator, stacked
from pocketdiffusion.sampling.denoise import denoiser, guided
from pocketdiffusion.sampling.scheduler import sampling_plan
from pocketdiffusion.tensors import TensorSpec
from pocketdiffusion.timing import Timings, timed

LATENT = (1, 4, 64, 64)
CONTEXT = (1, 77, 768)
ENTRY = ComponentEntry(
    format="fake",
    graph="unet",
    inputs={
        "sample": TensorSpec("float32", ("batch", 4, "height", "width")),
        "timestep": TensorSpec("float32", ()),
        "encoder_hidden_states": TensorSpec("float32", ("batch", "length", 768)),
    },
    outputs={"out_sample": TensorSpec("float32", ("batch", 4, "height", "width"))},
    weights="float32",
)
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}


class ReadyBackend:
    """An engine whose only graph takes no time."""

    name = "ready"
    formats: tuple[str, ...] = ("fake",)

    def devices(self) -> list[str]:
        """One device."""
        return ["cpu"]

    def precisions(self, device: str) -> tuple[str, ...]:
        """One precision."""
        return ("float32",)

    def version(self) -> str:
        """A version, as every engine has one."""
        return "1"

    def fixes_shapes(self, device: str) -> bool:
        """Never."""
        return False

    def open(self, graph: Path, device: str, options: SessionOptions) -> EngineSession:
        """A session that returns the same array each time."""
        answer = {"out_sample": Generator("cpu").manual_seed(1).randn((2 * LATENT[0], *LATENT[1:]))}
        return EngineSession(
            graph,
            inputs=ENTRY.inputs,
            outputs=ENTRY.outputs,
            device="ready:cpu",
            precision="float32",
            execute=lambda _: answer,
        )


def step_seconds(sampler: str, steps: int) -> list[float]:
    """Seconds of each step of one run."""
    component = Component("unet", Path("unet"), ENTRY, backend=ReadyBackend(), device="cpu")
    context = np.zeros(CONTEXT, np.float32)
    conditioning = Conditioning({"encoder_hidden_states": context}, {"encoder_hidden_states": context})
    timings = Timings()
    answer = guided(
        passes(component, conditioning, batched=True, timings=timings),
        network(component, conditioning.positive, timings),
        7.5,
    )
    plan = sampling_plan(SCHEDULER, sampler=sampler)
    levels = plan.levels(steps)
    noise = stacked([Generator("cpu").manual_seed(0)], LATENT)
    start = (noise() * levels.initial_scale).astype(np.float32)
    for _ in timed(plan.run(denoiser(answer, plan.parameterization(levels)), start, levels, noise), timings, "step"):
        pass
    return timings.samples["step"]


def main() -> int:
    """Parse the command line, measure, print a Markdown table."""
    parser = argparse.ArgumentParser(
        prog="python -m pocketdiffusion_bench.overhead", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--sampler", action="append", help="repeat to compare (default: euler, dpm++ 2m, unipc)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--step-seconds", type=float, default=1.4, help="of a real guided step (default: 1.4)")
    args = parser.parse_args()
    print(f"| sampler | own time per step, ms (median) | share of a {args.step_seconds:g} s step |")
    print("|---|---|---|")
    for sampler in args.sampler or ["euler", "dpm++ 2m", "unipc"]:
        seconds = statistics.median(step_seconds(sampler, args.steps))
        print(f"| {sampler} | {1000 * seconds:.2f} | {100 * seconds / args.step_seconds:.3f} % |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
