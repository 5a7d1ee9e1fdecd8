from __future__ import annotations

import io
import os
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pocketdiffusion.errors import InvalidRequest, OutputFailed
from pocketdiffusion.image.files import (
    check_pattern,
    from_image,
    mask_to_latent,
    output_path,
    output_paths,
    resize,
    save,
    save_all,
    to_pil,
    to_uint8,
)
from pocketdiffusion.image.metadata import Metadata, Parameters, read

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
SUFFIXES = [".png", ".jpg", ".jpeg", ".webp", ".PNG"]


def uint8(image: np.ndarray) -> np.ndarray:
    return to_uint8(image)[0]


def test_every_pixel_value_survives() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(3).reshape(16, 16, 3)
    image = from_image(values)
    assert image.shape == (1, 16, 16, 3) and image.dtype == np.float32
    assert (image.min(), image.max()) == (-1, 1)
    assert np.array_equal(uint8(image), values)


def test_to_uint8_clips_and_rounds_half_to_even() -> None:
    values = np.array([-9, -1, 0, 1, 9, 2 * 0.5 / 255 - 1, 2 * 1.5 / 255 - 1], np.float32).reshape(1, 1, 7, 1)
    assert to_uint8(np.broadcast_to(values, (1, 1, 7, 3)))[0, 0, :5, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.torch
def test_to_uint8_and_to_pil_as_diffusers() -> None:
    torch = pytest.importorskip("torch")
    processor = pytest.importorskip("diffusers.image_processor").VaeImageProcessor()
    images = np.random.default_rng(1).normal(0, 0.7, (2, 16, 24, 3)).astype(np.float32)
    expected = processor.postprocess(torch.from_numpy(images).permute(0, 3, 1, 2), output_type="pil")
    for ours, theirs in zip(to_pil(to_uint8(images)), expected, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.torch
def test_resize_and_mask_as_diffusers() -> None:
    torch = pytest.importorskip("torch")
    processor_class = pytest.importorskip("diffusers.image_processor").VaeImageProcessor
    picture = Image.fromarray(PIXELS)
    ours = resize(from_image(picture), 32, 40)
    theirs = processor_class().preprocess(picture, height=40, width=32).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    masks = processor_class(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    mask = torch.nn.functional.interpolate(masks.preprocess(picture, height=40, width=32), size=(5, 4)).numpy()
    assert 0 < mask.mean() < 1
    assert np.array_equal(mask_to_latent(ours, 8), mask)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (Image.new("L", (3, 2), 10), (10, 10, 10)),
        (Image.new("1", (3, 2), 1), (255, 255, 255)),
        (Image.new("RGBA", (3, 2), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (3, 2), (0, 100, 255, 128)), (127, 177, 255)),
        (Image.new("LA", (3, 2), (0, 255)), (0, 0, 0)),
        (Image.new("CMYK", (3, 2), (0, 0, 0, 255)), (0, 0, 0)),
        (Image.new("I;16", (3, 2), 257 * 40), (40, 40, 40)),
        (np.full((2, 3), 7, np.uint8), (7, 7, 7)),
        (np.full((2, 3, 1), 7, np.uint8), (7, 7, 7)),
        (np.full((2, 3, 4), [1, 2, 3, 255], np.uint8), (1, 2, 3)),
    ],
)
def test_modes(source: Image.Image | np.ndarray, expected: tuple[int, int, int]) -> None:
    image = uint8(from_image(source))
    assert image.shape == (2, 3, 3)
    assert np.abs(image.astype(int) - expected).max() <= 1


def test_palette_with_transparency(tmp_path: Path) -> None:
    picture = Image.new("P", (3, 2), 0)
    picture.putpalette([200, 0, 0, 0, 200, 0])
    picture.putpixel((0, 0), 1)
    picture.save(tmp_path / "x.png", transparency=0)
    image = uint8(from_image(tmp_path / "x.png"))
    assert image[0, 0].tolist() == [0, 200, 0]
    assert image[1, 2].tolist() == [255, 255, 255]


def test_exif_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to show
    Image.fromarray(PIXELS).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(uint8(from_image(tmp_path / "x.png")), np.rot90(PIXELS, -1))


@pytest.mark.parametrize(
    "array", [np.zeros((2, 2, 3)), np.zeros((1, 2, 2, 3), np.uint8), np.zeros((0, 2, 3), np.uint8)]
)
def test_arrays_that_are_no_picture(array: np.ndarray) -> None:
    with pytest.raises(InvalidRequest, match="uint8"):
        from_image(array)


def test_file_objects() -> None:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG")
    buffer.seek(0)
    assert np.array_equal(uint8(from_image(buffer)), PIXELS)


@pytest.mark.parametrize("format_name", ["BMP", "GIF", "TIFF", "PPM"])
def test_other_formats_are_refused_whatever_their_suffix(tmp_path: Path, format_name: str) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(PIXELS).save(path, format_name)
    with pytest.raises(InvalidRequest, match="not a PNG, JPEG or WebP"):
        from_image(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_truncated_files(tmp_path: Path, suffix: str) -> None:
    path = save(PIXELS, tmp_path / f"x{suffix}", metadata=None)
    content = path.read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 40):
        path.write_bytes(content[:size])
        with pytest.raises(InvalidRequest) as caught:
            from_image(path)
        assert "\n" not in str(caught.value) and path.name in str(caught.value)


@pytest.mark.parametrize("size", [(4097, 4096), (10_000, 10_000), (30_000, 30_000)])
def test_too_large_is_refused_before_decoding(tmp_path: Path, size: tuple[int, int]) -> None:
    path = save(PIXELS, tmp_path / "x.png", metadata=None)
    content = bytearray(path.read_bytes())
    content[16:24] = size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match="4096 x 4096"):
        from_image(path)


