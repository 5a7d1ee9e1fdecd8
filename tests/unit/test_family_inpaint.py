"""Repainting: the wrapper alone, and the pipeline on the fake engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pocketdiffusion.backends.fake import FakeBackend
from pocketdiffusion.errors import BundleUnsupported, InvalidRequest
from pocketdiffusion.golden import golden_inputs
from pocketdiffusion.pipeline import Pipeline
from pocketdiffusion.request import make_request
from pocketdiffusion.tasks import kept

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
MASK = np.zeros((32, 32), np.uint8)
MASK[8:20, 4:24] = 255


def test_the_wrapper_shows_and_returns_the_original_where_the_mask_is_black() -> None:
    random = np.random.default_rng(1)
    x, original, unit = (random.standard_normal((2, 4, 2, 2)).astype(np.float32) for _ in range(3))
    mask = np.zeros((1, 1, 2, 2), np.float32)
    mask[..., 0, 1] = 1
    seen = []

    def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
        seen.append(x)
        return np.full_like(x, 9)

    wrapped = kept(denoise, original, unit, mask, first=5.0)
    black, white = np.broadcast_to(mask == 0, x.shape), np.broadcast_to(mask == 1, x.shape)
    for sigma in (5.0, 2.0):
        found = wrapped(x, sigma)
        assert np.array_equal(found[black], original[black]) and (found[white] == 9).all()
    assert np.array_equal(seen[0], x)  # the start is the sampler's
    np.testing.assert_allclose(seen[1][black], (original + 2 * unit)[black], rtol=1e-6)
    assert np.array_equal(seen[1][white], x[white])


def test_kept_pixels_are_the_pictures_and_white_ones_are_new(pipe: Pipeline) -> None:
    result = pipe("a cat", seed=0, image=PIXELS, mask_image=MASK, num_images_per_prompt=2)
    assert result.pixels is not None and len(result.pixels) == 2
    for pixels in result.pixels:
        assert np.array_equal(pixels[MASK == 0], PIXELS[MASK == 0])
        assert (pixels[MASK > 0] != PIXELS[MASK > 0]).mean() > 0.9
    assert result.digital_source == "compositeWithTrainedAlgorithmicMedia"
    assert result.parameters[0].extra["Denoising strength"] == "1"


def test_masks_come_as_files_pillow_images_and_arrays(pipe: Pipeline, tmp_path: Path) -> None:
    picture = Image.fromarray(MASK)
    picture.save(tmp_path / "mask.png")
    results = [
        pipe("a cat", seed=0, image=PIXELS, mask_image=mask, output_type="latent").images
        for mask in (MASK, picture, tmp_path / "mask.png", str(tmp_path / "mask.png"), np.stack([MASK] * 3, -1))
    ]
    assert all(np.array_equal(results[0], other) for other in results[1:])


def test_the_task_follows_from_the_fields() -> None:
    assert make_request("a", seed=0, image=PIXELS, mask_image=MASK).task == "inpaint"
    with pytest.raises(InvalidRequest, match="mask_image was given without image"):
        make_request("a", seed=0, mask_image=MASK)


def test_denoisers_made_for_it_get_mask_and_masked_picture(pipe: Pipeline, backend: FakeBackend) -> None:
    entries = dict(pipe.bundle.manifest.components)
    spec = entries["unet"].inputs["sample"]
    inputs = {**entries["unet"].inputs, "sample": replace(spec, shape=("batch", 9, "height", "width"))}
    entries["unet"] = replace(entries["unet"], inputs=inputs)
    pipe.bundle = replace(pipe.bundle, manifest=replace(pipe.bundle.manifest, components=entries, tasks=("inpaint",)))
    graph, seen = backend.graphs["unet/model.fake"], []

    def function(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.append(feeds["sample"])
        return graph.function({**feeds, "sample": feeds["sample"][:, :4]})

    backend.graphs = {**backend.graphs, "unet/model.fake": replace(graph, inputs=inputs, function=function)}
    pipe("a cat", seed=0, image=PIXELS, mask_image=MASK, num_inference_steps=2)
    (mask,) = {sample[:, 4:5].tobytes() for sample in seen}
    cells = np.frombuffer(mask, np.float32).reshape(2, 8, 8)
    assert np.array_equal(cells[0], (MASK[::4, ::4] > 0).astype(np.float32)) and np.array_equal(cells[0], cells[1])
    assert np.allclose(seen[0][:, 5:8, 2:5, 1:6], 0, atol=1e-3)  # the white part is grey in the masked picture
    with pytest.raises(BundleUnsupported, match="exported for inpaint"):
        pipe("a cat", seed=0)


def test_models_that_take_no_picture_can_not_repaint(pipe: Pipeline) -> None:
    pipe.bundle = replace(pipe.bundle, manifest=replace(pipe.bundle.manifest, tasks=("text-to-image",)))
    with pytest.raises(BundleUnsupported, match="can't do inpaint"):
        pipe("a cat", seed=0, image=PIXELS, mask_image=MASK)


def test_golden_inputs_are_those_that_the_tasks_need() -> None:
    assert golden_inputs(("text-to-image", "inpaint"), 8, 8) == {}
    found = golden_inputs(("inpaint",), 16, 8)
    assert found["image"].shape == (8, 16, 3) and found["mask_image"].shape == (8, 16)
    assert 0 < (found["mask_image"] > 0).mean() < 0.5
