"""Opening again from what an engine kept, and with weights that stay int8."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pocketdiffusion.backends import load
from pocketdiffusion.backends import openvino as module
from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.backends.cache import EngineCache

KNOWN = SessionOptions(threads=1, identity="digest unet/graph.onnx")


@pytest.fixture
def openvino(monkeypatch, tmp_path):
    """The backend, with a cache of this test's own."""
    backend = load("openvino")
    if "cpu" not in backend.devices():
        pytest.skip("openvino is not installed")
    monkeypatch.setenv("POCKETDIFFUSION_CACHE", str(tmp_path / "cache"))
    return backend


def sqnr(reference, found) -> float:
    """Signal to noise in dB."""
    noise = np.sum((reference.astype(np.float64) - found) ** 2)
    return 10 * np.log10(np.sum(reference.astype(np.float64) ** 2) / max(noise, 1e-300))


@pytest.mark.parametrize("name", ["weights", "qdq"])
@pytest.mark.parametrize("weights", ["fast", "compact"])
def test_from_the_cache_it_is_the_same_graph(openvino, graphs, feeds_for_quantized, name, weights):
    options = replace(KNOWN, weights=weights)
    cold, again = (openvino.open(graphs[name], "cpu", options) for _ in range(2))
    assert (cold.cached, again.cached) == (False, True)
    assert (again.inputs, again.outputs) == (cold.inputs, cold.outputs)
    assert (again.precision, again.device) == (cold.precision, cold.device)
    expected = cold.run(feeds_for_quantized)["out"]
    for _ in range(2):
        np.testing.assert_array_equal(again.run(feeds_for_quantized)["out"], expected)
    again.close()


def test_what_came_from_the_cache_outlives_its_file(openvino, graphs, feeds_for_quantized):
    expected = openvino.open(graphs["weights"], "cpu", KNOWN).run(feeds_for_quantized)["out"]
    session = openvino.open(graphs["weights"], "cpu", KNOWN)
    assert session.cached and EngineCache().clear() > 0
    np.testing.assert_array_equal(session.run(feeds_for_quantized)["out"], expected)


@pytest.mark.parametrize(
    "change",
    [{"identity": "other"}, {"threads": 2}, {"weights": "compact"}, {"precision": "bfloat16"}],
    ids=lambda change: next(iter(change)),
)
def test_other_contents_or_settings_are_compiled(openvino, graphs, change):
    openvino.open(graphs["shift"], "cpu", KNOWN)
    if "bfloat16" in change.values():
        import openvino as engine

        if "BF16" not in engine.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            pytest.skip("this processor does not compute in bfloat16")
    assert not openvino.open(graphs["shift"], "cpu", replace(KNOWN, **change)).cached


def test_contents_that_nothing_vouches_for_are_not_kept(openvino, graphs, tmp_path):
    for _ in range(2):
        assert not openvino.open(graphs["shift"], "cpu", SessionOptions()).cached
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("lost", [False, True])
def test_a_large_graph_is_closed_when_it_is_compiled_and_opened_from_the_cache(
    openvino, graphs, shift_feeds, monkeypatch, lost
):
    monkeypatch.setattr(module, "REOPENED", 0)
    if lost:
        monkeypatch.setattr(EngineCache, "load", lambda self, key: None)
    session = openvino.open(graphs["shift"], "cpu", KNOWN)
    assert not session.cached
    assert (session._execute._mapped is None) == (session.kept is None) == lost
    np.testing.assert_allclose(session.run(shift_feeds)["out"], shift_feeds["sample"] / 2 + 7, rtol=1e-6)


def test_a_graph_that_would_fill_the_cache_is_not_kept(openvino, graphs, monkeypatch):
    monkeypatch.setattr(module, "MAX_KEPT", 0)
    for _ in range(2):
        assert not openvino.open(graphs["shift"], "cpu", KNOWN).cached
    assert EngineCache().entries() == []


def test_another_processor_compiles_again(openvino, graphs, monkeypatch):
    openvino.open(graphs["shift"], "cpu", KNOWN)
    monkeypatch.setattr("pocketdiffusion.backends.openvino.processor", lambda: "Linux x86_64 0")
    assert not openvino.open(graphs["shift"], "cpu", KNOWN).cached


