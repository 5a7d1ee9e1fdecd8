"""Core ML: ML programs (.mlpackage) with the file names, inputs and outputs of Apple's ml-stable-diffusion.

They are made of our ONNX graph (`coreml_translation.py`): one trace and one quantization serve all targets. All sizes
are fixed: image, batch, text length. A program computes in float16, but for the recipe fp32, for the autoencoder, whose
activations float16 often can't hold, and for the safety checker, whose scores decide in the third digit. It needs
macOS 13 or iOS 16. The UNet can come in two programs, `UnetChunk1` and `UnetChunk2`. Limits: attention in its plain
form and not in Apple's split one for the Neural Engine; packages are compiled by macOS, so that no .mlmodelc is here.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import uuid
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from pocketdiffusion.backends import apple
from pocketdiffusion.tensors import TensorSpec
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.sizes import Shapes

logging.getLogger("coremltools").setLevel(logging.ERROR)  # it warns of untested torch, which it reads nothing from here
try:
    import coremltools as ct
except ImportError as error:
    raise ExportError(
        f"the target coreml needs coremltools ({error}); install: pip install 'pocketdiffusion[export]'"
    ) from None
from coremltools.converters.mil.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.mil import Function, Program, types  # noqa: E402

from pocketdiffusion_export.targets.coreml_chunks import halves  # noqa: E402
from pocketdiffusion_export.targets.coreml_translation import Translation  # noqa: E402
from pocketdiffusion_export.targets.coreml_values import kind_of  # noqa: E402

PACKAGES = {
    "judge_image": "JudgeImage",
    "judge_text": "JudgeText",
    "safety_checker": "SafetyScores",
    "text_encoder": "TextEncoder",
    "text_encoder_2": "TextEncoder2",
    "unet": "Unet",
    "vae_decoder": "VAEDecoder",
    "vae_encoder": "VAEEncoder",
}
"""Component -> Apple's name of its package. The safety checker has another: Apple's takes and gives other things."""
CHUNKED = "unet"
"""The component that can be written in two."""
HANDED = "state_"
"""Begins the names of what the first chunk hands on."""
TOKENIZER_FILES = ("merges.txt", "vocab.json")
"""Apple's tools read them from the bundle's root."""
SYSTEM = ct.target.iOS16
PASSES = (
    "cast_optimization",
    "const_elimination",
    "fuse_gelu_exact",
    "merge_consecutive_reshapes",
    "merge_consecutive_transposes",
    "reduce_transposes",
    "fuse_transpose_matmul",
    "remove_redundant_ops",
    "noop_elimination",
    "dead_code_elimination",
)
"""Of the converter's. Others take away the weights' names, or take a program for float32 that is float16 already."""
KEPT = "com.github.apple.coremltools.version"
"""Of the converter's notes; others hold the day."""

_AS_TRACED: Shapes = {}
_NONE: Mapping[str, Shapes] = {}


@dataclass(frozen=True)
class CoreMLTarget:
    """Writes ML programs."""

    chunks: bool = False
    """Write the denoiser in two."""
    format = "coreml"
    static = True
    graph = ".mlpackage"
    """Ending of a package."""

    def place(self, component: str) -> str:
        """A component's package, in the bundle's root. Raises ExportError for one that Apple's tools don't know."""
        if component not in PACKAGES:
            raise ExportError(f"{component} has no place in a Core ML bundle; known: {', '.join(PACKAGES)}")
        chunk = apple.FIRST_CHUNK if self.chunks and component == CHUNKED else ""
        return f"{PACKAGES[component]}{chunk}{self.graph}"

    def save(
        self, model: onnx.ModelProto, file: Path, shapes: Shapes = _AS_TRACED, others: Mapping[str, Shapes] = _NONE
    ) -> None:
        """Translate the model and write the package, or both where `file` is a first chunk.

        The same model gives the same bytes. `shapes` fixes every axis. Raises ExportError for free axes, for `others`,
        for a graph that Core ML can't hold, and on a full disk.
        """
        if others:
            raise ExportError("a Core ML package holds one image size; give one --size")
        border = _Border(*_apple_specs(model, shapes), _names_of(model))
        half, places = _computes_half(model), apple.chunks(file)
        for part, place in zip([model] if len(places) == 1 else halves(model), places, strict=True):
            program = _program(part, border, half=half)
            try:
                _write(program, place)
            except (OSError, RuntimeError) as error:
                raise ExportError(
                    f"writing {place.name} failed ({error}); is the disk full? Nothing was written"
                ) from None

    def describe(
        self, model: onnx.ModelProto, shapes: Shapes = _AS_TRACED
    ) -> tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec]]:
        """Inputs and outputs by the runtime's names, as it sees them when it opens the package."""
        return apple.described(*_apple_specs(model, shapes))

    def finish(self, folder: Path) -> tuple[str, ...]:
        """Put the vocabulary where Apple's tools look for it."""
        for name in TOKENIZER_FILES:
            shutil.copyfile(folder / "tokenizer" / name, folder / name)
        return ()


