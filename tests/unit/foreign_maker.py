"""Folders as other exporters write them, with graphs of a few layers: made with onnx and openvino, without torch."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

LENGTH, WIDTH = 8, 6
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
}
UNET = {"block_out_channels": [8, 16], "in_channels": 4, "sample_size": 8, "cross_attention_dim": WIDTH}
VAE = {"block_out_channels": [8, 8], "latent_channels": 4, "scaling_factor": 0.5}
CONFIGS: dict[str, Any] = {
    "model_index.json": {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]},
    "scheduler/scheduler_config.json": SCHEDULER,
    "text_encoder/config.json": {"max_position_embeddings": LENGTH},
    "unet/config.json": UNET,
    "vae_decoder/config.json": VAE,
    "vae_encoder/config.json": VAE,
    "tokenizer/tokenizer_config.json": {"model_max_length": LENGTH},
}


def write_configs(folder: Path, **changes: Any) -> Path:
    """Configs and a tokenizer that knows the ASCII letters. `changes` go by path, None leaves a file out."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: index for index, word in enumerate(words)}
    texts = {path: json.dumps(value) for path, value in {**CONFIGS, **changes}.items() if value is not None}
    texts |= {"tokenizer/vocab.json": json.dumps(vocab), "tokenizer/merges.txt": "#version: 0.2\n"}
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    return folder


def onnx_folder(folder: Path, *, external: bool = False, **changes: Any) -> Path:
    """A folder like `optimum-cli export onnx`'s; with `external` the weights lie in model.onnx_data."""
    import onnx

    write_configs(folder, **changes)
    for name, model in models().items():
        (folder / name).mkdir(exist_ok=True)
        data = {"save_as_external_data": True, "location": "model.onnx_data", "size_threshold": 64} if external else {}
        onnx.save(model, str(folder / name / "model.onnx"), **data)
    return folder


def openvino_folder(folder: Path, onnx_source: Path) -> Path:
    """The same model in the layout of `optimum-cli export openvino`."""
    import openvino

    write_configs(folder)
    (folder / "tokenizer" / "openvino_tokenizer.xml").write_text("<net/>", encoding="utf-8")
    for name in models():
        converted = openvino.convert_model(onnx_source / name / "model.onnx")
        openvino.save_model(converted, folder / name / "openvino_model.xml", compress_to_fp16=False)
    return folder


def cached(folder: Path, cache: Path, name: str = "owner/tiny") -> Path:
    """`folder` as the hub's tools would have stored it: every file a link into blobs. Returns the snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob, link = repository / "blobs" / f"{number:064x}", snapshot / file.relative_to(folder)
        shutil.copy(file, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def models() -> dict[str, Any]:
    """Component -> ONNX model."""
    batch, height, width = "batch", "height", "width"
    latents = [batch, 4, height, width]
    table = _weights((190, WIDTH), 1)
    return {
        "text_encoder": _model(
            [("Gather", ["table", "input_ids"], "last_hidden_state", {})],
            {"input_ids": ("int64", [batch, "length"])},
            {"last_hidden_state": [batch, "length", WIDTH]},
            {"table": table},
        ),
        "unet": _model(
            [
                ("Conv", ["sample", "w"], "c", {"pads": [1, 1, 1, 1]}),
                ("ReduceMean", ["encoder_hidden_states"], "m", {"axes": [1, 2], "keepdims": 1}),
                ("Unsqueeze", ["m", "last"], "m4", {}),
                ("Mul", ["timestep", "small"], "t", {}),
                ("Add", ["c", "m4"], "a", {}),
                ("Add", ["a", "t"], "b", {}),
                ("Tanh", ["b"], "out_sample", {}),
            ],
            {
                "sample": ("float32", latents),
                "timestep": ("float32", []),
                "encoder_hidden_states": ("float32", [batch, "length", WIDTH]),
            },
            {"out_sample": latents},
            {"w": _weights((4, 4, 3, 3), 2), "last": np.array([3]), "small": np.float32(1e-4)},
        ),
        "vae_decoder": _model(
            [("ConvTranspose", ["latent_sample", "w"], "c", {"strides": [2, 2]}), ("Tanh", ["c"], "sample", {})],
            {"latent_sample": ("float32", latents)},
            {"sample": [batch, 3, "height_out", "width_out"]},
            {"w": _weights((4, 3, 2, 2), 3)},
        ),
        "vae_encoder": _model(
            [("Conv", ["sample", "w"], "latent_parameters", {"strides": [2, 2]})],
            {"sample": ("float32", [batch, 3, "height_in", "width_in"])},
            {"latent_parameters": [batch, 8, height, width]},
            {"w": _weights((8, 3, 2, 2), 4)},
        ),
    }


def _weights(shape: tuple[int, ...], seed: int) -> Any:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.3).astype(np.float32)


def _model(nodes: Any, inputs: Any, outputs: Any, weights: Any) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    def value(name: str, dtype: str, shape: Any) -> Any:
        return helper.make_tensor_value_info(name, getattr(TensorProto, dtype), shape)

    kinds = {"float32": "FLOAT", "int64": "INT64"}
    graph = helper.make_graph(
        [helper.make_node(kind, sources, [result], **extra) for kind, sources, result, extra in nodes],
        "graph",
        [value(name, kinds[dtype], shape) for name, (dtype, shape) in inputs.items()],
        [value(name, "FLOAT", shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
