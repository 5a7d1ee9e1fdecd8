"""One export from end to end: load, trace, quantize, verify, assemble.

A bundle holds the folders that Diffusers and optimum know, plus golden files and manifest.json. Several targets give
several bundles from one load, one trace and one quantization. Of a component's weights little more than the source's
and the model's copy are in memory at a time: its source goes when it is traced, its model before engines open it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from safetensors.numpy import save

from pocketdiffusion.backends import SessionOptions
from pocketdiffusion.bundle import Bundle, file_entries, write_manifest
from pocketdiffusion.bundle.manifest import (
    ComponentEntry,
    GoldenImage,
    Manifest,
    Numbers,
    SizedGraph,
    Source,
    version_needed,
)
from pocketdiffusion.bundle.manifest_json import manifest_digest
from pocketdiffusion.components import choose_devices, open_components
from pocketdiffusion.golden import golden_inputs
from pocketdiffusion.pipeline import Pipeline
from pocketdiffusion.tensors import AnyArray
from pocketdiffusion_export import layout, read_back, verify
from pocketdiffusion_export.bands import DECODER, add_bands
from pocketdiffusion_export.component import ComponentSpec, Feeds
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.families import FAMILIES
from pocketdiffusion_export.families.base import Family
from pocketdiffusion_export.parts import cut_component
from pocketdiffusion_export.plan import ExportPlan
from pocketdiffusion_export.quant import QUANTIZERS
from pocketdiffusion_export.registry import lookup
from pocketdiffusion_export.sizes import GraphPlan, Shapes, Size, check_sizes, fixed_shapes, graph_plans
from pocketdiffusion_export.source import load
from pocketdiffusion_export.space import check_space
from pocketdiffusion_export.targets import TARGETS
from pocketdiffusion_export.targets.onnx import TARGET as ONNX
from pocketdiffusion_export.write import assembled, check_holder

Say = Callable[[str], None]
Item = TypeVar("Item")

GOLDEN = "golden.safetensors"
GOLDEN_IMAGE = "golden.png"
QUANTIZATION = "quantization.json"
"""Which weights were quantized with which error, and which stayed float and why."""
WEIGHTS = "weights.json"
"""SQNR of each weight in dB, where a graph was read back because no engine here opens it."""
MAX_SAMPLES = 64
"""Inputs per component that verification runs, evenly spaced over the source's own."""
MAX_SAMPLE_VALUES = 1 << 20
"""Numbers in them all; a large component gets fewer samples, but no fewer than `MIN_SAMPLES`."""
MIN_SAMPLES = 3
MAX_BYTES_ON_ALL = 2 << 30
"""Larger components are verified on the main engine only: OpenVINO maps an ONNX file beside its own copy of it."""


@dataclass(frozen=True)
class Made:
    """One bundle that an export made."""

    destination: Path
    manifest: Manifest
    measured: tuple[verify.Measured, ...]
    notes: tuple[str, ...] = ()
    """What else there is to say of it, for people."""


@dataclass(frozen=True)
class Summary:
    """What an export made."""

    bundles: tuple[Made, ...]
    """In the order of the plan's targets."""
    seconds: float


def export(plan: ExportPlan, say: Say) -> Summary:
    """Run a plan; `say` gets a line before each long step.

    Raises ExportError or another PocketDiffusionError; then nothing was written or replaced.
    """
    start = time.perf_counter()
    with ExitStack() as stack:
        drafts = _begin(plan, stack)
        material = _read_source(plan, drafts, say)
        work = _Work(plan, drafts, say)
        for name in list(material.specs):
            work.component(material.specs.pop(name), material.samples[name])
        bundles = tuple(_finish(plan, draft, work, material, say) for draft in drafts)
    return Summary(bundles, time.perf_counter() - start)


@dataclass
class _Draft:
    """A bundle that is being assembled."""

    target: Any
    engines: tuple[str, ...]
    """Those that verify it, the main one first."""
    destination: Path
    folder: Path
    """Where it is assembled."""
    entries: dict[str, ComponentEntry] = field(default_factory=dict)
    weights: dict[str, Mapping[str, float]] = field(default_factory=dict)
    """Component -> SQNR of each of its weights, read back from a graph that no engine here opens."""
    measured: list[verify.Measured] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What else was found, for people."""


def _begin(plan: ExportPlan, stack: ExitStack) -> list[_Draft]:
    """Engines and folders, first of all: what can't be verified or written is found before the long work."""
    if len(plan.targets) > 1:
        check_holder(plan.destination)
    engines = {target: verify.engines(lookup(TARGETS, "target", target).format) for target in plan.targets}
    return [
        _Draft(lookup(TARGETS, "target", target), engines[target], place, stack.enter_context(assembled(place)))
        for target, place in plan.bundles.items()
    ]


