"""`python -m pocketdiffusion_bench.judge CASE...`: how well pictures show their prompts, by a bundle's judge.

A case is a bundle, or BUNDLE@STEPS, or BUNDLE@STEPS@GUIDANCE; BUNDLE+tiny decodes with its tiny decoder. All cases draw
the same prompts with the same seeds, and one judge, the first bundle's, looks at all of them; without a network and
without torch. The table goes to stdout as Markdown: the mean score, how often a picture's prompt is found among all
captions, how far the set is from the real pictures, or from the first case's where there are none, how unlike pictures
of one prompt are, and how near the pictures come to those of the training (median PSNR of small pictures to the
nearest; that of real pictures says what is near).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pocketdiffusion.errors import PocketDiffusionError
from pocketdiffusion.image import from_image
from pocketdiffusion.judge import Judge
from pocketdiffusion.pipeline import Pipeline
from pocketdiffusion.tensors import AnyArray, Array
from pocketdiffusion.timing import Timings
from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.judging import diversity, found_within, frechet, nearest_db, ranks
from pocketdiffusion_bench.quality import pixels
from pocketdiffusion_bench.sheet import contact_sheet

BATCH = 10
"""Pictures at a time; an image of a batch is the same as alone."""
REAL = ".png"
_CASE = re.compile(r"([^@]+?)(\+tiny)?(?:@(\d+)(?:@(\d+(?:\.\d+)?))?)?")
SEEDS, DIVERSE = 4, 10
"""Pictures of one prompt, and of how many prompts, that diversity is measured on."""
HEAD = """| pictures | score | prompt found first | among five | distance | diversity | nearest, dB |
|---|---|---|---|---|---|---|"""


@dataclass(frozen=True, slots=True)
class Case:
    """A bundle and how it draws."""

    bundle: str
    steps: int | None = None
    guidance: float | None = None
    decoder: str | None = None

    @classmethod
    def of(cls, text: str) -> Case:
        """From BUNDLE[+tiny][@STEPS[@GUIDANCE]]. Raises BenchError."""
        found = _CASE.fullmatch(text)
        if found is None:
            raise BenchError(f"{text!r} is no case; write BUNDLE, BUNDLE@STEPS or BUNDLE@STEPS@GUIDANCE")
        bundle, tiny, steps, guidance = found.groups()
        numbers = None if steps is None else int(steps), None if guidance is None else float(guidance)
        return cls(bundle, *numbers, None if tiny is None else "tiny")

    @property
    def name(self) -> str:
        """For the table and the sheet: the bundle's folder, its decoder and its steps."""
        words = (Path(self.bundle).name, self.decoder, self.steps)
        return " ".join(str(word) for word in words if word is not None)


@dataclass(frozen=True, slots=True)
class Judged:
    """A set of pictures as the judge sees it."""

    vectors: Array
    features: Array


def draw(pipe: Pipeline, case: Case, prompts: Sequence[str]) -> list[AnyArray]:
    """One picture for each prompt, prompt i with seed i: uint8 (height, width, 3)."""
    pictures: list[AnyArray] = []
    for start in range(0, len(prompts), BATCH):
        part = list(prompts[start : start + BATCH])
        result = pipe(
            part,
            seed=start,
            num_inference_steps=case.steps,
            guidance_scale=case.guidance,
            decoder=case.decoder,
        )
        pictures += [np.asarray(image) for image in result.images]
    return pictures


def judged(judge: Judge, pictures: Sequence[AnyArray]) -> Judged:
    """What the judge makes of pictures, uint8 (height, width, 3), of one or several sizes."""
    seen = [judge.see(from_image(picture), Timings()) for picture in pictures]
    return Judged(np.concatenate([vectors for vectors, _ in seen]), np.concatenate([found for _, found in seen]))


def row(name: str, found: Judged, read: Array, own: Sequence[int], reference: Judged, *more: str) -> str:
    """One line of the table. `read` are the vectors of all captions, `own` says which is each picture's; `more` are the
    last columns."""
    places = ranks(found.vectors, read, own)
    score = float((found.vectors * read[list(own)]).sum(1).mean())
    figures = (f"{score:.3f}", f"{found_within(places, 1):.1%}", f"{found_within(places, 5):.1%}")
    cells = (name, *figures, f"{frechet(found.features, reference.features):.4f}", *more)
    return f"| {' | '.join(cells)} |"


def unlike(pipe: Pipeline, case: Case, judge: Judge, prompts: Sequence[str]) -> str:
    """The diversity of a case, of a few prompts with a few seeds each."""
    repeated = [prompt for prompt in prompts[:DIVERSE] for _ in range(SEEDS)]
    seen = judged(judge, draw(pipe, case, repeated)).vectors
    return f"{diversity(seen.reshape(-1, SEEDS, seen.shape[-1])):.3f}"


