"""Memory of real processes, whose sizes are known because they allocate them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pocketdiffusion_bench.events import Interval
from pocketdiffusion_bench.memory import Sample, Sampler, by_stage, peaks
from pocketdiffusion_bench.process import run_process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MB = 10**6


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_peak_between_samples_is_caught() -> None:
    """300 MB for a moment between two long sleeps, of which no sample may know."""
    code = "import time; time.sleep(.05); b = b'x' * 300_000_000; del b; time.sleep(.05)"
    script = f"""
from pocketdiffusion_bench.process import run_process
ended = run_process({python(code)!r}, sample=False)
assert ended.code == 0 and ended.memory.anonymous is None, ended
print(ended.memory.rss)
"""
    # From a small process: without samples, the kernel's figure counts a large parent's memory too.
    small = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(python(script), env=small, capture_output=True, text=True, check=True).stdout
    assert 300 * MB < int(found) < 360 * MB


def test_anonymous_and_file_memory_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 80 * MB)
    code = f"""
import mmap, time
own = b"y" * 120_000_000
file = open({str(file)!r}, "rb")
mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
sum(mapped[::4096]); time.sleep(.3)
"""
    memory = run_process(python(code)).memory
    assert memory.anonymous is not None and 120 * MB < memory.anonymous < 160 * MB
    assert memory.file is not None and 80 * MB < memory.file < 120 * MB


def test_pss_is_read_near_a_peak_and_then_rests() -> None:
    ballast = b"x" * 100 * MB
    sampler = Sampler(os.getpid())
    sampler.take()
    sampler.take()
    sampler.close()
    first, second = sampler.samples
    if first.rss >= 0.95 * first.peak:
        assert first.pss is not None and len(ballast) < first.pss <= first.rss * 1.05
    assert second.pss is None and 100 * MB < second.rss <= second.peak * 1.05


def test_the_parents_own_memory_is_not_counted() -> None:
    """A process shares its parent's memory until it loads its program, and the kernel counts that."""
    ballast = bytearray(400 * MB)
    ballast[::4096] = b"x" * len(ballast[::4096])
    ended = run_process(python("import time; time.sleep(.2)"))
    assert ended.memory.rss is not None and ended.memory.rss < 100 * MB
    assert len(ballast) == 400 * MB


def test_peaks_belong_to_the_stages_in_which_they_were_seen() -> None:
    samples = [Sample(float(at), rss, rss - 1, 1, rss, None) for at, rss in enumerate((10, 50, 20, 90, 30))]
    spans = [Interval("step", 0.5, 1.5), Interval("open:a", 0.5, 3.5), Interval("step", 3.5, 4.5), Interval("x", 8, 9)]
    found = by_stage(samples, spans)
    assert {name: peak.rss for name, peak in found.items()} == {"step": 50, "open:a": 90}
    assert found["open:a"].anonymous == 89 and found["open:a"].pss is None


def test_no_sample_is_no_figure() -> None:
    assert peaks([]).rss is None
    assert peaks([], rss=5).rss == 5


def test_a_process_that_hangs_is_ended_and_its_last_words_are_kept() -> None:
    code = (
        "import sys, time; print('first', file=sys.stderr); print('last', file=sys.stderr, flush=True); time.sleep(60)"
    )
    ended = run_process([sys.executable, "-SE", "-c", code], timeout=3.0)
    assert ended.timed_out and ended.code == -9 and ended.message == "last"


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_what_a_hanging_process_started_is_ended_with_it(tmp_path: Path) -> None:
    file = str(tmp_path / "pid")
    code = f"import os, time; pid = os.fork(); pid and open({file!r}, 'w').write(str(pid)); time.sleep(60)"
    run_process([sys.executable, "-SE", "-c", code], timeout=3.0)
    deadline = time.monotonic() + 20
    while _alive(int((tmp_path / "pid").read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(int((tmp_path / "pid").read_text()))


def _alive(pid: int) -> bool:
    """A zombie, which waits for its new parent to look, is not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_much_output_does_not_block_a_process() -> None:
    ended = run_process(
        python("import sys; print('x' * 10**6); print('y' * 10**6 + 'end', file=sys.stderr)"), timeout=60
    )
    assert ended.code == 0 and ended.message.endswith("end")