def test_too_large_in_memory() -> None:
    with pytest.raises(InvalidRequest, match="4096 x 4096"):
        from_image(Image.new("1", (4097, 4096)))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no such file"):
        from_image(tmp_path / "absent.png")
    with pytest.raises(InvalidRequest):
        from_image(tmp_path)


def test_resize_of_the_same_size_changes_nothing() -> None:
    image = np.random.default_rng(0).uniform(-1, 1, (2, 4, 6, 3)).astype(np.float32)
    assert resize(image, 6, 4) is image
    assert resize(image, 3, 5).shape == (2, 5, 3, 3)


def test_mask_to_latent() -> None:
    mask = np.zeros((16, 24, 3), np.uint8)
    mask[8:, 8:16] = 255
    mask[1:8, 1:8] = 255  # all but the pixels that count
    latent = mask_to_latent(from_image(mask), 8)
    assert latent.dtype == np.float32
    assert latent.tolist() == [[[[0, 0, 0], [0, 1, 0]]]]
    with pytest.raises(InvalidRequest, match="multiples of 7"):
        mask_to_latent(from_image(mask), 7)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_save(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    assert save(PIXELS, str(path), metadata=None) == path
    first = path.read_bytes()
    assert save(PIXELS, path, metadata=None).read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    difference = np.abs(uint8(from_image(path)).astype(int) - PIXELS)
    assert difference.mean() < (0.001 if suffix.lower() == ".png" else 60)


def test_quality(tmp_path: Path) -> None:
    for suffix in (".jpg", ".webp"):
        low, high = (save(PIXELS, tmp_path / f"{q}{suffix}", metadata=None, quality=q) for q in (10, 95))
        assert low.stat().st_size < high.stat().st_size
    with pytest.raises(InvalidRequest, match="1 to 100"):
        save(PIXELS, tmp_path / "x.jpg", metadata=None, quality=0)


@pytest.mark.parametrize("name", ["x", "x.gif", "x.png.txt"])
def test_unknown_suffix_lists_the_choices(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"\.png, \.jpg, \.jpeg, \.webp"):
        save(PIXELS, tmp_path / name, metadata=None)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(PIXELS, tmp_path / "x.png", metadata=None)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputFailed, match="No space left"):
        save(PIXELS // 2, path, metadata=None)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.png"]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(PIXELS, tmp_path / "x.png", metadata=None)
    assert list(tmp_path.iterdir()) == []


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputFailed, match="can't be written"):
        save(PIXELS, tmp_path / "absent" / "x.png", metadata=None)
    with pytest.raises(InvalidRequest, match="there is no folder"):
        check_pattern(str(tmp_path / "absent" / "{seed}.png"))


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_a_saved_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    assert save(PIXELS, tmp_path / "x.png", metadata=None).stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_output_path() -> None:
    path = output_path(
        "out/{model}-{seed}-{index:03}-{steps}-{width}x{height}.png",
        seed=7, index=2, width=64, height=48, steps=20, model="sd15"
    )  # fmt: skip
    assert path == Path("out/sd15-7-002-20-64x48.png")


