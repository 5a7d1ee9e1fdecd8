"""Whether a run did what was asked: what is told of it, and the picture itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from pocketdiffusion_bench.case import Case
from pocketdiffusion_bench.checks import mismatch, pixels_of, png_size, wrong_size

PART = {"device": "openvino:cpu", "precision": "float32", "engine": "openvino 1"}
USED = {**PART, "recipe": "fp32", "threads": 2, "width": 64, "height": 64, "steps": 4, "guidance": 3.5}


def used(**changes: object) -> dict[str, object]:
    """A configuration of two components, with changes of the denoiser's part or of the whole."""
    part = {key: changes.pop(key) for key in list(changes) if key in PART}
    return {**USED, **changes, "components": {"text_encoder": PART, "unet": {**PART, **part}}}


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"precision": "float32", "device": "openvino:cpu", "recipe": "fp32", "threads": 2},
        {"width": 64, "height": 64, "steps": 4, "guidance": 3.5},
        {"device": "auto"},
        {"device": "cpu"},
        {"device": "openvino"},
        {"device": "OpenVINO:CPU"},
        {"device": "denoiser=openvino:cpu,vae=onnxruntime:cpu"},
    ],
)
def test_what_was_asked_and_done_passes(asked: dict[str, object]) -> None:
    assert mismatch(Case("m", **asked), used()) is None  # type: ignore[arg-type]
    assert mismatch(Case("m", **asked), USED) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "changes", "message"),
    [
        ({"precision": "float32"}, {"precision": "bfloat16"}, "unet ran in bfloat16, asked for float32"),
        ({"precision": "float32"}, {"precision": None}, "unet ran in an untold precision, asked for float32"),
        ({"device": "openvino:gpu"}, {}, "text_encoder ran on openvino:cpu, asked for openvino:gpu"),
        ({"device": "openvino:cpu"}, {"device": "onnxruntime:cpu"}, "unet ran on onnxruntime:cpu"),
        ({"device": "cpu"}, {"device": "openvino:gpu.0"}, "unet ran on openvino:gpu.0, asked for cpu"),
        ({"device": "openvino"}, {"device": None}, "unet ran on an untold device"),
        ({"device": "unet=openvino:gpu,cpu"}, {}, "unet ran on openvino:cpu, asked for openvino:gpu"),
        ({"recipe": "fp32"}, {"recipe": "int8"}, "ran with recipe int8, asked for fp32"),
        ({"steps": 4}, {"steps": 2}, "ran with steps 2, asked for 4"),
        ({"width": 64, "height": 64}, {"width": 32}, "ran with width 32"),
        ({"threads": 2}, {"threads": 8}, "ran with threads 8"),
        ({"guidance": 3.5}, {"guidance": 1.0}, "ran with guidance 1.0"),
        ({"vae_tile": 256}, {"vae_tile": 512}, "ran with vae_tile 512, asked for 256"),
        ({"preset": "fast"}, {"preset": "exact"}, "ran with preset exact, asked for fast"),
    ],
)
def test_what_was_silently_changed_is_told(asked: dict[str, object], changes: dict[str, object], message: str) -> None:
    assert message in str(mismatch(Case("m", **asked), used(**changes)))  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["gpu", "openvino:gpu", "openvino:gpu.1", "openvino"])
def test_a_numbered_device_is_one_of_its_kind(device: str) -> None:
    part = {"components": {"unet": {**PART, "device": "openvino:gpu.1"}}}
    assert mismatch(Case("m", device=device), part) is None
    assert mismatch(Case("m", device="openvino:gpu.0"), part) is not None


def test_integer_layers_of_a_quantized_graph_are_no_other_precision() -> None:
    assert mismatch(Case("m", precision="float32"), used(precision="int8")) is None


def test_a_peer_that_tells_no_parts_is_checked_as_a_whole() -> None:
    assert "the model ran in bfloat16" in str(mismatch(Case("m", precision="float32"), {"precision": "bfloat16"}))


def test_the_pictures_size_is_its_own_and_not_what_is_told_of_it(tmp_path: Path) -> None:
    Image.new("RGB", (64, 32)).save(tmp_path / "a.png")
    assert png_size(tmp_path / "a.png") == (64, 32)
    assert wrong_size(Case("m", width=64, height=32), tmp_path / "a.png") is None
    assert wrong_size(Case("m"), tmp_path / "a.png") is None
    assert "64x32, asked for 64x64" in str(wrong_size(Case("m", width=64, height=64), tmp_path / "a.png"))


def test_pixels_are_compared_without_what_a_file_tells_besides(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    told = PngInfo()
    told.add_text("time", "now")
    picture = Image.linear_gradient("L").convert("RGB")
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "b.png", pnginfo=told)
    picture.putpixel((5, 5), (1, 2, 3))
    picture.save(tmp_path / "c.png")
    a, b, c = (pixels_of(tmp_path / f"{name}.png") for name in "abc")
    assert a == b and a and a != c


def test_another_file_is_no_png(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"a\.png is no PNG"):
        png_size(tmp_path / "a.png")
