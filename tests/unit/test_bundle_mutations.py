"""Every damaged or hostile bundle is refused, by name and reason, before an engine sees a file of it."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from pocketdiffusion.bundle import Bundle
from pocketdiffusion.errors import BundleError

from . import bundle_maker as maker
from . import bundle_mutations as damage

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links and pipes")


class RecordingBackend:
    """Stands for an engine: remembers what it was given."""

    def __init__(self) -> None:
        self.opened: list[Path] = []

    def open(self, graph: Path) -> None:
        self.opened.append(graph)


def use(path: Path, backend: RecordingBackend, cache: Path) -> None:
    """What a pipeline does: open the bundle, then its graphs."""
    bundle = Bundle.open(path, cache_dir=cache)
    for component in bundle.manifest.components:
        backend.open(bundle.graph(component))


def verdict(mutation: damage.Mutation, copy: Path, cache: Path) -> str | None:
    """None if the damaged bundle is refused as it should be, else what went wrong."""
    backend, error = RecordingBackend(), None
    start = time.process_time()
    try:
        use(copy, backend, cache)
    except BundleError as caught:
        error = str(caught)
    except Exception as caught:
        return f"crashed: {caught!r}"
    seconds = time.process_time() - start
    if error is None:
        return "was accepted"
    if mutation.file not in error or not error.isprintable():
        return f"an error that does not name {mutation.file!r} in one line: {error!r}"
    if backend.opened:
        return "reached the engine"
    return f"took {seconds:.1f} s of processor time" if seconds > 1 else None


def refused(source: Path, work: Path, seed: int) -> tuple[Counter[str], list[str]]:
    """Run all mutations of `source`: how many of each kind were refused, and those that were not."""
    kinds, failures = Counter[str](), []
    for number, mutation in enumerate(damage.mutations(source, seed)):
        copy = work / str(number)
        shutil.copytree(source, copy, copy_function=os.link)
        mutation.apply(copy)
        if problem := verdict(mutation, copy, work / "cache"):
            failures.append(f"{mutation.kind} #{number} of {mutation.file!r} {mutation.apply.__defaults__}: {problem}")
        kinds[mutation.kind] += not problem
        shutil.rmtree(copy)
    return kinds, failures


def run_all(source: Path, work: Path, seed: int) -> Counter[str]:
    """Run and print the histogram; fails unless all of at least 1,000 mutations are refused."""
    kinds, failures = refused(source, work, seed)
    for kind, count in sorted(kinds.items()):
        print(f"{count:5d} {kind}")
    print(f"{kinds.total():5d} refused")
    assert failures == []
    assert kinds.total() >= 1000
    return kinds


def test_every_mutation_is_refused(tmp_path: Path) -> None:
    kinds = run_all(maker.make_bundle(tmp_path / "bundle"), tmp_path, seed=20240)
    assert kinds["external data path"] >= 30


@pytest.mark.slow
def test_every_mutation_of_the_embedded_model_is_refused(tmp_path: Path) -> None:
    embedded = Path(__file__).parents[2] / "models" / "sticker" / "bundle"
    if not (embedded / "manifest.json").is_file():
        pytest.skip("no embedded model in this checkout")
    run_all(shutil.copytree(embedded, tmp_path / "bundle"), tmp_path, seed=20241)


def test_the_unmutated_bundle_reaches_the_engine(tmp_path: Path) -> None:
    backend = RecordingBackend()
    use(maker.make_bundle(tmp_path / "bundle"), backend, tmp_path / "cache")
    assert [path.name for path in backend.opened] == ["model.onnx", "openvino_model.xml"]
