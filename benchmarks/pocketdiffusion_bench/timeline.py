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
STAGES = (*BETWEEN, "vae_encode", "step", "vae_decode")


def stage_of(component: str) -> str:
    """The stage that runs a component: "text_encoder_2" belongs to "text_encode"."""
    return next((stage for name, stage in PLACES.items() if component.startswith(name)), "step")


def timeline(spans: Sequence[TimedSpan], start: float, end: float) -> Iterator[Interval]:
    """The stages of one picture, none inside another.

    The runtime's "text_encode" holds the tokeniser's work, which goes on while graphs are opened, and waits for them.
    What comes before it from `start` is "prepare" (checks, starting the openings), what follows the last stage until
    `end` is "convert" (the array becomes a picture).
    """
    latest = start
    for span in spans:
        whole = Interval(span.name, span.start, span.start + span.seconds)
        if span.name == "text_encode":
            yield Interval("prepare", start, span.start)
            yield from _encoding(whole, spans)
        elif span.name in STAGES and not (span.name in BETWEEN and _in_step(span, spans)):
            yield whole
        else:
            continue
        latest = max(latest, whole.end)
    yield Interval("convert", latest, end)


def _in_step(span: TimedSpan, spans: Sequence[TimedSpan]) -> bool:
    steps = (step for step in spans if step.name == "step")
    return any(step.start <= span.start < step.start + step.seconds for step in steps)


def _encoding(whole: Interval, spans: Sequence[TimedSpan]) -> Iterator[Interval]:
    """ "tokenise" until the first text encoder is wanted, then "text_encode" without what is cut out of it."""
    inside = [span for span in spans if whole.start <= span.start < whole.end]
    cuts = sorted((span.start, span.start + span.seconds) for span in inside if span.name in BETWEEN)
    runs = [span.start for span in inside if stage_of(span.name) == "text_encode" and span.name.endswith(".run")]
    place = min([*(start for start, _ in cuts), *runs], default=whole.end)
    yield Interval("tokenise", whole.start, place)
    for start, end in [*cuts, (whole.end, whole.end)]:
        if start > place:
            yield Interval(whole.name, place, start)
        place = end
