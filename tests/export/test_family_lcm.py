"""LCM: guidance as an input of the UNet, against Diffusers' pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("openvino")

from pocketdiffusion import Pipeline  # noqa: E402
from pocketdiffusion.errors import InvalidRequest  # noqa: E402
from pocketdiffusion.families.guidance import embedding  # noqa: E402

from . import family_sources as tiny  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


def make(folder: Path) -> Any:
    scheduler = diffusers.LCMScheduler(**tiny.NOISE, clip_sample=False, set_alpha_to_one=True)
    kind = diffusers.LatentConsistencyModelPipeline
    return tiny.sd(folder, kind, scheduler, unet_changes={"time_cond_proj_dim": 16})


def test_every_component_equals_its_source(made: Any) -> None:
    assert min(item.sqnr_db for item in made.measured) >= 60
    names = ["sample", "timestep", "encoder_hidden_states", "timestep_cond"]
    assert list(made.manifest.components["unet"].inputs) == names


@pytest.mark.parametrize("device", tiny.DEVICES)
@pytest.mark.parametrize("scale", [0.5, 1.0, 8.5])
def test_the_same_image(ours: dict[str, Pipeline], theirs: Any, device: str, scale: float) -> None:
    assert tiny.compare(ours[device], theirs, guidance_scale=scale) >= 50


def test_one_pass_a_step_whatever_the_scale(ours: dict[str, Pipeline]) -> None:
    timings = ours["onnxruntime:cpu"]("cat", seed=0, guidance_scale=8.5, num_inference_steps=4).timings
    assert len(timings.samples["unet.run"]) == 4


@pytest.mark.parametrize(
    "fields",
    [{"negative_prompt": "cat"}, {"guidance_rescale": 0.5}, {"guidance_interval": (0.0, 0.5)}, {"guidance_hold": 0.5}],
    ids=str,
)
def test_what_needs_two_passes_is_refused(ours: dict[str, Pipeline], fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="has its guidance built in"):
        ours["onnxruntime:cpu"]("cat", seed=0, **fields)


@pytest.mark.parametrize("width", [16, 17, 256])
@pytest.mark.parametrize("scale", [0.0, 1.0, 8.5, 20.0])
def test_the_embedding_is_diffusers(theirs: Any, scale: float, width: int) -> None:
    expected = theirs.get_guidance_scale_embedding(torch.tensor(scale - 1).repeat(1), embedding_dim=width)
    np.testing.assert_allclose(embedding(scale, width), expected.numpy(), atol=3e-3)
