"""`pocketdiffusion verify`: are the files whole, and do they compute here what their source computed?"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from pocketdiffusion.backends.base import PRECISIONS
from pocketdiffusion.cli.command import Command
from pocketdiffusion.cli.table import table

if TYPE_CHECKING:
    from pocketdiffusion.bundle import Bundle
    from pocketdiffusion.verify import Check


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", help="bundle name or folder")
    parser.add_argument(
        "--device", action="append", help="only here, e.g. openvino:cpu (default: every device present)"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0])
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Hash every file, then run the golden tensors and the golden picture on each device. 1 if anything fails."""
    from pocketdiffusion.backends.base import SessionOptions
    from pocketdiffusion.bundle import Bundle
    from pocketdiffusion.bundle.models import find_bundle
    from pocketdiffusion.verify import verify

    bundle = Bundle.open(find_bundle(args.model))
    bundle.verify_all()
    options = SessionOptions(precision=args.precision)
    checks = [check for device in args.device or _devices(bundle) for check in verify(bundle, device, options)]
    passed = all(check.passed for check in checks)
    if args.json:
        print(json.dumps({"passed": passed, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        print(f"{len(bundle.manifest.files)} files, {bundle.size_bytes / 1e6:.1f} MB: sizes and sha256 as listed")
        print(table(("what", "device", "dB", "wanted", ""), [_row(check) for check in checks]))
    return 0 if passed else 1


def _devices(bundle: Bundle) -> list[str]:
    from pocketdiffusion.backends import available, choose

    formats = {entry.format for entry in bundle.manifest.components.values()}
    for format_ in formats:
        choose(format_)  # says how to install an engine when there is none
    return [f"{info.backend}:{info.device}" for info in available() if formats <= set(info.formats)]


def _row(check: Check) -> tuple[str, ...]:
    figure = "-" if check.figure is None else f"{check.figure:.1f}"
    verdict = "ok" if check.passed else f"FAILED {check.note}".rstrip()
    return check.subject, check.device, figure, f"{check.wanted:.1f}", verdict


COMMAND = Command("verify", "check a bundle's files and its figures on this machine", configure, run)