@dataclass(frozen=True)
class _Material:
    """What of a source is needed when its pipeline is gone."""

    specs: dict[str, ComponentSpec]
    """Emptied as components are done, which frees their weights."""
    samples: Mapping[str, Sequence[Feeds]]
    numbers: Numbers
    image: AnyArray
    """The golden image, by Diffusers."""
    family: str
    tasks: tuple[str, ...]
    sha256: Mapping[str, str]


def _read_source(plan: ExportPlan, drafts: Sequence[_Draft], say: Say) -> _Material:
    say(f"loading {plan.source}")
    loaded = load(plan.source)
    family: Family = lookup(FAMILIES, "family", loaded.family)
    specs = {spec.name: spec for spec in family.components(loaded.pipe)}
    for draft in drafts:
        layout.write_configs(loaded.folder, plan, tuple(specs.values()), draft.folder)
    vae, unet = loaded.pipe.vae_scale_factor, loaded.pipe.unet.config
    check_sizes(plan.sizes, vae * 2 ** (len(unet.down_block_types) - 1))
    check_space(drafts[0].folder, specs.values(), plan.recipe.weights, len(drafts))
    say("generating images with the source: inputs to verify with")
    samples = family.samples(loaded.pipe, plan.prompts, plan)
    numbers = family.numbers(loaded.pipe, samples, plan)
    say("generating the golden image with the source")
    image = family.reference_image(loaded.pipe, plan.golden, numbers)
    return _Material(specs, samples, numbers, image, loaded.family, family.tasks(loaded.pipe), loaded.sha256)


@dataclass(frozen=True)
class _Graph:
    """One graph of a component: what it is fixed to, and what it is verified with."""

    size: Size | None
    shapes: Shapes
    samples: Sequence[Feeds]
    expected: Sequence[Mapping[str, AnyArray]]
    whole: Shapes
    """`shapes` for static graphs: batch and text length are fixed as well."""

    def calls(self, engine: str) -> tuple[Sequence[Feeds], Sequence[Mapping[str, AnyArray]]]:
        """Inputs and expected outputs for an engine; a graph that is read back is slow to compute."""
        count = read_back.SAMPLES if engine == read_back.ENGINE else len(self.samples)
        return _evenly(self.samples, count), _evenly(self.expected, count)

    def file(self, first: str) -> str:
        """Its name in the component's folder; `first` is that of the native size's."""
        stem, dot, kind = first.rpartition(".")
        return first if self.size is None else "{}_{}x{}{}{}".format(stem, *self.size, dot, kind)


