from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from pocketdiffusion_bench.figures import figures, stage_seconds
from pocketdiffusion_bench.record import MemoryPeaks, Span
from pocketdiffusion_bench.stats import percentile, summarize

from .bench_records import make_failed, make_record, make_run


def test_summary_of_known_samples():
    found = summarize([4.0, 1.0, 3.0, 2.0])
    assert found is not None
    assert (found.count, found.min, found.p50, found.p90, found.mean) == (4, 1.0, 2.5, 4.0, 2.5)
    assert found.sd == pytest.approx((5 / 3) ** 0.5)
    assert found.cv == pytest.approx((5 / 3) ** 0.5 / 2.5)


def test_one_sample_has_no_spread_and_none_no_summary():
    found = summarize([2.0])
    assert found is not None and found.sd is None and found.cv is None and found.p90 == 2.0
    assert summarize([]) is None


@pytest.mark.parametrize("percent", [1, 50, 90, 99, 100])
@pytest.mark.parametrize("count", [1, 2, 3, 9, 10, 11, 100])
def test_percentiles_are_numpys_nearest_rank(count, percent):
    samples = random.Random(count).sample(range(1000), count)
    oracle = np.percentile(samples, percent, method="inverted_cdf")
    assert percentile(samples, percent) == oracle


def test_p90_is_the_largest_of_few_and_not_of_ten():
    assert percentile([1.0, 2.0, 30.0], 90) == 30.0
    assert percentile([*map(float, range(9)), 100.0], 90) == 8.0


@pytest.mark.parametrize(("samples", "percent"), [([], 90), ([1.0], 0), ([1.0], 101)])
def test_percentiles_that_do_not_exist(samples, percent):
    with pytest.raises(ValueError, match="percentile"):
        percentile(samples, percent)


def test_figures_leave_out_what_came_first_in_a_process():
    steps = [[9.0, 2.0], [2.0, 4.0]]
    found = figures(make_record([make_run(steps), make_run(steps, rss=400_000_000)]))
    assert found.step is not None and found.step.count == 6 and found.step.p50 == 2.0
    assert found.image is not None and found.image.p50 == pytest.approx(6.1)
    assert found.first is not None and found.first.p50 == pytest.approx(0.5 + 11 + 0.1)
    assert found.memory == MemoryPeaks(rss=400_000_000, anonymous=200_000_000)
    assert found.joules_per_image == 5.0
    assert found.images_per_minute == pytest.approx(60 / 6.1) and found.steps_per_second == 0.5
    assert found.cold == ()


def test_a_single_picture_counts_and_is_called_cold():
    found = figures(make_record([make_run([[9.0, 2.0]])]))
    assert found.image is not None and found.image.p50 == pytest.approx(11.1)
    assert found.step is not None and found.step.p50 == 2.0
    assert found.cold == ("image",)


def test_no_runs_no_figures():
    found = figures(make_failed())
    assert (found.image, found.step, found.first, found.joules_per_image, found.cold) == (None, None, None, None, ())
    assert found.memory == MemoryPeaks()


def test_stages_until_the_first_picture_without_openings_in_threads():
    run = make_run([[1.0, 2.0], [5.0, 5.0]])
    run = replace(run, spans=(*run.spans, Span("open:unet", 0.2, 0.9)))
    stages = stage_seconds(make_record([run]))
    assert stages == {"import": 0.5, "step": 3.0, "vae_decode": pytest.approx(0.1)}
    assert list(stages) == ["import", "step", "vae_decode"]
