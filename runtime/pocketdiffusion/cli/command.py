"""What a command of the command line is made of."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Command:
    """One verb. Other distributions join by the entry point group "pocketdiffusion.commands"."""

    name: str
    help: str
    """One line for the overview."""
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    """Returns the exit code; raises PocketDiffusionError for what the user can mend."""
