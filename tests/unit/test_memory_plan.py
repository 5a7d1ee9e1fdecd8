"""Plans that keep a memory limit, on the fake engine with given footprints, and one in earnest."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pocketdiffusion import memory
from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.bundle import Bundle
from pocketdiffusion.bundle.manifest import BandGraph, GraphPart
from pocketdiffusion.bundle.models import find_bundle
from pocketdiffusion.component import Component
from pocketdiffusion.errors import GraphFailed, InvalidRequest
from pocketdiffusion.pipeline import Pipeline
from pocketdiffusion.tuning import budget as module
from pocketdiffusion.tuning import trial
from pocketdiffusion.tuning.budget import limit_bytes
from pocketdiffusion.tuning.choice import Candidate
from pocketdiffusion.tuning.footprint import Footprint, Memory, Subject
from pocketdiffusion.tuning.footprints import Footprints
from pocketdiffusion.tuning.plan import MARGIN, Stage, Strategy, identity, predicted, strategies
from pocketdiffusion.tuning.store import Store
from pocketdiffusion.tuning.trial import TooLarge, measure
from pocketdiffusion.tuning.tune import subject_of
from pocketdiffusion.units import size_in_bytes

MB = 10**6
BASE = 100 * MB
Make = Callable[..., Pipeline]


def footprint(running: int, *, opening: int = 0, kept: str | None = None) -> Footprint:
    """Of a graph that holds half of its peak when it has run, and nothing when it is closed."""
    sizes = Memory(opening, opening // 2, running, running // 2, 0, 2 * MB)
    return Footprint(0.0, 0.0, 0.0, 0.0, "float32", sizes, kept=kept)


class FakeMeasure:
    """Footprints in proportion to the inputs: the denoiser takes 100 MB a row, the VAE 4 MB a cell."""

    def __init__(self) -> None:
        self.measured: list[Subject] = []

    def __call__(self, subject: Subject, *, limit: int | None = None) -> Footprint:
        self.measured.append(subject)
        shape = max(subject.shapes.values(), key=len)
        needed = {"unet": 100 * shape[0], "vae_decoder": 4 * shape[-1] * shape[-2]}.get(subject.component, 10) * MB
        if limit is not None and needed > limit:
            raise TooLarge("too large")
        return footprint(needed)

    @property
    def names(self) -> list[str]:
        return [subject.component for subject in self.measured]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeMeasure:
    reading = memory.Reading(BASE, BASE, BASE, 0)
    monkeypatch.setattr(
        module, "memory", SimpleNamespace(read=lambda: reading, available=lambda: 10**10, trim=lambda: None)
    )
    return FakeMeasure()


@pytest.fixture
def limited(make_pipe: Make, fake: FakeMeasure, tmp_path: Path) -> Pipeline:
    """A pipeline on the fake engine whose graphs cost what `FakeMeasure` says."""
    pipe = make_pipe()
    for component in pipe.components.values():
        component.graph.parent.mkdir(exist_ok=True)
    pipe.budget.footprints = Footprints(Store("footprints", tmp_path), fake)
    return pipe


def plan(pipe: Pipeline, limit: int, **fields: Any) -> Any:
    pipe.budget.limit = limit
    found = pipe.stream("a cat", seed=0, **fields).memory_plan
    assert found is not None
    return found


def test_without_a_limit_nothing_is_planned_or_measured(limited: Pipeline, fake: FakeMeasure) -> None:
    assert limited.stream("a cat", seed=0).memory_plan is None
    assert fake.measured == []


# The native size is 32x32 pixels, 8x8 cells: VAE 256 MB, denoiser 200 MB guided, 100 MB in turn, text encoder 10 MB.
@pytest.mark.parametrize(
    ("limit", "way"),
    [
        (2000, Strategy()),
        (500, Strategy()),  # 100 + 2, and 5 + 100 + 256 of kept graphs, and 8 of pictures: 471, with the margin 495
        (475, Strategy(batched=False)),
        (400, Strategy(residency="release")),
        (2000, Strategy()),
    ],
)
def test_the_fastest_way_that_fits_is_taken(limited: Pipeline, limit: int, way: Strategy) -> None:
    found = plan(limited, limit * MB)
    assert found.strategy == way
    assert found.predicted * MARGIN <= limit * MB


def test_larger_pictures_are_decoded_in_tiles(limited: Pipeline, fake: FakeMeasure) -> None:
    whole = plan(limited, 6000 * MB, width=128, height=128)
    assert whole.strategy == Strategy()
    tiled = plan(limited, 1500 * MB, width=128, height=128)
    assert tiled.strategy.tile == 64 and tiled.strategy.residency == "keep"
    tried = [subject.shapes["latent_sample"][2:] for subject in fake.measured if subject.component == "vae_decoder"]
    assert tried[0] == (32, 32) and all(height * width <= 24 * 24 for height, width in tried[1:])


def test_what_no_graph_holds_is_there_when_a_plan_is_made(limited: Pipeline) -> None:
    limited.stream("a cat", seed=0)
    assert "tokenizer" not in vars(limited._family)
    plan(limited, 2000 * MB)
    assert "tokenizer" in vars(limited._family)


def test_the_request_follows_the_plan(limited: Pipeline, backend: Any) -> None:
    limited.budget.limit = 475 * MB
    result = limited("a cat", seed=0)
    assert {len(feeds["sample"]) for name, feeds in backend.runs if name.startswith("unet")} == {1}
    assert result.messages[-1].startswith("peak memory: 100 MB; predicted ")
    limited.budget.limit = 400 * MB
    backend.opened.clear()
    backend.closed.clear()
    limited("a cat", seed=0)
    names = [name.partition("/")[0] for name in backend.opened]
    assert names == ["text_encoder", "unet", "vae_decoder"]
    assert [name.partition("/")[0] for name in backend.closed][-3:] == names


def test_graphs_open_in_their_turn_under_a_limit(limited: Pipeline, backend: Any) -> None:
    limited.budget.limit = 2000 * MB
    steps = limited.stream("a cat", seed=0)
    next(steps)
    assert [name.partition("/")[0] for name in backend.opened] == ["text_encoder", "unet"]


def test_what_can_not_fit_is_refused_before_anything_is_opened(limited: Pipeline, backend: Any) -> None:
    with pytest.raises(
        InvalidRequest, match=r"memory_limit is 300 MB; this request needs 390 MB \(one graph at a time"
    ):
        plan(limited, 300 * MB)
    assert backend.opened == []
    assert plan(limited, 400 * MB).strategy.residency == "release"


def test_a_graph_too_large_for_the_machine_is_told(
    limited: Pipeline, fake: FakeMeasure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pocketdiffusion.tuning.plan.memory.available", lambda: 50 * MB)
    with pytest.raises(InvalidRequest, match="needs more than this machine has free"):
        plan(limited, 40 * MB)


def test_only_what_a_verdict_needs_is_measured_and_once(limited: Pipeline, fake: FakeMeasure) -> None:
    plan(limited, 2000 * MB)
    assert sorted(fake.names) == ["text_encoder", "unet", "vae_decoder"]
    plan(limited, 1900 * MB)
    limited.budget.limit = None
    assert len(fake.measured) == 3


def test_options_of_the_user_stay(limited: Pipeline, make_pipe: Make, fake: FakeMeasure) -> None:
    limited.vae_tile = None
    assert not plan(limited, 2000 * MB, batched_guidance=False).strategy.batched
    released = make_pipe("release")
    released.budget.footprints = limited.budget.footprints
    assert plan(released, 2000 * MB).strategy.residency == "release"


def test_latents_need_no_decoder(limited: Pipeline, fake: FakeMeasure) -> None:
    plan(limited, 350 * MB, output_type="latent")
    assert sorted(fake.names) == ["text_encoder", "unet"]


def test_a_system_that_does_not_tell_its_memory(limited: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "memory", SimpleNamespace(read=lambda: None, trim=lambda: None))
    with pytest.raises(InvalidRequest, match="needs Linux"):
        plan(limited, 2000 * MB)


def subject(tiny: Any, component: str = "unet", **changes: Any) -> Subject:
    entry = tiny.manifest.components[component]
    shapes = {"sample": (2, 4, 8, 8)}
    options = SessionOptions(**changes)
    return Subject(component, tiny.graph(component), entry, "digest", "fake", "cpu", options, shapes)


def test_the_peak_is_the_largest_moment(tiny_bundle: Any) -> None:
    one, two = subject(tiny_bundle), subject(tiny_bundle, "vae_decoder")
    found = {
        identity(one): Memory(opening=50, open=30, running=40, ran=35, left=5, code=7),
        identity(two): Memory(opening=10, open=10, running=20, ran=20, left=1, code=9),
    }
    kept = [Stage(one, kept=True), Stage(two, kept=True, extra=3)]
    assert predicted(kept, found, 1000) == 1000 + 9 + 35 + 3 + 20
    released = [replace(stage, kept=False) for stage in kept]
    assert predicted(released, found, 1000) == 1000 + 9 + 50
    assert predicted(kept, {}, 1000) == 1000


def test_strategies_are_ordered_by_what_they_cost() -> None:
    decoders = [(None, None, False), (None, 16, False), (256, None, False)]
    ways = strategies(["keep", "release"], [False, True], [True, False], decoders)
    assert ways[:3] == [Strategy(), Strategy(batched=False), Strategy(residency="release")]
    assert len(set(ways)) == 24 and all(way.bands == 16 for way in ways[8:16])
    assert all(way.tile == 256 for way in ways[16:])
    assert str(ways[8]) == "graphs stay open, VAE in bands of 16 rows"
    assert str(ways[-1]) == (
        "one graph at a time, weights held compact, guidance in turn, VAE in tiles of at most 256x256 pixels"
    )


def test_footprints_are_remembered_until_something_changes(tiny_bundle: Any, tmp_path: Path) -> None:
    measured: list[int | None] = []

    def measure(subject: Subject, *, limit: int | None) -> Footprint:
        measured.append(limit)
        if limit is not None and limit < 50:
            raise TooLarge("too large")
        return footprint(50, kept=str(tmp_path / "a.engine"))

    (tmp_path / "a.engine").touch()
    footprints, said = Footprints(Store("footprints", tmp_path), measure), list[str]()
    one = subject(tiny_bundle)
    assert footprints.of(one, said.append, limit=40) is None
    assert footprints.of(one, said.append, limit=30) is None  # remembered
    assert footprints.of(one, said.append, limit=60) == footprints.of(one, said.append)
    assert measured == [40, 60]
    assert said[0] == "measuring unet on fake:cpu, float32, 2x4x8x8"
    assert footprints.known(subject(tiny_bundle, threads=3)) is None
    (tmp_path / "a.engine").unlink()  # what it was opened from has gone
    assert footprints.known(one) is None


@pytest.mark.parametrize(
    ("given", "found"), [("1GB", 10**9), ("1.5GiB", 3 * 2**29), (5 * 10**8, 5 * 10**8), (None, None)]
)
def test_limits(given: Any, found: int | None) -> None:
    assert limit_bytes(given) == found


@pytest.mark.parametrize("given", ["much", "-1GB", 0, -5, True, 1.5])
def test_no_limits(given: Any) -> None:
    with pytest.raises(InvalidRequest, match="^memory_limit"):
        limit_bytes(given)


def test_amounts() -> None:
    assert size_in_bytes("512MiB") == 2**29
    with pytest.raises(ValueError, match="800MB"):
        size_in_bytes("512 apples")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_memory_of_this_process() -> None:
    before = memory.read()
    assert before is not None and 0 < memory.code() < before.rss <= before.peak
    block = bytearray(b"1" * 50_000_000)
    grown = memory.read()
    assert grown is not None and grown.rss - before.rss > 40_000_000
    del block
    if memory.reset_peak():
        after = memory.read()
        assert after is not None and after.peak < grown.peak
    memory.trim()
    assert memory.read(2**22 + 1) is None and (memory.available() or 0) > 0


@pytest.fixture
def sticker_subject() -> Subject:
    pytest.importorskip("onnxruntime")
    bundle = Bundle.open(find_bundle("sticker"))
    return subject_of(bundle, "text_encoder", Candidate("onnxruntime", "cpu", "float32", "fast"), (64, 64), 1)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_graph_is_measured_in_a_child(sticker_subject: Subject) -> None:
    golden = sticker_subject.graph.parents[1] / "golden.safetensors"
    found = measure(sticker_subject, golden=golden if golden.is_file() else None)
    assert found.precision == "float32" and min(found.loading, found.opening, found.first, found.run) > 0
    assert found.memory is not None
    assert 4 * MB < found.memory.open <= found.memory.opening < 100 * MB
    assert found.memory.left < found.memory.open
    with pytest.raises(TooLarge, match="text_encoder on onnxruntime:cpu, float32, 1x24 takes more than 20 MB"):
        measure(sticker_subject, limit=20 * MB)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_child_that_the_system_ends_was_too_large(sticker_subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_CHILD", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(TooLarge, match="1x24 was ended by the system"):
        measure(sticker_subject)


def test_a_graph_that_does_not_open_is_an_error_as_it_is(sticker_subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08\x08")
    with pytest.raises(GraphFailed, match="could not be opened on onnxruntime:cpu"):
        measure(replace(sticker_subject, graph=tmp_path / "model.onnx"))


def test_a_denoiser_in_parts_is_the_leanest_way(limited: Pipeline, fake: FakeMeasure) -> None:
    component = limited.components["unet"]
    part = GraphPart("unet/part_0.fake", component.entry.inputs, component.entry.outputs, 1)
    component.entry = replace(component.entry, parts=(part,))
    lean = FakeMeasure()

    def measure(subject: Subject, *, limit: int | None = None) -> Footprint:
        return footprint(20 * MB) if subject.streamed else lean(subject, limit=limit)

    limited.budget.footprints = Footprints(limited.budget.footprints._store, measure)
    assert plan(limited, 400 * MB).strategy.residency == "release"
    assert plan(limited, 390 * MB, output_type="latent").strategy.residency == "keep"
    found = plan(limited, 160 * MB, output_type="latent")
    assert found.strategy == Strategy(residency="stream")
    assert component.residency == "stream" and "denoiser in parts" in str(found)


@pytest.fixture
def banded(limited: Pipeline, fake: FakeMeasure, backend: Any) -> Pipeline:
    """The same with a decoder in one piece for bands, which take 10 MB a row."""

    def measure(subject: Subject, *, limit: int | None = None) -> Footprint:
        if subject.bands is None:
            return fake(subject, limit=limit)
        fake.measured.append(subject)
        return footprint(10 * subject.bands * MB)

    part = limited.components["vae_decoder"]
    graph = BandGraph(part.entry.graph, part.entry.inputs, part.entry.outputs, 0, 4)
    part.entry = replace(part.entry, bands=(graph,))
    (entry,) = part.entry.pieces
    part.bands = (Component("vae_decoder", part.graph, entry, backend=backend, device="cpu", residency="release"),)
    limited.budget.footprints = Footprints(limited.budget.footprints._store, measure)
    return limited


# A picture of 256x256, 64x64 cells: denoiser and text encoder as ever, VAE 16 GB whole, 1 GB in the smallest tiles.
def test_a_decoder_that_has_bands_uses_them_before_tiles(banded: Pipeline, fake: FakeMeasure, backend: Any) -> None:
    size = {"width": 256, "height": 256}
    found = plan(banded, 1500 * MB, **size)
    assert found.strategy == Strategy(bands=32)
    assert plan(banded, 400 * MB, **size, guidance_scale=1.0).strategy == Strategy(bands=16)
    decoders = [subject for subject in fake.measured if subject.component == "vae_decoder"]
    assert all(subject.shapes["latent_sample"][2:] == (64, 64) for subject in decoders)
    given = banded("a cat", seed=0, num_inference_steps=2, **size)
    banded.budget.limit = None
    backend.runs.clear()
    np.testing.assert_array_equal(given.pixels, banded("a cat", seed=0, num_inference_steps=2, **size).pixels)


def test_bands_that_are_asked_for_are_what_is_planned(banded: Pipeline, fake: FakeMeasure) -> None:
    banded.vae_bands = 8
    assert plan(banded, 2000 * MB).strategy == Strategy(bands=8)
    assert [subject.bands for subject in fake.measured if subject.component == "vae_decoder"] == [8]


def test_a_subject_arrives_in_a_child_as_it_is(tiny_bundle: Any) -> None:
    one = subject(tiny_bundle)
    part = GraphPart("unet/part_0.fake", one.entry.inputs, one.entry.outputs, 7)
    band = BandGraph("unet/band_0.fake", one.entry.inputs, one.entry.outputs, 1, 2)
    for sent in (
        one,
        replace(one, entry=replace(one.entry, parts=(part,)), streamed=True),
        replace(one, entry=replace(one.entry, bands=(band,)), bands=16),
    ):
        found = Subject.from_json(json.loads(json.dumps(sent.to_json())))
        assert replace(found, entry=sent.entry) == sent and (found.entry.parts, found.entry.bands) == (
            sent.entry.parts,
            sent.entry.bands,
        )
        assert found.key() == sent.key()
    assert one.key() != found.key()
