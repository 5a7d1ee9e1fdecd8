"""`pocketdiffusion bench compare A.jsonl B.jsonl`: is B slower or larger than A, by more than chance explains?

Cases are matched by everything that was asked for. Each measure becomes the ratio B / A with a bootstrap interval (see
`bootstrap`). It is a regression when the whole interval lies above 1 + threshold, an improvement when it lies below
1 - threshold; with fewer than `MIN_RUNS` processes on a side there is no verdict.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pocketdiffusion.cli.table import table
from pocketdiffusion_bench.bootstrap import CONFIDENCE, RESAMPLES, Interval, ratio_interval
from pocketdiffusion_bench.case import Case
from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.figures import first_picture, run_samples, warm
from pocketdiffusion_bench.record import OK, Record, Run
from pocketdiffusion_bench.report import read

MIN_RUNS = 3
THRESHOLD = 0.03


def _warm(name: str) -> Callable[[Sequence[Run]], list[list[float]]]:
    return lambda runs: warm([run_samples(run, name) for run in runs])


def _first(runs: Sequence[Run]) -> list[list[float]]:
    return [[first_picture(run)] for run in runs if run_samples(run, "image")]


def _peak(kind: str) -> Callable[[Sequence[Run]], list[list[float]]]:
    return lambda runs: [[peak] for run in runs if (peak := getattr(run.memory, kind)) is not None]


MEASURES: Mapping[str, Callable[[Sequence[Run]], list[list[float]]]] = {
    "step": _warm("step"),
    "image": _warm("image"),
    "process start to first picture": _first,
    "peak RSS": _peak("rss"),
    "peak anonymous memory": _peak("anonymous"),
}
"""Measure -> samples of each process that has any. Less is better for all."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One measure of one case."""

    case: Case
    measure: str
    interval: Interval
    runs: int
    """Processes on the side that has fewer."""

    def verdict(self, threshold: float) -> str:
        """ "regression", "improvement", "same", or why there is none."""
        if self.runs < MIN_RUNS:
            return f"none: {self.runs} of {MIN_RUNS} processes"
        if self.interval.low > 1 + threshold:
            return "regression"
        return "improvement" if self.interval.high < 1 - threshold else "same"


def findings(before: Sequence[Record], after: Sequence[Record], *, resamples: int = RESAMPLES) -> list[Finding]:
    """Every measure of every case that was measured on both sides; a case's processes are taken together."""
    old, new = _by_case(before), _by_case(after)
    found = []
    for case in (case for case in old if case in new):
        for measure, samples in MEASURES.items():
            a, b = samples(old[case]), samples(new[case])
            if a and b:
                interval = ratio_interval(a, b, resamples=resamples)
                found.append(Finding(case, measure, interval, min(len(a), len(b))))
    return found


def unmatched(before: Sequence[Record], after: Sequence[Record]) -> list[str]:
    """One line for each case that only one side measured."""
    old, new = _by_case(before), _by_case(after)
    sides = (("only before", old, new, after), ("only after", new, old, before))
    return [
        f"{what}: {case.label}{_why(case, others)}"
        for what, here, there, others in sides
        for case in here
        if case not in there
    ]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("before", type=Path, metavar="A.jsonl", help="what `bench -o jsonl` wrote")
    parser.add_argument("after", type=Path, metavar="B.jsonl", help="the same, of what is to be judged")
    parser.add_argument(
        "--threshold",
        type=share,
        default=THRESHOLD,
        metavar="SHARE",
        help="what counts as a change, as 3%% or 0.03 (default: 3%%)",
    )


def run(args: argparse.Namespace) -> int:
    """Print a table and what could not be matched; 1 on a regression. Raises BenchError when nothing matches."""
    before, after = read([args.before]), read([args.after])
    found, left = findings(before, after), unmatched(before, after)
    if not found:
        raise BenchError(
            f"{args.before} and {args.after} have no measured case in common; "
            f"{'; '.join(left) or 'neither holds one'}; measure the same cases on both sides"
        )
    head = ("case", "measure", "B / A", f"{100 * CONFIDENCE:.0f} % interval", "verdict")
    print(table(head, [_row(each, args.threshold) for each in found]))
    for line in [*left, *_other_machine(before, after)]:
        print(line)
    return int(any(each.verdict(args.threshold) == "regression" for each in found))


def share(text: str) -> float:
    """ "3%" or "0.03" as 0.03. Raises ValueError below 0 and for anything else."""
    value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    if not 0 <= value < 1:
        raise ValueError(f"{text} is not between 0% and 100%")
    return value


def _by_case(records: Sequence[Record]) -> dict[Case, list[Run]]:
    runs: dict[Case, list[Run]] = {}
    for record in records:
        if record.status == OK:
            runs.setdefault(record.case, []).extend(record.runs)
    return runs


def _why(case: Case, others: Sequence[Record]) -> str:
    """What became of the case on the other side."""
    fates = [f"{record.status} ({record.error})" for record in others if record.case == case]
    return f"; on the other side {fates[-1]}" if fates else ""


def _row(found: Finding, threshold: float) -> tuple[str, ...]:
    interval = found.interval
    cells = (f"{interval.ratio:.3f}", f"{interval.low:.3f} - {interval.high:.3f}")
    return (found.case.label, found.measure, *cells, found.verdict(threshold))


def _other_machine(before: Sequence[Record], after: Sequence[Record]) -> list[str]:
    sides = [{str(record.machine.get("cpu")) for record in records} for records in (before, after)]
    if sides[0] == sides[1]:
        return []
    names = [", ".join(sorted(side)) for side in sides]
    return [f"the machines differ: {names[0]} before, {names[1]} after"]
