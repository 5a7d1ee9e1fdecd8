"""The judge's graphs against transformers' own encoders, and what `best` makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("openvino")

from pocketdiffusion import Pipeline  # noqa: E402
from pocketdiffusion.backends import SessionOptions  # noqa: E402
from pocketdiffusion.timing import Timings  # noqa: E402
from pocketdiffusion.verify import verify  # noqa: E402
from pocketdiffusion_export.errors import ExportError  # noqa: E402
from pocketdiffusion_export.export import export  # noqa: E402
from pocketdiffusion_export.plan import make_plan  # noqa: E402
from pocketdiffusion_export.source import load  # noqa: E402

from . import family_sources as sources  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

SIDE, SPACE = 32, 12
PROMPTS = ["a red apple", "a cat", ""]


def add_judge(folder: Path, space: int = SPACE) -> None:
    """Both encoders with random weights, and batch norms that did see something, in a source's folder."""
    torch.manual_seed(5)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))
    text = transformers.CLIPTextModelWithProjection(sources.text_config(tokenizer, projection_dim=SPACE))
    shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}
    image = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(**shape, num_labels=space, image_size=SIDE)
    )
    with torch.no_grad():
        image.train()(torch.randn(16, 3, SIDE, SIDE))
    text.save_pretrained(folder / "judge_text")
    image.eval().save_pretrained(folder / "judge_image")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index |= {name: ["transformers", type(part).__name__] for name, part in parts(text, image).items()}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def parts(text: Any, image: Any) -> dict[str, Any]:
    return {"judge_text": text, "judge_image": image}


def make(folder: Path) -> Any:
    sources.sd(folder, diffusers.StableDiffusionPipeline)
    add_judge(folder)
    return load(str(folder)).pipe


@pytest.mark.parametrize("device", sources.DEVICES)
def test_both_encoders_are_transformers(ours: dict[str, Pipeline], theirs: Any, device: str) -> None:
    judge = ours[device].judge
    assert judge is not None and judge.side == SIDE
    ids = theirs.tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    pixels = np.random.default_rng(0).uniform(-1, 1, (4, SIDE, SIDE, 3)).astype(np.float32)
    with torch.no_grad():
        text = torch.nn.functional.normalize(theirs.judge_text(ids).text_embeds)
        image = torch.nn.functional.normalize(theirs.judge_image(torch.from_numpy(pixels).permute(0, 3, 1, 2)).logits)
    vectors, features = judge.see(pixels, Timings())
    np.testing.assert_allclose(judge.read(PROMPTS, Timings()), text.numpy(), atol=1e-5)
    np.testing.assert_allclose(vectors, image.numpy(), atol=1e-5)
    assert features.shape == (4, 16)


def test_the_bundle_holds_it_and_verifies(made: Any, ours: dict[str, Pipeline]) -> None:
    entries = made.manifest.components
    assert entries["judge_image"].inputs["pixel_values"].shape == ("batch", 3, SIDE, SIDE)
    assert list(entries["judge_text"].outputs) == ["text_embeds"]
    assert min(item.sqnr_db for item in made.measured) >= 60
    checks = list(verify(ours["onnxruntime:cpu"].bundle, "onnxruntime:cpu", SessionOptions()))
    assert {"judge_text", "judge_image"} < {check.subject for check in checks}
    assert [check.subject for check in checks if not check.passed] == []


def test_the_best_of_many_is_the_one_with_the_highest_score(ours: dict[str, Pipeline]) -> None:
    pipe = ours["onnxruntime:cpu"]
    fields: dict[str, Any] = {"seed": 0, "num_images_per_prompt": 6, "num_inference_steps": 2}
    every, best = pipe("a cat", best=6, **fields), pipe("a cat", best=1, **fields)
    assert every.scores is not None and every.scores == tuple(sorted(every.scores, reverse=True))
    assert len(set(every.scores)) == 6, "the test shows nothing"
    assert best.seeds == every.seeds[:1] and best.scores == every.scores[:1]


def test_both_graphs_can_be_written_for_core_ml(twins: Any, preset: Path, tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    source, bundle = twins.folder / "source", tmp_path / "bundle"
    plan = make_plan(source, bundle, target="coreml", recipe="fp32", size="32x32", preset=preset)
    (made,) = export(plan, lambda line: None).bundles
    assert {"JudgeImage.mlpackage", "JudgeText.mlpackage"} < {path.name for path in bundle.iterdir()}
    assert {"judge_text", "judge_image"} < made.manifest.components.keys()


def test_parts_of_two_judges_are_refused(tmp_path: Path, preset: Path) -> None:
    sources.sd(tmp_path / "source", diffusers.StableDiffusionPipeline)
    add_judge(tmp_path / "source", space=7)
    with pytest.raises(ExportError, match="the judge's parts don't fit: 12 and 7 values"):
        sources.exported(tmp_path / "source", tmp_path / "bundle", preset)
    assert not (tmp_path / "bundle").exists()


def test_half_a_judge_is_refused(tmp_path: Path) -> None:
    sources.sd(tmp_path / "source", diffusers.StableDiffusionPipeline)
    add_judge(tmp_path / "source")
    index = json.loads((tmp_path / "source/model_index.json").read_text(encoding="utf-8"))
    del index["judge_image"]
    (tmp_path / "source/model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ExportError, match="'judge_image' names None"):
        load(str(tmp_path / "source"))
