"""What files of a bundle may hold: checked against onnx, onnxruntime and safetensors, which we did not write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketdiffusion.bundle import Bundle, content, write_manifest
from pocketdiffusion.bundle.onnx_wire import read_graph
from pocketdiffusion.errors import BundleCorrupt, BundleError, BundleUnsafe

from . import bundle_maker as maker


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path: Path = maker.make_bundle(tmp_path / "bundle")
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def check(path: str, data: bytes, others: dict[str, int] | None = None) -> set[str]:
    sizes = {path: len(data), "unet/model.onnx_data": 16, "m.bin": 16, **(others or {})}
    if path.endswith(".onnx"):
        return content._check_onnx(data, path, sizes, {})
    if path.endswith(".xml"):
        return content._check_openvino(data, path, sizes)
    content._check_safetensors(data, path)
    return set()


@pytest.mark.parametrize("where", maker.PLACES)
def test_external_data_is_seen_wherever_a_tensor_stands(where: str) -> None:
    graph = maker.onnx_model(maker.external("model.onnx_data"), where)
    assert check("unet/model.onnx", graph) == {"unet/model.onnx_data"}
    assert read_graph(maker.onnx_model(maker.tensor(), where), "x").external == ()


def test_graph_interface_is_read() -> None:
    facts = read_graph(maker.onnx_model(maker.tensor()), "x")
    assert facts.inputs == {"x": ("float32", (1, 4))}
    assert facts.outputs == {"y": ("float32", (1, 4))}


def test_weights_of_a_graph_may_begin_with_any_bytes(folder: Path, cache: Path) -> None:
    assert (folder / "vae_decoder/openvino_model.bin").read_bytes()[:2] == b"\x80\x02"
    Bundle.open(folder, cache_dir=cache)
    (folder / "notes.bin").write_bytes(b"\x80\x02")
    write_manifest(folder, maker.make_manifest(folder))
    with pytest.raises(BundleUnsafe, match=r"notes\.bin: holds a pickle"):
        Bundle.open(folder, cache_dir=cache)


@given(st.data())
def test_onnx_walker_raises_nothing_else(data: st.DataObject) -> None:
    graph = bytearray(
        maker.onnx_model(maker.external("model.onnx_data"), data.draw(st.sampled_from(list(maker.PLACES))))
    )
    for at in data.draw(st.lists(st.integers(0, len(graph) - 1), min_size=1, max_size=4)):
        graph[at] = data.draw(st.integers(0, 255))
    try:
        check("unet/model.onnx", bytes(graph))
    except BundleError as error:
        assert str(error).startswith("unet/model.onnx: ")


def test_onnx_agrees_with_the_walker() -> None:
    onnx = pytest.importorskip("onnx")
    for where in maker.PLACES:
        model = onnx.load_model_from_string(maker.onnx_model(maker.external("model.onnx_data", 4, 12), where))
        found = list(_tensors(model))
        assert [tensor.data_location for tensor in found] == [onnx.TensorProto.EXTERNAL], where
        entries = {entry.key: entry.value for entry in found[0].external_data}
        (ours,) = read_graph(model.SerializeToString(), "x").external
        assert (ours.location, str(ours.offset), str(ours.length)) == tuple(
            entries[key] for key in ("location", "offset", "length")
        )


def _tensors(node: Any) -> Any:
    """All TensorProtos below a protobuf message, found by reflection and not by field numbers."""
    if node.DESCRIPTOR.name == "TensorProto":
        yield node
        return
    for field, value in node.ListFields():
        if field.message_type is not None:
            for child in [value] if hasattr(value, "ListFields") else value:
                yield from _tensors(child)


def test_engines_take_the_synthetic_bundle(folder: Path, cache: Path) -> None:
    """So the refusals of the mutation test are refusals of bundles that would otherwise run."""
    runtime = pytest.importorskip("onnxruntime")
    graph = Bundle.open(folder, cache_dir=cache).graph("unet")
    session = runtime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.ones((1, 4), np.float32)})
    np.testing.assert_array_equal(y, [[2, 3, 4, 5]])


def test_safetensors_own_files_pass() -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    tensors = {"a": np.ones((2, 3), np.float16), "b": np.zeros((0,), np.int64), "c": np.array(1, np.float32)}
    check("x.safetensors", numpy.save(tensors, metadata={"format": "np"}))
    check("x.safetensors", numpy.save({}))


def test_a_header_as_long_as_a_pickles_mark_is_no_pickle(folder: Path, cache: Path) -> None:
    golden = maker.safetensors(json.dumps(maker.GOLDEN).encode().ljust(0x280), bytes(16))
    assert golden[:2] == b"\x80\x02"
    maker.replace(folder / "golden/tensors.safetensors", golden)
    write_manifest(folder, maker.make_manifest(folder))
    Bundle.open(folder, cache_dir=cache)


def test_openvino_ranges() -> None:
    def text(offset: int, size: int) -> bytes:
        return bytes(maker.IR.format(offset=offset, size=size).encode())

    assert check("m.xml", text(0, 16)) == {"m.bin"}
    assert check("m.xml", text(0, 0)) == set()
    with pytest.raises(BundleCorrupt, match=r"m\.xml: reads m\.bin up to byte 17, which has 16"):
        check("m.xml", text(1, 16))
    with pytest.raises(BundleUnsafe, match=r"other\.bin', which the manifest does not list"):
        check("other.xml", text(0, 16))
