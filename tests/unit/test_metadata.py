from __future__ import annotations

import io
import re
import struct
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pocketdiffusion.errors import InvalidRequest
from pocketdiffusion.image import save
from pocketdiffusion.image.metadata import DIGITAL_SOURCES, Metadata, Parameters, parse, read

FULL = Parameters(
    prompt="a red fox, (snow:1.2)\nsecond line",
    negative_prompt="blurry, text",
    steps=20,
    sampler="Euler a",
    schedule="Karras",
    guidance_scale=7.0,
    seed=965400086,
    width=512,
    height=768,
    model="name, with: signs",
    model_hash="45dee52b",
    clip_skip=2,
    rng="CPU",
    version="pocketdiffusion 0.1.0",
    extra={"Backend": "onnxruntime:cpu", "Quantization": "int8"},
)
TEXT = """a red fox, (snow:1.2)
second line
Negative prompt: blurry, text
Steps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, Model hash: \
45dee52b, Model: "name, with: signs", Clip skip: 2, RNG: CPU, Backend: "onnxruntime:cpu", Quantization: int8, \
Version: pocketdiffusion 0.1.0"""

# The pair rule of the web UI's reader: a key of at least two characters, a JSON text or anything up to the next comma.
A1111_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')

SUFFIXES = [".png", ".jpg", ".webp"]
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


def test_text() -> None:
    assert FULL.text() == TEXT
    assert parse(TEXT) == FULL


@settings(deadline=None)
@given(st.text(), st.text())
@example("Negative prompt: x", "Negative prompt: y")
@example("cat\nSteps: 1, Sampler: a, CFG scale: 2, Seed: 3", "\n\n")
@example(" \n a \r\n\n b\x85", "b\u2028")
@example('"', '\\"\\')
@example("nul\0", "\udcff")
@example("\ufeff", "Exact prompt: a")
def test_any_prompt_comes_back(prompt: str, negative: str) -> None:
    known = Parameters(prompt=prompt, negative_prompt=negative, steps=1, sampler="Euler", seed=0)
    known.text().encode()
    assert parse(known.text()) == known


@settings(deadline=None)
@given(st.text(), st.dictionaries(st.from_regex(r"[A-Z][a-z][a-z /-]*[a-z]", fullmatch=True), st.text()))
@example(
    "512x512", {"Hash": '"quoted"', "Lora hashes": "a: 1, b: 2", "Empty": "", "Path": "C:\\x", "Tail": "\\", "Sp": " x"}
)
def test_any_value_comes_back_here_and_in_the_web_ui(model: str, extra: dict[str, str]) -> None:
    extra = {key: value for key, value in extra.items() if key not in ("Model", "Steps", "Seed", "Sampler", "Version")}
    known = Parameters(model=model, steps=3, seed=4, version="x", extra=extra)
    text = known.text()
    assert "\n" not in text
    assert {"RNG", "Size", "Clip skip"} & set(extra) or parse(text) == known
    assert [key for key, _ in A1111_PAIR.findall(text)] == ["Steps", "Seed", "Model", *extra, "Version"]


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet='ab -/,:.é"\\\t', max_size=60))
def test_pairs_are_found_where_the_web_ui_finds_them(line: str) -> None:
    text = f"Seed: 1, Steps: 2, Model: m, {line}".strip()
    expected = {key.rstrip(): value for key, value in A1111_PAIR.findall(text) if value and len(key.rstrip()) > 1}
    found = parse(text)
    assert {"Seed", "Steps", "Model", *found.extra} == set(expected)
    for key, value in found.extra.items():
        assert value == expected[key] or expected[key].startswith('"')


def test_web_ui_text() -> None:
    known = parse(
        "masterpiece, best quality, 1girl <lora:style:0.8>\n"
        "Negative prompt: lowres, bad anatomy,\n(worst quality:1.4)\n"
        "Steps: 28, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 3141592653, Size: 512x768, Model hash: e6415c4892, "
        "Model: Anything_V5, Denoising strength: 0.45, Clip skip: 2, ENSD: 31337, Hires upscale: 2, "
        'Hires upscaler: R-ESRGAN 4x+, Lora hashes: "style: 7a5f9c0d, other: 12", '
        'TI hashes: "easynegative: c74b4e810b03", Version: v1.6.0'
    )
    assert known.prompt == "masterpiece, best quality, 1girl <lora:style:0.8>"
    assert known.negative_prompt == "lowres, bad anatomy,\n(worst quality:1.4)"
    assert (known.steps, known.sampler, known.schedule, known.guidance_scale) == (28, "DPM++ 2M Karras", None, 6.5)
    assert (known.seed, known.width, known.height, known.clip_skip, known.rng) == (3141592653, 512, 768, 2, "GPU")
    assert (known.model, known.model_hash, known.version) == ("Anything_V5", "e6415c4892", "v1.6.0")
    assert known.extra["Lora hashes"] == "style: 7a5f9c0d, other: 12"
    assert known.extra["Hires upscaler"] == "R-ESRGAN 4x+"
    assert parse(known.text()) == known


