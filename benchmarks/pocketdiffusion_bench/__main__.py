"""`python -m pocketdiffusion_bench MODEL…`: the `bench` command on its own."""

from __future__ import annotations

import argparse
import sys

from pocketdiffusion.errors import PocketDiffusionError
from pocketdiffusion_bench.cli import COMMAND


def main() -> int:
    """Parse the command line and measure; errors are one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m pocketdiffusion_bench", description=COMMAND.help)
    COMMAND.configure(parser)
    try:
        return COMMAND.run(parser.parse_args())
    except (PocketDiffusionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, PocketDiffusionError) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
