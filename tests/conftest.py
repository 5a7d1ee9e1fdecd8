"""Fixtures: a tiny bundle whose graphs are Python functions, so that the whole runtime runs without an engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.backends.fake import FakeBackend, FakeGraph
from pocketdiffusion.bundle import Bundle, file_entries, write_manifest
from pocketdiffusion.bundle.manifest import ComponentEntry, Manifest, Numbers, Source
from pocketdiffusion.component import Component
from pocketdiffusion.pipeline import Pipeline
from pocketdiffusion.tensors import AnyArray, TensorSpec

LENGTH, WIDTH, CHANNELS, FACTOR = 8, 6, 4, 4
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
    "timestep_spacing": "trailing",
}
SPECS: dict[str, tuple[dict[str, TensorSpec], dict[str, TensorSpec]]] = {
    "text_encoder": (
        {"input_ids": TensorSpec("int64", ("batch", LENGTH))},
        {
            "last_hidden_state": TensorSpec("float32", ("batch", LENGTH, WIDTH)),
            "clip_skip_1": TensorSpec("float32", ("batch", LENGTH, WIDTH)),
        },
    ),
    "unet": (
        {
            "sample": TensorSpec("float32", ("batch", CHANNELS, "height", "width")),
            "timestep": TensorSpec("float32", ()),
            "encoder_hidden_states": TensorSpec("float32", ("batch", "length", WIDTH)),
        },
        {"out_sample": TensorSpec("float32", ("batch", CHANNELS, "height", "width"))},
    ),
    "vae_decoder": (
        {"latent_sample": TensorSpec("float32", ("batch", CHANNELS, "height", "width"))},
        {"sample": TensorSpec("float32", ("batch", 3, "height_out", "width_out"))},
    ),
    "vae_encoder": (
        {"sample": TensorSpec("float32", ("batch", 3, "height_in", "width_in"))},
        {"latent_parameters": TensorSpec("float32", ("batch", 2 * CHANNELS, "height", "width"))},
    ),
}


def _text_encoder(feeds: dict[str, AnyArray]) -> dict[str, AnyArray]:
    angle = feeds["input_ids"][..., None] * 0.1 + np.arange(WIDTH)
    return {"last_hidden_state": np.sin(angle), "clip_skip_1": np.cos(angle)}


def _unet(feeds: dict[str, AnyArray]) -> dict[str, AnyArray]:
    context = feeds["encoder_hidden_states"].mean(axis=(1, 2))[:, None, None, None]
    return {"out_sample": np.tanh(feeds["sample"] * 0.5 + context) + float(feeds["timestep"]) * 1e-4}


def _vae_decoder(feeds: dict[str, AnyArray]) -> dict[str, AnyArray]:
    return {"sample": np.tanh(feeds["latent_sample"][:, :3].repeat(FACTOR, axis=2).repeat(FACTOR, axis=3))}


def _vae_encoder(feeds: dict[str, AnyArray]) -> dict[str, AnyArray]:
    small = feeds["sample"][:, :, ::FACTOR, ::FACTOR]
    mean = np.concatenate([small, small[:, :1]], axis=1)
    return {"latent_parameters": np.concatenate([mean, np.full_like(mean, -20)], axis=1)}


FUNCTIONS = {
    "text_encoder": _text_encoder,
    "unet": _unet,
    "vae_decoder": _vae_decoder,
    "vae_encoder": _vae_encoder,
}


def _byte_letters() -> list[str]:
    """The 256 letters that byte-level BPE writes bytes with (Radford et al. 2019)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = (byte for byte in range(256) if byte not in shown)
    return [chr(byte) for byte in shown] + [chr(256 + index) for index, _ in enumerate(hidden)]


def write_bundle(folder: Path) -> Path:
    """A valid bundle of format "fake" for `FUNCTIONS`, with golden tensors."""
    letters = _byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    texts = {
        "tokenizer/vocab.json": json.dumps({token: index for index, token in enumerate(tokens)}),
        "tokenizer/merges.txt": "#version: 0.2\n",
        "tokenizer/tokenizer_config.json": json.dumps({"model_max_length": LENGTH}),
        "scheduler/scheduler_config.json": json.dumps(SCHEDULER),
        **{f"{name}/model.fake": "" for name in SPECS},
    }
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    save_file(_golden(), folder / "golden.safetensors")
    components = {
        name: ComponentEntry("fake", f"{name}/model.fake", inputs, outputs, "float32", min_sqnr_db=60.0)
        for name, (inputs, outputs) in SPECS.items()
    }
    numbers = Numbers(
        width=32,
        height=32,
        latent_channels=CHANNELS,
        latent_scale=0.5,
        latent_shift=0.0,
        vae_factor=FACTOR,
        size_multiple=16,
        text_length=LENGTH,
        default_steps=5,
        default_guidance=3.0,
        latent_rgb=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    )
    manifest = Manifest(
        name="tiny",
        description="a bundle of Python functions",
        family="sd",
        tasks=("text-to-image", "image-to-image"),
        recipe="fp32",
        source=Source("made in a test", "Apache-2.0"),
        numbers=numbers,
        components=components,
        files=file_entries(folder),
        golden="golden.safetensors",
    )
    write_manifest(folder, manifest)
    return folder


def _golden() -> dict[str, AnyArray]:
    """Inputs and outputs of every graph."""
    random = np.random.default_rng(0)
    sizes = {"batch": 1, "height": 8, "width": 8, "length": LENGTH, "height_in": 32, "width_in": 32}
    tensors: dict[str, AnyArray] = {}
    for name, (inputs, outputs) in SPECS.items():
        feeds: dict[str, AnyArray] = {}
        for key, spec in inputs.items():
            shape = [sizes[str(axis)] if isinstance(axis, str) else axis for axis in spec.shape]
            feeds[key] = np.asarray(random.integers(0, 9, shape), spec.dtype)
        found = FUNCTIONS[name](feeds)
        tensors |= {f"{name}/in/{key}": value for key, value in feeds.items()}
        tensors |= {f"{name}/out/{key}": np.asarray(found[key], spec.dtype) for key, spec in outputs.items()}
    return tensors


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("POCKETDIFFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def tiny_bundle(tmp_path: Path) -> Bundle:
    """The tiny bundle, opened."""
    return Bundle.open(write_bundle(tmp_path / "tiny"))


@pytest.fixture
def backend() -> FakeBackend:
    """The fake engine with the tiny bundle's graphs."""
    return FakeBackend(
        {f"{name}/model.fake": FakeGraph(*SPECS[name], function) for name, function in FUNCTIONS.items()}
    )


@pytest.fixture
def make_pipe(tiny_bundle: Bundle, backend: FakeBackend) -> Callable[..., Pipeline]:
    """Builds pipelines on the fake engine."""

    def make(residency: str = "keep") -> Pipeline:
        components = {
            name: Component(
                name,
                tiny_bundle.graph(name),
                entry,
                backend=backend,
                device="cpu",
                options=SessionOptions(),
                residency=residency,  # type: ignore[arg-type]
            )
            for name, entry in tiny_bundle.manifest.components.items()
        }
        return Pipeline(tiny_bundle, components)

    return make


@pytest.fixture
def pipe(make_pipe: Callable[..., Pipeline]) -> Pipeline:
    """A pipeline on the fake engine."""
    return make_pipe()
