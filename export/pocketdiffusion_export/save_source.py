"""`python -m pocketdiffusion_export.save_source SOURCE DEST`: a source as a Diffusers folder of safetensors, float32.

Other programs that read Diffusers folders get the weights that an export starts from: of "random:NAME" the very same
numbers, of a single-file checkpoint the converted ones. Text encoders keep transformers' `text_model.` prefix.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pocketdiffusion.errors import PocketDiffusionError
from pocketdiffusion_export.source import load
from pocketdiffusion_export.write import assembled


def save_source(source: str, destination: Path) -> None:
    """Write the folder, whole or not at all. Raises ExportError, also when `destination` holds anything."""
    with assembled(destination) as folder:
        load(source).pipe.save_pretrained(str(folder), safe_serialization=True)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and save; the folder's path on stdout, errors as one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m pocketdiffusion_export.save_source", description="write a source as a Diffusers folder"
    )
    parser.add_argument("source", metavar="SOURCE", help="random:NAME, Diffusers folder or .safetensors checkpoint")
    parser.add_argument("destination", metavar="DEST", type=Path, help="folder to write")
    args = parser.parse_args(arguments)
    try:
        save_source(args.source, args.destination)
    except PocketDiffusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(args.destination)
    return 0


if __name__ == "__main__":
    sys.exit(main())
