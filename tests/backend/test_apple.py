"""Graphs in the form of Apple's ml-stable-diffusion: names, layouts, and any number of rows on graphs of fixed rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pocketdiffusion.backends import coreml
from pocketdiffusion.backends.apple import chained, chunks, described, translated
from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.errors import GraphFailed
from pocketdiffusion.tensors import TensorSpec

from .test_coreml import Model, field, on_macos  # noqa: F401  # a fixture


def spec(*shape: int | str) -> TensorSpec:
    return TensorSpec("float32", shape)


UNET = {"sample": spec(2, 4, 8, 8), "timestep": spec(2), "encoder_hidden_states": spec(2, 6, 1, 5)}


def test_the_unet_of_apple_in_our_words() -> None:
    inputs, outputs = described(UNET, {"noise_pred": spec(2, 4, 8, 8)})
    assert inputs == {
        "sample": spec("batch", 4, 8, 8),
        "timestep": spec(),
        "encoder_hidden_states": spec("batch", 5, 6),
    }
    assert outputs == {"out_sample": spec("batch", 4, 8, 8)}


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_any_number_of_rows_runs_on_two(count: int) -> None:
    calls = []

    def execute(feeds):
        calls.append(feeds)
        assert {name: array.shape for name, array in feeds.items()} == {n: s.shape for n, s in UNET.items()}
        mean = feeds["encoder_hidden_states"].mean((1, 2, 3))[:, None, None, None]
        return {"noise_pred": feeds["sample"] * 2 + feeds["timestep"][:, None, None, None] + mean}

    rng = np.random.default_rng(0)
    sample = rng.standard_normal((count, 4, 8, 8)).astype(np.float32)
    states = rng.standard_normal((count, 5, 6)).astype(np.float32)
    _, _, run = translated(UNET, {"noise_pred": spec(2, 4, 8, 8)}, execute)
    found = run({"sample": sample, "timestep": np.float32(7), "encoder_hidden_states": states})
    expected = sample * 2 + 7 + states.mean((1, 2))[:, None, None, None]
    np.testing.assert_allclose(found["out_sample"], expected, rtol=1e-6, atol=1e-6)
    assert len(calls) == -(-count // 2)
    np.testing.assert_array_equal(calls[0]["encoder_hidden_states"][0, :, 0, :], states[0].T)


@pytest.mark.parametrize(
    ("inputs", "outputs", "ours"),
    [
        ({"z": spec(1, 4, 8, 8)}, {"image": spec(1, 3, 64, 64)}, ({"latent_sample"}, {"sample"})),
        ({"x": spec(1, 3, 64, 64)}, {"latent": spec(1, 8, 8, 8)}, ({"sample"}, {"latent_parameters"})),
        ({"x": spec(1, 3, 64, 64)}, {"latent_sample": spec(1, 4, 8, 8)}, ({"sample"}, {"latent_sample"})),
        (
            {"input_ids": spec(1, 77)},
            {"last_hidden_state": spec(1, 77, 8), "pooled_outputs": spec(1, 8)},
            ({"input_ids"}, {"last_hidden_state", "pooler_output"}),
        ),
        (
            {"input_ids": spec(1, 77)},
            {"hidden_embeds": spec(1, 77, 8), "pooled_outputs": spec(1, 8)},
            ({"input_ids"}, {"hidden_embeds", "text_embeds"}),
        ),
        (
            {"input_ids": spec(1, 77)},
            {
                "pooler_output": spec(1, 8),
                "hidden_states_0": spec(1, 77, 8),
                "hidden_embeds": spec(1, 77, 8),
                "pooled_outputs": spec(1, 8),
            },
            ({"input_ids"}, {"hidden_states.0", "pooler_output"}),
        ),
    ],
)
def test_names(inputs, outputs, ours) -> None:
    given, made = described(inputs, outputs)
    assert (set(given), set(made)) == ours
    assert all(found.shape[0] == "batch" for found in (*given.values(), *made.values()))


def test_other_graphs_stay_as_they_are() -> None:
    inputs, outputs = {"x": spec(2, 3), "y": spec(2)}, {"out": spec(2, 3)}
    assert described(inputs, outputs) == (inputs, outputs)

    def execute(feeds):
        return feeds

    assert translated(inputs, outputs, execute)[2] is execute


def test_chunks_run_as_one() -> None:
    """The second takes what the first gives, and what it needs of the whole's inputs."""
    a, b, middle, out = (spec(2, 3) for _ in range(4))
    models = [
        ({"a": a}, {"middle": middle}, "float32", lambda feeds: {"middle": feeds["a"] + 1}),
        ({"middle": middle, "b": b}, {"out": out}, "float16", lambda feeds: {"out": feeds["middle"] * feeds["b"]}),
    ]
    inputs, outputs, precision, run = chained(models)
    assert (list(inputs), list(outputs), precision) == (["a", "b"], ["out"], "float16")
    found = run({"a": np.full((2, 3), 2), "b": np.full((2, 3), 5)})
    np.testing.assert_array_equal(found["out"], np.full((2, 3), 15))


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("UnetChunk1.mlmodelc", ["UnetChunk1.mlmodelc", "UnetChunk2.mlmodelc"]),
        ("Unet.mlpackage", ["Unet.mlpackage"]),
    ],
)
def test_the_first_chunk_names_both(name: str, names: list[str]) -> None:
    assert chunks(Path("folder") / name) == tuple(Path("folder") / other for other in names)