def nearness(pictures: Sequence[AnyArray], training: AnyArray | None) -> str:
    """The median PSNR to the nearest training picture, at the size of those; "" where none are given."""
    if training is None:
        return ""
    size = training.shape[2], training.shape[1]
    small = [Image.fromarray(picture).resize(size, Image.Resampling.BOX) for picture in pictures]
    return f"{float(np.median(nearest_db(np.stack([np.asarray(each) for each in small]), training))):.1f}"


def real_pictures(folder: Path, captions: Sequence[str]) -> tuple[list[AnyArray], list[int]]:
    """Pictures named NUMBER-anything.png, and the captions they show: lines of the captions' file, from 1.

    Raises BenchError where there are none, or one whose number is no line.
    """
    files = sorted(folder.glob(f"*{REAL}"))
    if not files:
        raise BenchError(f"{folder} holds no {REAL} files; write them there, or leave --real out")
    numbers = [file.name.partition("-")[0] for file in files]
    for file, number in zip(files, numbers, strict=True):
        if not number.isdecimal() or not 1 <= int(number) <= len(captions):
            raise BenchError(f"{file.name} begins with no line of the captions' file, 1 to {len(captions)}")
    pictures: list[AnyArray] = [pixels(file) for file in files]
    return pictures, [int(number) - 1 for number in numbers]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, draw, judge, print the table, write the sheet."""
    args = _parser().parse_args(arguments)
    try:
        for line in _table(args):
            print(line, flush=True)
    except PocketDiffusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pocketdiffusion_bench.judge", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("cases", nargs="+", metavar="CASE", help="BUNDLE[+tiny][@STEPS[@GUIDANCE]]")
    parser.add_argument("--captions", type=Path, required=True, help="a prompt per line: what the pictures could show")
    parser.add_argument("--count", type=int, default=100, help="how many of the captions are drawn (default: 100)")
    parser.add_argument("--real", type=Path, help="folder of true pictures, NUMBER-anything.png by line of --captions")
    parser.add_argument("--training", type=Path, help="small pictures of the training, .npy, uint8 (n, side, side, 3)")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet, .jpg or .png, of --sheet-prompts")
    parser.add_argument("--sheet-prompts", type=Path, help="a prompt per line")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    return parser


def _table(args: argparse.Namespace) -> Iterator[str]:
    if (args.sheet is None) != (args.sheet_prompts is None):
        raise BenchError("--sheet and --sheet-prompts belong together; give both or none")
    captions = _lines(args.captions)
    training = None if args.training is None else _training(args.training)
    shown = [] if args.sheet is None else _lines(args.sheet_prompts)
    cases = [Case.of(text) for text in args.cases]
    judge = _judge(_open(cases[0], args))
    read = judge.read(captions, Timings())
    reference: Judged | None = None
    columns: dict[str, list[AnyArray]] = {}
    yield HEAD
    if args.real is not None:
        pictures, own = real_pictures(args.real, captions)
        reference = judged(judge, pictures)
        yield row("real", reference, read, own, reference, "", nearness(pictures, training))
    for case in cases:
        pipe = _open(case, args)
        drawn = draw(pipe, case, captions[: args.count])
        found = judged(judge, drawn)
        reference = reference or found
        more = unlike(pipe, case, judge, captions), nearness(drawn, training)
        yield row(case.name, found, read, range(len(found.vectors)), reference, *more)
        columns[case.name] = draw(pipe, case, shown)
        pipe.close()
    if args.sheet is not None:
        contact_sheet(shown, columns, args.sheet)


def _open(case: Case, args: argparse.Namespace) -> Pipeline:
    return Pipeline.from_pretrained(case.bundle, device=args.device, threads=args.threads)


def _judge(pipe: Pipeline) -> Judge:
    if pipe.judge is None:
        raise BenchError(f"{pipe.bundle.manifest.name} has no judge; name a bundle first that has one")
    return pipe.judge


def _training(file: Path) -> AnyArray:
    try:
        found: AnyArray = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise BenchError(f"{file} can't be read ({error}); give the training.npy that the recipe writes") from None
    if found.dtype != np.uint8 or found.ndim != 4 or found.shape[-1] != 3:
        raise BenchError(f"{file} holds {found.dtype} {found.shape}; small pictures are uint8 (n, side, side, 3)")
    return found


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise BenchError(f"{file} can't be read: {error.strerror}") from None
    if not any(lines):
        raise BenchError(f"{file} holds no prompts; write one a line")
    return [line for line in lines if line]


if __name__ == "__main__":
    sys.exit(main())
