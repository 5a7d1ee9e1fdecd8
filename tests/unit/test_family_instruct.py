"""Changing a picture by an instruction: guidance alone, the request, and the pipeline on the fake engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pocketdiffusion.backends.fake import FakeBackend
from pocketdiffusion.errors import BundleUnsupported, InvalidRequest
from pocketdiffusion.golden import golden_inputs
from pocketdiffusion.pipeline import Pipeline
from pocketdiffusion.request import make_request
from pocketdiffusion.sampling.denoise import guided

from .foreign_maker import models, onnx_folder

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)


def test_guidance_by_two_conditions_is_equation_3() -> None:
    random = np.random.default_rng(1)
    blank, image, text = (random.standard_normal((2, 4, 3, 3)).astype(np.float32) for _ in range(3))
    network = guided(lambda x, t: (blank, image, text), lambda x, t: text, 1.5, 7.0)
    found = network(blank, 10.0)
    np.testing.assert_allclose(found, blank + 1.5 * (image - blank) + 7 * (text - image), rtol=1e-5, atol=1e-5)


def test_there_is_a_scale_for_each_condition() -> None:
    x = np.zeros((1, 1, 1, 1), np.float32)
    with pytest.raises(ValueError, match="zip"):
        guided(lambda x, t: (x, x, x), lambda x, t: x, 7.0)(x, 0.0)


def test_the_request_says_what_is_guided() -> None:
    def request(**fields: float) -> tuple[str, bool, tuple[float, ...]]:
        made = make_request("a", seed=0, image=PIXELS, **{"guidance_scale": 7.0, **fields})
        return made.task, made.guided, made.guidance_scales

    assert request(image_guidance_scale=1.5) == ("instruct", True, (1.5, 7.0))
    assert request(image_guidance_scale=0.5) == ("instruct", False, (0.5, 7.0))
    assert request(image_guidance_scale=1.5, guidance_scale=1.0) == ("instruct", False, (1.5, 1.0))
    assert request() == ("image-to-image", True, (7.0,))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "image_guidance_scale was given without image"),
        ({"image": PIXELS, "strength": 0.5}, "strength was given; a model that follows instructions"),
        ({"image": PIXELS, "mask_image": PIXELS}, "mask_image was given; a model that follows instructions"),
        ({"image": PIXELS, "image_guidance_scale": -1}, "image_guidance_scale is -1; it must be from 0 to 100"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make_request("a", seed=0, **{"image_guidance_scale": 1.5, **fields})


def test_a_picture_for_other_models_is_no_instruction(pipe: Pipeline) -> None:
    assert pipe("a cat", seed=0, image=PIXELS, num_inference_steps=2).parameters[0].extra["Denoising strength"] == "0.8"
    with pytest.raises(BundleUnsupported, match="can't do instruct; it was exported for text-to-image, image-to-image"):
        pipe("a cat", seed=0, image=PIXELS, image_guidance_scale=1.5)


def test_the_denoiser_sees_the_unscaled_picture_and_zeros(pipe: Pipeline, backend: FakeBackend) -> None:
    entries = dict(pipe.bundle.manifest.components)
    spec = entries["unet"].inputs["sample"]
    inputs = {**entries["unet"].inputs, "sample": replace(spec, shape=("batch", 8, "height", "width"))}
    entries["unet"] = replace(entries["unet"], inputs=inputs)
    pipe.bundle = replace(pipe.bundle, manifest=replace(pipe.bundle.manifest, components=entries, tasks=("instruct",)))
    graph, seen = backend.graphs["unet/model.fake"], []

    def function(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.append(feeds)
        return graph.function({**feeds, "sample": feeds["sample"][:, :4]})

    backend.graphs = {**backend.graphs, "unet/model.fake": replace(graph, inputs=inputs, function=function)}
    result = pipe("a cat", negative_prompt="dog", seed=0, image=PIXELS, num_inference_steps=1, num_images_per_prompt=2)
    (feeds,) = seen
    blank, image, text = np.split(feeds["sample"][:, 4:], 3)
    picture = PIXELS[::4, ::4].transpose(2, 0, 1) / np.float32(127.5) - 1  # the fake VAE's mean, in its first channels
    assert (blank == 0).all() and np.array_equal(image, text)
    np.testing.assert_allclose(image[:, :3], np.stack([picture] * 2), atol=1e-5)
    states = np.split(feeds["encoder_hidden_states"], 3)
    assert np.array_equal(states[0], states[1]) and not np.array_equal(states[1], states[2])
    assert result.parameters[0].extra["Image CFG scale"] == "1.5"
    with pytest.raises(BundleUnsupported, match=r"can't do text-to-image; it was exported for instruct \(give image\)"):
        pipe("a cat", seed=0)


def test_the_golden_picture_needs_no_mask() -> None:
    assert list(golden_inputs(("instruct",), 16, 8)) == ["image"]


def test_another_exporters_folder_is_known_by_its_channels(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    index = {"_class_name": "StableDiffusionInstructPix2PixPipeline"}
    folder = onnx_folder(tmp_path / "model", **{"model_index.json": index})
    unet = models()["unet"]
    unet.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 8
    (weights,) = (tensor for tensor in unet.graph.initializer if tensor.name == "w")
    wide = np.concatenate([onnx.numpy_helper.to_array(weights)] * 2, axis=1)
    weights.CopyFrom(onnx.numpy_helper.from_array(wide, "w"))
    onnx.save(unet, str(folder / "unet/model.onnx"))
    pipe = Pipeline.from_pretrained(folder, device="onnxruntime:cpu")
    assert pipe.bundle.manifest.tasks == ("instruct",)
    assert len(pipe("cat", seed=0, image=PIXELS[:16, :16], num_inference_steps=2).images) == 1
