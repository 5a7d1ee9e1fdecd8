"""`pocketdiffusion cache`: the compiled graphs that engines keep on disk, and what was measured."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from datetime import datetime

from pocketdiffusion.cli.command import Command
from pocketdiffusion.cli.table import table


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--clear", action="store_true", help="delete all of it; it is made again when needed")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """List the compiled graphs, the last used first, and count what was measured; or delete both."""
    from pocketdiffusion.backends.cache import LIMIT, EngineCache, limit_bytes
    from pocketdiffusion.tuning.store import KINDS, Store

    cache, stores = EngineCache(), {kind: Store(kind) for kind in KINDS}
    freed = cache.clear() + sum(store.clear() for store in stores.values()) if args.clear else 0
    measured = {kind: len(store.files()) for kind, store in stores.items()}
    entries = cache.entries()
    held, limit = sum(entry.size for entry in entries), limit_bytes()
    if args.json:
        listed = [{**asdict(entry), "path": str(entry.path)} for entry in entries]
        about = {"folder": str(cache.folder), "bytes": held, "limit_bytes": limit, "freed_bytes": freed}
        print(json.dumps({**about, "measured": measured, "entries": listed}, indent=2))
        return 0
    rows = [(entry.graph, entry.engine, entry.device, _megabytes(entry.size), _time(entry.used)) for entry in entries]
    print(table(("graph", "engine", "device", "size", "last used"), rows))
    if args.clear:
        print(f"freed {_megabytes(freed)}", file=sys.stderr)
    counts = ", ".join(f"{count} {kind}" for kind, count in measured.items())
    print(f"measured: {counts} in {cache.folder.parent}", file=sys.stderr)
    print(f"{_megabytes(held)} of {_megabytes(limit)} ({LIMIT}) in {cache.folder}", file=sys.stderr)
    return 0


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(" ", "minutes")


COMMAND = Command("cache", "list or clear compiled graphs and what was measured", configure, run)
