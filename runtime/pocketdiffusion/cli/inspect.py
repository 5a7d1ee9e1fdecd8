"""`pocketdiffusion inspect`: what a bundle holds, or how a saved picture was made."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pocketdiffusion.cli.command import Command
from pocketdiffusion.cli.table import table

if TYPE_CHECKING:
    from pocketdiffusion.bundle.manifest import ComponentEntry, Manifest

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("subject", help="bundle name or folder, or a picture file")
    parser.add_argument("--variant", help="which graphs of another exporter's folder, e.g. fp16 for model_fp16.onnx")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Describe the bundle (after checking its files) or the picture."""
    if Path(args.subject).suffix.lower() in PICTURES:
        return _picture(Path(args.subject), as_json=args.json)
    return _bundle(args.subject, args.variant, as_json=args.json)


def _picture(path: Path, *, as_json: bool) -> int:
    from pocketdiffusion.image.metadata import read

    parameters, source = read(path)
    if as_json:
        print(
            json.dumps({"parameters": None if parameters is None else asdict(parameters), "source": source}, indent=2)
        )
        return 0
    print("no generation parameters" if parameters is None else parameters.text())
    print(f"\ndigital source type: {source or 'not marked'}")
    return 0


def _bundle(subject: str, variant: str | None, *, as_json: bool) -> int:
    from pocketdiffusion.bundle import Bundle
    from pocketdiffusion.bundle.models import find_bundle

    bundle = Bundle.open(find_bundle(subject), variant=variant)
    manifest = bundle.manifest
    if as_json:
        print(json.dumps({"path": str(bundle.path), "digest": bundle.digest, **asdict(manifest)}, indent=2))
        return 0
    numbers = manifest.numbers
    facts = [
        ("name", manifest.name),
        ("what", manifest.description),
        ("path", str(bundle.path)),
        ("digest", bundle.digest),
        ("size", f"{bundle.size_bytes / 1e6:.1f} MB"),
        ("family", manifest.family),
        ("tasks", ", ".join(manifest.tasks)),
        ("recipe", manifest.recipe),
        ("source", f"{manifest.source.name} ({manifest.source.licence})"),
        ("picture", ", ".join(_sizes(manifest))),
        ("defaults", f"{numbers.default_steps} steps, guidance {numbers.default_guidance:g}"),
        ("made with", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())),
    ]
    facts += [("parts", _parts(name, entry)) for name, entry in manifest.components.items() if entry.parts]
    facts += [("changed", change) for change in manifest.changes]
    facts += [("note", note) for note in bundle.notes]
    print(table(("", ""), facts).lstrip())
    rows = [
        (
            name,
            entry.format,
            entry.weights,
            "" if entry.sqnr_db is None else f"{entry.sqnr_db:.1f} dB",
            _names(entry.inputs),
        )
        for name, entry in manifest.components.items()
    ]
    print("\n" + table(("component", "format", "weights", "SQNR", "inputs"), rows))
    return 0


def _sizes(manifest: Manifest) -> list[str]:
    """The native size, and the others that have graphs of their own."""
    further = [(sized.width, sized.height) for entry in manifest.components.values() for sized in entry.sizes]
    numbers = manifest.numbers
    return [f"{width}x{height}" for width, height in dict.fromkeys([(numbers.width, numbers.height), *further])]


def _parts(name: str, entry: ComponentEntry) -> str:
    largest = max(part.weight_bytes for part in entry.parts)
    return f"{name}: {len(entry.parts)} of at most {largest / 1e6:.1f} MB of weights, for --residency stream"


def _names(tensors: object) -> str:
    return ", ".join(tensors) if isinstance(tensors, dict) else str(tensors)


COMMAND = Command("inspect", "describe a bundle, or how a picture was made", configure, run)
