"""`Component`: lazy opening, checks, residency, threads; on the fake engine."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pocketdiffusion.backends import Choice
from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.backends.fake import FakeBackend, FakeGraph
from pocketdiffusion.bundle.manifest import ComponentEntry
from pocketdiffusion.component import Component, non_finite
from pocketdiffusion.components import open_components
from pocketdiffusion.errors import BackendUnavailable, BundleCorrupt, GraphFailed, InvalidRequest, NonFinite
from pocketdiffusion.tensors import TensorSpec
from pocketdiffusion.timing import Timings

VECTOR = TensorSpec("float32", ("n",))
FEEDS = {"x": np.arange(3, dtype=np.float32)}


def double(feeds):
    return {"y": feeds["x"] * 2}


def make(
    *,
    function=double,
    device="cpu",
    entry=None,
    residency="keep",
    backend_type=FakeBackend,
    **faults,
) -> tuple[Component, FakeBackend]:
    backend = backend_type({"unet/model.fake": FakeGraph({"x": VECTOR}, {"y": VECTOR}, function, **faults)})
    entry = entry or ComponentEntry("fake", "unet/model.fake", {"x": VECTOR}, {"y": VECTOR}, "float32")
    component = Component(
        "unet", Path("bundle/unet/model.fake"), entry, backend=backend, device=device, residency=residency
    )
    return component, backend


class SlowBackend(FakeBackend):
    def open(self, graph, device, options):
        time.sleep(0.05)
        return super().open(graph, device, options)


@pytest.mark.parametrize("threads", [0, -3, 100_000, 2.0, "2", True])
def test_numbers_of_threads_are_checked(threads):
    with pytest.raises(InvalidRequest, match="give a whole number from 1 to 1024"):
        SessionOptions(threads=threads)


def test_it_opens_on_first_use_and_once():
    component, backend = make()
    assert backend.opened == []
    for _ in range(3):
        np.testing.assert_array_equal(component.run(FEEDS)["y"], [0, 2, 4])
    assert backend.opened == ["unet/model.fake"]
    assert len(backend.runs) == 3


def test_options_reach_the_engine():
    backend = FakeBackend({"model.fake": FakeGraph({"x": VECTOR}, {"y": VECTOR}, double)})
    entry = ComponentEntry("fake", "model.fake", {"x": VECTOR}, {"y": VECTOR}, "float32")
    options = SessionOptions(precision="bfloat16")
    component = Component("unet", Path("b/model.fake"), entry, backend=backend, device="cpu", options=options)
    assert component.precision == "bfloat16"
    assert (component.device, component.engine) == ("fake:cpu", "fake 1")
    assert component.cached is False


def test_closing_is_repeatable_and_the_next_use_opens_again():
    component, backend = make()
    component.close()
    component.run(FEEDS)
    component.close()
    component.close()
    assert backend.closed == ["unet/model.fake"]
    assert component.precision == "float32"
    assert len(backend.opened) == 1  # asking how it ran does not open it
    component.run(FEEDS)
    assert len(backend.opened) == 2


@pytest.mark.parametrize(("residency", "closed"), [("keep", 0), ("release", 1)])
def test_residency(residency, closed):
    component, backend = make(residency=residency)
    with component.use() as same:
        assert same is component
        component.run(FEEDS)
        component.run(FEEDS)
        assert backend.closed == []
    assert len(backend.closed) == closed
    assert len(backend.opened) == 1


def test_release_happens_after_an_error_too():
    component, backend = make(residency="release", nan_from_run=0)
    with pytest.raises(NonFinite), component.use():
        component.run(FEEDS)
    assert len(backend.closed) == 1


def test_release_waits_for_the_last_user():
    component, backend = make(residency="release")
    with component.use():
        with component.use():
            component.run(FEEDS)
        assert backend.closed == []
    assert len(backend.closed) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, -1])
def test_values_that_are_not_finite_are_found(value, place):
    def broken(feeds):
        result = np.ones(1000, np.float32)
        result[place] = value
        return {"y": result}

    component, _ = make(function=broken)
    with pytest.raises(NonFinite, match="unet produced 1 NaN or infinite values of 1000 in 'y'") as caught:
        component.run(FEEDS)
    error = caught.value
    assert (error.component, error.output, error.precision, error.device) == ("unet", "y", "float32", "fake:cpu")
    assert (error.bad, error.size, error.step) == (1, 1000, None)


def test_the_fake_engine_turns_bad_when_told():
    component, _ = make(nan_from_run=2)
    component.run(FEEDS)
    component.run(FEEDS)
    with pytest.raises(NonFinite):
        component.run(FEEDS)


@pytest.mark.parametrize(
    ("array", "count"),
    [
        (np.array([3.4e38, 3.4e38], np.float32), 0),
        (np.array([65504] * 9, np.float16), 0),
        (np.array([np.inf, -np.inf, 1], np.float32), 2),
        (np.array([np.nan], np.float16), 1),
        (np.array([1, 2]), 0),
        (np.array([], np.float32), 0),
        (np.array(np.nan), 1),
    ],
)
def test_non_finite(array, count):
    assert non_finite(array) == count


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ({"z": VECTOR}, {"y": VECTOR}, "unet/model.fake: inputs are x; the manifest says z"),
        ({"x": VECTOR}, {"y": VECTOR, "a": VECTOR}, "unet/model.fake: outputs are y; the manifest says a, y"),
    ],
)
def test_a_graph_that_is_not_the_manifest_s(inputs, outputs, message):
    component, backend = make(entry=ComponentEntry("fake", "unet/model.fake", inputs, outputs, "float32"))
    with pytest.raises(BundleCorrupt, match=message):
        component.run(FEEDS)
    assert len(backend.closed) == 1


def test_wrong_feeds_and_a_failing_function():
    component, _ = make()
    with pytest.raises(GraphFailed, match=r"unet/model\.fake: input 'x' is missing"):
        component.run({})
    failing, _ = make(function=lambda feeds: {"y": feeds["nothing"]})
    with pytest.raises(GraphFailed, match=r"unet/model\.fake failed on fake:cpu: 'nothing'"):
        failing.run(FEEDS)


def test_an_error_of_opening_is_raised_at_each_use():
    component, _ = make(fail_at_open="out of memory")
    for _ in range(2):
        with pytest.raises(GraphFailed, match="out of memory"):
            component.run(FEEDS)
    absent, _ = make(device="npu")
    with pytest.raises(BackendUnavailable, match="fake:npu is not here; present: fake:cpu"):
        absent.run(FEEDS)


def test_opening_ahead_returns_at_once_and_opens_once():
    returned = threading.Event()

    class WaitingBackend(FakeBackend):
        def open(self, graph, device, options):
            assert returned.wait(timeout=10)
            return super().open(graph, device, options)

    component, backend = make(backend_type=WaitingBackend)
    component.open_ahead()
    component.open_ahead()
    returned.set()
    component.run(FEEDS)
    assert len(backend.opened) == 1


def test_several_components_open_side_by_side():
    together = threading.Barrier(3, timeout=10)  # broken, and so an error, if one opens after another

    class MeetingBackend(FakeBackend):
        def open(self, graph, device, options):
            together.wait()
            return super().open(graph, device, options)

    components = [make(backend_type=MeetingBackend)[0] for _ in range(3)]
    for component in components:
        component.open_ahead()
    for component in components:
        component.run(FEEDS)


def test_an_error_of_opening_ahead_surfaces_at_the_first_use():
    component, _ = make(fail_at_open="bad file")
    component.open_ahead()
    with pytest.raises(GraphFailed, match="bad file"):
        component.run(FEEDS)


def test_closing_waits_for_an_opening_under_way():
    component, backend = make(backend_type=SlowBackend)
    component.open_ahead()
    component.close()
    assert len(backend.opened) == len(backend.closed) == 1
    failing, _ = make(fail_at_open="bad file")
    failing.open_ahead()
    failing.close()


def test_opening_ahead_does_nothing_when_memory_is_to_be_released():
    component, backend = make(residency="release")
    component.open_ahead()
    component.close()
    assert backend.opened == []


def test_threads_share_one_opening():
    component, backend = make(backend_type=SlowBackend)
    threads = [threading.Thread(target=component.run, args=(FEEDS,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(backend.opened) == 1
    assert len(backend.runs) == 8


def test_timings_hold_each_opening_once_and_every_run():
    component, _ = make(backend_type=SlowBackend)
    component.open_ahead()
    timings = Timings()
    component.run(FEEDS)  # opens unmeasured
    component.close()
    for _ in range(3):
        component.run(FEEDS, timings)
    assert set(timings.samples) == {"wait_open", "unet.open", "unet.run"}
    assert len(timings.samples["unet.open"]) == 1
    assert timings.total("unet.open") >= 0.04
    assert len(timings.samples["unet.run"]) == 3
    component.close()
    component.run(FEEDS, timings)
    assert len(timings.samples["unet.open"]) == 2


def test_only_contents_that_are_vouched_for_have_an_identity(tiny_bundle, monkeypatch):
    monkeypatch.setattr("pocketdiffusion.components.probe", lambda trials: None)
    choices = dict.fromkeys(tiny_bundle.manifest.components, Choice("fake", "cpu", "a test"))

    def identities(bundle, **given):
        opened = open_components(bundle, choices, SessionOptions(), "keep", **given)
        return {name: component.options.identity for name, component in opened.items()}

    known = identities(tiny_bundle)
    assert known == {n: f"{tiny_bundle.digest} {entry.graph}" for n, entry in tiny_bundle.manifest.components.items()}
    assert set(identities(tiny_bundle, cache=False).values()) == {None}
    assert set(identities(replace(tiny_bundle, hashed=False)).values()) == {None}


def test_a_precision_for_each_role(tiny_bundle):
    choices = dict.fromkeys(tiny_bundle.manifest.components, Choice("fake", "cpu", "a test"))
    precisions = {"default": "float32", "vae": "bfloat16"}
    opened = open_components(tiny_bundle, choices, SessionOptions(threads=3), "keep", precisions=precisions)
    assert {name: component.options.precision for name, component in opened.items()} == {
        name: "bfloat16" if name.startswith("vae") else "float32" for name in choices
    }
    assert {component.options.threads for component in opened.values()} == {3}


def test_an_unknown_way_to_hold_weights_is_refused(tiny_bundle):
    with pytest.raises(InvalidRequest, match="weights is 'small'; choose one of: fast, compact"):
        open_components(tiny_bundle, {}, SessionOptions(weights="small"), "keep")
