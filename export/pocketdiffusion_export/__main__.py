"""`python -m pocketdiffusion_export SOURCE DEST …`: the `export` command on its own."""

from __future__ import annotations

import argparse
import sys

from pocketdiffusion.errors import PocketDiffusionError
from pocketdiffusion_export.cli import COMMAND


def main() -> int:
    """Parse the command line and run the export; errors are one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m pocketdiffusion_export", description=COMMAND.help)
    COMMAND.configure(parser)
    try:
        return COMMAND.run(parser.parse_args())
    except PocketDiffusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