def test_civitai_text_without_negative_prompt() -> None:
    known = parse(
        "a lighthouse: at dawn, 35mm\n"
        "Steps: 30, CFG scale: 7, Sampler: DPM++ 2M, Seed: 42, Schedule type: Karras, RNG: NV, Size: 1024x1024, "
        'Civitai resources: [{"type":"checkpoint","modelVersionId":128713}], Created Date: 2024-05-01T10:00:00Z'
    )
    assert (known.prompt, known.negative_prompt) == ("a lighthouse: at dawn, 35mm", "")
    assert (known.schedule, known.rng, known.width) == ("Karras", "NV", 1024)


def test_fewer_than_three_pairs_are_prompt() -> None:
    assert parse("a cat\nSteps: 1, Seed: 2") == Parameters(prompt="a cat\nSteps: 1, Seed: 2")
    assert parse("") == Parameters()


def test_what_has_no_field_is_kept() -> None:
    text = "x\nSteps: many, CFG scale: nan, Seed: -1, Size: big, RNG: other, Clip skip: 0, Clip skip/: 1, Steps : 4"
    known = parse(text)
    assert known.steps == 4
    assert known.extra == {
        "CFG scale": "nan",
        "Seed": "-1",
        "Size": "big",
        "RNG": "other",
        "Clip skip": "0",
        "Clip skip/": "1",
    }
    assert parse(known.text()) == known


@pytest.mark.parametrize(
    "text", ["a" * 500_000, "aa:1," * 100_000, "a b. " * 100_000 + ":", '"\\' * 200_000, "::" * 200_000]
)
def test_hostile_text_takes_linear_time(text: str) -> None:
    start = time.perf_counter()
    parse(f"Seed: 1, Steps: 2, Model: m, {text}")
    assert time.perf_counter() - start < 5


def test_too_few_parameters_can_not_be_written() -> None:
    with pytest.raises(InvalidRequest, match="only 2 parameters"):
        Parameters(prompt="x", steps=1, seed=2).text()


