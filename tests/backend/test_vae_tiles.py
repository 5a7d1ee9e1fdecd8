"""The embedded model's decoder and encoder in tiles, against the same in one piece."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pocketdiffusion import vae
from pocketdiffusion.backends import load
from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.bundle import Bundle
from pocketdiffusion.component import Component
from pocketdiffusion.golden import sqnr_db
from pocketdiffusion.image import to_uint8
from pocketdiffusion.pipeline import Pipeline
from pocketdiffusion.tensors import Array
from pocketdiffusion.timing import Timings
from pocketdiffusion.verify import psnr_db

STICKER = Path(__file__).resolve().parents[2] / "models/sticker/bundle"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(STICKER)


def component(bundle: Bundle, name: str) -> Component:
    engine = load("onnxruntime")
    if not engine.devices():
        pytest.skip("onnxruntime is not installed")
    entry = bundle.manifest.components[name]
    return Component(name, bundle.graph(name), entry, backend=engine, device="cpu", options=SessionOptions(threads=1))


def sheet(array: Array) -> Array:
    """Planar pictures (1, c, h, w) mirrored to three by three."""
    _, _, height, width = array.shape
    return np.pad(array, ((0, 0), (0, 0), (height, height), (width, width)), mode="symmetric")


# Measured: 30.0, 33.6 and 37.9 dB. Group norms and attention see a tile; how much that changes depends on the picture.
@pytest.mark.parametrize(("tile", "least"), [(16, 25.0), (24, 28.0), (32, 32.0)])
def test_a_picture_decoded_in_tiles_is_near_the_one_in_one_piece(bundle: Bundle, tile: int, least: float) -> None:
    numbers, decoder = bundle.manifest.numbers, component(bundle, "vae_decoder")
    latents = sheet(load_file(STICKER / "golden.safetensors")["vae_decoder/in/latent_sample"]) * numbers.latent_scale
    whole = vae.decode(decoder, latents, numbers, Timings())
    found = vae.decode(decoder, latents, numbers, Timings(), (tile, tile))
    decibels = psnr_db(to_uint8(whole), to_uint8(found))
    print(f"{tile * numbers.vae_factor} pixels: {decibels:.1f} dB")
    assert least < decibels < 60


def test_a_picture_encoded_in_tiles_is_near_the_one_in_one_piece(bundle: Bundle) -> None:
    numbers, encoder = bundle.manifest.numbers, component(bundle, "vae_encoder")
    picture = sheet(load_file(STICKER / "golden.safetensors")["vae_encoder/in/sample"]).transpose(0, 2, 3, 1)
    none = np.zeros((1, 4, 48, 48), np.float32)
    whole = vae.encode(encoder, picture, numbers, lambda: none, Timings())
    found = vae.encode(encoder, picture, numbers, lambda: none, Timings(), (32, 32))
    decibels = sqnr_db(whole, found)
    print(f"{decibels:.1f} dB")
    assert 30 < decibels < 60  # measured: 39.3


def test_a_pipeline_is_opened_with_a_limit() -> None:
    if not load("onnxruntime").devices():
        pytest.skip("onnxruntime is not installed")
    side = Bundle.open(STICKER).manifest.numbers.height
    pipe = Pipeline.from_pretrained(STICKER, device="onnxruntime:cpu", threads=1, vae_tile=side)
    given = {"seed": 0, "width": side * 3 // 2, "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "np"}
    tiled = pipe("a red apple", **given)
    assert tiled.messages == (
        f"vae_decoder ran in 2 tiles of {side}x{side} pixels; in one piece it gives a slightly different picture",
    )
    pipe.vae_tile = None
    whole = pipe("a red apple", **given)
    assert whole.messages == ()
    np.testing.assert_array_equal(tiled.latents, whole.latents)
    assert 0 < np.abs(tiled.images - whole.images).mean() < 0.1
    pipe.close()
