"""What `manifest.json` says about a bundle: frozen value types.

A model's numbers live here and never in branches of the code. Reading and writing the file is `bundle.py`'s work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pocketdiffusion.tensors import TensorSpec

FORMAT_VERSION = 4
"""The newest that is read. A bundle says the oldest that has all of it: 4 with changes of what the source computes, 3
with graphs in parts or for bands, 2 with graphs for several sizes, 1 without any."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the bundle. `path` is relative to the bundle, with "/" between its parts."""

    path: str
    size: int
    """Bytes."""
    sha256: str
    """64 lower-case hexadecimal digits."""


@dataclass(frozen=True, slots=True)
class GraphPart:
    """A part of a graph, which reads the weights of the whole. Run one after another the parts compute the whole.

    An input is one of the whole graph, or an output of an earlier part under the same name.
    """

    graph: str
    """Path, as in `ComponentEntry`."""
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    weight_bytes: int
    """Stored weights that it reads."""


@dataclass(frozen=True, slots=True)
class SizedGraph:
    """A component's graph for a further image size. It reads the weights of the component's first graph."""

    width: int
    """Pixels."""
    height: int
    graph: str
    """Path, as in `ComponentEntry`."""
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    parts: tuple[GraphPart, ...] = ()
    """As in `ComponentEntry`."""


@dataclass(frozen=True, slots=True)
class BandGraph:
    """A piece of a component's graph, which runs over bands of a picture's rows. It reads the first graph's weights.

    Inputs and outputs are maps, (1, channels, height, width), by name: the component's own, or what an earlier piece
    made. "NAME_mean" and "NAME_variance", (1, groups, 1, 1), are those of groups of channels of the map NAME.
    """

    graph: str
    """Path, as in `ComponentEntry`."""
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    halo: int | None
    """Rows that a band must be fed with beyond its own, above and below; None: the piece needs whole maps."""
    scale: int
    """Rows, and columns, that it makes of each one."""


@dataclass(frozen=True, slots=True)
class ComponentEntry:
    """One component of the bundle: a graph, or one for each image size."""

    format: str
    """Graph format: "onnx", "openvino", "coreml"."""
    graph: str
    """Path of the file that an engine opens; it and its external data are listed in `Manifest.files`."""
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    weights: str
    """How weights are stored: "float32", "float16", "int8" ..."""
    sqnr_db: float | None = None
    """Signal to quantization noise ratio against the float32 source, measured at export."""
    min_sqnr_db: float | None = None
    """What `verify` demands on another machine."""
    sizes: tuple[SizedGraph, ...] = ()
    """Graphs for further image sizes, where graphs are fixed to one each: `graph` is the native size's, which golden
    tensors are about. The export stage checked these too; `verify` only hashes them."""
    bands: tuple[BandGraph, ...] = ()
    """The same once more in pieces, in the order of use, for less memory: see `pocketdiffusion.bands`."""
    parts: tuple[GraphPart, ...] = ()
    """The same graph once more, in parts of which one at a time can be in memory; () where it was not cut."""

    @property
    def graphs(self) -> tuple[ComponentEntry, ...]:
        """An entry for each graph, the native size's first, as if it were the only one."""
        first = replace(self, sizes=(), bands=())
        others = (replace(first, graph=s.graph, inputs=s.inputs, outputs=s.outputs, parts=s.parts) for s in self.sizes)
        return first, *others

    @property
    def files(self) -> tuple[ComponentEntry, ...]:
        """An entry for each graph and each part or piece of one, as if it were the only one."""
        whole = [replace(graph, parts=()) for graph in self.graphs]
        parts = [part for graph in self.graphs for part in graph.parts]
        made = (replace(whole[0], graph=p.graph, inputs=p.inputs, outputs=p.outputs) for p in parts)
        return *whole, *made, *self.pieces

    @property
    def pieces(self) -> tuple[ComponentEntry, ...]:
        """An entry for each of `bands`, as if it were the only graph."""
        first = replace(self, sizes=(), bands=())
        return tuple(replace(first, graph=b.graph, inputs=b.inputs, outputs=b.outputs) for b in self.bands)


@dataclass(frozen=True, slots=True)
class Source:
    """Where the weights come from and under which terms."""

    name: str
    licence: str
    """SPDX expression."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Source weight file -> sha256."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """The model's numbers. Noise levels and parameterization stand in `scheduler/scheduler_config.json`."""

    width: int
    """Native width in pixels. Which other sizes are possible follows from the graphs' input shapes."""
    height: int
    latent_channels: int
    latent_scale: float
    """Denoiser latents = (VAE latents - latent_shift) * latent_scale."""
    latent_shift: float
    vae_factor: int
    """Pixels per latent cell, along one side."""
    size_multiple: int
    """Width and height must be multiples of this: vae_factor times 2 for each halving inside the denoiser."""
    text_length: int
    """Tokens that the text encoder takes, start and end included."""
    default_steps: int
    default_guidance: float
    latent_rgb: tuple[tuple[float, float, float], ...] | None = None
    """Preview: rows of weights, one per latent channel and a last one for the offset, giving R, G, B in [-1, 1]."""


@dataclass(frozen=True, slots=True)
class GoldenImage:
    """One whole generation by the float32 source, which `verify` repeats."""

    prompt: str
    seed: int
    steps: int
    guidance: float
    file: str
    """PNG in the bundle."""
    psnr_db: float | None
    """What this bundle reached at export; None where no engine could run it there."""
    min_psnr_db: float


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole of `manifest.json`."""

    name: str
    description: str
    family: str
    """Key of `pocketdiffusion.families.FAMILIES`."""
    tasks: tuple[str, ...]
    """Keys of `pocketdiffusion.tasks.TASKS` that the components allow."""
    recipe: str
    source: Source
    numbers: Numbers
    components: Mapping[str, ComponentEntry]
    """By Diffusers' names: text_encoder, unet, vae_decoder, vae_encoder ..."""
    files: tuple[FileEntry, ...]
    """Every file of the bundle but manifest.json itself, sorted by path."""
    tools: Mapping[str, str] = field(default_factory=dict)
    """Versions of what made the bundle."""
    golden: str | None = None
    """Path of a safetensors file with keys "component/in/name" and "component/out/name": float32 source outputs."""
    golden_image: GoldenImage | None = None
    changes: tuple[str, ...] = ()
    """What the graphs compute in another way than the source, beside storing its weights, in words."""
    format_version: int = 1
    """What `version_needed` says."""


def version_needed(components: Mapping[str, ComponentEntry], changes: Sequence[str] = ()) -> int:
    """The oldest format that can hold these components and changes."""
    if changes:
        return 4
    graphs = [graph for component in components.values() for graph in (component, *component.graphs)]
    if any(graph.parts or graph.bands for graph in graphs):
        return 3
    return 2 if any(component.sizes for component in components.values()) else 1
