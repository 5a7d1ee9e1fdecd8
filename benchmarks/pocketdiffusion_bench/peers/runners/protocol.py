"""What every runner shares: its command line, its events, and the switches that keep other libraries off the network.

Runners are scripts for the peers' own environments: this folder's files import nothing of ours but each other. The
events are those of `pocketdiffusion_bench.events`. Stages follow on each other without gaps: entering one ends the
one before.
"""

from __future__ import annotations

import time

FIRST_LINE = time.perf_counter()  # what was before this line is Python's own start

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
from collections.abc import Callable, Mapping  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

START = "POCKETDIFFUSION_BENCH_START"
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}


class Events:
    """Writes stages and events as JSON lines, each at once."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._stage: str | None = None
        self._since = 0.0

    def enter(self, name: str, since: float | None = None) -> None:
        """End the present stage, if there is one, and begin another, now or at `since`."""
        self.leave()
        self._stage, self._since = name, self._since if since is None else since
        self.write("begin", name=name, at=self._since)

    def leave(self) -> None:
        """End the present stage; what follows belongs to none until the next is entered."""
        now = time.perf_counter()
        if self._stage is not None:
            self.span(self._stage, self._since, now)
        self._stage, self._since = None, now

    def span(self, name: str, start: float, end: float) -> None:
        """A stretch of time that is no stage of its own, or was timed elsewhere."""
        self.write("span", name=name, start=start, end=end)

    def write(self, event: str, **values: Any) -> None:
        """One line."""
        os.write(self._file, (json.dumps({"event": event, **values}) + "\n").encode())


@dataclass(frozen=True)
class Job:
    """What the parent asks of a runner."""

    case: Mapping[str, Any]
    """The fields of `pocketdiffusion_bench.case.Case`; size, steps and guidance are always given."""
    settings: Mapping[str, Any]
    """The peer's own, above all "model": what it loads."""
    image: Path
    images: int
    events: Events

    def draw(self, picture: Callable[[], Any]) -> Any:
        """Call `picture` for every image asked for, which enters its stages and gives a PIL image; save each.

        Returns the last image. All have the same seed, so that equal pictures are expected.
        """
        made = None
        for index in range(self.images):
            start = time.perf_counter()
            made = picture()
            self.events.enter("save")
            file = self.image.with_name(f"{self.image.stem}-{index}{self.image.suffix}")
            made.save(file)
            self.events.leave()
            self.events.span("image", start, time.perf_counter())
            self.events.write("picture", path=str(file))
        return made


def start() -> Job:
    """Read the command line, tell Python's own start and enter the stage "import"."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", type=json.loads, required=True)
    parser.add_argument("--settings", type=json.loads, required=True)
    parser.add_argument("--events", type=Path, required=True)
    parser.add_argument("--image", type=Path, required=True, help="picture N is written to NAME-N.png beside it")
    parser.add_argument("--images", type=int, default=1)
    args = parser.parse_args()
    os.environ.update(OFFLINE)
    events = Events(args.events)
    if START in os.environ:
        events.span("python", float(os.environ[START]), FIRST_LINE)
    events.enter("import", FIRST_LINE)
    return Job(args.case, args.settings, args.image, args.images, events)


def finish(job: Job, used: Mapping[str, Any]) -> None:
    """Tell what was really used, and that all pictures were made."""
    job.events.write("configuration", configuration=dict(used))
    job.events.write("done", at=time.perf_counter(), peak_rss=peak_rss())


def peak_rss() -> int | None:
    """The kernel's maximum resident set of this process in bytes; None where /proc does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


def normal(seed: int, size: int) -> Any:
    """What ``torch.randn(size, generator=torch.Generator().manual_seed(seed))`` gives on the CPU, without torch.

    Float32, shape (size,); `size` must be a multiple of 16. MT19937 seeded with the low 32 bits, 24-bit uniforms, and
    Box-Muller over rows of 16, of which the first eight are the radii (ATen/native/cpu/DistributionTemplates.h).
    """
    import numpy as np

    words = np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 2**32, size=size, dtype=np.uint32)
    rows = ((words & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2**-24)).reshape(-1, 2, 8)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - rows[:, 0]))
    angle = np.float32(2 * np.pi) * rows[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(size)