@pytest.mark.parametrize(
    "pattern",
    [
        "{seed.__class__}.png",
        "{seed[0]}.png",
        "{seed!r}.png",
        "{prompt}.png",
        "{}.png",
        "{0}.png",
        "{index:>9999}.png",
        "{index:999}.png",
        "{model:03}.png",
        "{{seed}}.png",
        "{seed.png",
        "seed}.png",
        "a\0.png",
    ],
)
def test_other_fields_are_refused_and_the_choices_listed(pattern: str) -> None:
    with pytest.raises(InvalidRequest, match=r"\{seed\}, \{index\}") as caught:
        check_pattern(pattern)
    assert caught.value.parameter == "output"


def test_pattern_without_an_image_suffix() -> None:
    with pytest.raises(InvalidRequest, match="choose one of"):
        check_pattern("{seed}")


@pytest.mark.parametrize("model", ["../../etc/x", "/etc/x", "..", "a\\b", "C:x", "~root", "a\0b\n", ""])
def test_a_model_name_adds_no_folder(model: str) -> None:
    path = output_path("out/{model}.png", seed=0, index=0, model=model)
    assert path.parent == Path("out")
    assert not set(path.name) & set('/\\:~\0\n"')
    assert not path.name.startswith(".")


def test_images_that_would_share_a_name_are_numbered() -> None:
    names = ["a-1.png", "a-2.png"]
    assert [path.name for path in output_paths("a.png", [5, 6])] == names
    assert [path.name for path in output_paths("a.png", [5])] == ["a.png"]
    assert [path.name for path in output_paths("{seed}.png", [5, 6])] == ["5.png", "6.png"]
    assert [path.name for path in output_paths("{seed}.png", [5, 5])] == ["5-1.png", "5-2.png"]
    assert [path.name for path in output_paths("{index:02}.png", [5, 5])] == ["00.png", "01.png"]


@dataclass
class Pictures:
    pixels: np.ndarray | None
    seeds: tuple[int, ...]
    parameters: tuple[Parameters, ...]
    digital_source: str = "trainedAlgorithmicMedia"


def test_save_all(tmp_path: Path) -> None:
    known = tuple(Parameters(prompt="a fox", steps=4, seed=seed, model="m") for seed in (3, 4))
    result = Pictures(np.stack([PIXELS, 255 - PIXELS]), (3, 4), known)
    paths = save_all(result, str(tmp_path / "{model}-{seed}-{width}x{height}-{steps}.png"))
    assert [path.name for path in paths] == ["m-3-24x16-4.png", "m-4-24x16-4.png"]
    assert [read(path)[0] for path in paths] == list(known)
    assert np.array_equal(uint8(from_image(paths[1])), 255 - PIXELS)
    (path, _) = save_all(result, str(tmp_path / "x.png"), with_prompt=False)
    assert read(path) == (known[0].without_prompts(), "trainedAlgorithmicMedia")
    with pytest.raises(InvalidRequest, match="latents only"):
        save_all(Pictures(None, (3, 4), known), "x.png")


def test_import_does_not_load_pillow() -> None:
    code = "import sys, pocketdiffusion.image, pocketdiffusion.image.metadata; print('PIL' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == "False"


def test_metadata_does_not_change_pixels(tmp_path: Path) -> None:
    known = Metadata(parameters=Parameters(prompt="x", steps=1, seed=1, model="m"))
    for suffix in (".png", ".jpg", ".webp"):
        bare, marked = (save(PIXELS, tmp_path / f"{i}{suffix}", metadata=m) for i, m in enumerate((None, known)))
        assert np.array_equal(from_image(bare), from_image(marked))
