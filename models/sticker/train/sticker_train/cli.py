"""The stages as commands: `python models/sticker/train STAGE …`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sticker_train.held_out import write_evaluation
from sticker_train.loop import Settings
from sticker_train.pack import FREE_SETS, DataError, pack, read_pack
from sticker_train.run import Run, hand_over
from sticker_train.shapes import SHAPES

SETTINGS = {
    "judge": Settings(steps=1200, batch=192, rate=1.5e-3),
    "vae": Settings(steps=6000, batch=32, rate=1e-3),
    "tiny": Settings(steps=3000, batch=32, rate=1e-3),
    "denoiser": Settings(steps=20000, batch=64, rate=6e-4, matrices=True),
    "distil": Settings(steps=2000, batch=32, rate=1e-4, average=0.99),
}
"""How each stage trains where nothing else is asked."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a stage; returns the exit code."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except (DataError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python models/sticker/train", description="Train the embedded model.")
    stages = parser.add_subparsers(title="stages, in the order of use", required=True, metavar="STAGE")
    packing = stages.add_parser("pack", help="put the pictures of some sets in one file")
    packing.add_argument("source", type=Path, help="folder with captions.jsonl and a zip for each set")
    packing.add_argument("file", type=Path, help="the file to write")
    packing.add_argument("--sets", nargs="+", default=FREE_SETS, help="default: those that ask for no credit")
    packing.add_argument("--side", type=int, help="pixels; default: as they are")
    packing.set_defaults(run=_pack)
    captions = stages.add_parser("captions", help="write what is evaluated with: captions, and held-out pictures")
    captions.add_argument("--data", type=Path, required=True, help="file of the stage `pack`")
    captions.add_argument("--to", type=Path, required=True, help="folder for captions.txt and real/*.png")
    captions.add_argument("--count", type=int, default=500, help="captions (default: 500)")
    captions.add_argument("--side", type=int, default=128, help="of the pictures (default: 128)")
    captions.set_defaults(run=_captions)
    words = _stage(stages, "tokenizer", "learn the words")
    words.set_defaults(run=_tokenizer)
    for name, default in SETTINGS.items():
        _training(_stage(stages, name, f"train the {name}"), name, default)
    handing = stages.add_parser("hand-over", help="write the Diffusers folder that `pocketdiffusion export` reads")
    _folders(handing)
    handing.add_argument("--to", type=Path, required=True, help="the folder to write")
    handing.add_argument("--distilled", action="store_true", help="with the UNet for few steps")
    handing.set_defaults(run=_hand_over)
    return parser


def _stage(
    stages: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str
) -> argparse.ArgumentParser:
    parser = stages.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="file of the stage `pack`")
    parser.add_argument("--side", type=int, choices=sorted(SHAPES), default=128, help="of the model's pictures")
    _folders(parser)
    return parser


def _folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", dest="folder", type=Path, required=True, help="folder of the training")
    parser.add_argument("--start", type=Path, help="Diffusers folder for what the training has not made itself")


def _training(parser: argparse.ArgumentParser, name: str, default: Settings) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default.device)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default=default.precision, help="where safe")
    parser.add_argument("--minutes", type=float, help="stop after these; the same command goes on")
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--batch", type=int, default=default.batch)
    parser.add_argument("--rate", type=float, default=default.rate, help="learning rate")
    parser.add_argument("--average", type=float, default=default.average, help="decay of the weights' average")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.set_defaults(run=_train, stage=name)


def _pack(args: argparse.Namespace) -> None:
    count = pack(args.source, args.file, args.sets, args.side)
    print(f"{count} pictures, {args.file.stat().st_size:,} bytes in {args.file}")


def _captions(args: argparse.Namespace) -> None:
    count = write_evaluation(read_pack(args.data, args.side), args.to, args.count)
    print(f"{count} held-out pictures in {args.to}")


def _tokenizer(args: argparse.Namespace) -> None:
    from sticker_train.stages import tokenizer

    tokenizer(_run(args), args.data, SHAPES[args.side], _say)


def _train(args: argparse.Namespace) -> None:
    import torch

    from sticker_train.stages import TRAINED

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    settings = Settings(
        steps=args.steps,
        batch=args.batch,
        rate=args.rate,
        minutes=args.minutes,
        seed=args.seed,
        device=args.device,
        precision=args.precision,
        matrices=SETTINGS[args.stage].matrices,
        average=args.average,
    )
    TRAINED[args.stage](_run(args), args.data, SHAPES[args.side], settings, _say)


def _hand_over(args: argparse.Namespace) -> None:
    from sticker_train.stages import few_steps, scheduler_of, second_order

    run = _run(args)
    trained_on = scheduler_of(run)
    scheduler = few_steps(trained_on) if args.distilled else second_order(trained_on)
    parts = hand_over(run, args.to, scheduler, distilled=args.distilled)
    print(f"{', '.join(parts)} in {args.to}")


def _run(args: argparse.Namespace) -> Run:
    return Run(args.folder, args.start)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