def test_both_chunks_are_opened(on_macos, tmp_path: Path) -> None:  # noqa: F811
    """The stand-in doubles what it gets as "sample"."""
    first, second = {"x": spec(2, 4), "sample": spec(2, 4)}, {"noise_pred": spec(2, 4), "sample": spec(2, 4)}
    for name, given in (("UnetChunk1", first), ("UnetChunk2", second)):
        (tmp_path / f"{name}.mlmodelc").mkdir()
        metadata = {
            "computePrecision": "Float32",
            "inputSchema": [field(key, "Float32", list(found.shape)) for key, found in given.items()],
            "outputSchema": [field("noise_pred", "Float32", [2, 4])],
        }
        (tmp_path / f"{name}.mlmodelc/metadata.json").write_text(json.dumps([metadata]), encoding="utf-8")
    session = on_macos.open(tmp_path / "UnetChunk1.mlmodelc", "cpu", SessionOptions())
    assert (list(session.inputs), list(session.outputs)) == (["x", "sample"], ["noise_pred"])
    session.run({"x": np.zeros((2, 4)), "sample": np.ones((2, 4))})
    assert Model.latest.path.endswith("UnetChunk2.mlmodelc")
    np.testing.assert_array_equal(Model.latest.feeds["noise_pred"], np.full((2, 4), 2))
    (tmp_path / "UnetChunk2.mlmodelc/metadata.json").unlink()
    with pytest.raises(GraphFailed, match="UnetChunk1.mlmodelc could not be opened"):
        on_macos.open(tmp_path / "UnetChunk1.mlmodelc", "cpu", SessionOptions())


def test_the_backend_opens_a_compiled_unet_of_apple_s(on_macos, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    metadata = [
        {
            "computePrecision": "Mixed (Float16, Float32, Int32)",
            "inputSchema": [field(name, "Float32", list(found.shape)) for name, found in UNET.items()],
            "outputSchema": [field("noise_pred", "Float32", [2, 4, 8, 8])],
        }
    ]
    folder = tmp_path / "Unet.mlmodelc"
    folder.mkdir()
    (folder / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    session = on_macos.open(folder, "all", SessionOptions())
    feeds = {"sample": np.ones((3, 4, 8, 8)), "timestep": np.array(500), "encoder_hidden_states": np.zeros((3, 5, 6))}
    np.testing.assert_array_equal(session.run(feeds)["out_sample"], np.full((3, 4, 8, 8), 2, np.float32))
    np.testing.assert_array_equal(Model.latest.feeds["timestep"], [500, 500])
    with pytest.raises(GraphFailed, match="expected float32 \\[batch, 5, 6\\]"):
        session.run(feeds | {"encoder_hidden_states": np.zeros((3, 10, 6))})
    assert isinstance(on_macos, coreml.CoreMLBackend)
