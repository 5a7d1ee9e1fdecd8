"""The judge without torch: scores, the best of several pictures, models without one; on the fake engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pocketdiffusion.backends.fake import FakeBackend, FakeGraph
from pocketdiffusion.bundle.manifest import ComponentEntry
from pocketdiffusion.cli import main
from pocketdiffusion.component import Component
from pocketdiffusion.errors import BundleUnsupported, InvalidRequest
from pocketdiffusion.judge import COMPONENTS, Judge
from pocketdiffusion.pipeline import Pipeline
from pocketdiffusion.tensors import AnyArray, TensorSpec
from pocketdiffusion.timing import Timings

from ..conftest import LENGTH

SIDE = 8
SPECS = {
    "judge_text": (
        {"input_ids": TensorSpec("int64", ("batch", LENGTH))},
        {"text_embeds": TensorSpec("float32", ("batch", 3))},
    ),
    "judge_image": (
        {"pixel_values": TensorSpec("float32", ("batch", 3, SIDE, SIDE))},
        {name: TensorSpec("float32", ("batch", 3)) for name in ("image_embeds", "features")},
    ),
}


def red_or_blue(feeds: dict[str, AnyArray]) -> dict[str, AnyArray]:
    """A prompt that begins with "r" means red, any other blue."""
    red = feeds["input_ids"][:, 1] == feeds["input_ids"].dtype.type(RED)
    return {"text_embeds": np.where(red[:, None], [2.0, 0.0, 0.0], [0.0, 0.0, 3.0])}


def colours(feeds: dict[str, AnyArray]) -> dict[str, AnyArray]:
    mean = feeds["pixel_values"].mean(axis=(2, 3)) + 1
    return {"image_embeds": 5 * mean, "features": mean}


RED = 81 + 256
"""The token "r</w>" of the tests' tokenizer."""


@pytest.fixture
def judged(pipe: Pipeline, backend: FakeBackend) -> Pipeline:
    """The fake pipeline with a judge."""
    functions = {"judge_text": red_or_blue, "judge_image": colours}
    graphs = {f"{name}/model.fake": FakeGraph(*SPECS[name], functions[name]) for name in COMPONENTS}
    backend.graphs = {**backend.graphs, **graphs}
    parts = {
        name: Component(
            name,
            Path(f"{name}/model.fake"),
            ComponentEntry("fake", f"{name}/model.fake", *SPECS[name], "float32"),
            backend=backend,
            device="cpu",
        )
        for name in COMPONENTS
    }
    pipe.components = {**pipe.components, **parts}
    pipe.judge = Judge.of(pipe.bundle, pipe.components)
    return pipe


def redness(picture: AnyArray) -> float:
    mean = np.asarray(picture, np.float64).mean(axis=(0, 1))
    return float(mean[0] / np.linalg.norm(mean))


def test_the_best_are_kept_best_first(judged: Pipeline) -> None:
    every = judged("r", seed=0, num_images_per_prompt=6, num_inference_steps=2, output_type="np")
    best = judged("r", seed=0, num_images_per_prompt=6, num_inference_steps=2, output_type="np", best=2)
    order = sorted(range(6), key=lambda place: -redness(every.images[place]))[:2]
    assert best.seeds == tuple(every.seeds[place] for place in order)
    for name in ("images", "latents", "pixels"):
        np.testing.assert_array_equal(getattr(best, name), getattr(every, name)[order])
    assert [parameters.seed for parameters in best.parameters] == list(best.seeds)
    assert best.scores == pytest.approx([redness(every.images[place]) for place in order], abs=0.01)
    assert best.messages[-1].startswith("kept 2 of 6 images, scored 0.") and "; the others 0." in best.messages[-1]
    assert {"judge_text", "judge_image"} <= best.configuration.keys() and "judge" in best.timings.samples


def test_each_prompt_has_its_own_best(judged: Pipeline) -> None:
    found = judged(["r", "b"], seed=0, num_images_per_prompt=4, num_inference_steps=2, best=1)
    assert len(found.images) == 2 and found.seeds[0] in range(4) and found.seeds[1] in range(4, 8)
    assert [parameters.prompt for parameters in found.parameters] == ["r", "b"]


def test_weights_of_a_prompt_are_not_judged(judged: Pipeline) -> None:
    fields = {"seed": 0, "num_images_per_prompt": 2, "num_inference_steps": 2, "best": 2}
    weighted, plain = judged("(r:1.5)", weighting=True, **fields), judged("r", **fields)
    assert weighted.scores is not None and plain.scores is not None
    red = [redness(np.asarray(image)) for image in weighted.images]
    assert weighted.scores == pytest.approx(red, abs=0.01)


def test_without_best_nothing_is_judged(judged: Pipeline) -> None:
    result = judged("r", seed=0, num_images_per_prompt=2, num_inference_steps=1)
    assert result.scores is None and "judge_image" not in result.configuration


def test_pictures_of_any_size_are_seen(judged: Pipeline) -> None:
    assert judged.judge is not None
    vectors, features = judged.judge.see(np.full((2, 40, 24, 3), 0.5, np.float32), Timings())
    np.testing.assert_allclose(vectors, 3**-0.5, atol=1e-6)
    assert features.shape == (2, 3)


def test_a_model_without_a_judge_says_so_before_the_work(pipe: Pipeline) -> None:
    with pytest.raises(BundleUnsupported, match=r"best=1 was asked; tiny has no judge .* leave best out"):
        pipe.stream("cat", num_images_per_prompt=2, best=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"best": 3}, "best is 3; it must be from 1 to 2"),
        ({"best": 0}, "best is 0; it must be from 1 to 2"),
        ({"best": 1.5}, "best is 1.5; give a whole number"),
        ({"best": 1, "output_type": "latent"}, "a judge needs pictures"),
    ],
)
def test_bad_values_are_refused(judged: Pipeline, fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        judged.stream("r", num_images_per_prompt=2, **fields)


def test_the_command_saves_only_the_best(
    judged: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *args, **kwargs: judged)
    arguments = ["r", "-n", "4", "--best", "1", "--steps", "2", "--seed", "3", "--json", "-o", str(tmp_path / "a.png")]
    assert main(["generate", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["images"]) == len(report["scores"]) == 1
    assert [path.name for path in tmp_path.glob("*.png")] == ["a.png"]