class _Work:
    """The components of one export, one after another, and what is learnt from them."""

    def __init__(self, plan: ExportPlan, drafts: Sequence[_Draft], say: Say) -> None:
        self.plan, self.drafts, self.say = plan, drafts, say
        self.golden: dict[str, AnyArray] = {}
        self.quantization: dict[str, Any] = {}

    def component(self, spec: ComponentSpec, samples: Sequence[Feeds]) -> None:
        """Trace, quantize, write and verify one component. Raises ExportError when it misses its threshold."""
        name, batch = spec.name, self.plan.batch_of(spec.name)
        plans = graph_plans(spec, samples, self.plan.sizes, batch)
        self.say(f"running {name} in torch on {sum(len(_spread(plan.samples)) for plan in plans)} inputs")
        graphs = [self._graph(spec, plan) for plan in plans]
        self._keep_golden(name, graphs[0])
        self._write(spec, samples, graphs)
        del spec
        for draft in self.drafts:
            self._verify(draft, name, graphs)

    def _graph(self, spec: ComponentSpec, plan: GraphPlan) -> _Graph:
        used = _spread(plan.samples)
        expected = verify.references(spec, used)
        fixed = bool(self.plan.sizes)
        shapes = fixed_shapes(spec, used[0] | expected[0], batch=self.plan.batch is not None) if fixed else {}
        whole = fixed_shapes(spec, used[0] | expected[0], batch=True) if fixed else {}
        return _Graph(plan.size, shapes, used, expected, whole)

    def _write(self, spec: ComponentSpec, samples: Sequence[Feeds], graphs: Sequence[_Graph]) -> None:
        recipe, (first, *others) = self.plan.recipe, graphs
        self.say(f"exporting {spec.name}")
        model = ONNX.trace(spec, release=True)
        unread = any(read_back.ENGINE in draft.engines for draft in self.drafts)
        source = read_back.keep_weights(model, self.drafts[0].folder) if unread else {}
        if recipe.method is not None:
            self.say(f"quantizing {spec.name} to {recipe.weights}")
            quantize = lookup(QUANTIZERS, "quantization method", recipe.method)
            self.quantization[spec.name] = asdict(quantize(model, recipe, _evenly(samples, MAX_SAMPLES)))
        for draft in self.drafts:
            target, place = draft.target, draft.target.place(spec.name)
            shapes = first.whole if target.static else first.shapes
            names = {graph.file(target.graph): graph for graph in others}
            target.save(model, draft.folder / place, shapes, {n: graph.shapes for n, graph in names.items()})
            inputs, outputs = target.describe(model, shapes)
            draft.entries[spec.name] = ComponentEntry(
                format=draft.target.format,
                graph=place,
                inputs=inputs,
                outputs=outputs,
                weights=recipe.weights,
                sizes=tuple(
                    SizedGraph(*graph.size, f"{spec.name}/{name}", *target.describe(model, graph.shapes))
                    for name, graph in names.items()
                    if graph.size is not None
                ),
            )
            if read_back.ENGINE in draft.engines:
                self.say(f"reading {place} back")
                draft.weights[spec.name] = read_back.compare(draft.folder / place, draft.entries[spec.name], source)

    def _verify(self, draft: _Draft, name: str, graphs: Sequence[_Graph]) -> None:
        recipe, entry = self.plan.recipe, draft.entries[name]
        folder, native = (draft.folder / entry.graph).parent, entry.graph.rpartition("/")[2]
        large = sum(file.stat().st_size for file in folder.iterdir()) > MAX_BYTES_ON_ALL
        engines = draft.engines[:1] if large else draft.engines
        self.say(f"verifying {name} ({draft.target.format}) on {', '.join(engines)}")
        measured = [
            verify.measure(_label(name, g), folder / g.file(native), engine, *g.calls(engine))
            for g in graphs
            for engine in engines
        ]
        worst = min(item.sqnr_db for item in measured)
        if worst < recipe.min_sqnr_db:
            _miss(self.plan, self.say, name, "SQNR", worst, recipe.min_sqnr_db)
        draft.measured += measured
        floor = verify.floor_for(worst, recipe.min_sqnr_db)
        if read_back.ENGINE in engines:  # the figure is no engine's
            draft.entries[name] = replace(entry, min_sqnr_db=read_back.floor(recipe.weights, floor))
        else:
            draft.entries[name] = replace(entry, sqnr_db=round(worst, 2), min_sqnr_db=floor)
        if self.plan.part_bytes is not None:
            self.say(f"cutting {name} ({draft.target.format})")
            samples = {f"{name}/{g.file(native)}": g.calls(read_back.ENGINE)[0] for g in graphs}
            cut = cut_component(draft.folder, draft.entries[name], self.plan.part_bytes, samples, engines)
            draft.entries[name], notes = cut
            draft.notes += notes

        if self.plan.bands and name == DECODER:
            self.say(f"cutting {name} for bands, and comparing them with the whole")
            draft.entries[name], note = add_bands(draft.folder, draft.entries[name], graphs[0].samples, engines)
            draft.notes.append(note)

    def _keep_golden(self, name: str, graph: _Graph) -> None:
        middle = len(graph.samples) // 2
        for side, arrays in (("in", graph.samples[middle]), ("out", graph.expected[middle])):
            for key, array in arrays.items():
                self.golden[f"{name}/{side}/{key}"] = np.array(array, order="C")


def _label(name: str, graph: _Graph) -> str:
    return name if graph.size is None else "{} {}x{}".format(name, *graph.size)


