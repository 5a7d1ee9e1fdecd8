"""One export from end to end: load, trace, quantize, verify, assemble.

The bundle holds the folders that Diffusers and optimum know, plus golden files and manifest.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save

from pocketdiffusion.backends import SessionOptions
from pocketdiffusion.bundle import Bundle, file_entries, write_manifest
from pocketdiffusion.bundle.manifest import ComponentEntry, GoldenImage, Manifest, Source
from pocketdiffusion.bundle.manifest_json import manifest_digest
from pocketdiffusion.components import choose_devices, open_components
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
from pocketdiffusion_export.write import assembled, check_replaceable

Say = Callable[[str], None]

GOLDEN = "golden.safetensors"
GOLDEN_IMAGE = "golden.png"
QUANTIZATION = "quantization.json"
"""Which weights were quantized with which error, and which stayed float and why."""
MAX_SAMPLES = 64
"""Inputs per component that verification runs, evenly spaced over the source's own."""


@dataclass(frozen=True)
class Summary:
    """What an export made."""

    manifest: Manifest
    measured: tuple[verify.Measured, ...]
    seconds: float


def export(plan: ExportPlan, say: Say) -> Summary:
    """Run a plan; `say` gets a line before each long step.

    Raises ExportError or another PocketDiffusionError; then nothing was written or replaced.
    """
    start = time.perf_counter()
    check_replaceable(plan.destination)
    engines = verify.engines()
    say(f"loading {plan.source}")
    loaded = load(plan.source)
    family: Family = lookup(FAMILIES, "family", loaded.family)
    specs = family.components(loaded.pipe)
    say(f"generating {len(plan.prompts)} images with the source: inputs to verify with")
    samples = family.samples(loaded.pipe, plan.prompts, plan)
    numbers = family.numbers(loaded.pipe, samples, plan)
    with assembled(plan.destination) as folder:
        layout.write_configs(loaded.folder, plan, specs, folder)
        work = _Work(plan, engines, folder, say)
        for spec in specs:
            work.component(spec, _spread(samples[spec.name]))
        (folder / GOLDEN).write_bytes(save(work.golden))  # save_file would make it readable by its owner alone
        if work.quantization:
            layout.write_json(folder / QUANTIZATION, work.quantization)
        manifest = Manifest(
            name=plan.name,
            description=plan.description,
            family=loaded.family,
            tasks=family.tasks,
            recipe=plan.recipe.name,
            source=Source(plan.source_name, plan.licence, loaded.sha256),
            numbers=numbers,
            components=work.entries,
            files=file_entries(folder),
            tools=layout.tool_versions(),
            golden=GOLDEN,
        )
        say("generating the golden image with the source and with the exported graphs")
        manifest = replace(manifest, golden_image=_golden_image(plan, loaded, family, manifest, folder, say))
        layout.write_readme(manifest, work.measured, plan, folder)
        manifest = replace(manifest, files=file_entries(folder))
        write_manifest(folder, manifest)
    return Summary(manifest, tuple(work.measured), time.perf_counter() - start)