TARGET = CoreMLTarget()


def _computes_half(model: onnx.ModelProto) -> bool:
    """Whether any weight is stored in less than float32 and the component is neither autoencoder nor safety checker."""
    narrow = {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT4}
    inputs = {value.name for value in model.graph.input}
    exact = inputs in ({"sample"}, {"latent_sample"}, {"clip_input"})
    return not exact and any(tensor.data_type in narrow for tensor in model.graph.initializer)


def _apple_specs(model: onnx.ModelProto, shapes: Shapes) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """Inputs and outputs by Apple's names, in Apple's layouts, all float32."""
    traced = {
        value.name: tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*model.graph.input, *model.graph.output)
    }
    whole = {name: shapes.get(name, shape) for name, shape in traced.items()}
    for name, shape in whole.items():
        if free := [axis for axis in shape if not isinstance(axis, int)]:
            raise ExportError(
                f"Core ML graphs have fixed sizes, '{name}' has free {', '.join(free)}; give --size WIDTHxHEIGHT"
            )
    ours = [value.name for value in model.graph.input]
    rows = next(whole[name][0] for name in ours if whole[name])
    names = _names_of(model)
    specs = {name: TensorSpec("float32", _apple_shape(name, whole[name], rows)) for name in whole}
    inputs = {names.get(name, name): specs[name] for name in ours}
    outputs = {names.get(value.name, value.name): specs[value.name] for value in model.graph.output}
    return inputs, outputs | {name: outputs[ours] for name, ours in _copies(outputs).items()}


def _apple_shape(name: str, shape: tuple[int | str, ...], rows: int | str) -> tuple[int | str, ...]:
    if name == apple.STATES:
        return shape[0], shape[2], 1, shape[1]
    return shape or (rows,)  # the timestep, one for each row


def _names_of(model: onnx.ModelProto) -> dict[str, str]:
    """Our name -> Apple's, of one graph's inputs and outputs."""
    inputs, outputs = ([value.name for value in side] for side in (model.graph.input, model.graph.output))
    if "timestep" in inputs:
        table = apple.UNET
    elif "input_ids" in inputs:
        layers = {name: name.replace(apple.OUR_LAYER, apple.LAYER) for name in outputs if apple.OUR_LAYER in name}
        return layers or {"pooler_output": apple.POOLED}
    else:
        table = apple.VAE_DECODER if "latent_sample" in inputs else apple.VAE_ENCODER
    return {ours: theirs for theirs, ours in table.items()}


def _copies(outputs: Mapping[str, Any]) -> dict[str, str]:
    """Of SDXL's text encoders, Apple's outputs beside ours: the states before the last layer, and the pooled ones."""
    layers = [name for name in outputs if name.startswith(apple.LAYER)]  # the first are the embeddings
    pooled = next((name for name in apple.OUR_POOLED if name in outputs), "")
    return {apple.PENULTIMATE: layers[-2], apple.POOLED: pooled} if layers else {}


