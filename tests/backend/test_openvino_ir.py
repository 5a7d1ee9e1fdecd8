"""OpenVINO's own format: timesteps declared as whole numbers, and graphs that read another's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketdiffusion.backends import SessionOptions, load
from pocketdiffusion.backends.feeds import check_feeds
from pocketdiffusion.errors import GraphFailed
from pocketdiffusion.tensors import TensorSpec

openvino = pytest.importorskip("openvino")
from openvino import opset13 as opset  # noqa: E402

TABLE = np.arange(20, dtype=np.float32).reshape(10, 2)


def write(file: Path, outputs: list[Any], inputs: list[Any]) -> Path:
    for port, name in zip(outputs, ("out", "more"), strict=False):
        port.output(0).get_tensor().set_names({name})
    openvino.save_model(openvino.Model(outputs, inputs, "m"), file, compress_to_fp16=False)
    return file


def whole(name: str) -> Any:
    parameter = opset.parameter([-1], openvino.Type.i64, name=name)
    parameter.output(0).get_tensor().set_names({name})
    return parameter


def test_a_timestep_of_whole_numbers_takes_fractions(tmp_path: Path) -> None:
    step = whole("timestep")
    cast = opset.convert(step, openvino.Type.f32)
    cast.output(0).get_tensor().set_names({"cast"})  # what falls away must not rename the input
    out = opset.multiply(cast, opset.constant(np.float32(2)))
    session = load("openvino").open(write(tmp_path / "m.xml", [out], [step]), "cpu", SessionOptions())
    assert session.inputs == {"timestep": TensorSpec("float32", (None,))}
    assert session.run({"timestep": np.array([3.25], np.float32)})["out"] == 6.5


def test_whole_numbers_that_are_used_as_such_stay(tmp_path: Path) -> None:
    ids = whole("input_ids")
    picked = opset.gather(opset.constant(TABLE), ids, opset.constant(0))
    both = opset.multiply(picked, opset.constant(np.float32(1)))
    floats = opset.convert(ids, openvino.Type.f32)
    session = load("openvino").open(write(tmp_path / "m.xml", [both, floats], [ids]), "cpu", SessionOptions())
    assert session.inputs["input_ids"].dtype == "int64"
    np.testing.assert_array_equal(session.run({"input_ids": np.array([3, 1])})["out"], TABLE[[3, 1]])
    with pytest.raises(GraphFailed, match="input_ids"):
        session.run({"input_ids": np.array([0.5])})


def test_a_graph_of_another_size_reads_the_first_ones_weights(tmp_path: Path) -> None:
    for name, rows in (("openvino_model.xml", 1), ("openvino_model_64x32.xml", 3)):
        x = opset.parameter([rows, 10], openvino.Type.f32, name="x")
        x.output(0).get_tensor().set_names({"x"})
        write(tmp_path / name, [opset.matmul(x, opset.constant(TABLE), False, False)], [x])
    (tmp_path / "openvino_model_64x32.bin").unlink()
    session = load("openvino").open(tmp_path / "openvino_model_64x32.xml", "cpu", SessionOptions())
    x = np.ones((3, 10), np.float32)
    np.testing.assert_allclose(session.run({"x": x})["out"], x @ TABLE, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "found"), [((), ()), ((1,), (1,)), ((2,), (2,)), (("batch",), (1,)), ((None,), (1,))]
)
def test_a_scalar_fills_one_axis(shape: tuple[int | str | None, ...], found: tuple[int, ...]) -> None:
    feeds = check_feeds("g", {"t": np.float32(5)}, {"t": TensorSpec("float32", shape)})
    assert (feeds["t"].shape, feeds["t"].tolist()) == (found, 5 if found == () else [5] * found[0])
    with pytest.raises(GraphFailed):
        check_feeds("g", {"t": np.float32(5)}, {"t": TensorSpec("float32", (1, 1))})