class _Work:
    """The components of one export, one after another, and what is learnt from them."""

    def __init__(self, plan: ExportPlan, engines: tuple[str, ...], folder: Path, say: Say) -> None:
        self.plan, self.engines, self.folder, self.say = plan, engines, folder, say
        self.target = lookup(TARGETS, "target", plan.target)
        self.entries: dict[str, ComponentEntry] = {}
        self.measured: list[verify.Measured] = []
        self.golden: dict[str, AnyArray] = {}
        self.quantization: dict[str, Any] = {}

    def component(self, spec: ComponentSpec, samples: Sequence[Feeds]) -> None:
        """Trace, quantize, write and verify one component. Raises ExportError when it misses its threshold."""
        recipe = self.plan.recipe
        self.say(f"exporting {spec.name}")
        model = self.target.trace(spec)
        if recipe.method is not None:
            self.say(f"quantizing {spec.name} to {recipe.weights}")
            report = lookup(QUANTIZERS, "quantization method", recipe.method)(model, recipe, samples)
            self.quantization[spec.name] = asdict(report)
        file = self.folder / spec.name / self.target.graph
        self.target.save(model, file)
        self.say(f"verifying {spec.name} on {', '.join(self.engines)}")
        expected = verify.references(spec, samples)
        measured = [verify.measure(spec.name, file, engine, samples, expected) for engine in self.engines]
        worst = min(item.sqnr_db for item in measured)
        if worst < recipe.min_sqnr_db:
            _miss(self.plan, self.say, spec.name, "SQNR", worst, recipe.min_sqnr_db)
        self.measured += measured
        self._keep_golden(spec.name, samples[len(samples) // 2], expected[len(samples) // 2])
        inputs, outputs = self.target.describe(model)
        self.entries[spec.name] = ComponentEntry(
            format=self.target.format,
            graph=f"{spec.name}/{self.target.graph}",
            inputs=inputs,
            outputs=outputs,
            weights=recipe.weights,
            sqnr_db=round(worst, 2),
            min_sqnr_db=verify.floor_for(worst, recipe.min_sqnr_db),
        )

    def _keep_golden(self, name: str, feeds: Feeds, outputs: Mapping[str, AnyArray]) -> None:
        for side, arrays in (("in", feeds), ("out", outputs)):
            for key, array in arrays.items():
                self.golden[f"{name}/{side}/{key}"] = np.array(array, order="C")


def _golden_image(
    plan: ExportPlan, loaded: Loaded, family: Family, manifest: Manifest, folder: Path, say: Say
) -> GoldenImage:
    golden, numbers = plan.golden, manifest.numbers
    expected = family.reference_image(loaded.pipe, golden, numbers)
    steps = numbers.default_steps if golden.steps is None else golden.steps
    guidance = numbers.default_guidance if golden.guidance is None else golden.guidance
    pipe = _runtime(folder, manifest)
    found = pipe(golden.prompt, seed=golden.seed, num_inference_steps=steps, guidance_scale=guidance)
    psnr = verify.image_psnr(expected, np.asarray(found.images[0]))
    if psnr < plan.recipe.min_psnr_db:
        _miss(plan, say, "the golden image", "PSNR", psnr, plan.recipe.min_psnr_db)
    Image.fromarray(expected).save(folder / GOLDEN_IMAGE, optimize=True)
    return GoldenImage(
        prompt=golden.prompt,
        seed=golden.seed,
        steps=steps,
        guidance=guidance,
        file=GOLDEN_IMAGE,
        psnr_db=round(psnr, 2),
        min_psnr_db=verify.floor_for(psnr, plan.recipe.min_psnr_db),
    )


def _runtime(folder: Path, manifest: Manifest) -> Pipeline:
    """The runtime on what was just written: the bundle is not opened but made, because its manifest comes last."""
    bundle = Bundle(folder, manifest, manifest_digest(manifest))
    choices = choose_devices(bundle, "onnxruntime:cpu")
    return Pipeline(bundle, open_components(bundle, choices, SessionOptions(), "release"))


def _miss(plan: ExportPlan, say: Say, what: str, figure: str, found: float, demanded: float) -> None:
    text = f"{what} reaches {found:.1f} dB {figure}, recipe {plan.recipe.name} demands {demanded:g} dB"
    if not plan.accept_error:
        raise ExportError(
            f"{text}; nothing was written. Try another recipe, or --accept-error to write it nevertheless"
        )
    say(f"accepted: {text}")


def _spread(samples: Sequence[Feeds]) -> list[Feeds]:
    if len(samples) <= MAX_SAMPLES:
        return list(samples)
    return [samples[round(index)] for index in np.linspace(0, len(samples) - 1, MAX_SAMPLES)]
