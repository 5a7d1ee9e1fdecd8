"""The Core ML backend as far as it goes without macOS: descriptions, and the calls it makes of coremltools."""

from __future__ import annotations

import json
from enum import Enum
from types import SimpleNamespace

import numpy as np
import pytest

from pocketdiffusion.backends import coreml
from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.errors import BackendUnavailable, GraphFailed
from pocketdiffusion.tensors import TensorSpec


def field(
    name: str, dtype: str, shape: list[int], *, flexible: bool = False, kind: str = "MultiArray"
) -> dict[str, str]:
    flexibility = "1" if flexible else "0"
    return {"name": name, "type": kind, "dataType": dtype, "shape": str(shape), "hasShapeFlexibility": flexibility}


METADATA = [
    {
        "computePrecision": "Mixed (Float16, Float32, Int32)",
        "inputSchema": [field("sample", "Float16", [2, 4, 64, 64]), field("timestep", "Float16", [2])],
        "outputSchema": [field("noise_pred", "Float32", [2, 4, 64, 64])],
    }
]


class Unit(Enum):
    ALL = 1
    CPU_AND_GPU = 2
    CPU_ONLY = 3
    CPU_AND_NE = 4


class Model:
    """Stands in for coremltools' CompiledMLModel."""

    def __init__(self, path: str, compute_units: Unit) -> None:
        self.path, self.units = path, compute_units
        Model.latest = self

    def predict(self, feeds):
        self.feeds = feeds
        return {"noise_pred": feeds["sample"] * 2}


@pytest.fixture
def compiled(tmp_path):
    folder = tmp_path / "Unet.mlmodelc"
    folder.mkdir()
    (folder / "metadata.json").write_text(json.dumps(METADATA), encoding="utf-8")
    return folder


@pytest.fixture
def on_macos(monkeypatch):
    engine = SimpleNamespace(__version__="9.0", ComputeUnit=Unit, models=SimpleNamespace(CompiledMLModel=Model))
    monkeypatch.setattr(coreml, "_engine", lambda: engine)
    return coreml.CoreMLBackend()


def test_elsewhere_there_is_no_device(monkeypatch, compiled):
    monkeypatch.setattr(coreml.sys, "platform", "linux")
    backend = coreml.CoreMLBackend()
    assert (backend.devices(), backend.version()) == ([], "")
    with pytest.raises(BackendUnavailable):
        backend.open(compiled, "cpu", SessionOptions())


def test_the_description_of_a_compiled_model(compiled):
    inputs, outputs, precision = coreml.compiled_description(compiled)
    assert inputs == {
        "sample": TensorSpec("float16", (2, 4, 64, 64)),
        "timestep": TensorSpec("float16", (2,)),
    }
    assert outputs == {"noise_pred": TensorSpec("float32", (2, 4, 64, 64))}
    assert precision == "float16"


@pytest.mark.parametrize(
    ("device", "unit"), [("all", "ALL"), ("ane", "CPU_AND_NE"), ("gpu", "CPU_AND_GPU"), ("cpu", "CPU_ONLY")]
)
def test_opening_and_running(on_macos, compiled, device, unit):
    assert device in on_macos.devices()
    session = on_macos.open(compiled, device, SessionOptions())
    assert (session.device, session.precision) == (f"coreml:{device}", "float16")
    assert (Model.latest.path, Model.latest.units.name) == (str(compiled), unit)
    outputs = session.run({"sample": np.ones((2, 4, 64, 64), np.float32), "timestep": np.array([7, 7])})
    assert {name: array.dtype.name for name, array in Model.latest.feeds.items()} == {
        "sample": "float16",
        "timestep": "float16",
    }
    np.testing.assert_array_equal(outputs["noise_pred"], np.full((2, 4, 64, 64), 2, np.float32))
    assert outputs["noise_pred"].dtype == np.float32


def test_a_model_of_pictures_is_refused(on_macos, compiled):
    pictures = [{**METADATA[0], "inputSchema": [field("image", "", [], kind="Image")]}]
    (compiled / "metadata.json").write_text(json.dumps(pictures), encoding="utf-8")
    with pytest.raises(GraphFailed, match=r"Unet\.mlmodelc could not be opened on coreml:cpu: 'image' is a Image"):
        on_macos.open(compiled, "cpu", SessionOptions())


def test_a_precision_that_the_model_does_not_have(on_macos, compiled):
    with pytest.raises(GraphFailed, match="asked for bfloat16, the model is compiled for float16"):
        on_macos.open(compiled, "cpu", SessionOptions(precision="bfloat16"))


@pytest.mark.filterwarnings("ignore")  # coremltools' own
def test_the_description_of_a_package():
    ct = pytest.importorskip("coremltools")
    from coremltools.converters.mil import Builder as mb

    @mb.program(input_specs=[mb.TensorSpec(shape=(1, 4))], opset_version=ct.target.iOS16)
    def program(x):
        return mb.mul(x=x, y=0.5, name="out")

    model = ct.convert(program, convert_to="mlprogram", skip_model_load=True)
    inputs, outputs, precision = coreml.package_description(model.get_spec())
    assert inputs == {"x": TensorSpec("float32", (1, 4))}
    assert outputs == {"out": TensorSpec("float32", (1, 4))}
    assert precision == "float16"
