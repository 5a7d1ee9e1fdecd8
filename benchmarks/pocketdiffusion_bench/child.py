"""`python -m pocketdiffusion_bench.child`: the process that is measured, when the case is ours.

It does what `pocketdiffusion generate` does, as often as asked, and tells of it by `events`. Everything that this file
adds to what is measured is one line of JSON for a stage.
"""
# ruff: noqa: E402 (the clock is read before anything else is imported)

from __future__ import annotations

import time

FIRST_LINE = time.perf_counter()  # what was before this line is Python's own start

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketdiffusion import memory
from pocketdiffusion.timing import TimedSpan, peak_rss
from pocketdiffusion_bench.case import EXACT, Case
from pocketdiffusion_bench.events import OPENING, START, EventLog
from pocketdiffusion_bench.timeline import UNEVEN_STEP, stage_of, timeline

if TYPE_CHECKING:
    from pocketdiffusion.pipeline import Pipeline
    from pocketdiffusion.result import Result
    from pocketdiffusion.tuning.plan import Plan


def main() -> int:
    """Make the pictures. Errors are one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m pocketdiffusion_bench.child")
    parser.add_argument("--case", required=True, help="as JSON")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--events", type=Path, required=True)
    parser.add_argument("--image", type=Path, required=True, help="picture N is written to NAME-N.png beside it")
    parser.add_argument("--images", type=int, default=1)
    args = parser.parse_args()
    log = EventLog(args.events)
    log.span("python", float(os.environ[START]), FIRST_LINE)
    log.begin("import")
    from pocketdiffusion.errors import PocketDiffusionError
    from pocketdiffusion.pipeline import Pipeline

    log.span("import", FIRST_LINE, time.perf_counter())
    try:
        _measure(Pipeline, Case.from_json(json.loads(args.case)), args, log)  # and with it every graph is closed
    except (PocketDiffusionError, OSError, MemoryError) as error:
        print(" ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        return 1
    return 0


def _measure(kind: type[Pipeline], case: Case, args: argparse.Namespace, log: EventLog) -> None:
    asked = {name: getattr(case, name) for name in ("device", "precision", "residency", "vae_tile")}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    given["memory_limit"] = case.memory_plan
    with log.timed("load"):
        pipe = kind.from_pretrained(args.bundle, threads=case.threads, **given)
    closings: list[TimedSpan] = []
    for name, component in pipe.components.items():
        for part in (component, *component.sizes.values()):
            part.backend = Announced(part.backend, name, log, closings)
    for index in range(args.images):
        file = args.image.with_name(f"{args.image.stem}-{index}{args.image.suffix}")
        closings.clear()
        result, plan = _picture(pipe, case, file, log, closings)
        if index == 0:
            log.configuration(configuration(pipe, case, result, plan))
    own = memory.read()  # `getrusage` would count the parent too, until the program was loaded
    log.done(peak_rss() if own is None else own.peak)  # before the graphs are closed: that belongs to the process's end


def _picture(
    pipe: Pipeline, case: Case, file: Path, log: EventLog, closings: Sequence[TimedSpan]
) -> tuple[Result, Plan | None]:
    start = time.perf_counter()
    log.begin("prepare")
    generation = pipe.stream(
        case.prompt,
        width=case.width,
        height=case.height,
        num_inference_steps=case.steps,
        sampler=case.sampler,
        guidance_scale=case.guidance,
        preset=case.preset or EXACT,
        decoder=case.decoder,
        seed=case.seed,
    )
    result = generation.result
    made = time.perf_counter()
    log.begin("save")
    result.save(file)
    saved = time.perf_counter()
    log.picture(file)
    for span in timeline([*result.timings.spans, *closings], start, made):
        log.span(*(span if case.exact or span.name != "step" else span._replace(name=UNEVEN_STEP)))
    log.span("save", made, saved)
    log.span("image", start, saved)
    return result, generation.memory_plan


def configuration(pipe: Pipeline, case: Case, result: Result, plan: Plan | None) -> dict[str, Any]:
    """What was really used, as the sessions and the manifest say. Nothing in it names this machine or its paths."""
    from pocketdiffusion import __version__
    from pocketdiffusion.presets import DECODERS
    from pocketdiffusion.sampling import SAMPLERS, SCHEDULES
    from pocketdiffusion.sampling.names import sampler_and_schedule, schedule_name

    manifest, made = pipe.bundle.manifest, result.parameters[0]
    denoiser = next(use for name, use in result.configuration.items() if stage_of(name) == "step")
    engine, _, version = denoiser.engine.partition(" ")
    return {
        "engine": engine,
        "version": version,
        "device": denoiser.device,
        "precision": denoiser.precision,
        "threads": case.threads,
        "residency": next(iter(pipe.components.values())).residency,
        "vae_tile": pipe.vae_tile,
        "memory_plan": None if plan is None else plan.limit,
        "plan": None if plan is None else str(plan.strategy),
        "predicted_bytes": None if plan is None else plan.predicted,
        "recipe": manifest.recipe,
        "changes": list(manifest.changes),
        "width": made.width,
        "height": made.height,
        "steps": made.steps,
        "sampler": sampler_and_schedule(made.sampler or "", SAMPLERS, SCHEDULES)[0],
        "schedule": schedule_name(made.schedule or "", SCHEDULES),
        "guidance": made.guidance_scale,
        "preset": case.preset or EXACT,
        "left_out": {label: made.extra[label] for label in ("Computed steps", "Guidance hold") if label in made.extra},
        "decoder": next((short for short, name in DECODERS.items() if name in result.configuration), None),
        "bundle": pipe.bundle.digest,
        "pocketdiffusion": __version__,
        "components": {
            name: {
                "engine": use.engine,
                "device": use.device,
                "precision": use.precision,
                "weights": use.weights,
                "cached": use.cached,
            }
            for name, use in result.configuration.items()
        },
    }


class Announced:
    """A backend, or a session of it, that tells when it begins to open or to run a graph, and how long it closed."""

    def __init__(self, inner: Any, name: str, log: EventLog, closings: list[TimedSpan]) -> None:
        self._inner, self._name, self._log, self._closings = inner, name, log, closings

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def open(self, *args: Any) -> Announced:
        """As the backend's."""
        self._log.begin(OPENING + self._name)
        start = time.perf_counter()
        session = Announced(self._inner.open(*args), self._name, self._log, self._closings)
        self._log.span(OPENING + self._name, start, time.perf_counter())
        return session

    def run(self, feeds: Any) -> Any:
        """As the session's."""
        self._log.begin(stage_of(self._name))
        return self._inner.run(feeds)

    def close(self) -> None:
        """As the session's."""
        start = time.perf_counter()
        self._inner.close()
        self._closings.append(TimedSpan("close", start, time.perf_counter() - start))


if __name__ == "__main__":
    sys.exit(main())
