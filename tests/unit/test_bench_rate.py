from __future__ import annotations

import numpy as np
import pytest

from pocketdiffusion.backends import DeviceInfo, available, load
from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion_bench import rate as module
from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.matmul_graph import QUANTUM, matmul_graph
from pocketdiffusion_bench.rate import Peak, peak, rate

from .bench_records import make_failed, make_record, make_run

ENGINES = [info for info in available() if info.device == "cpu" and "onnx" in info.formats]
needs_engine = pytest.mark.skipif(not ENGINES, reason="no engine is installed")
SIZE = 64


@pytest.fixture
def _small(monkeypatch):
    monkeypatch.setattr(module, "SIZE", SIZE)
    monkeypatch.setattr(module, "SECONDS", 0.01)
    peak.cache_clear()
    yield
    peak.cache_clear()


def weights() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((SIZE, SIZE)) / np.sqrt(SIZE)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_graphs_follow_the_format(dtype):
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(onnx.load_model_from_string(matmul_graph(SIZE, 3, dtype)), full_check=True)


@needs_engine
@pytest.mark.parametrize("info", ENGINES, ids=lambda info: info.backend)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("int8", 0.2)])
def test_graphs_multiply_matrices(tmp_path, info, dtype, tolerance):
    graph = tmp_path / "matmul.onnx"
    graph.write_bytes(matmul_graph(SIZE, 3, dtype))
    x = np.random.default_rng(1).standard_normal((SIZE, SIZE)).astype(np.float32)
    session = load(info.backend).open(graph, "cpu", SessionOptions())
    expected = x.astype(np.float64) @ weights() @ weights() @ weights()
    assert np.abs(session.run({"x": x})["y"] - expected).max() <= tolerance
    assert session.precision == dtype
    assert np.abs(x).max() < 128 * QUANTUM, "nothing is clipped"


@needs_engine
@pytest.mark.usefixtures("_small")
def test_the_best_engine_gives_the_peak():
    found = peak("float32", "cpu", 1)
    assert found.flops > 0
    assert found.probe.startswith("float32 64x64x64 ") and any(info.backend in found.probe for info in ENGINES)
    assert peak("float32", "cpu", 1) is found, "measured once"


@needs_engine
@pytest.mark.usefixtures("_small")
def test_the_arithmetic_is_counted(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(module, "available", lambda: ENGINES[:1])
    assert peak("float32").flops == 2 * module.PRODUCTS * SIZE**3


@pytest.mark.usefixtures("_small")
def test_no_engine_has_the_precision(monkeypatch):
    with pytest.raises(BenchError, match="precision 'float8' is unknown; choose from float32, bfloat16, float16, int8"):
        peak("float8")
    with pytest.raises(BenchError, match="no engine here computes in float32 on npu: none has it"):
        peak("float32", "npu")
    monkeypatch.setattr(module, "available", lambda: [DeviceInfo("onnxruntime", "cpu", "1", ("onnx",))])
    if ENGINES:
        with pytest.raises(BenchError, match="no engine here computes in bfloat16 on cpu: .*bfloat16"):
            peak("bfloat16")


def test_an_engine_that_computes_in_something_else_gives_no_peak(monkeypatch, tmp_path):
    from pocketdiffusion.backends.fake import FakeBackend, FakeGraph
    from pocketdiffusion.tensors import TensorSpec

    specs = ({"x": TensorSpec("float32", (2, 2))}, {"y": TensorSpec("float32", (2, 2))})
    fake = FakeBackend({"matmul.onnx": FakeGraph(*specs, lambda feeds: {"y": feeds["x"]})})
    monkeypatch.setattr(module, "available", lambda: [DeviceInfo("fake", "cpu", "1", ("onnx",))])
    monkeypatch.setattr(module, "load", lambda _: fake)
    peak.cache_clear()
    with pytest.raises(BenchError, match="no engine here computes in int8 on cpu: fake:cpu computes in float32"):
        peak("int8")
    peak.cache_clear()


def test_the_rate_is_of_the_median_warm_step():
    record = make_record([make_run([[9.0, 2.0], [2.0, 4.0]])])
    found = rate(record, 8e11, Peak(1e12, "float32 of a test"))
    assert (found.achieved, found.peak, found.share) == (4e11, 1e12, 0.4)
    with pytest.raises(BenchError, match="no step was measured"):
        rate(make_failed(), 8e11, Peak(1e12, "float32 of a test"))
