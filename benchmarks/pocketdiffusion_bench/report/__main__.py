"""`python -m pocketdiffusion_bench.report`: saved records in another format, or the tables of a README."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pocketdiffusion.atomic import replace_file
from pocketdiffusion.errors import PocketDiffusionError
from pocketdiffusion_bench.report import FORMATS, read, write
from pocketdiffusion_bench.report.readme import fill


def main() -> int:
    """Parse the command line, convert. Exit code 1: an error, or with --check a README that is not up to date."""
    parser = argparse.ArgumentParser(
        prog="python -m pocketdiffusion_bench.report", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help="what `bench -o jsonl` wrote")
    parser.add_argument("-o", "--format", choices=FORMATS, default="md")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="make the tables of this file anew instead")
    parser.add_argument("--check", action="store_true", help="change nothing; say whether the README is up to date")
    args = parser.parse_args()
    if bool(args.files) == (args.readme is not None):
        parser.error("give either files of records or --readme")
    if args.check and args.readme is None:
        parser.error("--check is for --readme")
    try:
        if args.readme is None:
            write(read(args.files), args.format, sys.stdout)
            return 0
        return _readme(args.readme, check=args.check)
    except (PocketDiffusionError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1


def _readme(file: Path, *, check: bool) -> int:
    text = file.read_text(encoding="utf-8")
    filled = fill(text, file.parent)
    if check and filled != text:
        print(f"{file}: its tables differ from the results; run this again without --check", file=sys.stderr)
        return 1
    if filled != text:
        replace_file(file, filled.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
