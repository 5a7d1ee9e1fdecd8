"""`python -m pocketdiffusion` is the `pocketdiffusion` command."""

import sys

from pocketdiffusion.cli import main

if __name__ == "__main__":
    sys.exit(main())