@dataclass
class _Border:
    """What a graph takes and gives by Apple's names, and what its chunks hand on, which grows as they are made."""

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    names: dict[str, str]
    """Our name -> Apple's, where they differ."""
    halved: frozenset[str] = frozenset()
    """What is handed on as float32 and was float16."""

    def theirs(self, names: Iterable[str]) -> dict[str, str]:
        """Our name -> Apple's."""
        return {name: self.names.get(name, name) for name in names}

    def entered(self, name: str, value: Any) -> Any:
        """An input in the layout and type of the graph. Rows of one call share their timestep."""
        if name == apple.IDS:
            return mb.cast(x=value, dtype="int32")
        if name == apple.TIMESTEP and value.shape[0] > 1:
            return mb.slice_by_index(x=value, begin=[0], end=[1])
        if name == apple.STATES:
            return mb.transpose(x=mb.squeeze(x=value, axes=[2]), perm=[0, 2, 1])
        return mb.cast(x=value, dtype="fp16") if name in self.halved else value

    def left(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Results by Apple's names, float32. What is handed on gets names that Core ML can have."""
        whole = self.outputs.keys() & self.theirs(found).values()
        if not whole:
            self.names |= {name: f"{HANDED}{number}" for number, name in enumerate(found)}
            self.halved = frozenset(name for name, value in found.items() if kind_of(value) == "fp16")
        made = {self.names.get(name, name): mb.cast(x=value, dtype="fp32") for name, value in found.items()}
        if not whole:
            self.inputs |= {name: TensorSpec("float32", tuple(value.shape)) for name, value in made.items()}
            return made
        made |= {name: made[ours] for name, ours in _copies(made).items()}
        return {name: made[name] for name in self.outputs}


def _program(model: onnx.ModelProto, border: _Border, *, half: bool) -> Program:
    """The graph, or a chunk of it, between inputs and outputs of Apple's."""
    program, given = Program(), border.theirs(value.name for value in model.graph.input)
    placeholders = {name: mb.placeholder(shape=border.inputs[name].shape, dtype=types.fp32) for name in given.values()}
    with Function(placeholders, opset_version=SYSTEM) as function:
        entered = {ours: border.entered(ours, function.inputs[theirs]) for ours, theirs in given.items()}
        made = border.left(Translation(model, entered, half=half).run())
        function.set_outputs([mb.identity(x=value, name=name) for name, value in made.items()])
    program.add_function("main", function)
    return program


def _write(program: Program, file: Path) -> None:
    with redirect_stderr(io.StringIO()):  # progress bars
        made = ct.convert(
            program,
            source="milinternal",
            convert_to="mlprogram",
            compute_precision=ct.precision.FLOAT32,  # the program says its own types
            minimum_deployment_target=SYSTEM,
            skip_model_load=True,
            pass_pipeline=ct.PassPipeline([f"common::{name}" for name in PASSES], "pocketdiffusion"),
        )
    for key in set(made.user_defined_metadata) - {KEPT}:
        del made.user_defined_metadata[key]
    made.save(str(file))
    _settle(file)


def _settle(package: Path) -> None:
    """Take out what differs from run to run: the order of maps, and the names of parts in the index."""
    program = package / "Data" / "com.apple.CoreML" / "model.mlmodel"
    program.write_bytes(ct.proto.Model_pb2.Model.FromString(program.read_bytes()).SerializeToString(deterministic=True))
    index = package / "Manifest.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    parts = sorted(content["itemInfoEntries"].items(), key=lambda item: item[1]["path"])
    names = {old: str(uuid.UUID(int=number)).upper() for number, (old, _) in enumerate(parts, 1)}
    content["itemInfoEntries"] = {names[old]: part for old, part in parts}
    content["rootModelIdentifier"] = names[content["rootModelIdentifier"]]
    index.write_text(json.dumps(content, indent=4, sort_keys=True) + "\n", encoding="utf-8", newline="\n")
