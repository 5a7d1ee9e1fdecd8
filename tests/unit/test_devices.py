"""Which engine runs a graph: `backends.choose`, `backends.parse_devices` and the registry."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pocketdiffusion import backends
from pocketdiffusion.backends import (
    AUTO_ORDER,
    BACKENDS,
    DeviceInfo,
    available,
    choose,
    load,
    parse_devices,
    parse_precisions,
    role_value,
)
from pocketdiffusion.backends.onnxruntime import PROVIDERS
from pocketdiffusion.errors import BackendUnavailable, InvalidRequest

FORMATS = {"onnxruntime": ("onnx",), "openvino": ("openvino", "onnx"), "coreml": ("coreml",), "fake": ("fake",)}


@dataclass
class Present:
    """A backend that says what a test wants."""

    name: str
    found: list[str] = field(default_factory=list)

    @property
    def formats(self) -> tuple[str, ...]:
        return FORMATS[self.name]

    def devices(self) -> list[str]:
        return self.found

    def version(self) -> str:
        return "1.0"


@pytest.fixture
def present(monkeypatch):
    """Makes a machine with these devices."""

    def make(**devices: list[str]) -> None:
        monkeypatch.setattr(backends, "load", lambda name: Present(name, devices.get(name, [])))

    return make


def chosen(*args, **kwargs) -> str:
    return str(choose(*args, **kwargs))


@pytest.mark.parametrize(
    ("devices", "format", "expected"),
    [
        ({"onnxruntime": ["cpu"]}, "onnx", "onnxruntime:cpu"),
        ({"openvino": ["cpu"]}, "onnx", "openvino:cpu"),
        ({"openvino": ["cpu"], "onnxruntime": ["cpu"]}, "onnx", "onnxruntime:cpu"),
        ({"openvino": ["cpu"], "onnxruntime": ["cpu"]}, "openvino", "openvino:cpu"),
        ({"openvino": ["gpu", "cpu"], "onnxruntime": ["cpu"]}, "onnx", "openvino:gpu"),
        ({"openvino": ["gpu.0", "gpu.1", "cpu"], "onnxruntime": ["cpu"]}, "onnx", "openvino:gpu"),
        ({"openvino": ["gpu", "cpu"], "onnxruntime": ["cuda", "tensorrt", "cpu"]}, "onnx", "onnxruntime:cuda"),
        ({"openvino": ["gpu", "cpu"], "onnxruntime": ["directml", "cpu"]}, "onnx", "onnxruntime:directml"),
        ({"coreml": ["all", "cpu"], "onnxruntime": ["cpu", "coreml"]}, "onnx", "onnxruntime:cpu"),
        ({"coreml": ["all", "cpu"], "onnxruntime": ["cpu", "coreml"]}, "coreml", "coreml:all"),
        ({"openvino": ["cpu", "npu"]}, "onnx", "openvino:cpu"),
    ],
)
def test_auto_takes_the_first_that_is_here_and_opens_the_format(present, devices, format, expected):
    present(**devices)
    assert chosen(format) == expected
    assert choose(format).reason


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("openvino:cpu", "openvino:cpu"),
        ("openvino:gpu", "openvino:gpu"),
        ("openvino:gpu.1", "openvino:gpu.1"),
        ("OpenVINO:GPU", "openvino:gpu"),
        ("openvino", "openvino:gpu.0"),
        ("openvino:npu", "openvino:npu"),
        ("npu", "openvino:npu"),
        ("gpu", "openvino:gpu"),
        ("cpu", "onnxruntime:cpu"),
        ("onnxruntime", "onnxruntime:cpu"),
    ],
)
def test_a_device_that_is_asked_for_is_the_one_that_runs(present, device, expected):
    present(onnxruntime=["cpu"], openvino=["gpu.0", "gpu.1", "cpu", "npu"])
    assert chosen("onnx", device) == expected


def test_no_engine_names_the_commands(present):
    present()
    with pytest.raises(BackendUnavailable, match="no engine is installed") as caught:
        choose("onnx", component="unet")
    text = str(caught.value)
    assert text.startswith("unet (onnx): ")
    for extra in ("cpu", "cuda", "directml", "openvino"):
        assert f"pip install 'pocketdiffusion[{extra}]'" in text
    assert "[coreml]" not in text
    assert "\n" not in text


@pytest.mark.parametrize("device", ["cuda", "onnxruntime:cuda", "openvino:gpu", "coreml", "abacus"])
def test_a_device_that_is_not_here_says_what_is(present, device):
    present(onnxruntime=["cpu"], openvino=["cpu"])
    with pytest.raises(BackendUnavailable, match="onnxruntime:cpu, openvino:cpu"):
        choose("onnx", device)


def test_an_engine_that_does_not_open_the_format(present):
    present(onnxruntime=["cpu"], openvino=["cpu"])
    with pytest.raises(BackendUnavailable, match=r"unet \(openvino\) can't be opened by onnxruntime, .* openvino:cpu"):
        choose("openvino", "onnxruntime", component="unet")


def test_only_an_npu_is_named_and_not_taken(present):
    present(openvino=["npu"])
    with pytest.raises(BackendUnavailable, match="present for this format: openvino:npu"):
        choose("onnx")


def test_a_format_that_nothing_opens(present):
    present(onnxruntime=["cpu"])
    with pytest.raises(BackendUnavailable, match="pocketdiffusion.coreml."):
        choose("coreml")


def test_an_unknown_backend_lists_the_choices(present):
    present(onnxruntime=["cpu"])
    with pytest.raises(InvalidRequest, match="unknown backend 'onnx'; choose from onnxruntime, openvino, coreml$"):
        choose("onnx", "onnx:cpu")


def test_the_fake_backend_must_be_asked_for(present):
    present(fake=["cpu"])
    with pytest.raises(BackendUnavailable):
        choose("fake")
    with pytest.raises(BackendUnavailable):
        choose("fake", "cpu")
    assert chosen("fake", "fake") == "fake:cpu"
    assert available() == []


def test_available_lists_every_device(present):
    present(onnxruntime=["cuda", "cpu"], openvino=["cpu"])
    assert available() == [
        DeviceInfo("onnxruntime", "cuda", "1.0", ("onnx",)),
        DeviceInfo("onnxruntime", "cpu", "1.0", ("onnx",)),
        DeviceInfo("openvino", "cpu", "1.0", ("openvino", "onnx")),
    ]


def test_every_backend_loads_without_its_engine_and_names_itself():
    for name in BACKENDS:
        backend = load(name)
        assert backend.name == name
        assert backend.formats
        assert isinstance(backend.devices(), list)


def test_the_order_holds_devices_that_exist():
    known = {"onnxruntime": set(PROVIDERS), "openvino": {"gpu", "cpu", "npu"}, "coreml": {"all", "ane", "gpu", "cpu"}}
    for backend, device, reason in AUTO_ORDER:
        assert device in known[backend]
        assert reason


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "coreml"])
def test_a_missing_engine_has_no_devices(name):
    code = (
        f"import sys; sys.modules.update(onnxruntime=None, openvino=None, coremltools=None)\n"
        f"from pocketdiffusion.backends import load, choose\n"
        f"from pathlib import Path\n"
        f"from pocketdiffusion.backends.base import SessionOptions\n"
        f"backend = load({name!r}); print(backend.devices(), repr(backend.version()))\n"
        f"try: backend.open(Path('g'), 'cpu', SessionOptions())\n"
        f"except Exception as error: print(type(error).__name__)\n"
    )
    assert run_python(code).splitlines() == ["[] ''", "BackendUnavailable"]


def run_python(code: str) -> str:
    runtime = str(Path(backends.__file__).parents[2])
    program = f"import sys; sys.path.insert(0, {runtime!r})\n{code}"
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout


def test_importing_the_registry_imports_no_engine():
    engines = ("onnxruntime", "openvino", "coremltools")
    code = f"import pocketdiffusion.backends; print([name for name in {engines} if name in sys.modules])"
    assert run_python(code) == "[]\n"


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ("auto", ("auto", "auto", "auto", "auto")),
        ("openvino:cpu", ("openvino:cpu",) * 4),
        ("unet=openvino:cpu,vae=onnxruntime:cpu", ("auto", "openvino:cpu", "onnxruntime:cpu", "auto")),
        (" text_encoder = cpu , openvino:gpu", ("cpu", "openvino:gpu", "openvino:gpu", "openvino:gpu")),
        ({"transformer": "cuda", "default": "cpu"}, ("cpu", "cuda", "cpu", "cpu")),
        ({}, ("auto",) * 4),
    ],
)
def test_devices_for_roles(devices, expected):
    assert tuple(parse_devices(devices).values()) == expected
    assert list(parse_devices(devices)) == ["text_encoder", "denoiser", "vae", "default"]


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("unett=cpu", "unknown role 'unett'; choose from text_encoder, denoiser, vae, default, unet"),
        ("unet=cpu,denoiser=gpu", "two devices are given for 'denoiser': cpu and gpu"),
        ("cpu,gpu", "two devices are given for 'default'"),
        ("unet=", "no device is given for 'unet'"),
        ("", "no device is given for 'default'"),
        ("cpu,", "no device is given for 'default'"),
        (None, "device is None; give a text, e.g. 'auto', or a text for each role"),
        ({"denoiser": 3}, "give a text, e.g. 'auto'"),
    ],
)
def test_wrong_devices_for_roles(devices, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        parse_devices(devices)
    assert caught.value.parameter == "device"


def test_precisions_for_roles():
    assert set(parse_precisions("bfloat16").values()) == {"bfloat16"}
    found = parse_precisions("unet=bfloat16,vae=float16")
    assert [role_value(found, name) for name in ("unet", "vae_decoder", "text_encoder_2", "safety_checker")] == [
        *("bfloat16", "float16", "float32", "float32")
    ]
    assert parse_precisions({"default": "bfloat16", "vae": "float32"})["vae"] == "float32"


@pytest.mark.parametrize(
    ("precisions", "message"),
    [
        (16, "precision is 16; give a text, e.g. 'float32'"),
        ("int3", "precision of text_encoder is 'int3'; choose from float32, bfloat16, float16"),
        ("vae=half", "precision of vae is 'half'; choose from float32"),
        ("vae", "precision of text_encoder is 'vae'; choose from float32"),
        ("vea=float32", "unknown role 'vea'"),
        ("vae=float32,vae_decoder=float16", "two precisions are given for 'vae'"),
        ("vae=", "no precision is given for 'vae'; write e.g. vae=float32"),
    ],
)
def test_wrong_precisions_for_roles(precisions, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        parse_precisions(precisions)
    assert caught.value.parameter == "precision"


@pytest.mark.parametrize(
    ("component", "role"),
    [
        ("text_encoder", "text_encoder"),
        ("text_encoder_2", "text_encoder"),
        ("unet", "denoiser"),
        ("transformer", "denoiser"),
        ("vae_decoder", "vae"),
        ("vae_encoder", "vae"),
        ("safety_checker", "default"),
    ],
)
def test_the_role_of_a_component(component, role):
    devices = {name: name for name in ("text_encoder", "denoiser", "vae", "default")}
    assert role_value(devices, component) == role