def test_a_damaged_entry_is_compiled_and_written_anew(openvino, graphs, shift_feeds):
    openvino.open(graphs["shift"], "cpu", KNOWN)
    (path,) = EngineCache().folder.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    session = openvino.open(graphs["shift"], "cpu", KNOWN)
    assert not session.cached
    np.testing.assert_allclose(session.run(shift_feeds)["out"], shift_feeds["sample"] / 2 + 7, rtol=1e-6)
    assert path.stat().st_size == len(content)
    assert openvino.open(graphs["shift"], "cpu", KNOWN).cached


def test_an_entry_that_the_engine_refuses_is_replaced(openvino, graphs, monkeypatch):
    """Whole by its hash, but of a build that calls itself the same."""
    original = EngineCache.store

    def store(self, key, facts, export):
        return original(self, key, facts, lambda stream: stream.write(b"x" * 999))

    monkeypatch.setattr(EngineCache, "store", store)
    openvino.open(graphs["shift"], "cpu", KNOWN)
    monkeypatch.setattr(EngineCache, "store", original)
    assert not openvino.open(graphs["shift"], "cpu", KNOWN).cached
    assert openvino.open(graphs["shift"], "cpu", KNOWN).cached


def test_onnxruntime_keeps_nothing(graphs, monkeypatch, tmp_path):
    if "cpu" not in load("onnxruntime").devices():
        pytest.skip("onnxruntime is not installed")
    monkeypatch.setenv("POCKETDIFFUSION_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        assert not load("onnxruntime").open(graphs["shift"], "cpu", KNOWN).cached
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_compact_weights_give_the_same_answer(graphs, feeds_for_quantized, name):
    if "cpu" not in load(name).devices():
        pytest.skip(f"{name} is not installed")
    fast, compact = (
        load(name).open(graphs["weights"], "cpu", SessionOptions(threads=1, weights=weights))
        for weights in ("fast", "compact")
    )
    assert fast.precision == compact.precision == "float32"
    found = [session.run(feeds_for_quantized)["out"] for session in (fast, compact)]
    assert sqnr(*found) > 100  # 60 is promised; activations in int8 would give about 40


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_compact_weights_of_the_embedded_denoiser_give_the_same_answer(name):
    graph = Path(__file__).resolve().parents[2] / "models" / "sticker" / "bundle" / "unet" / "model.onnx"
    if "cpu" not in load(name).devices() or not graph.exists():
        pytest.skip(f"{name} or the embedded model is not here")
    rng = np.random.default_rng(0)
    feeds = {}
    found = []
    for weights in ("fast", "compact"):
        session = load(name).open(graph, "cpu", SessionOptions(weights=weights))
        states = session.inputs["encoder_hidden_states"].shape
        feeds = feeds or {
            "sample": rng.standard_normal((1, 4, 16, 16)).astype(np.float32),
            "timestep": np.array(500, session.inputs["timestep"].dtype).reshape(
                (1,) * len(session.inputs["timestep"].shape)
            ),
            "encoder_hidden_states": rng.standard_normal((1, 77, int(states[2]))).astype(np.float32),
        }
        found.append(session.run(feeds)["out_sample"])
        session.close()
    assert sqnr(*found) > 60


@pytest.mark.parametrize(("kind", "folded"), [("row", False), ("one", False), ("half", False), ("column", True)])
def test_tables_stay_as_they_are_stored_unless_their_columns_have_scales(openvino, kind, folded):
    import openvino as engine
    from openvino import opset13

    rng, shapes = np.random.default_rng(0), {"row": (300, 1), "one": (), "column": (16,)}
    table = rng.integers(-128, 128, (300, 16)).astype(np.float16 if kind == "half" else np.int8)
    scale = rng.random(shapes.get(kind, ())).astype(np.float32)
    ids = opset13.parameter([1, 7], np.int64, name="ids")
    source = opset13.convert(opset13.constant(table), "f32")
    if kind != "half":
        source = opset13.multiply(source, opset13.constant(scale))
    model = engine.Model([opset13.gather(source, ids, opset13.constant(np.int64(0)))], [ids], "m")
    module._fold_tables(model)
    (gather,) = [node for node in model.get_ops() if node.get_type_name() == "Gather"]
    assert (gather.input_value(0).get_node().get_type_name() == "Constant") == folded
    rows = rng.integers(0, 300, (1, 7))
    (found,) = module.shared_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([rows]).values()
    factor = np.float32(1) if kind == "half" else scale
    np.testing.assert_allclose(found, (table.astype(np.float32) * factor)[rows], rtol=1e-6)
