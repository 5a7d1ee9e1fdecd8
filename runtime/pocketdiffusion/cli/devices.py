"""`pocketdiffusion devices`: what can run a model here."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from pocketdiffusion.cli.command import Command
from pocketdiffusion.cli.table import table


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """List engines and devices, and what auto would pick. Without any engine: an error with the install commands."""
    from pocketdiffusion.backends import available, choose

    choice = choose("onnx")
    found = available()
    if args.json:
        print(json.dumps({"devices": [asdict(info) for info in found], "auto": asdict(choice)}, indent=2))
        return 0
    rows = [(f"{info.backend}:{info.device}", info.version, ", ".join(info.formats)) for info in found]
    print(table(("device", "engine version", "graph formats"), rows))
    print(f"\nauto takes {choice}: {choice.reason}")
    return 0


COMMAND = Command("devices", "list the engines and devices that are present", configure, run)
