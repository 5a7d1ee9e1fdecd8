"""The stages as commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from sticker_train.loop import Settings
from sticker_train.pack import FREE_SETS, DataError, pack

Stage = Callable[[argparse.Namespace], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a stage; returns the exit code."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except (DataError, FileNotFoundError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python models/sticker/train", description=__doc__)
    stages = parser.add_subparsers(title="stages", required=True, metavar="STAGE")
    packing = stages.add_parser("pack", help="put the pictures of some sets in one file")
    packing.add_argument("source", type=Path, help="folder with captions.jsonl and a zip for each set")
    packing.add_argument("file", type=Path, help="the file to write")
    packing.add_argument("--sets", nargs="+", default=FREE_SETS, help="default: those that ask for no credit")
    packing.add_argument("--side", type=int, help="pixels; default: as they are")
    packing.set_defaults(run=_pack)
    judge = _training(stages, "judge", _judge, Settings(steps=1200, batch=192, rate=1.5e-3))
    judge.add_argument("--tokenizer", type=Path, required=True, help="folder with it, or a Diffusers folder")
    return parser


def _training(
    stages: argparse._SubParsersAction[argparse.ArgumentParser], name: str, run: Stage, default: Settings
) -> argparse.ArgumentParser:
    parser = stages.add_parser(name, help=f"train the {name}", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="file of the stage `pack`")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints; a run there goes on")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default.device)
    parser.add_argument("--minutes", type=float, help="stop after these, with a checkpoint")
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--batch", type=int, default=default.batch)
    parser.add_argument("--rate", type=float, default=default.rate, help="learning rate")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.set_defaults(run=run)
    return parser


def _pack(args: argparse.Namespace) -> None:
    count = pack(args.source, args.file, args.sets, args.side)
    print(f"{count} pictures, {args.file.stat().st_size:,} bytes in {args.file}")


def _judge(args: argparse.Namespace) -> None:
    from sticker_train.judge import SIDE, JudgeTask, load_tokenizer
    from sticker_train.loop import train
    from sticker_train.pack import read_pack

    settings = _settings(args)
    pictures = read_pack(args.data, SIDE).part(held_out=False)
    task = JudgeTask(pictures, load_tokenizer(args.tokenizer), settings.seed, settings.device)
    train(task, args.out, settings, _say)


def _settings(args: argparse.Namespace) -> Settings:
    import torch

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return Settings(
        steps=args.steps,
        batch=args.batch,
        rate=args.rate,
        minutes=args.minutes,
        seed=args.seed,
        device=args.device,
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
