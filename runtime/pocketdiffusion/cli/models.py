"""`pocketdiffusion models`: which bundles are here."""

from __future__ import annotations

import argparse
import json
from typing import Any

from pocketdiffusion.cli.command import Command
from pocketdiffusion.cli.table import table


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """List the embedded and the installed bundles; one that can't be read is listed with the reason."""
    from pocketdiffusion.bundle.models import installed

    found = [_describe(model.name, model.path, model.kind) for model in installed()]
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    head = ("name", "kind", "size", "picture", "recipe", "licence", "path")
    rows = [tuple(row.get(column, "") for column in (*head, "error")) for row in found]
    print(table((*head, ""), rows))
    return 0


def _describe(name: str, path: Any, kind: str) -> dict[str, Any]:
    from pocketdiffusion.bundle import Bundle
    from pocketdiffusion.errors import BundleError

    known = {"name": name, "kind": kind, "path": str(path)}
    try:
        bundle = Bundle.open(path)
    except BundleError as error:
        return {**known, "error": str(error)}
    manifest = bundle.manifest
    return {
        **known,
        "size": f"{bundle.size_bytes / 1e6:.1f} MB",
        "picture": f"{manifest.numbers.width}x{manifest.numbers.height}",
        "recipe": manifest.recipe,
        "licence": manifest.source.licence,
    }


COMMAND = Command("models", "list the models that are installed", configure, run)
