"""The command line: results on stdout, words for people on stderr, exit codes 0, 1 error, 2 usage, 130 interrupted."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper
from typing import Any, NoReturn

from pocketdiffusion._version import __version__
from pocketdiffusion.cli.command import Command
from pocketdiffusion.errors import PocketDiffusionError

COMMANDS = {
    "generate": "pocketdiffusion.cli.generate",
    "devices": "pocketdiffusion.cli.devices",
    "models": "pocketdiffusion.cli.models",
    "inspect": "pocketdiffusion.cli.inspect",
    "verify": "pocketdiffusion.cli.verify",
    "tune": "pocketdiffusion.cli.tune",
    "cache": "pocketdiffusion.cli.cache",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        # Prompts and paths may hold letters that a terminal or a pipe, as on Windows, has no code for.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = _parser(words).parse_args(words)
        return int(args.run(args))
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # Whoever read stdout has gone; a second error while Python flushes it at exit would only be noise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (PocketDiffusionError, OSError, MemoryError) as error:
        if "--debug" in words:
            raise
        code = error.exit_code if isinstance(error, PocketDiffusionError) else 1
        return _fail(_one_line(error), code)


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Refuses what is left over, so that it is a command's own help that the error points at."""
        found, left = super().parse_known_args(args, namespace)
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}")
        return found, left

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="pocketdiffusion", description="Image generation on this device.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"pocketdiffusion {__version__}")
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _commands(words):
        verb = verbs.add_parser(command.name, help=command.help, description=command.help, allow_abbrev=False)
        verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.configure(verb)
        verb.set_defaults(run=command.run)
    return parser


def _commands(words: Sequence[str]) -> list[Command]:
    """The command that is asked for, or all of them where that is not clear: loading all would slow each start."""
    if words and words[0] in COMMANDS:
        return [import_module(COMMANDS[words[0]]).COMMAND]
    from importlib.metadata import entry_points  # takes longer than what a command of ours imports

    own = [import_module(module).COMMAND for module in COMMANDS.values()]
    return own + [entry.load() for entry in entry_points(group="pocketdiffusion.commands")]


def _one_line(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "out of memory; close other programs, generate fewer or smaller images, or use --residency release"
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str, code: int) -> int:
    print(f"pocketdiffusion: {message}", file=sys.stderr)
    return code
