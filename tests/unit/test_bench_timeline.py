"""The runtime's spans as a record shows them: without gaps and overlaps."""

from __future__ import annotations

import pytest

from pocketdiffusion.timing import TimedSpan
from pocketdiffusion_bench.timeline import stage_of, timeline


def test_the_timeline_has_no_gap_and_no_overlap() -> None:
    """Two text encoders, of which the second is waited for; a wait inside a step belongs to the step."""
    told = [
        TimedSpan("tokenise", 1.0, 2.0),
        TimedSpan("wait_open", 3.0, 1.0),
        TimedSpan("text_encoder.run", 4.0, 1.0),
        TimedSpan("wait_open", 5.5, 0.5),
        TimedSpan("text_encoder_2.open", 0.5, 5.5),
        TimedSpan("text_encoder_2.run", 6.0, 1.0),
        TimedSpan("text_encode", 3.0, 5.0),
        TimedSpan("wait_open", 8.0, 1.0),
        TimedSpan("wait_open", 9.5, 0.1),
        TimedSpan("unet.run", 9.6, 1.0),
        TimedSpan("step", 9.0, 2.0),
        TimedSpan("vae_decode", 11.0, 1.0),
        TimedSpan("active", 0.0, 12.0),
    ]
    found = sorted(timeline(told, 0.0, 13.0), key=lambda span: span.start)
    assert [span.name for span in found] == [
        *("prepare", "tokenise", "wait_open", "text_encode", "wait_open", "text_encode"),
        *("wait_open", "step", "vae_decode", "convert"),
    ]
    edges = [span.start for span in found] + [13.0]
    assert edges[0] == 0.0 and edges[1:] == [span.end for span in found]


def test_a_graph_that_is_closed_after_its_stage_is_neither_lost_nor_counted_twice() -> None:
    """As with residency "release": the text encoder is closed inside of "text_encode", the others after their stage."""
    told = [
        TimedSpan("tokenise", 0.5, 0.5),
        TimedSpan("wait_open", 1.0, 1.0),
        TimedSpan("text_encoder.run", 2.0, 1.0),
        TimedSpan("text_encode", 1.0, 3.0),
        TimedSpan("step", 4.0, 1.0),
        TimedSpan("vae_decode", 6.0, 1.0),
        TimedSpan("close", 3.5, 0.5),
        TimedSpan("close", 5.0, 1.0),
        TimedSpan("close", 7.0, 0.5),
    ]
    found = sorted(timeline(told, 0.0, 8.0), key=lambda span: span.start)
    assert [span.name for span in found] == [
        *("prepare", "tokenise", "wait_open", "text_encode", "close"),
        *("step", "close", "vae_decode", "close", "convert"),
    ]
    assert [span.start for span in found[1:]] == [span.end for span in found[:-1]]


@pytest.mark.parametrize(
    ("component", "stage"),
    [("text_encoder_2", "text_encode"), ("unet", "step"), ("transformer", "step"), ("vae_decoder", "vae_decode")],
)
def test_each_component_has_its_stage(component: str, stage: str) -> None:
    assert stage_of(component) == stage
