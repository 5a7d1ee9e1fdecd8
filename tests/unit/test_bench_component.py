from __future__ import annotations

import io
import json

import pytest

from pocketdiffusion.backends import available
from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.bundle import Bundle
from pocketdiffusion.bundle.models import find_bundle
from pocketdiffusion.errors import BundleUnsupported
from pocketdiffusion_bench import component as module
from pocketdiffusion_bench.case import Case
from pocketdiffusion_bench.component import ComponentTimes, devices, feeds, markdown, measure, measure_cases, write
from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.profile import PROFILERS, NodeTime, onnxruntime_nodes, profile
from pocketdiffusion_bench.stats import Summary

HERE = [info.backend for info in available() if info.device == "cpu" and info.backend in PROFILERS]


@pytest.fixture
def sticker() -> Bundle:
    return Bundle.open(find_bundle("sticker"))


@pytest.mark.parametrize("backend", HERE)
def test_a_graph_on_an_engine(sticker, backend):
    pytest.importorskip("openvino")  # counts the arithmetic
    given = feeds(sticker, "text_encoder", None)
    found = measure(sticker, "text_encoder", f"{backend}:cpu", given, SessionOptions(threads=1), runs=3)
    assert (found.device, found.precision, found.latency.count) == (f"{backend}:cpu", "float32", 3)
    assert found.inputs == {"input_ids": given["input_ids"].shape}
    assert found.rate == found.flops / found.latency.p50 and found.flops > 1e6
    assert sum(node.share for node in found.nodes) == pytest.approx(1)
    assert [node.seconds for node in found.nodes] == sorted((node.seconds for node in found.nodes), reverse=True)
    kinds = {node.kind for node in found.nodes}
    assert kinds & {"MatMul", "FusedMatMul", "Gemm", "FullyConnected"}
    assert all(node.count >= 1 for node in found.nodes)


def test_nodes_of_onnx_runtimes_profile_without_the_first_run():
    def node(name: str, at: int, dur: int, op: str) -> dict[str, object]:
        args = {"op_name": op, "provider": "CPUExecutionProvider"}
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": at, "dur": dur, "args": args}

    def run(at: int) -> dict[str, object]:
        return {"cat": "Session", "name": "model_run", "ts": at, "dur": 100, "args": {}}

    fence = {"cat": "Node", "name": "a_fence_before", "ts": 210, "dur": 5, "args": {"op_name": "Conv"}}
    events = [node("a", 10, 90, "Conv"), run(0), node("a", 210, 30, "Conv"), fence, node("b", 250, 20, "Add"), run(200)]
    assert list(onnxruntime_nodes(events)) == [
        ("Conv", "CPUExecutionProvider", pytest.approx(30e-6)),
        ("Add", "CPUExecutionProvider", pytest.approx(20e-6)),
    ]


def test_an_engine_without_a_profile(sticker):
    with pytest.raises(BenchError, match="coreml gives no profile of a graph; choose from onnxruntime, openvino"):
        profile("coreml", sticker.graph("unet"), "cpu", SessionOptions(), {})


@pytest.mark.parametrize("backend", HERE)
def test_a_graph_that_does_not_run(sticker, backend):
    with pytest.raises(BenchError, match=f"text_encoder/model.onnx could not be profiled on {backend}:cpu: ") as error:
        profile(backend, sticker.graph("text_encoder"), "cpu", SessionOptions(), {"wrong": None})  # type: ignore[dict-item]
    assert "\n" not in str(error.value)


def test_devices(sticker, tiny_bundle):
    assert devices(sticker, "unet", []) == [f"{info.backend}:cpu" for info in available() if info.device == "cpu"]
    if HERE:
        assert devices(sticker, "unet", [HERE[0]]) == [f"{HERE[0]}:cpu"]
    with pytest.raises(BenchError, match="unet .fake.: no engine here opens it on a CPU"):
        devices(tiny_bundle, "unet", [])


def test_feeds(sticker, tiny_bundle):
    golden = feeds(sticker, "unet", None)
    assert set(golden) == {"sample", "timestep", "encoder_hidden_states"}
    width, height = (cells * sticker.manifest.numbers.vae_factor for cells in (32, 16))
    assert feeds(sticker, "unet", (width, height), rows=2)["sample"].shape == (2, 4, 16, 32)
    for given in (sticker, tiny_bundle):
        with pytest.raises(BundleUnsupported, match=r"has no component 'net', it has: .*text_encoder, .*unet"):
            feeds(given, "net", None)


