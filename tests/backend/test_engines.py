"""What belongs to one engine: how it is set up, and that two engines agree."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pocketdiffusion.backends import load
from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.errors import BackendUnavailable, DeviceNotAttached, GraphFailed


@pytest.fixture
def ort():
    if not load("onnxruntime").devices():
        pytest.skip("onnxruntime is not installed")
    import onnxruntime

    return onnxruntime


@pytest.fixture
def optimized(ort, monkeypatch, tmp_path):
    """Opens a graph and returns the file of what ONNX Runtime made of it."""
    target = tmp_path / "optimized.onnx"
    original = ort.InferenceSession

    def saving(path, options, **kwargs):
        options.optimized_model_filepath = str(target)
        return original(path, options, **kwargs)

    monkeypatch.setattr(ort, "InferenceSession", saving)

    def open_(graph: Path) -> tuple[bytes, str]:
        session = load("onnxruntime").open(graph, "cpu", SessionOptions(threads=1))
        return target.read_bytes(), session.precision

    return open_


def test_onnxruntime_folds_int8_weights_at_load(optimized, graphs):
    content, precision = optimized(graphs["weights"])
    assert b"DequantizeLinear" not in content
    assert b"MatMulNBits" not in content
    assert precision == "float32"


def test_onnxruntime_keeps_integer_arithmetic(optimized, graphs):
    content, precision = optimized(graphs["qdq"])
    assert b"QLinearConv" in content
    assert b"QLinearMatMul" in content
    assert precision == "int8"


def test_onnxruntime_and_openvino_agree_in_float32(graphs, feeds_for_quantized):
    found = []
    for name in ("onnxruntime", "openvino"):
        if "cpu" not in load(name).devices():
            pytest.skip(f"{name} is not installed")
        session = load(name).open(graphs["weights"], "cpu", SessionOptions())
        assert session.precision == "float32"
        found.append(session.run(feeds_for_quantized)["out"])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_onnxruntime_on_another_provider_than_asked_is_an_error(ort, graphs, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["DmlExecutionProvider", "CPUExecutionProvider"])
    original = ort.InferenceSession
    monkeypatch.setattr(
        ort, "InferenceSession", lambda path, options, **_: original(path, options, providers=["CPUExecutionProvider"])
    )
    with pytest.raises(
        DeviceNotAttached, match="asked for onnxruntime:directml, but DmlExecutionProvider did not attach"
    ):
        load("onnxruntime").open(graphs["shift"], "directml", SessionOptions())


def test_onnxruntime_without_the_provider_is_an_error(ort, graphs):
    if "DmlExecutionProvider" in ort.get_available_providers():
        pytest.skip("DirectML is here")
    with pytest.raises(BackendUnavailable, match="onnxruntime:directml is not here; present: .*onnxruntime:cpu"):
        load("onnxruntime").open(graphs["shift"], "directml", SessionOptions())


def test_onnxruntime_s_telemetry_is_off(ort):
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"


@pytest.mark.parametrize(("precision", "capability"), [("float16", "FP16"), ("bfloat16", "BF16")])
def test_openvino_computes_as_asked_or_refuses(graphs, feeds_for_quantized, quantized, precision, capability):
    backend = load("openvino")
    if "cpu" not in backend.devices():
        pytest.skip("openvino is not installed")
    import openvino

    options = SessionOptions(precision=precision)
    if capability not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(GraphFailed, match=f"openvino:cpu does not compute in {precision}; choose from float32"):
            backend.open(graphs["weights"], "cpu", options)
        return
    session = backend.open(graphs["weights"], "cpu", options)
    assert session.precision == precision
    error = session.run(feeds_for_quantized)["out"] - quantized.expected(feeds_for_quantized)
    assert 1e-4 < np.abs(error).max() < 0.1  # float32 would be nearer


def test_openvino_opens_its_own_format(graphs, tmp_path, shift_feeds):
    backend = load("openvino")
    if "cpu" not in backend.devices():
        pytest.skip("openvino is not installed")
    import openvino

    path = tmp_path / "openvino_model.xml"
    openvino.save_model(openvino.Core().read_model(graphs["shift"]), path)
    session = backend.open(path, "cpu", SessionOptions())
    np.testing.assert_allclose(session.run(shift_feeds)["out"], shift_feeds["sample"] / 2 + 7, rtol=1e-6)
    assert list(session.inputs) == ["sample", "timestep"]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_weights_in_a_file_of_their_own_and_a_path_with_letters(graphs, tmp_path, feeds_for_quantized, quantized, name):
    onnx = pytest.importorskip("onnx")
    if "cpu" not in load(name).devices():
        pytest.skip(f"{name} is not installed")
    folder = tmp_path / "Größe 大"
    folder.mkdir()
    onnx.save(
        onnx.load(graphs["weights"]),
        folder / "model.onnx",
        save_as_external_data=True,
        location="w.bin",
        size_threshold=0,
    )
    assert (folder / "w.bin").stat().st_size > 1000
    session = load(name).open(folder / "model.onnx", "cpu", SessionOptions())
    found = session.run(feeds_for_quantized)["out"]
    np.testing.assert_allclose(found, quantized.expected(feeds_for_quantized), rtol=1e-4, atol=1e-4)
