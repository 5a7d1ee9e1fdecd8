from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from pocketdiffusion_bench import compare
from pocketdiffusion_bench.bootstrap import ratio_interval
from pocketdiffusion_bench.case import Case
from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.record import KILLED, Record
from pocketdiffusion_bench.report import write

from .bench_records import make_record, make_run

THRESHOLD = 0.03


def processes(random: np.random.Generator, *, median: float = 1.0, between: float, within: float, runs: int = 3):
    """Step seconds of processes of which each has its own level: what one process measured hangs together."""
    levels = median * (1 + between * random.standard_normal(runs))
    return [list(level * (1 + within * random.standard_normal(20))) for level in levels]


def alarm(
    random: np.random.Generator, threshold: float, *, slower: float = 1.0, between: float = 0.01, within: float = 0.02
) -> bool:
    before = processes(random, between=between, within=within)
    after = processes(random, median=slower, between=between, within=within)
    return ratio_interval(before, after, resamples=500).low > 1 + threshold


def test_a_planted_regression_of_5_percent_is_caught():
    random = np.random.default_rng(0)
    caught = sum(alarm(random, THRESHOLD, slower=1.05, between=0.003, within=0.01) for _ in range(200))
    assert caught >= 190


@pytest.mark.parametrize("between", [0.0, 0.01, 0.02])
def test_samples_of_one_distribution_raise_no_alarm(between):
    """With the default threshold; even processes that differ by 2 % from each other give at most one in fifty."""
    random = np.random.default_rng(1)
    assert sum(alarm(random, THRESHOLD, between=between) for _ in range(200)) <= 4


def test_a_change_below_the_threshold_is_no_regression():
    random = np.random.default_rng(2)
    assert sum(alarm(random, THRESHOLD, slower=1.02, between=0.003) for _ in range(100)) == 0


def test_the_interval_is_wider_for_samples_that_hang_together():
    """Drawing all samples alike, as if there were one process, would miss what differs between processes."""
    random = np.random.default_rng(3)
    before, after = (processes(random, between=0.03, within=0.01, runs=5) for _ in range(2))
    nested = ratio_interval(before, after)
    alike = ratio_interval([list(chain(*before))], [list(chain(*after))])
    assert nested.high - nested.low > 2 * (alike.high - alike.low)


def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says():
    random = np.random.default_rng(4)
    intervals = [
        ratio_interval(
            processes(random, between=0.02, within=0.02, runs=10),
            processes(random, median=1.1, between=0.02, within=0.02, runs=10),
            resamples=400,
        )
        for _ in range(200)
    ]
    assert 0.88 <= np.mean([found.low <= 1.1 <= found.high for found in intervals]) <= 1.0


def test_the_same_samples_give_the_same_interval_and_lengths_may_differ():
    before, after = [[1.0, 1.1, 1.2], [1.0]], [[2.0, 2.2], [2.1, 2.4, 2.2]]
    found = ratio_interval(before, after)
    assert found == ratio_interval(before, after)
    assert found.ratio == 2.2 / 1.05
    assert 2.0 / 1.2 <= found.low < found.ratio < found.high <= 2.4


def records(scale: float = 1.0, *, rss: int = 300_000_000, runs: int = 3, case: Case | None = None) -> Record:
    each = [[1.0 * scale, 1.01 * scale, 0.99 * scale], [1.0 * scale, 1.02 * scale, 1.01 * scale]]
    return make_record([make_run(each, rss=rss + index) for index in range(runs)], case)


def run(folder: Path, before: Sequence[Record], after: Sequence[Record], threshold: str = "3%") -> int:
    for name, found in (("a.jsonl", before), ("b.jsonl", after)):
        with (folder / name).open("w", encoding="utf-8") as stream:
            write(found, "jsonl", stream)
    parser = argparse.ArgumentParser()
    compare.configure(parser)
    return compare.run(parser.parse_args([str(folder / "a.jsonl"), str(folder / "b.jsonl"), "--threshold", threshold]))


@pytest.mark.parametrize(
    ("after", "threshold", "code"),
    [
        (records(), "3%", 0),
        (records(1.05), "3%", 1),
        (records(1.05), "0.08", 0),
        (records(0.8), "3%", 0),
        (records(rss=330_000_000), "3%", 1),
    ],
    ids=["same", "slower", "allowed", "faster", "larger"],
)
def test_the_exit_code_tells_a_regression(tmp_path, after, threshold, code):
    assert run(tmp_path, [records()], [after], threshold) == code


def test_the_table_names_measures_and_cases_that_one_side_lacks(tmp_path, capsys):
    other, killed = Case("sticker"), Case("random:sd15", memory_limit=10**9)
    before = [records(), records(case=other), records(case=killed)]
    after = [records(0.8), make_record(case=killed, status=KILLED, error="killed at 1 GB", runs=())]
    assert run(tmp_path, before, after) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines[1:6]] == list(compare.MEASURES)
    assert lines[1].split()[-1] == "improvement" and lines[4].split()[-1] == "same"
    assert lines[6:] == [
        "only before: sticker",
        f"only before: {killed.label}; on the other side killed (killed at 1 GB)",
    ]


def test_too_few_processes_give_no_verdict(tmp_path, capsys):
    assert run(tmp_path, [records()], [records(2.0, runs=2)]) == 0
    assert "none: 2 of 3 processes" in capsys.readouterr().out


def test_processes_of_equal_cases_are_taken_together(tmp_path):
    assert run(tmp_path, [records()], [records(2.0, runs=2), records(2.0, runs=1)]) == 1


def test_nothing_in_common_is_an_error(tmp_path):
    with pytest.raises(BenchError, match="no measured case in common; only before: random:sd15.*; only after: sticker"):
        run(tmp_path, [records()], [records(case=Case("sticker"))])


def test_another_machine_is_said(tmp_path, capsys):
    run(tmp_path, [records()], [make_record(records().runs, machine={"cpu": "Tester 2"})])
    assert capsys.readouterr().out.endswith("the machines differ: Tester 1 before, Tester 2 after\n")


@pytest.mark.parametrize(("text", "value"), [("3%", 0.03), ("0.05", 0.05), ("0", 0.0)])
def test_shares(text, value):
    assert compare.share(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "%", "3", "-1%", "x"])
def test_what_is_no_share(text):
    with pytest.raises(ValueError):
        compare.share(text)
