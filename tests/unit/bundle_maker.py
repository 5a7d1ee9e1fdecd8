"""A small sound bundle made from raw bytes."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pocketdiffusion.bundle import MANIFEST, file_entries, write_manifest
from pocketdiffusion.bundle.manifest import ComponentEntry, GoldenImage, Manifest, Numbers, Source
from pocketdiffusion.bundle.manifest_json import canonical, digest
from pocketdiffusion.tensors import TensorSpec

Field = tuple[int, "int | str | bytes"]


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def message(*fields: Field) -> bytes:
    """A protobuf message; int is a varint field, str and bytes are length-delimited."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            data = value.encode("utf-8") if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(data)) + data
    return out


def value_info(name: str, dtype: int = 1, shape: tuple[int, ...] = (1, 4)) -> bytes:
    dims = message(*((1, message((1, size))) for size in shape))
    return message((1, name), (2, message((1, message((1, dtype), (2, dims))))))


def entry(key: str, value: str | bytes) -> bytes:
    return message((1, key), (2, value))


def tensor(*entries: bytes, name: str = "w") -> bytes:
    """A TensorProto of 4 floats; with entries its data is external."""
    data: list[Field] = [(13, item) for item in entries]
    data += [(14, 1)] if entries else [(9, struct.pack("<4f", 1, 2, 3, 4))]
    return message((1, 4), (2, 1), (8, name), *data)


def external(location: str | bytes, offset: int | str = 0, length: int | str = 16) -> bytes:
    return tensor(entry("location", location), entry("offset", str(offset)), entry("length", str(length)))


def onnx_model(weights: bytes, where: str = "initializer") -> bytes:
    """y = x + w, with the tensor `weights` in one of the places of `PLACES`."""
    graph: list[Field] = [
        (1, message((1, "x"), (1, "w"), (2, "y"), (4, "Add"))),
        (2, "main"),
        (11, value_info("x")),
        (12, value_info("y")),
    ]
    model: list[Field] = [(1, 8), (8, message((1, ""), (2, 17)))]
    graph += PLACES[where][0](weights)
    return message(*model, (7, message(*graph)), *PLACES[where][1](weights))


def _node(attribute: bytes) -> bytes:
    return message((2, "c"), (4, "Constant"), (5, attribute))


def _subgraph(node: bytes) -> bytes:
    return message((1, node), (2, "inner"))


Place = tuple[Callable[[bytes], list[Field]], Callable[[bytes], list[Field]]]


def _nothing(_: bytes) -> list[Field]:
    return []


PLACES: dict[str, Place] = {
    "initializer": (lambda w: [(5, w)], _nothing),
    "constant": (lambda w: [(1, _node(message((1, "value"), (5, w))))], _nothing),
    "tensor list": (lambda w: [(1, _node(message((1, "values"), (10, w))))], _nothing),
    "subgraph": (lambda w: [(1, _node(message((1, "body"), (6, message((5, w), (2, "g"))))))], _nothing),
    "nested subgraph": (
        lambda w: [
            (1, _node(message((1, "b"), (11, _subgraph(_node(message((1, "b"), (6, message((5, w)))))))))),
        ],
        _nothing,
    ),
    "sparse initializer": (lambda w: [(15, message((1, w), (3, 4)))], _nothing),
    "sparse indices": (lambda w: [(15, message((2, w), (3, 4)))], _nothing),
    "sparse attribute": (lambda w: [(1, _node(message((1, "s"), (22, message((1, w))))))], _nothing),
    "function": (_nothing, lambda w: [(25, message((1, "f"), (7, _node(message((1, "v"), (5, w))))))]),
    "function default": (_nothing, lambda w: [(25, message((1, "f"), (11, message((1, "v"), (5, w)))))]),
    "training": (_nothing, lambda w: [(20, message((2, message((5, w)))))]),
}

IR = """<?xml version="1.0"?>
<net name="m" version="11"><layers>
<layer id="0" name="w" type="Const" version="opset1">
<data element_type="f32" shape="4" offset="{offset}" size="{size}"/><output><port id="0" precision="FP32"/></output>
</layer></layers><edges/></net>
"""


def safetensors(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


GOLDEN = {"unet/in/x": {"dtype": "F32", "shape": [1, 4], "data_offsets": [0, 16]}}


def make_bundle(folder: Path) -> Path:
    """A sound bundle: an ONNX graph with external data, an OpenVINO one, tokenizer, scheduler, golden files."""
    files = {
        "unet/model.onnx": onnx_model(external("model.onnx_data")),
        "unet/model.onnx_data": struct.pack("<4f", 1, 2, 3, 4),
        "vae_decoder/openvino_model.xml": IR.format(offset=0, size=16).encode(),
        "vae_decoder/openvino_model.bin": b"\x80\x02" + bytes(14),
        "tokenizer/tokenizer.json": b'{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}\n',
        "scheduler/scheduler_config.json": b'{"_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085}\n',
        "golden/tensors.safetensors": safetensors(GOLDEN, bytes(16)),
        "golden/image.png": b"\x89PNG\r\n\x1a\n" + bytes(32),
    }
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    write_manifest(folder, make_manifest(folder))
    return folder


def make_manifest(folder: Path) -> Manifest:
    spec = TensorSpec("float32", ("batch", 4))
    return Manifest(
        name="tiny",
        description="A bundle for tests",
        family="sd",
        tasks=("text-to-image",),
        recipe="float32",
        source=Source("made up", "CC0-1.0", {"unet/w.safetensors": "0" * 64}),
        numbers=Numbers(
            width=64,
            height=64,
            latent_channels=1,
            latent_scale=0.5,
            latent_shift=0.0,
            vae_factor=8,
            size_multiple=16,
            text_length=32,
            default_steps=20,
            default_guidance=7.5,
            latent_rgb=((1.0, 0.0, -1.0), (0.0, 0.5, 0.0)),
        ),
        components={
            "unet": ComponentEntry("onnx", "unet/model.onnx", {"x": spec}, {"y": spec}, "float32", 90.0, 60.0),
            "vae_decoder": ComponentEntry("openvino", "vae_decoder/openvino_model.xml", {"z": spec}, {}, "float32"),
        },
        files=file_entries(folder),
        tools={"made-by": "tests"},
        golden="golden/tensors.safetensors",
        golden_image=GoldenImage("a cat", 7, 4, 5.0, "golden/image.png", 60.0, 35.0),
    )


def replace(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def rehash(bundle: Path, change: Callable[[dict[str, Any]], None] = lambda content: None) -> None:
    """Make manifest.json fit the files again after `change`, as an attacker would, without our own checks."""
    content = json.loads((bundle / MANIFEST).read_bytes())
    del content["digest"]
    for item in content["files"]:
        data = (bundle / item["path"]).read_bytes()
        item["size"], item["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    change(content)
    replace(bundle / MANIFEST, canonical({**content, "digest": digest(content)}))
