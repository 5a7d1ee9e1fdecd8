"""The safety checker without torch: preprocessing's limits, the pipeline on the fake engine, foreign folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketdiffusion.backends.fake import FakeBackend, FakeGraph
from pocketdiffusion.bundle.foreign.graphs import choose_graphs
from pocketdiffusion.bundle.manifest import ComponentEntry
from pocketdiffusion.component import Component
from pocketdiffusion.errors import BundleUnsupported, InvalidRequest
from pocketdiffusion.pipeline import Pipeline
from pocketdiffusion.safety import Preprocessing, SafetyChecker, unsafe
from pocketdiffusion.tensors import AnyArray, TensorSpec

from .foreign_maker import onnx_folder

INPUTS = {"clip_input": TensorSpec("float32", ("batch", 3, 8, 8))}
SCORES = {name: TensorSpec("float32", ("batch", 1)) for name in ("special_scores", "concept_scores")}


def by_colour(feeds: dict[str, AnyArray]) -> dict[str, AnyArray]:
    """Takes for unsafe what is more red than green on the whole."""
    red, green, _ = feeds["clip_input"].mean(axis=(2, 3)).T
    return {"special_scores": np.full((1, 1), -1.0), "concept_scores": (red - green)[:, None]}


@pytest.fixture
def checked(pipe: Pipeline, backend: FakeBackend) -> Pipeline:
    """The fake pipeline with a checker."""
    backend.graphs = {**backend.graphs, "safety_checker/model.fake": FakeGraph(INPUTS, SCORES, by_colour)}
    entry = ComponentEntry("fake", "safety_checker/model.fake", INPUTS, SCORES, "float32")
    component = Component("safety_checker", Path("safety_checker/model.fake"), entry, backend=backend, device="cpu")
    pipe.components = {**pipe.components, "safety_checker": component}
    pipe.safety_checker = SafetyChecker(component, Preprocessing(8, (0.5,) * 3, (0.5,) * 3))
    return pipe


def test_unsafe_pictures_are_black_and_said(checked: Pipeline) -> None:
    result = checked(["cat"] * 8, seed=0, num_inference_steps=2, output_type="np")
    flags = result.nsfw_content_detected
    assert flags is not None and 0 < sum(flags) < 8
    assert [image.max() == 0 for image in result.images] == flags
    assert [line for line in result.messages if "safety checker" in line] == [
        f"image {index + 1} is black: the safety checker takes it for unsafe; try another prompt or seed"
        for index in range(8)
        if flags[index]
    ]
    assert checked(["cat"] * 8, seed=0, num_inference_steps=2, return_dict=False)[1] == flags
    assert len(result.timings.samples["safety_checker.run"]) == 8 and "safety_checker" in result.configuration


def test_none_switches_it_off(checked: Pipeline) -> None:
    checked.safety_checker = None
    result = checked(["cat"] * 8, seed=0, num_inference_steps=2)
    assert result.nsfw_content_detected is None and "safety_checker" not in result.configuration
    assert result.messages == ("the model's safety checker is switched off; the pictures were not checked",)


def test_only_none_switches_it_off() -> None:
    with pytest.raises(InvalidRequest, match="safety_checker is False; give 'bundle', or None"):
        Pipeline.from_pretrained("sticker", safety_checker=False)  # type: ignore[arg-type]


def test_models_without_one_say_nothing(pipe: Pipeline) -> None:
    result = pipe("cat", seed=0, num_inference_steps=1)
    assert result.nsfw_content_detected is None and result.messages == ()


@pytest.mark.parametrize(
    ("special", "concept", "expected"),
    [
        (-1.0, -0.001, False),
        (-1.0, 0.0004, False),
        (-1.0, 0.001, True),
        (0.001, -0.009, True),
        (0.001, -0.011, False),
    ],
)
def test_a_special_concept_lowers_the_thresholds(special: float, concept: float, expected: bool) -> None:
    assert unsafe(np.array([-1, special], np.float32), np.array([-1, concept], np.float32)) is expected


def test_configs_of_all_ages_are_read() -> None:
    side = {"height": 32, "width": 32}
    for config in ({"size": 32, "crop_size": 32}, {"size": {"shortest_edge": 32}, "crop_size": side}):
        assert Preprocessing.of(config) == Preprocessing(32)
    assert Preprocessing.of({}) == Preprocessing(224)
    assert Preprocessing.of({"image_mean": [0, 0.5, 1]}).mean == (0, 0.5, 1)


@pytest.mark.parametrize(
    "config",
    [
        {"size": 256},
        {"size": {"longest_edge": 224}},
        {"crop_size": {"height": 224, "width": 112}},
        {"size": -1, "crop_size": -1},
        {"size": "224"},
        {"image_mean": [0.5]},
        {"image_std": [0.0, 0.5, 0.5]},
        {"image_std": "x"},
    ],
    ids=str,
)
def test_other_preprocessing_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(BundleUnsupported, match="preprocessor_config.json asks for size"):
        Preprocessing.of(config)


@pytest.fixture
def make_foreign(tmp_path: Path) -> Callable[[Any, bool], Path]:
    """optimum's folder with a file in the checker's place."""

    def make(named: Any, preprocessor: bool) -> Path:
        index = {"_class_name": "StableDiffusionPipeline", "safety_checker": named}
        extra = {"feature_extractor/preprocessor_config.json": {}} if preprocessor else {}
        folder = onnx_folder(tmp_path / "model", **{"model_index.json": index, **extra})
        (folder / "safety_checker").mkdir()
        (folder / "safety_checker/model.onnx").write_bytes(b"not looked at")
        return folder

    return make


@pytest.mark.parametrize(("named", "preprocessor"), [([None, None], True), (None, True), (["diffusers", "X"], False)])
def test_foreign_checkers_that_are_not_named_or_not_whole_are_left_out(
    make_foreign: Callable[[Any, bool], Path], named: Any, preprocessor: bool
) -> None:
    pytest.importorskip("onnx")
    pipe = Pipeline.from_pretrained(make_foreign(named, preprocessor), device="onnxruntime:cpu")
    assert pipe.safety_checker is None and "safety_checker" not in pipe.components
    assert any(note.startswith("pictures are not checked: the folder's safety_checker") for note in pipe.notes)


def test_foreign_checkers_that_are_named_must_be_good(make_foreign: Callable[[Any, bool], Path]) -> None:
    pytest.importorskip("onnx")
    folder = make_foreign(["diffusers", "OnnxRuntimeModel"], True)
    assert "safety_checker" in choose_graphs(folder, None, checked=True)[0]
    with pytest.raises(Exception, match="safety_checker/model.onnx"):
        Pipeline.from_pretrained(folder, device="onnxruntime:cpu")


def test_the_manifest_names_it_like_any_component(checked: Pipeline) -> None:
    entries = {name: component.entry for name, component in checked.components.items()}
    bundle = replace(checked.bundle, manifest=replace(checked.bundle.manifest, components=entries))
    with pytest.raises(BundleUnsupported, match=r"no file 'feature_extractor/preprocessor_config\.json'"):
        SafetyChecker.of(bundle, checked.components)
    file = bundle.path / "feature_extractor/preprocessor_config.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"size": 8, "crop_size": 8}), encoding="utf-8")
    files = (
        *bundle.manifest.files,
        replace(bundle.manifest.files[0], path="feature_extractor/preprocessor_config.json"),
    )
    found = SafetyChecker.of(replace(bundle, manifest=replace(bundle.manifest, files=files)), checked.components)
    assert found is not None and found.preprocessing.side == 8
