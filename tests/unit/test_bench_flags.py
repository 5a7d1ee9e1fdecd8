"""Planted faults that make figures doubtful, each of which must be flagged, and a sound run, which must not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from pocketdiffusion_bench.flags import busy, covered, drift, flags, prediction, unequal
from pocketdiffusion_bench.record import MemoryPeaks, Run, Span


def sound(pictures: Sequence[Sequence[float]] = ((2.0, 1.0, 1.0), (1.0, 1.0, 1.0)), *, lost: float = 0.0) -> Run:
    """A run of these step seconds whose stages leave out `lost` seconds."""
    spans, at = [Span("python", 0.0, 0.1), Span("open:unet", 0.1, 1.5), Span("load", 0.1, 1.9)], 2.0
    for steps in pictures:
        begin = at
        for seconds in steps:
            spans.append(Span("step", at, seconds))
            at += seconds
        spans.append(Span("image", begin, at - begin))
    spans.append(Span("end", at, 0.1))
    return Run(at + 0.1 + lost, tuple(spans), MemoryPeaks())


def test_a_sound_case_has_no_flag() -> None:
    assert flags([sound(), sound(), sound()]) == []
    assert covered(sound()) == pytest.approx(sound().seconds)


def test_a_spread_over_3_percent_is_flagged_by_name() -> None:
    slow = sound([(2.0, 1.0, 1.0), (1.2, 1.2, 1.2)])
    found = flags([sound(), slow, sound()])
    assert [text.split(":")[0] for text in found] == ["process", "image", "step"]
    assert "CV of 3" in found[0]


def test_a_single_run_has_no_spread() -> None:
    assert flags([sound()]) == []


@pytest.mark.parametrize(("lost", "flagged"), [(0.15, False), (0.2, True), (-0.2, True)])
def test_stages_that_do_not_add_up_are_flagged(lost: float, flagged: bool) -> None:
    found = flags([sound(lost=lost)])
    assert [text for text in found if "add up to" in text] == found
    assert bool(found) == flagged


@pytest.mark.parametrize(
    "later",
    [
        (0.01, 0.01, 0.01),  # the steps are replayed
        (1.0,),  # most steps are left out
        (),  # the picture is
    ],
)
def test_a_cached_result_is_flagged(later: tuple[float, ...]) -> None:
    found = flags([sound([(2.0, 1.0, 1.0), later])])
    assert len(found) == 1 and "cached" in found[0]


@pytest.mark.parametrize("later", [(0.6, 0.6, 0.6), (1.0, 1.0, 1.0), (3.0, 3.0, 3.0)])
def test_faster_or_slower_later_pictures_are_no_cached_result(later: tuple[float, ...]) -> None:
    assert flags([sound([(9.0, 1.0, 1.0), later])]) == []


def test_a_first_step_that_compiles_hides_no_cached_result_of_a_single_step() -> None:
    assert flags([sound([(10.0,), (0.01,)])]) != []


def test_one_picture_each_can_not_show_a_cached_result() -> None:
    assert flags([sound([(2.0, 1.0, 1.0)])]) == []


def test_a_busy_machine_is_flagged() -> None:
    assert busy([0.01, None, 0.04]) == [] == busy([])
    assert "31 %" in busy([0.01, 0.31])[0]


def test_a_moving_clock_and_heat_are_flagged() -> None:
    assert drift([None, None], [None]) == [] == drift([3.0e9, 2.95e9], [4, 4])
    found = drift([3.0e9, 2.5e9, 2.9e9], [4, 4, 6])
    assert "between 2500 and 3000 MHz" in found[0] and "2 times" in found[1]


def test_different_pictures_of_equal_requests_are_flagged() -> None:
    assert unequal({"a"}) == [] == unequal(set())
    assert "2 different pictures" in unequal({"a", "b"})[0]


@pytest.mark.parametrize(
    ("predicted", "said"),
    [
        (None, []),
        (110, []),
        (90, []),
        (120, ["its plan predicted 120 MB, 20 % over the peak"]),
        (80, ["its plan predicted 80 MB, 20 % under the peak"]),
    ],
)
def test_a_prediction_that_misses_the_peak_is_flagged(predicted: int | None, said: list[str]) -> None:
    run = replace(sound(), memory=MemoryPeaks(rss=100_000_000))
    assert prediction(None if predicted is None else predicted * 10**6, [run, run]) == said
    assert prediction(10**9, [sound()]) == []  # nothing told what it took