def test_no_golden_inputs(tiny_bundle):
    from dataclasses import replace

    bare = replace(tiny_bundle, manifest=replace(tiny_bundle.manifest, golden=None))
    with pytest.raises(BenchError, match="tiny holds no golden inputs for unet; give a size"):
        feeds(bare, "unet", None)


def test_the_table_shows_the_largest_nodes_and_sums_up_the_rest(monkeypatch):
    monkeypatch.setattr(module, "TOP", 2)
    nodes = (("Conv", 0.5), ("MatMul", 0.3), ("Add", 0.15), ("Mul", 0.05))
    found = ComponentTimes(
        component="unet",
        device="openvino:cpu",
        engine="openvino 1",
        precision="float32",
        inputs={"sample": (2, 4, 64, 64)},
        open=4.0,
        first=3.0,
        latency=Summary(10, 1.9, 2.0, 2.5, 2.1, 0.1),
        flops=1.6e12,
        nodes=tuple(NodeTime(kind, "jit", 3, share, share) for kind, share in nodes),
    )
    assert markdown([found]).splitlines() == [
        "| component | engine | precision | open, s | first run, s | run p50 / p90, s | GFLOP | GFLOP/s |",
        "|---|---|---|---|---|---|---|---|",
        "| unet | openvino 1, openvino:cpu | float32 | 4.00 | 3.00 | 2.00 / 2.50 | 1,600.00 | 800 |",
        "",
        "| unet on openvino:cpu: nodes | kernel | count | share |",
        "|---|---|---|---|",
        "| Conv | jit | 3 | 50.0 % |",
        "| MatMul | jit | 3 | 30.0 % |",
        "| 2 more | | 6 | 20.0 % |",
    ]


def test_cases_are_measured_once_each(monkeypatch, sticker):
    asked: list[tuple[object, ...]] = []

    def fake(bundle, component, device, given, options, *, size):
        asked.append((component, device, given["sample"].shape, options, size))
        return len(asked)

    monkeypatch.setattr(module, "measure", fake)
    monkeypatch.setattr(module, "devices", lambda bundle, component, asked: asked or ["a:cpu", "b:cpu"])
    cases = [
        Case("sticker"),
        Case("sticker", steps=3),
        Case("sticker", precision="bfloat16", device="b:cpu", threads=1),
    ]
    width, height = (cells * sticker.manifest.numbers.vae_factor for cells in (32, 16))
    cases += [Case("sticker", width=width, height=height, guidance=1.0, device="a:cpu")]
    golden = feeds(sticker, "unet", None)["sample"].shape
    said: list[str] = []
    assert measure_cases(cases, "unet", said.append) == [1, 2, 3, 4]
    assert asked == [
        ("unet", "a:cpu", golden, SessionOptions(), None),
        ("unet", "b:cpu", golden, SessionOptions(), None),
        ("unet", "b:cpu", golden, SessionOptions(1, "bfloat16"), None),
        ("unet", "a:cpu", (1, 4, 16, 32), SessionOptions(), (width, height)),
    ]
    assert said[0] == "unet of sticker on a:cpu"
    measure_cases([Case("sticker", width=height, height=height)], "unet", said.append)
    assert asked[-1][2] == (2, 4, 16, 16), "a guided step has two rows"
    with pytest.raises(BenchError, match="--component is for graphs of ours; leave --peer diffusers out"):
        measure_cases([Case("sticker", "diffusers")], "unet", said.append)


@pytest.mark.parametrize("format", ["md", "json", "csv"])
def test_formats(format):
    found = ComponentTimes(
        "unet", "a:cpu", "a 1", "float32", {"x": (1,)}, 1.0, 1.0, Summary(1, 1, 1, 1, 1, None), 1e9, ()
    )
    stream = io.StringIO()
    if format == "csv":
        with pytest.raises(BenchError, match="--component has no output format 'csv'; choose from md, json"):
            write([found], format, stream)
        return
    write([found], format, stream)
    if format == "json":
        assert json.loads(stream.getvalue())[0]["latency"]["p50"] == 1
    else:
        assert stream.getvalue() == markdown([found])
