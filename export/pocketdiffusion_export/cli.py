"""`pocketdiffusion export SOURCE DEST`: the command line of the export stage. Imports no torch until it runs."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pocketdiffusion.cli.command import Command
from pocketdiffusion.timing import peak_rss
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.plan import BATCHES, DYNAMIC, STRIDES, make_plan
from pocketdiffusion_export.quant import RECIPES
from pocketdiffusion_export.targets import TARGETS

if TYPE_CHECKING:
    from pocketdiffusion_export.export import Made, Summary

USUAL = {"target": "onnx", "recipe": "fp32", "size": DYNAMIC, "batch": None, "preset": None, "accept_error": False}
USUAL |= {"banded_vae": False, "chunk_unet": False, "downsample_keys": None}
"""What the options of an export from torch are when they are not given."""
CHANGES = ("part_size", "tiny_vae")
"""Options that change a bundle, one at a time."""
REQUIRED = ("torch", "diffusers", "transformers", "onnx")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="Diffusers folder, .safetensors checkpoint, hub:OWNER/NAME, random:NAME, or with --part-size or "
        "--tiny-vae a bundle",
    )
    parser.add_argument("destination", metavar="DEST", help="bundle to write; a bundle that is there is replaced")
    parser.add_argument(
        "--target",
        default=USUAL["target"],
        help=f"graph format: {', '.join(TARGETS)} (default: onnx); several with commas give DEST/onnx, DEST/openvino …",
    )
    parser.add_argument(
        "--recipe", default=USUAL["recipe"], help=f"storage of weights: {', '.join(RECIPES)} (default: fp32)"
    )
    parser.add_argument(
        "--size",
        default=USUAL["size"],
        metavar="WIDTHxHEIGHT",
        help="fix the graphs to an image size, or with commas to several, which share their weights and of which the "
        f"first is the default; prompts may still differ in number and length (default: {DYNAMIC})",
    )
    parser.add_argument(
        "--batch",
        type=int,
        choices=BATCHES,
        help="fix all other axes too, as NPUs want it: the denoiser takes 1 row (guidance in turn) or 2 (both passes "
        "together), and prompts have one length (default: free)",
    )
    parser.add_argument(
        "--banded-vae",
        action="store_true",
        help="also write the VAE's decoder in pieces, for `generate --vae-bands`: decoding in little memory, exactly",
    )
    parser.add_argument(
        "--chunk-unet",
        action="store_true",
        help="write Core ML's UNet in two programs of half the size, UnetChunk1 and UnetChunk2, as iOS needs it",
    )
    parser.add_argument(
        "--downsample-keys",
        type=int,
        choices=STRIDES,
        help="let the UNet's largest self-attention read every 2nd (3rd, 4th) key along both sides: faster steps, and "
        "somewhat other pictures, which the summary measures (arXiv:2402.13573)",
    )
    parser.add_argument(
        "--part-size",
        type=int,
        metavar="MB",
        help="also cut components with more weights into parts of at most MB megabytes, which read the same weights, "
        "for generate --residency stream: less memory, slower steps. A bundle as SOURCE is copied, and the copy cut",
    )
    parser.add_argument(
        "--tiny-vae",
        metavar="SOURCE",
        help="also write a tiny decoder, for `generate --decoder tiny`, of this Diffusers folder of an AutoencoderTiny "
        "for the model's latents, or random:taesd (a folder tiny_vae in SOURCE is taken without a word). A bundle as "
        "SOURCE is copied, and the copy gets it",
    )
    parser.add_argument("--preset", help="TOML file with name, licence and numbers; see models/README.md")
    parser.add_argument(
        "--accept-error", action="store_true", help="write the bundle although a figure is under its threshold"
    )


def run(args: argparse.Namespace) -> int:
    """Export; progress and summary on stderr, the bundle's path on stdout. Raises PocketDiffusionError."""
    start = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - start:6.1f} s] {line}", file=sys.stderr, flush=True)

    if (Path(args.source) / "manifest.json").is_file():
        return _change(args, say)
    plan = make_plan(
        args.source,
        args.destination,
        target=args.target,
        recipe=args.recipe,
        size=args.size,
        batch=args.batch,
        part_size=args.part_size,
        preset=args.preset,
        accept_error=args.accept_error,
        banded_vae=args.banded_vae,
        tiny_vae=args.tiny_vae,
        chunk_unet=args.chunk_unet,
        downsample_keys=args.downsample_keys,
    )
    _require_libraries()
    from pocketdiffusion_export.export import export

    summary = export(plan, say)
    _print_summary(summary)
    for made in summary.bundles:
        print(made.destination)
    return 0


def _change(args: argparse.Namespace, say: Callable[[str], None]) -> int:
    """A copy of a bundle, with parts or with a tiny decoder."""
    asked = [name for name in CHANGES if getattr(args, name) is not None]
    able = {"accept_error"} if asked == ["tiny_vae"] else set()
    needless = [name for name in USUAL if getattr(args, name) != USUAL[name] and name not in able]
    if len(asked) != 1 or needless:
        given = ", ".join(f"--{name.replace('_', '-')}" for name in [*asked, *needless])
        raise ExportError(
            f"{args.source} is a bundle, which can be cut into parts or get a tiny decoder and no more"
            f"{f', and {given} was given' if given else ''}; give --part-size MB or --tiny-vae SOURCE alone, or a "
            "bundle's source"
        )
    _require_libraries()
    from pocketdiffusion_export.additions import add_tiny_vae
    from pocketdiffusion_export.parts import cut_bundle

    source, destination = Path(args.source), Path(args.destination)
    if args.tiny_vae is not None:
        notes = add_tiny_vae(source, destination, args.tiny_vae, say, accept_error=args.accept_error)
    else:
        notes = cut_bundle(source, destination, args.part_size, say)
    for note in notes:
        print(f"{args.destination}: {note}", file=sys.stderr)
    print(args.destination)
    return 0


def _require_libraries() -> None:
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"export needs {', '.join(missing)}; install: pip install 'pocketdiffusion[export,cpu]'")


COMMAND = Command("export", "turn a torch model into a verified bundle", configure, run)


def _print_summary(summary: Summary) -> None:
    lines = [line for made in summary.bundles for line in _describe(made)]
    peak = peak_rss()
    memory = "" if peak is None else f", peak memory {peak / 2**20:,.0f} MiB"
    lines.append(f"done in {summary.seconds:.0f} s{memory}")
    print("\n".join(lines), file=sys.stderr)


def _describe(made: Made) -> list[str]:
    manifest = made.manifest
    lines = [f"{entry.size:>12,} bytes  {entry.path}" for entry in manifest.files]
    lines.append(f"{sum(entry.size for entry in manifest.files):>12,} bytes in {len(manifest.files)} files")
    for item in made.measured:
        for name, figures in item.outputs.items():
            lines.append(
                f"{item.component:12} {item.engine:12} {name:18} SQNR {figures.sqnr_db:6.1f} dB   PSNR "
                f"{figures.psnr_db:6.1f} dB   worst channel {figures.worst_channel_db:6.1f} dB"
            )
    image = manifest.golden_image
    if image is not None and image.psnr_db is not None:
        lines.append(f'whole image "{image.prompt}": PSNR {image.psnr_db:.1f} dB')
    return lines + [f"{made.destination}: {note}" for note in (*made.notes, *manifest.changes)]
