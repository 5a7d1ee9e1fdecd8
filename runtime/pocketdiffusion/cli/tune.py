"""`pocketdiffusion tune`: what runs a model fastest here, by measuring; from then on "auto" takes it."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from pocketdiffusion.cli.command import Command
from pocketdiffusion.cli.table import table
from pocketdiffusion.cli.values import size, whole

if TYPE_CHECKING:
    from pocketdiffusion.tuning.choice import Measured
    from pocketdiffusion.tuning.tune import Tuning


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", help="bundle name or folder")
    parser.add_argument("--size", type=size, metavar="WIDTHxHEIGHT", help="of pictures (default: the model's)")
    parser.add_argument("--threads", type=int, help="compute threads, as for generate (default: the engine's choice)")
    parser.add_argument(
        "--max-loss",
        type=float,
        default=1.0,
        metavar="DB",
        help="how far below the best of float32 a choice's signal-to-noise ratio may be (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=whole, default=2, help="processes for each candidate (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Measure everything that can run each component, print a table, remember it. 1 if nothing will do."""
    from pocketdiffusion.bundle import Bundle
    from pocketdiffusion.bundle.models import find_bundle
    from pocketdiffusion.tuning.tune import tune

    bundle = Bundle.open(find_bundle(args.model))
    tuning = tune(bundle, size=args.size, threads=args.threads, max_loss=args.max_loss, rounds=args.rounds, say=_say)
    chosen = tuning.choose()
    if args.json:
        choice = None if chosen is None else {name: item.to_json()["candidate"] for name, item in chosen.items()}
        print(json.dumps({"choice": choice, "measured": [item.to_json() for item in tuning.measured]}, indent=2))
    else:
        _print(tuning, chosen)
    return 1 if chosen is None else 0


def _print(tuning: Tuning, chosen: dict[str, Measured] | None) -> None:
    head = ("component", "candidate", "open, s", "run, s", "first picture, s", "peak, MB", "SQNR, dB", "")
    picked = [] if chosen is None else list(chosen.values())
    print(table(head, [_row(item, item in picked) for item in tuning.measured]))
    if chosen is None:
        print("a component has no candidate with the wanted SQNR; nothing is chosen", file=sys.stderr)
    else:
        print("--device auto takes what is chosen here from now on", file=sys.stderr)


def _row(item: Measured, chosen: bool) -> tuple[str, ...]:
    found, verdict = item.footprint, "chosen: the shortest way to a first picture" if chosen else item.refused or ""
    if found is None:
        return item.component, str(item.candidate), "-", "-", "-", "-", "-", verdict
    peak = "-" if found.memory is None else f"{found.memory.peak / 1e6:,.0f}"
    error = "-" if found.sqnr_db is None else f"{found.sqnr_db:.1f}"
    times = (f"{seconds:.3g}" for seconds in (found.opening, found.run, item.seconds))
    return item.component, str(item.candidate), *times, peak, error, verdict


def _say(line: str) -> None:
    print(line, file=sys.stderr)


COMMAND = Command("tune", "measure what runs a model fastest here, for --device auto", configure, run)
