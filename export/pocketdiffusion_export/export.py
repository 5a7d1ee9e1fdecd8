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
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save

from pocketdiffusion.backends import SessionOptions
from pocketdiffusion.bundle import Bundle, file_entries, write_manifest
from pocketdiffusion.bundle.manifest import ComponentEntry, GoldenImage, Manifest, Numbers, Source
from pocketdiffusion.bundle.manifest_json import manifest_digest
from pocketdiffusion.components import choose_devices, open_components
from pocketdiffusion.golden import golden_inputs
from pocketdiffusion.pipeline import Pipeline
from pocketdiffusion.tensors import AnyArray
from pocketdiffusion_export import layout, verify
from pocketdiffusion_export.component import ComponentSpec, Feeds
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.families import FAMILIES
from pocketdiffusion_export.families.base import Family
from pocketdiffusion_export.plan import ExportPlan
from pocketdiffusion_export.quant import QUANTIZERS
from pocketdiffusion_export.registry import lookup
from pocketdiffusion_export.source import Loaded, load
from pocketdiffusion_export.targets import TARGETS
from pocketdiffusion_export.targets.onnx import TARGET as ONNX
from pocketdiffusion_export.write import assembled, check_holder

Say = Callable[[str], None]

GOLDEN = "golden.safetensors"
GOLDEN_IMAGE = "golden.png"
QUANTIZATION = "quantization.json"
"""Which weights were quantized with which error, and which stayed float and why."""
MAX_SAMPLES = 64
"""Inputs per component that verification runs, evenly spaced over the source's own."""
MAX_SAMPLE_VALUES = 1 << 20
"""Numbers in them all; a large component gets fewer samples, but no fewer than `MIN_SAMPLES`."""
MIN_SAMPLES = 4
MAX_BYTES_ON_ALL = 2 << 30
"""Larger components are verified on the main engine only: OpenVINO maps an ONNX file beside its own copy of it."""


@dataclass(frozen=True)
class Made:
    """One bundle that an export made."""

    destination: Path
    manifest: Manifest
    measured: tuple[verify.Measured, ...]


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
    measured: list[verify.Measured] = field(default_factory=list)


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
    if plan.static:
        _check_size(plan, loaded)
    say("generating images with the source: inputs to verify with")
    samples = family.samples(loaded.pipe, plan.prompts, plan)
    numbers = family.numbers(loaded.pipe, samples, plan)
    if plan.static:
        specs = {name: spec.fixed(samples[name][0]) for name, spec in specs.items()}
        samples = {name: specs[name].fitting(feeds) for name, feeds in samples.items()}
    say("generating the golden image with the source")
    image = family.reference_image(loaded.pipe, plan.golden, numbers)
    return _Material(specs, samples, numbers, image, loaded.family, family.tasks(loaded.pipe), loaded.sha256)


def _check_size(plan: ExportPlan, loaded: Loaded) -> None:
    """Raise ExportError for a size that the denoiser can't halve as often as it does."""
    width, height = plan.numbers.width, plan.numbers.height
    multiple = loaded.pipe.vae_scale_factor * 2 ** (len(loaded.pipe.unet.config.down_block_types) - 1)
    if width is None or height is None or width % multiple or height % multiple:
        raise ExportError(f"size {width}x{height} can't be exported; this model takes multiples of {multiple} pixels")


