"""The runtime's spans in a record's words: stages of the main thread that follow on each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pocketdiffusion.timing import TimedSpan
from pocketdiffusion_bench.events import Interval

PLACES = {
    "text_encoder": "text_encode",
    "vae_encoder": "vae_encode",
    "vae_decoder": "vae_decode",
    "tiny_vae_decoder": "vae_decode",
    "safety_checker": "convert",
    "judge": "convert",
}
"""Component -> the stage that runs it; all others are the denoiser's."""
BETWEEN = ("wait_open", "close")
"""What can happen to a graph inside another stage, which is then cut; but inside a step it is a part of the step."""
UNEVEN_STEP = "uneven_step"
"""A step of a run that leaves work out: it says nothing of the other steps, so it is no sample of "step"."""
CUT = ("text_encode",)
"""Stages that are shown without what happens to graphs in them."""
STAGES = (*BETWEEN, *CUT, "tokenise", "vae_encode", "step", "vae_decode")


def stage_of(component: str) -> str:
    """The stage that runs a component: "text_encoder_2" belongs to "text_encode"."""
    return next((stage for name, stage in PLACES.items() if component.startswith(name)), "step")


def timeline(spans: Sequence[TimedSpan], start: float, end: float) -> Iterator[Interval]:
    """The stages of one picture, none inside another.

    What comes before the first, "tokenise", from `start` is "prepare" (checks, starting the openings), what follows the
    last stage until `end` is "convert" (the array becomes a picture).
    """
    stages = [span for span in spans if span.name in STAGES and not (span.name in BETWEEN and _in_step(span, spans))]
    yield Interval("prepare", start, min((span.start for span in stages), default=end))
    for span in stages:
        yield from _without_cuts(span, spans) if span.name in CUT else [_interval(span)]
    yield Interval("convert", max((_interval(span).end for span in stages), default=end), end)


def _in_step(span: TimedSpan, spans: Sequence[TimedSpan]) -> bool:
    steps = (step for step in spans if step.name == "step")
    return any(step.start <= span.start < step.start + step.seconds for step in steps)


def _interval(span: TimedSpan) -> Interval:
    return Interval(span.name, span.start, span.start + span.seconds)


def _without_cuts(span: TimedSpan, spans: Sequence[TimedSpan]) -> Iterator[Interval]:
    whole = _interval(span)
    cuts = sorted((cut.start, cut.start + cut.seconds) for cut in spans if cut.name in BETWEEN)
    place = whole.start
    for start, end in [*((a, b) for a, b in cuts if whole.start <= a < whole.end), (whole.end, whole.end)]:
        if start > place:
            yield Interval(whole.name, place, start)
        place = end
