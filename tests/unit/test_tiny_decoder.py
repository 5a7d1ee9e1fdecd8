"""A bundle's tiny decoder: who takes it, what it is fed, what is said of it. On the fake engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pocketdiffusion import cli, memory
from pocketdiffusion.backends.fake import FakeBackend, FakeGraph
from pocketdiffusion.component import Component
from pocketdiffusion.errors import BundleUnsupported, InvalidRequest
from pocketdiffusion.pipeline import Pipeline
from pocketdiffusion.tensors import AnyArray
from pocketdiffusion.tuning import budget
from pocketdiffusion.tuning.footprint import Footprint, Memory, Subject
from pocketdiffusion.tuning.footprints import Footprints
from pocketdiffusion.tuning.store import Store

TINY = "tiny_vae_decoder"
TOLD = "the tiny decoder drew the pictures; the full one (--decoder full) draws finer detail"
MB = 10**6


def _rows(feeds: dict[str, AnyArray]) -> dict[str, AnyArray]:
    return {"sample": feeds["latent_sample"][:, :3].repeat(4, axis=2).repeat(4, axis=3) / 8}


@pytest.fixture
def both(pipe: Pipeline, backend: FakeBackend) -> Pipeline:
    """The tiny bundle with a second decoder."""
    full = pipe.components["vae_decoder"].entry
    entry = replace(full, graph=f"{TINY}/model.fake")
    backend.graphs = {**backend.graphs, entry.graph: FakeGraph(entry.inputs, entry.outputs, _rows)}
    graph = pipe.bundle.path / entry.graph
    return Pipeline(
        pipe.bundle, {**pipe.components, TINY: Component(TINY, graph, entry, backend=backend, device="cpu")}
    )


def decoded(backend: FakeBackend) -> list[tuple[str, AnyArray]]:
    """(component, latents) of each decode."""
    return [(name.partition("/")[0], feeds["latent_sample"]) for name, feeds in backend.runs if "decoder" in name]


def test_it_gets_latents_in_the_denoisers_scale(both: Pipeline, backend: FakeBackend) -> None:
    tiny = both("a cat", seed=0, decoder="tiny", output_type="np")
    full = both("a cat", seed=0, decoder="full", output_type="np")
    (first, given), (second, unscaled) = decoded(backend)
    assert (first, second) == (TINY, "vae_decoder")
    assert np.array_equal(given, tiny.latents) and np.array_equal(tiny.latents, full.latents)
    np.testing.assert_allclose(unscaled, given / both.bundle.manifest.numbers.latent_scale)
    assert tiny.messages == (TOLD,) and full.messages == ()
    assert tiny.parameters[0].extra["Decoder"] == "tiny" and "Decoder" not in full.parameters[0].extra
    assert TINY in tiny.configuration and "vae_decoder" not in tiny.configuration
    assert "vae_decoder/model.fake" in backend.opened  # by the second call, not by the first
    assert backend.opened.index(f"{TINY}/model.fake") < backend.opened.index("vae_decoder/model.fake")


@pytest.mark.parametrize(
    ("fields", "used"),
    [
        ({}, "vae_decoder"),
        ({"preset": "balanced"}, "vae_decoder"),
        ({"preset": "fast"}, TINY),
        ({"preset": "fast", "decoder": "full"}, "vae_decoder"),
    ],
)
def test_only_the_fast_preset_takes_it_by_itself(
    both: Pipeline, backend: FakeBackend, fields: dict[str, Any], used: str
) -> None:
    result = both("a cat", seed=0, num_inference_steps=10, **fields)
    assert [name for name, _ in decoded(backend)] == [used]
    assert (TOLD in result.messages) == (used == TINY)


def test_it_draws_in_tiles_too(both: Pipeline, backend: FakeBackend) -> None:
    whole = both("a cat", seed=0, width=96, height=80, decoder="tiny", output_type="np").images
    both.vae_tile = 64
    backend.runs.clear()
    tiled = both("a cat", seed=0, width=96, height=80, decoder="tiny", output_type="np")
    assert {latents.shape for _, latents in decoded(backend)} == {(1, 4, 16, 16)}
    np.testing.assert_allclose(tiled.images, whole, atol=1e-5)
    assert len(tiled.messages) == 2 and tiled.messages[1] == TOLD


def test_what_can_not_be_is_refused_in_one_line(both: Pipeline, pipe: Pipeline) -> None:
    with pytest.raises(BundleUnsupported, match="decoder 'tiny' was asked; tiny has none: leave it out, or add one"):
        pipe.stream("a cat", decoder="tiny")
    with pytest.raises(InvalidRequest, match="decoder is 'small'; choose one of: full, tiny"):
        both.stream("a cat", decoder="small")
    both.vae_bands = 16
    with pytest.raises(InvalidRequest, match="decoder is 'tiny' and vae_bands 16; only the full decoder runs in bands"):
        both.stream("a cat", decoder="tiny")


def test_bands_mean_the_full_decoder(both: Pipeline) -> None:
    both.vae_bands = 16
    assert both.stream("a cat", output_type="latent", preset="fast").request.decoder == "full"


def test_without_one_the_fast_preset_is_as_before(pipe: Pipeline, backend: FakeBackend) -> None:
    pipe("a cat", seed=0, num_inference_steps=10, preset="fast")
    assert [name for name, _ in decoded(backend)] == ["vae_decoder"]


def test_the_command_line_takes_it(both: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda model, **options: both)
    assert cli.main(["generate", "a cat", "--decoder", "tiny", "-o", str(tmp_path / "p.png"), "--seed", "1"]) == 0
    assert b"Decoder: tiny" in (tmp_path / "p.png").read_bytes()


# Of 500 MB for the full decoder, in tiles 100 MB, and 30 MB for the tiny one.


def _measured(subject: Subject, *, limit: int | None = None) -> Footprint:
    sizes = {"vae_decoder": 500 * MB, TINY: 30 * MB}
    peak = sizes.get(subject.component, 10 * MB)
    if subject.component == "vae_decoder" and subject.shapes["latent_sample"][2:] != (32, 32):
        peak = 100 * MB
    return Footprint(0.0, 0.0, 0.0, 0.0, "float32", Memory(peak, 0, peak, 0, 0, 0))


@pytest.fixture
def limited(both: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Plans for pictures of 128x128 in so many MB, of which 100 are the process's own."""
    reading = memory.Reading(100 * MB, 100 * MB, 100 * MB, 0)
    monkeypatch.setattr(
        budget, "memory", SimpleNamespace(read=lambda: reading, available=lambda: 10**10, trim=lambda: None)
    )
    for component in both.components.values():
        component.graph.parent.mkdir(exist_ok=True)
        component.graph.touch()
    both.budget.footprints = Footprints(Store("footprints", tmp_path), _measured)

    def plan(megabytes: int, **fields: Any) -> Any:
        both.budget.limit = megabytes * MB
        return both.stream("a cat", seed=0, width=128, height=128, **fields)

    return plan


def test_a_memory_limit_takes_it_only_when_nothing_else_fits(limited: Callable[..., Any]) -> None:
    assert limited(700).request.decoder is None
    tiled = limited(300)
    assert tiled.request.decoder is None and tiled.memory_plan.strategy.tile is not None
    last = limited(170)
    assert last.request.decoder == "tiny" and last.memory_plan.strategy.tile is None
    assert "the tiny decoder, which draws less detail" in str(last.memory_plan)
    assert TOLD in last.result.messages


def test_a_memory_limit_keeps_to_a_decoder_that_was_asked_for(limited: Callable[..., Any]) -> None:
    assert limited(700, decoder="tiny").memory_plan.strategy.tiny is False  # it is the request's own
    with pytest.raises(InvalidRequest, match="memory_limit is 170 MB; this request needs"):
        limited(170, decoder="full")
