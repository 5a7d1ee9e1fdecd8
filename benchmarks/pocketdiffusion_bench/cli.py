"""`pocketdiffusion bench MODEL…`: stdout is the result, stderr tells of progress."""

from __future__ import annotations

import argparse
import io
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from pocketdiffusion.atomic import replace_file
from pocketdiffusion.cli.command import Command
from pocketdiffusion.cli.values import whole
from pocketdiffusion_bench import compare, component, options, peers, report
from pocketdiffusion_bench.appraisal import appraise
from pocketdiffusion_bench.case import OURS, Case
from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.plot import FORMATS as PLOTS
from pocketdiffusion_bench.plot import plot
from pocketdiffusion_bench.record import FAILED, OK, Record
from pocketdiffusion_bench.run import Job, Settings, measure, measure_curve

COMPARE = "compare"
"""In the place of a model: `bench compare A.jsonl B.jsonl`."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="bundles by name or folder, or random:NAME; or `compare A.jsonl B.jsonl`, two saved results",
    )
    options.add_case_options(parser)
    group = parser.add_argument_group("how it is measured")
    group.add_argument("--runs", type=whole, default=3, help="fresh processes for each case (default: 3)")
    group.add_argument("--images", type=whole, default=2, help="pictures of a process, the first cold (default: 2)")
    group.add_argument(
        "--no-warm-up", action="store_true", help="count the first round too, whose files are not in memory"
    )
    group.add_argument("--timeout", type=whole, default=3600, metavar="SECONDS", help="for a process (default: 3600)")
    group.add_argument(
        "--memory-curve", action="store_true", help="also find the smallest memory limit at which each case completes"
    )
    group.add_argument(
        "--component", metavar="NAME", help="one graph alone, e.g. unet, with a profile of its operators"
    )
    group.add_argument(
        "--set-up-peers", action="store_true", help="make the peers' environments first; needs a network"
    )
    group = parser.add_argument_group("result")
    group.add_argument("-o", "--format", choices=report.FORMATS, help="(default: by --output's ending, or md)")
    group.add_argument("--output", type=Path, metavar="FILE", help="in place of stdout")
    group.add_argument("--plot", type=Path, metavar="FILE", help="also draw latency against memory: .png or .svg")
    group.add_argument("--threshold", metavar="SHARE", help="of compare: what counts as a change (default: 3%%)")


def run(args: argparse.Namespace) -> int:
    """Measure, write the result. Exit code 1 when a case failed, or, of compare, on a regression."""
    if args.models[:1] == [COMPARE]:
        return _compare(args)
    if bool(args.models) == (args.cases is not None):
        raise BenchError("bench needs models or --cases FILE, and not both; for example: pocketdiffusion bench sticker")
    if args.threshold is not None:
        raise BenchError("--threshold is of `bench compare` only")
    _check_files(args)
    asked = options.cases(args)
    others = list(dict.fromkeys(case.peer for case in asked if case.peer != OURS))
    for name in others:
        peers.peer_named(name)  # a slip of the pen is told before hours of work
    if args.set_up_peers:
        peers.set_up(others, say)
    cases = peers.offered(asked, say)
    return _bench(cases, args) if args.component is None else _component(cases, args)


def _component(cases: Sequence[Case], args: argparse.Namespace) -> int:
    found = component.measure_cases(cases, args.component, say)
    text = io.StringIO()
    component.write(found, _format(args), text)
    _put(text.getvalue(), args)
    return 0


def _bench(cases: Sequence[Case], args: argparse.Namespace) -> int:
    settings = Settings(args.runs, args.images, not args.no_warm_up, float(args.timeout))
    with tempfile.TemporaryDirectory(prefix="pocketdiffusion-bench-") as folder, _terminable():
        jobs = measure(
            cases, settings, Path(folder), say, save=lambda jobs: _write([job.record() for job in jobs], args)
        )
        records = appraise(jobs, say)
        if args.memory_curve:
            records += [record for job in jobs if job.status == OK for record in _curve(job, settings)]
    if all(record.status == FAILED for record in records):
        raise BenchError("; ".join(dict.fromkeys(f"{record.case.label}: {record.error}" for record in records)))
    _write(records, args)
    return int(any(record.status == FAILED for record in records))


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises SystemExit, so that the measured process ends too."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _curve(job: Job, settings: Settings) -> list[Record]:
    curve = measure_curve(job, settings, say)
    limit = "no limit" if curve.smallest is None else f"{curve.smallest / 1e6:,.0f} MB"
    say(f"{job.case.label}: the smallest memory limit at which it completes: {limit}")
    return list(curve.records)


def _write(records: Sequence[Record], args: argparse.Namespace) -> None:
    text = io.StringIO()
    report.write(records, _format(args), text)
    _put(text.getvalue(), args)
    if args.plot is not None:
        plot(records, args.plot)


def _format(args: argparse.Namespace) -> str:
    suffix = "" if args.output is None else args.output.suffix.lstrip(".").lower()
    return args.format or (suffix if suffix in report.FORMATS else "md")


def _put(text: str, args: argparse.Namespace) -> None:
    if args.output is None:
        sys.stdout.write(text)
    else:
        replace_file(args.output, text.encode())
        print(args.output)


def _check_files(args: argparse.Namespace) -> None:
    """Places that can't be written to are told before the work, not after. Raises BenchError."""
    for file in (args.output, args.plot):
        if file is not None and not file.absolute().parent.is_dir():
            raise BenchError(f"there is no folder {file.parent} to write {file.name} to")
    if args.plot is not None and args.plot.suffix.lower() not in PLOTS:
        raise BenchError(f"--plot {args.plot}: its ending is unknown; choose from {', '.join(PLOTS)}")


class _CompareParser(argparse.ArgumentParser):
    """With errors of one line."""

    def error(self, message: str) -> NoReturn:
        raise BenchError(f"bench compare: {message}")


def _compare(args: argparse.Namespace) -> int:
    parser = _CompareParser()
    compare.configure(parser)
    given = [] if args.threshold is None else ["--threshold", args.threshold]
    return compare.run(parser.parse_args([*args.models[1:], *given]))


def say(line: str) -> None:
    """Progress, for people."""
    print(line, file=sys.stderr, flush=True)


COMMAND = Command("bench", "measure latency, memory and quality of models, ours and others' runtimes", configure, run)