class _Work:
    """The components of one export, one after another, and what is learnt from them."""

    def __init__(self, plan: ExportPlan, drafts: Sequence[_Draft], say: Say) -> None:
        self.plan, self.drafts, self.say = plan, drafts, say
        self.golden: dict[str, AnyArray] = {}
        self.quantization: dict[str, Any] = {}

    def component(self, spec: ComponentSpec, samples: Sequence[Feeds]) -> None:
        """Trace, quantize, write and verify one component. Raises ExportError when it misses its threshold."""
        name, used = spec.name, _spread(samples)
        self.say(f"running {name} in torch on {len(used)} inputs")
        expected = verify.references(spec, used)
        self._keep_golden(name, used[len(used) // 2], expected[len(used) // 2])
        self._write(spec, samples)
        del spec
        for draft in self.drafts:
            self._verify(draft, name, used, expected)

    def _write(self, spec: ComponentSpec, samples: Sequence[Feeds]) -> None:
        recipe = self.plan.recipe
        self.say(f"exporting {spec.name}")
        model = ONNX.trace(spec, release=True)
        if recipe.method is not None:
            self.say(f"quantizing {spec.name} to {recipe.weights}")
            quantize = lookup(QUANTIZERS, "quantization method", recipe.method)
            self.quantization[spec.name] = asdict(quantize(model, recipe, _evenly(samples, MAX_SAMPLES)))
        for draft in self.drafts:
            draft.target.save(model, draft.folder / spec.name / draft.target.graph)
            inputs, outputs = draft.target.describe(model)
            draft.entries[spec.name] = ComponentEntry(
                format=draft.target.format,
                graph=f"{spec.name}/{draft.target.graph}",
                inputs=inputs,
                outputs=outputs,
                weights=recipe.weights,
            )

    def _verify(
        self, draft: _Draft, name: str, samples: Sequence[Feeds], expected: Sequence[Mapping[str, AnyArray]]
    ) -> None:
        recipe = self.plan.recipe
        graph = draft.folder / draft.entries[name].graph
        large = sum(file.stat().st_size for file in graph.parent.iterdir()) > MAX_BYTES_ON_ALL
        engines = draft.engines[:1] if large else draft.engines
        self.say(f"verifying {name} ({draft.target.format}) on {', '.join(engines)}")
        measured = [verify.measure(name, graph, engine, samples, expected) for engine in engines]
        worst = min(item.sqnr_db for item in measured)
        if worst < recipe.min_sqnr_db:
            _miss(self.plan, self.say, name, "SQNR", worst, recipe.min_sqnr_db)
        draft.measured += measured
        floor = verify.floor_for(worst, recipe.min_sqnr_db)
        draft.entries[name] = replace(draft.entries[name], sqnr_db=round(worst, 2), min_sqnr_db=floor)

    def _keep_golden(self, name: str, feeds: Feeds, outputs: Mapping[str, AnyArray]) -> None:
        for side, arrays in (("in", feeds), ("out", outputs)):
            for key, array in arrays.items():
                self.golden[f"{name}/{side}/{key}"] = np.array(array, order="C")


def _finish(plan: ExportPlan, draft: _Draft, work: _Work, material: _Material, say: Say) -> Made:
    """Golden files, the golden image by the runtime, README, and the manifest last."""
    (draft.folder / GOLDEN).write_bytes(save(work.golden))  # save_file would make it readable by its owner alone
    if work.quantization:
        layout.write_json(draft.folder / QUANTIZATION, work.quantization)
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
    )
    say(f"generating the golden image with the exported graphs ({draft.target.format})")
    manifest = replace(manifest, golden_image=_golden_image(plan, material, manifest, draft, say))
    layout.write_readme(manifest, draft.measured, plan, draft.folder)
    manifest = replace(manifest, files=file_entries(draft.folder))
    write_manifest(draft.folder, manifest)
    return Made(draft.destination, manifest, tuple(draft.measured))


def _golden_image(plan: ExportPlan, material: _Material, manifest: Manifest, draft: _Draft, say: Say) -> GoldenImage:
    golden, numbers = plan.golden, manifest.numbers
    steps = numbers.default_steps if golden.steps is None else golden.steps
    guidance = numbers.default_guidance if golden.guidance is None else golden.guidance
    pipe = _runtime(draft, manifest)
    given = golden_inputs(manifest.tasks, numbers.width, numbers.height)
    found = pipe.stream(
        golden.prompt, seed=golden.seed, num_inference_steps=steps, guidance_scale=guidance, **given
    ).result
    psnr = verify.image_psnr(material.image, np.asarray(found.images[0]))
    if psnr < plan.recipe.min_psnr_db:
        _miss(plan, say, "the golden image", "PSNR", psnr, plan.recipe.min_psnr_db)
    Image.fromarray(material.image).save(draft.folder / GOLDEN_IMAGE, optimize=True)
    return GoldenImage(
        prompt=golden.prompt,
        seed=golden.seed,
        steps=steps,
        guidance=guidance,
        file=GOLDEN_IMAGE,
        psnr_db=round(psnr, 2),
        min_psnr_db=verify.floor_for(psnr, plan.recipe.min_psnr_db),
    )


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


def _evenly(samples: Sequence[Feeds], count: int) -> list[Feeds]:
    if len(samples) <= count:
        return list(samples)
    return [samples[round(index)] for index in np.linspace(0, len(samples) - 1, count)]
