"""Counts against closed forms; tests/export/test_bench_flops.py has torch's counter as the oracle."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pocketdiffusion.bundle import Bundle
from pocketdiffusion.bundle.manifest import SizedGraph
from pocketdiffusion.bundle.models import find_bundle
from pocketdiffusion.errors import BundleUnsupported, PocketDiffusionError
from pocketdiffusion.tensors import TensorSpec
from pocketdiffusion.tuning.shapes import denoiser_rows, entry_at, input_shapes, random_feeds
from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.flops import denoiser_name, graph_flops, step_flops
from pocketdiffusion_bench.matmul_graph import matmul_graph

openvino = pytest.importorskip("openvino")
from openvino import opset13 as ops  # noqa: E402


def saved(folder: Path, build, *shapes: list[int]) -> Path:
    """IR of a function of parameters x0, x1 ... of these shapes, -1 where they are free."""
    parameters = [ops.parameter(shape, openvino.Type.f32, name=f"x{index}") for index, shape in enumerate(shapes)]
    for index, parameter in enumerate(parameters):
        parameter.output(0).set_names({f"x{index}"})
    openvino.save_model(openvino.Model([build(*parameters)], parameters), folder / "model.xml")
    return folder / "model.xml"


def constant(*shape: int):
    import numpy as np

    return ops.constant(np.ones(shape, np.float32))


def conv(x):
    return ops.convolution(x, constant(6, 3, 5, 5), [2, 2], [2, 2], [2, 2], [1, 1])


def grouped(x):
    return ops.group_convolution(x, constant(3, 2, 1, 3, 3), [1, 1], [1, 1], [1, 1], [1, 1])


def transposed(x):
    return ops.convolution_backprop_data(x, constant(3, 7, 4, 4), [2, 2], pads_begin=[1, 1], pads_end=[1, 1])


@pytest.mark.parametrize(
    ("build", "free", "shapes", "expected"),
    [
        (lambda a, b: ops.matmul(a, b, False, False), [[-1, -1], [-1, -1]], [(4, 5), (5, 6)], 2 * 4 * 5 * 6),
        (lambda a, b: ops.matmul(a, b, True, True), [[-1, -1], [-1, -1]], [(5, 4), (6, 5)], 2 * 4 * 5 * 6),
        (lambda a, b: ops.matmul(a, b, False, False), [[-1, -1, -1], [5, 6]], [(7, 4, 5), (5, 6)], 7 * 2 * 4 * 5 * 6),
        (conv, [[-1, 3, -1, -1]], [(2, 3, 16, 12)], 2 * (2 * 6 * 8 * 6) * (3 * 5 * 5)),
        (grouped, [[-1, 3, -1, -1]], [(2, 3, 8, 8)], 2 * (2 * 6 * 8 * 8) * (1 * 3 * 3)),
        (transposed, [[-1, 3, -1, -1]], [(2, 3, 8, 8)], 2 * (2 * 3 * 8 * 8) * (7 * 4 * 4)),
        (
            lambda q, k, v: ops.scaled_dot_product_attention(q, k, v),
            [[-1, 2, -1, 8], [-1, 2, -1, 8], [-1, 2, -1, 8]],
            [(1, 2, 10, 8), (1, 2, 30, 8), (1, 2, 30, 8)],
            2 * (2 * 10 * 30 * 8) * 2,
        ),
        (lambda x: ops.relu(ops.add(x, x)), [[-1]], [(9,)], 0),
    ],
    ids=["matmul", "transposed matmul", "batched", "conv", "grouped", "transposed conv", "attention", "other"],
)
def test_counts_of_single_nodes(tmp_path, build, free, shapes, expected):
    graph = saved(tmp_path, build, *free)
    assert graph_flops(graph, {f"x{index}": shape for index, shape in enumerate(shapes)}) == expected


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_onnx_graphs_are_counted_alike(tmp_path, dtype):
    (tmp_path / "model.onnx").write_bytes(matmul_graph(64, 3, dtype))
    assert graph_flops(tmp_path / "model.onnx", {"x": (64, 64)}) == 3 * 2 * 64**3


def test_what_can_not_be_counted_is_named(tmp_path):
    graph = saved(tmp_path, lambda a, b: ops.einsum([a, b], "ij,jk->ik"), [-1, -1], [-1, -1])
    with pytest.raises(BenchError, match="unit|a Einsum node, which is not counted here"):
        graph_flops(graph, {"x0": (2, 3), "x1": (3, 4)})
    with pytest.raises(BenchError, match="do not fit"):
        graph_flops(graph, {"x0": (2, 3), "absent": (3, 4)})
    (tmp_path / "broken.onnx").write_bytes(b"broken")
    with pytest.raises(BenchError, match="OpenVINO can't read it"):
        graph_flops(tmp_path / "broken.onnx", {})


def test_shapes_that_depend_on_data_are_named(tmp_path):
    def build(x):
        return ops.matmul(ops.convert(ops.transpose(ops.non_zero(x), [1, 0]), "f32"), constant(1, 3), False, False)

    with pytest.raises(BenchError, match="the shapes of MatMul .* stay unknown"):
        graph_flops(saved(tmp_path, build, [-1]), {"x0": (4,)})


def test_without_openvino(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BenchError, match=r"pip install 'pocketdiffusion\[openvino\]'"):
        graph_flops(tmp_path / "model.onnx", {})


@pytest.fixture
def sticker() -> Bundle:
    return Bundle.open(find_bundle("sticker"))


def test_a_guided_step_is_twice_the_work_and_grows_with_the_picture(sticker):
    single = step_flops(sticker, width=64, height=64, guidance=1.0)
    assert step_flops(sticker, width=64, height=64, guidance=7.5) == pytest.approx(2 * single, rel=0.01)
    assert step_flops(sticker, width=128, height=64, guidance=1.0) > 2 * single * 0.95


def test_a_graph_for_one_row_counts_twice_for_guidance(sticker, monkeypatch):
    module = sys.modules["pocketdiffusion_bench.flops"]
    single = step_flops(sticker, width=64, height=64, guidance=1.0)
    fixed = input_shapes(sticker, "unet", width=64, height=64, rows=1)
    monkeypatch.setattr(module, "input_shapes", lambda *_, **__: fixed)
    assert step_flops(sticker, width=64, height=64, guidance=7.5) == 2 * single


def test_a_model_that_takes_the_scale_runs_once_a_step(sticker):
    manifest = sticker.manifest
    unet = manifest.components["unet"]
    inputs = {**unet.inputs, "timestep_cond": TensorSpec("float32", ("batch", 256))}
    told = replace(unet, inputs=inputs)
    assert (denoiser_rows(unet, 7.5), denoiser_rows(unet, 1.0), denoiser_rows(told, 7.5)) == (2, 1, 1)
    assert denoiser_rows(manifest.components["vae_decoder"], 7.5) == 1
    with pytest.raises(BenchError, match="sticker has no denoiser; it has vae_decoder"):
        denoiser_name(replace(sticker, manifest=replace(manifest, components={"vae_decoder": unet})))


def test_a_graph_for_each_size(tiny_bundle):
    manifest = tiny_bundle.manifest
    unet = manifest.components["unet"]
    fixed = {"sample": TensorSpec("float32", (1, 4, 16, 16)), "timestep": TensorSpec("float32", ())}
    sized = SizedGraph(64, 64, "unet/model_64x64.fake", fixed, unet.outputs)
    changed = replace(tiny_bundle, manifest=replace(manifest, components={"unet": replace(unet, sizes=(sized,))}))
    assert [entry_at(changed, "unet", size).graph for size in (None, (32, 32), (64, 64))] == [
        "unet/model.fake",
        "unet/model.fake",
        "unet/model_64x64.fake",
    ]
    shapes = input_shapes(changed, "unet", width=64, height=64, rows=2)
    assert shapes == {"sample": (1, 4, 16, 16), "timestep": ()}


def test_shapes_of_every_component(sticker):
    shapes = {name: input_shapes(sticker, name, width=256, height=128, rows=2) for name in sticker.manifest.components}
    assert shapes == {
        "judge_image": {"pixel_values": (2, 3, 64, 64)},
        "judge_text": {"input_ids": (2, 24)},
        "text_encoder": {"input_ids": (2, 24)},
        "tiny_vae_decoder": {"latent_sample": (2, 4, 16, 32)},
        "unet": {"sample": (2, 4, 16, 32), "timestep": (), "encoder_hidden_states": (2, 24, 160)},
        "vae_decoder": {"latent_sample": (2, 4, 16, 32)},
        "vae_encoder": {"sample": (2, 3, 128, 256)},
    }
    feeds = random_feeds(sticker.manifest.components["unet"].inputs, shapes["unet"])
    assert {name: array.shape for name, array in feeds.items()} == shapes["unet"]
    assert feeds["timestep"] == 500 and feeds["sample"].std() == pytest.approx(1, abs=0.05)
    ids = random_feeds(sticker.manifest.components["text_encoder"].inputs, shapes["text_encoder"])["input_ids"]
    assert ids.dtype == "int64" and set(ids.ravel()) == {0, 1}


@pytest.mark.parametrize(
    ("component", "width", "message"),
    [("net", 64, "no component 'net', it has: .*text_encoder, .*unet"), ("unet", 72, "must be multiples of 32")],
)
def test_shapes_that_are_not_possible(sticker, component, width, message):
    with pytest.raises(PocketDiffusionError, match=message):
        input_shapes(sticker, component, width=width, height=64, rows=1)


def test_a_graph_of_one_size_refuses_another(tiny_bundle):
    manifest = tiny_bundle.manifest
    unet = manifest.components["unet"]
    for spec, message in (
        (TensorSpec("float32", ("batch", 4, 8, 8)), "axis 2 is 8, the asked size needs 16"),
        (TensorSpec("float32", ("batch", "free", "h", "w")), "what axis 1 means is not known"),
    ):
        inputs = {**unet.inputs, "sample": spec}
        components = {**manifest.components, "unet": replace(unet, inputs=inputs)}
        changed = replace(tiny_bundle, manifest=replace(manifest, components=components))
        with pytest.raises(BundleUnsupported, match=message):
            input_shapes(changed, "unet", width=64, height=64, rows=1)