def _finish(plan: ExportPlan, draft: _Draft, work: _Work, material: _Material, say: Say) -> Made:
    """Golden files, the golden image by the runtime, README, and the manifest last."""
    (draft.folder / GOLDEN).write_bytes(save(work.golden))  # save_file would make it readable by its owner alone
    if work.quantization:
        layout.write_json(draft.folder / QUANTIZATION, work.quantization)
    if draft.weights:
        layout.write_json(draft.folder / WEIGHTS, draft.weights)
    notes = (*draft.notes, *draft.target.finish(draft.folder), *read_back.remarks(draft.engines, draft.weights))
    manifest = Manifest(
        name=plan.name,
        description=plan.description,
        family=material.family,
        tasks=material.tasks,
        recipe=plan.recipe.name,
        source=Source(plan.source_name, plan.licence, material.sha256),
        numbers=material.numbers,
        components=draft.entries,
        files=file_entries(draft.folder),
        tools=layout.tool_versions(),
        golden=GOLDEN,
        format_version=version_needed(draft.entries),
    )
    manifest = replace(manifest, golden_image=_golden_image(plan, material, manifest, draft, say))
    layout.write_readme(manifest, draft.measured, notes, plan, draft.folder)
    manifest = replace(manifest, files=file_entries(draft.folder))
    write_manifest(draft.folder, manifest)
    return Made(draft.destination, manifest, tuple(draft.measured), notes)


def _golden_image(plan: ExportPlan, material: _Material, manifest: Manifest, draft: _Draft, say: Say) -> GoldenImage:
    golden, numbers = plan.golden, manifest.numbers
    steps = numbers.default_steps if golden.steps is None else golden.steps
    guidance = numbers.default_guidance if golden.guidance is None else golden.guidance
    Image.fromarray(material.image).save(draft.folder / GOLDEN_IMAGE, optimize=True)
    image = GoldenImage(
        prompt=golden.prompt,
        seed=golden.seed,
        steps=steps,
        guidance=guidance,
        file=GOLDEN_IMAGE,
        psnr_db=None,
        min_psnr_db=plan.recipe.min_psnr_db,
    )
    if read_back.ENGINE in draft.engines:
        return replace(image, min_psnr_db=read_back.floor(plan.recipe.weights, image.min_psnr_db))
    say(f"generating the golden image with the exported graphs ({draft.target.format})")
    psnr = verify.image_psnr(material.image, _repeat(image, manifest, draft))
    if psnr < image.min_psnr_db:
        _miss(plan, say, "the golden image", "PSNR", psnr, image.min_psnr_db)
    return replace(image, psnr_db=round(psnr, 2), min_psnr_db=verify.floor_for(psnr, image.min_psnr_db))


def _repeat(image: GoldenImage, manifest: Manifest, draft: _Draft) -> AnyArray:
    """The golden image by the runtime: uint8, [height, width, 3]."""
    pipe = _runtime(draft, manifest)
    pipe.safety_checker = None  # the source's golden image was not checked either
    given = golden_inputs(manifest.tasks, manifest.numbers.width, manifest.numbers.height)
    found = pipe.stream(
        image.prompt, seed=image.seed, num_inference_steps=image.steps, guidance_scale=image.guidance, **given
    ).result
    return np.asarray(found.images[0])


def _runtime(draft: _Draft, manifest: Manifest) -> Pipeline:
    """The runtime on what was just written: the bundle is not opened but made, because its manifest comes last."""
    bundle = Bundle(draft.folder, manifest, manifest_digest(manifest))
    choices = choose_devices(bundle, f"{draft.engines[0]}:cpu")
    return Pipeline(bundle, open_components(bundle, choices, SessionOptions(), "release"))


def _miss(plan: ExportPlan, say: Say, what: str, figure: str, found: float, demanded: float) -> None:
    text = f"{what} reaches {found:.1f} dB {figure}, recipe {plan.recipe.name} demands {demanded:g} dB"
    if not plan.accept_error:
        raise ExportError(
            f"{text}; nothing was written. Try another recipe, or --accept-error to write it nevertheless"
        )
    say(f"accepted: {text}")


def _spread(samples: Sequence[Feeds]) -> list[Feeds]:
    """Samples to verify with."""
    values = max(sum(array.size for array in feeds.values()) for feeds in samples)
    return _evenly(samples, min(MAX_SAMPLES, max(MIN_SAMPLES, MAX_SAMPLE_VALUES // values)))


def _evenly(samples: Sequence[Item], count: int) -> list[Item]:
    if len(samples) <= count:
        return list(samples)
    return [samples[round(index)] for index in np.linspace(0, len(samples) - 1, count)]