@pytest.mark.parametrize(
    "fields",
    [
        {"rng": "cpu"},
        {"clip_skip": 0},
        {"width": 5},
        {"extra": {"a": "too short"}},
        {"extra": {"new\nline": "x"}},
        {"extra": {"Exact prompt": "x"}},
        {"steps": 3, "extra": {"Steps": "4"}},
        {"extra": {"Count": 3}},
    ],
)
def test_values_that_can_not_be_written(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Parameters(**fields)  # type: ignore[arg-type]
    assert caught.value.parameter == "metadata"


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("source", DIGITAL_SOURCES)
@pytest.mark.parametrize("prompt", ["plain", "日本語, 🦊", "é\0\udc80"])
def test_files_give_back_what_was_written(tmp_path: Path, suffix: str, source: str, prompt: str) -> None:
    known = Parameters(prompt=prompt, steps=1, seed=2, model="m")
    path = save(PIXELS, tmp_path / f"x{suffix}", metadata=Metadata(parameters=known, digital_source=source))
    assert read(path) == (known, source)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_mark_stays_without_prompt_or_parameters(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    save(PIXELS, path, metadata=Metadata(parameters=FULL.without_prompts()))
    assert read(path) == (FULL.without_prompts(), DIGITAL_SOURCES[0])
    content = path.read_bytes()
    assert b"fox" not in content and "fox".encode("utf-16-be") not in content
    save(PIXELS, path, metadata=Metadata(parameters=None))
    assert read(path) == (None, DIGITAL_SOURCES[0])
    assert b"Seed" not in path.read_bytes()


def test_no_metadata_at_all(tmp_path: Path) -> None:
    assert read(save(PIXELS, tmp_path / "x.png", metadata=None)) == (None, None)


def xmp_fields(picture: Image.Image) -> dict[str, str]:
    """By name with namespace, as an XML parser sees the packet."""
    (description,) = ElementTree.fromstring(picture.info["xmp"])[0]
    return {field.tag: field.text or "" for field in description}


def png_chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    chunks, position = [], 8
    while position < len(content):
        length, kind = struct.unpack(">I4s", content[position : position + 8])
        chunks.append((kind, content[position + 8 : position + 8 + length]))
        position += 12 + length
    return chunks


def test_png_chunks(tmp_path: Path) -> None:
    path = save(PIXELS, tmp_path / "x.png", metadata=Metadata(parameters=FULL))
    chunks = png_chunks(path.read_bytes())
    assert (b"tEXt", b"parameters\0" + TEXT.encode("latin-1")) in chunks
    xmp = [data for kind, data in chunks if kind == b"iTXt"]
    assert len(xmp) == 1 and xmp[0].startswith(b"XML:com.adobe.xmp\0\0\0\0\0<?xpacket begin=")
    assert b"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia<" in xmp[0]
    assert b"<xmp:CreatorTool>pocketdiffusion " in xmp[0]
    assert {kind for kind, _ in chunks} == {b"IHDR", b"tEXt", b"iTXt", b"IDAT", b"IEND"}  # no tIME


def test_png_text_beyond_latin_1_is_itxt(tmp_path: Path) -> None:
    known = Parameters(prompt="日本", steps=1, seed=2, model="m")
    path = save(PIXELS, tmp_path / "x.png", metadata=Metadata(parameters=known))
    assert (b"iTXt", b"parameters\0\0\0\0\0" + known.text().encode()) in png_chunks(path.read_bytes())


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_exif_as_the_web_ui_writes_and_reads_it(tmp_path: Path, suffix: str) -> None:
    path = save(PIXELS, tmp_path / f"x{suffix}", metadata=Metadata(parameters=FULL))
    with Image.open(path) as picture:
        exif = picture.getexif()
        assert exif.get_ifd(0x8769) == {0x9286: b"UNICODE\0" + TEXT.encode("utf-16-be")}
        packet = xmp_fields(picture)
    assert packet["{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"].endswith("/trainedAlgorithmicMedia")


def test_jpeg_segments(tmp_path: Path) -> None:
    content = save(PIXELS, tmp_path / "x.jpg", metadata=Metadata(parameters=FULL)).read_bytes()
    assert content.index(b"\xff\xe1") < content.index(b"Exif\0\0MM\0*")
    assert b"http://ns.adobe.com/xap/1.0/\0<?xpacket" in content


def test_webp_chunks(tmp_path: Path) -> None:
    content = save(PIXELS, tmp_path / "x.webp", metadata=Metadata(parameters=FULL)).read_bytes()
    assert b"EXIF" in content and b"XMP <" not in content
    size = struct.unpack("<I", content[content.index(b"XMP ") + 4 :][:4])[0]
    assert content[content.index(b"XMP ") + 8 :][:size].startswith(b"<?xpacket")


def test_a_tool_name_is_escaped(tmp_path: Path) -> None:
    path = save(PIXELS, tmp_path / "x.png", metadata=Metadata(parameters=None, tool="a <b> & \x01c"))
    with Image.open(path) as picture:
        assert xmp_fields(picture)["{http://ns.adobe.com/xap/1.0/}CreatorTool"] == "a <b> & \ufffdc"


def test_text_too_long_for_jpeg(tmp_path: Path) -> None:
    known = Parameters(prompt="x" * 33_000, steps=1, seed=2, model="m")
    with pytest.raises(InvalidRequest, match="PNG or WebP"):
        save(PIXELS, tmp_path / "x.jpg", metadata=Metadata(parameters=known))
    assert list(tmp_path.iterdir()) == []
    assert read(save(PIXELS, tmp_path / "x.webp", metadata=Metadata(parameters=known)))[0] == known


def test_unknown_digital_source() -> None:
    with pytest.raises(InvalidRequest, match="compositeWithTrainedAlgorithmicMedia"):
        Metadata(parameters=None, digital_source="human")


def test_other_tools_files(tmp_path: Path) -> None:
    """Attribute form of XMP, little-endian EXIF with UTF-16LE text."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + TEXT.encode("utf-16-le")
    xmp = b"<x Iptc4xmpExt:DigitalSourceType='http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture'/>"
    Image.fromarray(PIXELS).save(tmp_path / "x.jpg", exif=exif, xmp=xmp)
    assert read(tmp_path / "x.jpg") == (FULL, "digitalCapture")
    chunks = PngInfo()
    chunks.add_text("parameters", TEXT, zip=True)
    Image.fromarray(PIXELS).save(tmp_path / "x.png", pnginfo=chunks)
    assert read(tmp_path / "x.png") == (FULL, None)


def test_damaged_files(tmp_path: Path) -> None:
    encoded = io.BytesIO()
    Image.fromarray(PIXELS).save(encoded, "PNG", **Metadata(parameters=FULL).pillow_options("PNG"))
    content = encoded.getvalue()
    path = tmp_path / "x.png"
    for size in (0, 5, 20, 60, 300):
        path.write_bytes(content[:size])
        with pytest.raises(InvalidRequest, match=r"x\.png"):
            read(path)
    with pytest.raises(InvalidRequest, match="no such file"):
        read(tmp_path / "absent.png")
