"""Graphs in the form of Apple's ml-stable-diffusion: names, layouts, and any number of rows on graphs of fixed rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pocketdiffusion.backends import coreml
from pocketdiffusion.backends.apple import described, translated
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
