"""`pocketdiffusion generate`: a picture for some words."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pocketdiffusion.cli.command import Command
from pocketdiffusion.cli.progress import Progress
from pocketdiffusion.cli.values import amount
from pocketdiffusion.presets import DECODERS

DEFAULT_MODEL = "sticker"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("prompt", nargs="+", help="what to draw; several words need no quotes")
    parser.add_argument("-m", "--model", default=DEFAULT_MODEL, help="bundle name or folder (default: %(default)s)")
    parser.add_argument(
        "-o",
        "--output",
        default="{model}-{seed}.png",
        help=".png, .jpg or .webp; fields {seed} {index} {width} {height} {steps} {model} (default: %(default)s)",
    )
    parser.add_argument("--variant", help="which graphs of another exporter's folder, e.g. fp16 for model_fp16.onnx")
    _picture_options(parser)
    _sampling_options(parser)
    _machine_options(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of paths")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar, no word on devices")


def _picture_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("picture")
    group.add_argument("--negative-prompt", "--negative", metavar="TEXT", help="what to keep out")
    group.add_argument("--width", type=int, help="pixels (default: the model's)")
    group.add_argument("--height", type=int)
    group.add_argument("-n", "--count", type=int, default=1, help="images; image i uses seed + i (default: 1)")
    group.add_argument(
        "--best", type=int, metavar="N", help="save only the N that show the prompt best, if the model has a judge"
    )
    group.add_argument("--seed", type=int, help="0 to 2^64-1 (default: random; the file tells it)")
    group.add_argument(
        "--rng", choices=("cpu", "cuda"), default="cpu", help="whose torch noise to reproduce (default: cpu)"
    )
    group.add_argument("--image", metavar="FILE", help="start from this picture, or change it")
    group.add_argument("--mask", metavar="FILE", help="repaint only what is white in this picture (inpaint)")
    group.add_argument("--strength", type=float, help="how far to leave --image, 0 to 1 (default: 0.8; with --mask 1)")
    group.add_argument(
        "--image-guidance",
        type=float,
        metavar="SCALE",
        help="for models that follow instructions: how near to stay to --image (default: 1.5)",
    )
    group.add_argument("--no-safety-checker", action="store_true", help="do not check pictures, if the model would")
    group.add_argument("--quality", type=int, default=95, help="of JPEG and WebP, 1 to 100 (default: 95)")
    group.add_argument("--no-prompt-in-file", action="store_true", help="save the other parameters and the AI mark")


def _sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    group.add_argument("--guidance", "--cfg", type=float, metavar="SCALE", help="classifier-free guidance; 1 is off")
    group.add_argument("--guidance-rescale", type=float, default=0.0, metavar="0..1")
    group.add_argument(
        "--guidance-interval",
        type=_interval,
        default=(0.0, 1.0),
        metavar="A:B",
        help="part of the steps with guidance, e.g. 0:0.6",
    )
    group.add_argument(
        "--guidance-hold",
        type=float,
        metavar="0..1",
        help="from this part of the steps on, guidance adds what it last did, without its pass",
    )
    group.add_argument(
        "--guidance-in-turn", action="store_true", help="two passes instead of a batch of two: less memory"
    )
    group.add_argument("--sampler", help="e.g. 'euler', 'dpm++ 2m', 'DPM++ 2M Karras', 'DDIMScheduler'")
    group.add_argument("--schedule", help="e.g. karras, trailing, 'SGM Uniform'")
    group.add_argument(
        "--preset",
        default="exact",
        metavar="NAME",
        help="balanced or fast: leave out part of the work, for a slightly different picture (default: exact)",
    )
    group.add_argument(
        "--decoder",
        choices=tuple(DECODERS),
        help="tiny: much faster pictures with less detail, of models that have a tiny decoder (default: the preset's)",
    )
    group.add_argument(
        "--computed-steps", type=int, metavar="N", help="run the denoiser at N of the steps and forecast the others"
    )
    group.add_argument("--eta", type=float, help="share of fresh noise in stochastic samplers")
    group.add_argument(
        "--clip-skip", type=int, default=0, metavar="N", help="leave out the text encoder's last N layers"
    )
    group.add_argument("--plain-prompt", action="store_true", help="(word:1.2) is text, not a weight")
    group.add_argument(
        "--long-prompt", choices=("chunk", "truncate"), default="chunk", help="past the encoder's length"
    )


def _machine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, openvino:gpu …, or one for each part: denoiser=onnxruntime:cuda,vae=cpu",
    )
    group.add_argument("--threads", type=int, help="compute threads (default: the engine's choice)")
    group.add_argument(
        "--precision",
        help="the arithmetic: float32, bfloat16 or float16, or one for each part: denoiser=bfloat16,vae=float32 "
        "(default: what tune found for --device auto, else float32)",
    )
    group.add_argument(
        "--weights",
        choices=("fast", "compact"),
        help="compact: hold int8 and float16 weights as they are stored, for less memory and somewhat slower steps "
        "(default: what tune found for --device auto, else fast)",
    )
    group.add_argument("--no-cache", action="store_true", help="neither use nor keep compiled graphs on disk")
    group.add_argument(
        "--residency",
        choices=("keep", "release", "stream"),
        default="keep",
        help="release: close each graph after its stage, for less memory; stream: also hold only a part of a large "
        "graph at a time, for models larger than the memory (needs a bundle with parts)",
    )
    group.add_argument(
        "--vae-tile",
        type=int,
        metavar="PIXELS",
        help="decode in tiles of at most PIXELS x PIXELS: less memory, a slightly different picture",
    )
    group.add_argument(
        "--memory-limit",
        type=amount,
        metavar="SIZE",
        help="e.g. 800MB or 1.5GiB: hold the model so that the whole process keeps it, or say what it would need",
    )
    group.add_argument(
        "--vae-bands",
        type=int,
        metavar="ROWS",
        help="decode in bands of so many rows: less memory, the same picture; for models exported with --banded-vae",
    )


def run(args: argparse.Namespace) -> int:
    """Generate, save, print."""
    from pocketdiffusion.image import check_pattern, check_quality
    from pocketdiffusion.pipeline import Pipeline

    check_pattern(args.output)  # before minutes of work, not after
    check_quality(args.quality)
    fields = _fields(args)
    pipe = Pipeline.from_pretrained(
        args.model,
        device=args.device,
        threads=args.threads,
        precision=args.precision,
        weights=args.weights,
        size=None if args.width is None or args.height is None else (args.width, args.height),
        cache=not args.no_cache,
        residency=args.residency,
        variant=args.variant,
        safety_checker=None if args.no_safety_checker else "bundle",
        vae_tile=args.vae_tile,
        memory_limit=args.memory_limit,
        vae_bands=args.vae_bands,
    )
    pipe.budget.say = _say
    generation = pipe.stream(" ".join(args.prompt), **fields)
    if generation.memory_plan is not None and not args.quiet:
        _say(str(generation.memory_plan))
    with Progress("generating", quiet=args.quiet) as progress:
        for step in generation:
            progress.advance(step.index + 1, step.total)
    result = generation.result
    paths = result.save(args.output, with_prompt=not args.no_prompt_in_file, quality=args.quality)
    for line in (*(() if args.quiet else pipe.notes), *result.messages):
        _say(line)
    _print(result, paths, as_json=args.json)
    return 0


def _fields(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "negative_prompt": args.negative_prompt,
        "width": args.width,
        "height": args.height,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
        "guidance_rescale": args.guidance_rescale,
        "guidance_interval": args.guidance_interval,
        "guidance_hold": args.guidance_hold,
        "batched_guidance": not args.guidance_in_turn,
        "num_images_per_prompt": args.count,
        "best": args.best,
        "seed": args.seed,
        "rng": args.rng,
        "sampler": args.sampler,
        "schedule": args.schedule,
        "preset": args.preset,
        "decoder": args.decoder,
        "computed_steps": args.computed_steps,
        "eta": args.eta,
        "clip_skip": args.clip_skip,
        "weighting": not args.plain_prompt,
        "long_prompt": args.long_prompt,
        "image": None if args.image is None else Path(args.image),
        "mask_image": None if args.mask is None else Path(args.mask),
        "strength": args.strength,
        "image_guidance_scale": args.image_guidance,
    }


def _print(result: Any, paths: list[Path], *, as_json: bool) -> None:
    if not as_json:
        for path in paths:
            print(path)
        return
    images = [{"path": str(path), "seed": seed} for path, seed in zip(paths, result.seeds, strict=True)]
    report = {
        "images": images,
        "parameters": [asdict(parameters) for parameters in result.parameters],
        "timings": result.timings.samples,
        "configuration": {name: asdict(use) for name, use in result.configuration.items()},
        "messages": list(result.messages),
        "nsfw_content_detected": result.nsfw_content_detected,
        "scores": result.scores,
    }
    print(json.dumps(report, indent=2))


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _interval(text: str) -> tuple[float, float]:
    start, colon, stop = text.partition(":")
    try:
        if colon:
            return float(start), float(stop)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not A:B, e.g. 0:0.6")


COMMAND = Command("generate", "generate an image for a prompt", configure, run)
