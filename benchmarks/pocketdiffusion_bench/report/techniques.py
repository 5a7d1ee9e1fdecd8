"""What each way of doing less work gains and loses: one outcome a line of JSON, and the table for people."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.report.markdown import machine

HEAD = """| exact run | technique | passes | time | PSNR, dB: median / mean / worst | SSIM: median / mean / worst |
|---|---|---|---|---|---|"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One technique against the exact run of the same prompts, seeds, sampler and steps."""

    technique: str
    """What is set, e.g. "preset=fast"."""
    model: str
    sampler: str
    steps: int
    """Of the exact run."""
    guidance: float
    passes: int
    """Rows that the denoiser was fed for one picture; a guided step is two."""
    exact_passes: int
    time: float
    """Share of the exact run's processor time for whole pictures, on one thread."""
    psnr_db: tuple[float, ...]
    """Of each prompt's picture; 99 stands for an equal one."""
    ssim: tuple[float, ...]
    machine: Mapping[str, Any]
    """See `machine.describe`."""

    @property
    def setting(self) -> str:
        """What outcomes of one table should have in common."""
        place = machine({name: value for name, value in self.machine.items() if name != "revision"})
        return f"{self.model}, guidance {self.guidance:g}. {place}"

    def row(self) -> str:
        """A line of the table."""
        saved = 1 - self.passes / self.exact_passes
        cells = (
            f"{self.sampler}, {self.steps} steps, {len(self.ssim)} prompts",
            f"`{self.technique}`",
            f"{self.passes} of {self.exact_passes} ({saved:.0%} saved)",
            f"{self.time:.2f}",
            _figures(self.psnr_db, 1),
            _figures(self.ssim, 3),
        )
        return f"| {' | '.join(cells)} |"

    def line(self) -> str:
        """As one line of JSON."""
        return json.dumps(asdict(self), allow_nan=False)


def read(files: Iterable[Path]) -> list[Outcome]:
    """The outcomes of files with a line each. Raises BenchError with file and line for anything else."""
    return [
        _parse(file, number, line) for file in files for number, line in enumerate(_text(file).splitlines(), start=1)
    ]


def table(outcomes: Sequence[Outcome]) -> str:
    """A Markdown table, below it what was drawn and where; ends with a line break."""
    drawn = dict.fromkeys(found.setting for found in outcomes)
    return "\n".join([HEAD, *(found.row() for found in outcomes), "", *drawn]) + "\n"


def _figures(values: Sequence[float], digits: int) -> str:
    return " / ".join(f"{of(values):.{digits}f}" for of in (statistics.median, statistics.fmean, min))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"{file} can't be read: {error}") from None


def _parse(file: Path, number: int, line: str) -> Outcome:
    try:
        data = json.loads(line)
        return Outcome(**{**data, "psnr_db": tuple(data["psnr_db"]), "ssim": tuple(data["ssim"])})
    except (ValueError, TypeError, KeyError) as error:
        raise BenchError(
            f"{file}:{number} is no outcome ({type(error).__name__}: {error}); give a file that "
            "`python -m pocketdiffusion_bench.presets -o jsonl` wrote"
        ) from None
