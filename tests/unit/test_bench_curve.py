"""The bisection of memory limits, on a case whose need is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketdiffusion_bench.curve import FLOOR, SHARE, STEP, memory_curve
from pocketdiffusion_bench.record import KILLED, OK, Record

from .bench_records import make_record

MB = 10**6


def attempts(true_need: int, tried: list[int]):
    def attempt(limit: int) -> Record:
        tried.append(limit)
        made = make_record()
        case = replace(made.case, memory_limit=limit)
        return replace(made, case=case, status=OK if limit >= true_need else KILLED)

    return attempt


@settings(deadline=None)
@given(need=st.integers(20 * MB, 8000 * MB), told=st.floats(0.2, 2.0))
def test_the_smallest_limit_is_found_within_the_resolution(need: int, told: float) -> None:
    tried: list[int] = []
    curve = memory_curve(attempts(need, tried), int(need * told), 16_000 * MB)
    assert curve.smallest is not None
    assert need <= curve.smallest <= need + max(STEP, SHARE * curve.smallest) + 1
    assert len(tried) == len(set(tried)) <= 12
    assert [each.case.memory_limit for each in curve.records] == sorted(tried, reverse=True)


def test_a_case_that_never_fits_ends_at_what_the_machine_has() -> None:
    tried: list[int] = []
    curve = memory_curve(attempts(10**12, tried), 100 * MB, 700 * MB)
    assert curve.smallest is None and tried == [100 * MB, 200 * MB, 400 * MB, 700 * MB]


@pytest.mark.parametrize("need", [0, FLOOR // 2])
def test_a_tiny_need_still_brackets(need: int) -> None:
    tried: list[int] = []
    curve = memory_curve(attempts(1, tried), need, 10**10)
    assert curve.smallest is not None and curve.smallest <= FLOOR + STEP
