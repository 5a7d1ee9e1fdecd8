"""`python -m pocketdiffusion_bench.first_image`: from process start to saved picture, in fresh processes.

Prints the median, minimum and maximum over the runs after one warm-up, for each device asked for, interleaved
(A B A B …) so that a machine that drifts drifts for all. Also: peak memory, and the share of the denoising loop that is
not spent in the denoiser's graph, which is this package's own Python and numpy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from pocketdiffusion_bench.measure import ProcessRun, run_process


def main() -> int:
    """Parse the command line, measure, print a Markdown table."""
    parser = argparse.ArgumentParser(
        prog="python -m pocketdiffusion_bench.first_image", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--device", action="append", help="repeat to compare (default: auto)")
    parser.add_argument("--model", default="sticker")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, help="default: the model's")
    args = parser.parse_args()
    devices = args.device or ["auto"]
    runs: dict[str, list[ProcessRun]] = {device: [] for device in devices}
    with tempfile.TemporaryDirectory() as folder:
        for round_ in range(args.runs + 1):
            for device in devices:
                found = run_process(_command(args, device, Path(folder) / "image.png"))
                if round_ > 0:
                    runs[device].append(found)
    print("| device | start to PNG, s (median, min - max) | peak RSS, MB | loop outside the graph |")
    print("|---|---|---|---|")
    for device, found_runs in runs.items():
        print(_row(device, found_runs))
    return 0


def _command(args: argparse.Namespace, device: str, output: Path) -> list[str]:
    command = [sys.executable, "-m", "pocketdiffusion", "generate", "a red apple", "--seed", "0", "--json", "--quiet"]
    command += ["--model", args.model, "--device", device, "--output", str(output)]
    return command + ([] if args.steps is None else ["--steps", str(args.steps)])


def _row(device: str, runs: list[ProcessRun]) -> str:
    seconds = [run.seconds for run in runs]
    peaks = [run.peak_rss for run in runs if run.peak_rss is not None]
    peak = f"{max(peaks) / 1e6:.0f}" if peaks else "n/a"
    share = statistics.median(_overhead(json.loads(run.stdout)) for run in runs)
    times = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} - {max(seconds):.2f})"
    return f"| {device} | {times} | {peak} | {100 * share:.1f} % |"


def _overhead(report: dict[str, dict[str, list[float]]]) -> float:
    steps, graph = sum(report["timings"]["step"]), sum(report["timings"]["unet.run"])
    return (steps - graph) / steps


if __name__ == "__main__":
    sys.exit(main())
