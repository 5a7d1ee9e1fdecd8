"""Graphs opened for one shape of calls, where a backend is faster so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pocketdiffusion.backends.base import Session, SessionOptions
from pocketdiffusion.backends.fake import FakeBackend, FakeGraph
from pocketdiffusion.bundle.manifest import ComponentEntry
from pocketdiffusion.component import Component
from pocketdiffusion.pipeline import Pipeline
from pocketdiffusion.tensors import Array, TensorSpec
from pocketdiffusion.timing import Timings


def free(*, fixes: bool = True) -> tuple[Component, FakeBackend]:
    x = TensorSpec("float32", ("batch", "length"))
    engine = FakeBackend({"m.fake": FakeGraph({"x": x}, {"y": x}, lambda feeds: {"y": 2 * feeds["x"]})}, fixes=fixes)
    entry = ComponentEntry("fake", "m.fake", {"x": x}, {"y": x}, "float32")
    return Component("unet", Path("m.fake"), entry, backend=engine, device="cpu"), engine


def array(rows: int, length: int) -> Array:
    return np.arange(rows * length, dtype=np.float32).reshape(rows, length)


def run(component: Component, rows: int, length: int) -> None:
    np.testing.assert_array_equal(component.run({"x": array(rows, length)})["y"], 2 * array(rows, length))


def shapes(engine: FakeBackend) -> list[tuple[int, ...]]:
    return [feeds["x"].shape for _, feeds in engine.runs]


def test_the_first_call_fixes_the_shapes_and_rows_run_in_turn() -> None:
    component, engine = free()
    run(component, 3, 5)
    run(component, 1, 5)
    assert shapes(engine) == [(1, 5)] * 4 and len(engine.opened) == 1
    assert component.session.inputs["x"].shape == (1, 5)


def test_another_shape_opens_the_graph_for_any_and_only_once() -> None:
    component, engine = free()
    for length in (5, 7, 5, 9):
        run(component, 2, length)
    assert shapes(engine) == [(1, 5), (1, 5), (2, 7), (2, 5), (2, 9)] and len(engine.opened) == 2


def test_what_a_caller_waits_for_either_opening_is_told() -> None:
    component, _ = free()
    timings = Timings()
    for length in (5, 7, 7):
        component.run({"x": array(1, length)}, timings)
    assert [span.name for span in timings.spans].count("wait_open") == 2


def test_closing_forgets_the_shapes() -> None:
    component, engine = free()
    run(component, 2, 5)
    run(component, 2, 7)
    component.close()
    run(component, 2, 7)
    assert shapes(engine)[-2:] == [(1, 7), (1, 7)]


def test_what_is_expected_is_opened_ahead_and_nothing_before() -> None:
    component, engine = free()
    component.open_ahead()
    assert not engine.opened
    component.expect({"x": (4, 5)})
    component.open_ahead()
    component.wait(Timings())
    assert component.session.inputs["x"].shape == (1, 5)
    component.expect({"x": (1, 9)})  # too late: it is open
    run(component, 1, 5)
    assert len(engine.opened) == 1


def test_other_backends_open_for_any() -> None:
    component, engine = free(fixes=False)
    run(component, 3, 5)
    assert shapes(engine) == [(3, 5)] and component.session.inputs["x"].shape == ("batch", "length")


@pytest.mark.parametrize("fields", [{}, {"guidance_interval": (0.0, 0.5)}, {"num_images_per_prompt": 2}, {"width": 64}])
def test_pictures_do_not_depend_on_it(
    make_pipe: Callable[..., Pipeline], backend: FakeBackend, fields: dict[str, object]
) -> None:
    pipe = make_pipe()
    want = pipe("a", seed=0, guidance_scale=5, output_type="np", **fields).images
    pipe.close()
    backend.fixes = True
    backend.runs.clear()
    backend.opened.clear()
    np.testing.assert_array_equal(make_pipe()("a", seed=0, guidance_scale=5, output_type="np", **fields).images, want)
    assert {len(array) for _, feeds in backend.runs for array in feeds.values() if array.ndim > 1} == {1}
    assert len(backend.opened) == len(set(backend.opened))


@pytest.mark.parametrize("prompt", ["a", "a " * 200])
def test_all_graphs_are_opened_before_the_text_is_encoded(
    make_pipe: Callable[..., Pipeline], backend: FakeBackend, prompt: str
) -> None:
    """The denoiser too, whose shapes are known when the prompts are read; none is opened a second time."""
    backend.fixes = True
    pipe = make_pipe()
    generation = pipe.stream(prompt, seed=0, guidance_scale=5)
    assert not backend.opened
    next(generation)
    first = min(span.start for span in generation.result.timings.spans if span.name == "text_encoder.run")
    openings = [span for span in generation.result.timings.spans if span.name.endswith(".open")]
    assert len(openings) == len(backend.opened) == 3
    assert all(span.start <= first for span in openings)
    for name in ("text_encoder", "unet", "vae_decoder"):
        shapes = [spec.shape for spec in pipe.components[name].session.inputs.values()]
        assert all(isinstance(size, int) for shape in shapes for size in shape)


def test_streams_that_take_turns_do_not_undo_each_others_shapes(
    make_pipe: Callable[..., Pipeline], backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second begins before the first closes its graphs, and still opens its own for the shapes it expects."""
    backend.fixes = True
    given: list[object] = []
    plain = FakeBackend.open

    def record(engine: FakeBackend, graph: Path, device: str, options: SessionOptions) -> Session:
        given.append(options.shapes)
        return plain(engine, graph, device, options)

    monkeypatch.setattr(FakeBackend, "open", record)
    pipe = make_pipe("release")
    first, second = (pipe.stream("a", seed=0) for _ in range(2))
    next(first)
    next(second)
    np.testing.assert_array_equal(first.result.latents, second.result.latents)
    assert len(given) > 3 and None not in given
