"""One export from end to end: load, trace, quantize, verify, assemble.

A bundle holds the folders that Diffusers and optimum know, plus golden files and manifest.json. Several targets give
several bundles from one load, one trace and one quantization. Of a component's weights little more than the source's
and the model's copy are in memory at a time: its source goes when it is traced, its model before engines open it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save

from pocketdiffusion.backends import SessionOptions
from pocketdiffusion.bundle import Bundle, file_entries, write_manifest
from pocketdiffusion.bundle.manifest import GoldenImage, Manifest, Numbers, Source, version_needed
from pocketdiffusion.bundle.manifest_json import manifest_digest
from pocketdiffusion.components import choose_devices, open_components
from pocketdiffusion.golden import golden_inputs
from pocketdiffusion.pipeline import Pipeline
from pocketdiffusion.tensors import AnyArray
from pocketdiffusion_export import layout, read_back, verify
from pocketdiffusion_export.component import ComponentSpec, Feeds
from pocketdiffusion_export.families import FAMILIES
from pocketdiffusion_export.families.base import Family
from pocketdiffusion_export.fewer_keys import described, fewer_keys
from pocketdiffusion_export.plan import ExportPlan
from pocketdiffusion_export.registry import lookup
from pocketdiffusion_export.sizes import check_sizes
from pocketdiffusion_export.source import load
from pocketdiffusion_export.space import check_space
from pocketdiffusion_export.targets import TARGETS
from pocketdiffusion_export.work import Draft, Say, Work, miss
from pocketdiffusion_export.write import assembled, check_holder

GOLDEN_IMAGE = "golden.png"


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
        work = Work(plan, drafts, say)
        for name in list(material.specs):
            work.component(material.specs.pop(name), material.samples[name])
        bundles = tuple(_finish(plan, draft, work, material, say) for draft in drafts)
    return Summary(bundles, time.perf_counter() - start)


def _begin(plan: ExportPlan, stack: ExitStack) -> list[Draft]:
    """Engines and folders, first of all: what can't be verified or written is found before the long work."""
    if len(plan.targets) > 1:
        check_holder(plan.destination)
    targets = {name: lookup(TARGETS, "target", name) for name in plan.targets}
    if plan.chunks:
        targets["coreml"] = replace(targets["coreml"], chunks=True)
    engines = {name: verify.engines(target.format) for name, target in targets.items()}
    return [
        Draft(targets[name], engines[name], place, stack.enter_context(assembled(place)))
        for name, place in plan.bundles.items()
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
    source: Source
    changes: tuple[str, ...]
    """What the graphs compute in another way than the source, in words."""


def _read_source(plan: ExportPlan, drafts: Sequence[Draft], say: Say) -> _Material:
    say(f"loading {plan.source}")
    loaded = load(plan.source, plan.tiny_vae, say=say, scheduler=plan.scheduler)
    family: Family = lookup(FAMILIES, "family", loaded.family)
    hooks = [] if plan.key_stride is None else fewer_keys(loaded.pipe.unet, plan.key_stride)
    specs = {spec.name: spec for spec in family.components(loaded.pipe)}
    for draft in drafts:
        layout.write_configs(loaded, plan, tuple(specs.values()), draft.folder)
    vae, unet = loaded.pipe.vae_scale_factor, loaded.pipe.unet.config
    check_sizes(plan.sizes, vae * 2 ** (len(unet.down_block_types) - 1))
    check_space(drafts[0].folder, specs.values(), plan.recipe.weights, len(drafts))
    say("generating images with the source: inputs to verify with")
    samples = family.samples(loaded.pipe, plan.prompts, plan)
    numbers = family.numbers(loaded.pipe, samples, plan)
    say("generating the golden image with the source")
    image = family.reference_image(loaded.pipe, plan.golden, numbers)
    changes = []
    if plan.key_stride is not None:
        say("generating it with all keys, to compare")
        for hook in hooks:
            hook.remove()
        psnr = verify.image_psnr(family.reference_image(loaded.pipe, plan.golden, numbers), image)
        changes.append(described(plan.key_stride, psnr))
        fewer_keys(loaded.pipe.unet, plan.key_stride)
    source = Source(loaded.origin or plan.source_name, plan.licence, loaded.sha256)
    tasks = family.tasks(loaded.pipe)
    return _Material(specs, samples, numbers, image, loaded.family, tasks, source, tuple(changes))


def _finish(plan: ExportPlan, draft: Draft, work: Work, material: _Material, say: Say) -> Made:
    """Golden files, the golden image by the runtime, README, and the manifest last."""
    (draft.folder / layout.GOLDEN).write_bytes(save(work.golden))  # save_file would make it readable by its owner alone
    if work.quantization:
        layout.write_json(draft.folder / layout.QUANTIZATION, work.quantization)
    if draft.weights:
        layout.write_json(draft.folder / layout.WEIGHTS, draft.weights)
    notes = (*draft.notes, *draft.target.finish(draft.folder), *read_back.remarks(draft.engines, draft.weights))
    manifest = Manifest(
        name=plan.name,
        description=plan.description,
        family=material.family,
        tasks=material.tasks,
        recipe=plan.recipe.name,
        source=material.source,
        numbers=material.numbers,
        components=draft.entries,
        files=file_entries(draft.folder),
        tools=layout.tool_versions(),
        golden=layout.GOLDEN,
        changes=material.changes,
        format_version=version_needed(draft.entries, material.changes),
    )
    manifest = replace(manifest, golden_image=_golden_image(plan, material, manifest, draft, say))
    layout.write_readme(manifest, draft.measured, notes, plan, draft.folder)
    manifest = replace(manifest, files=file_entries(draft.folder))
    write_manifest(draft.folder, manifest)
    return Made(draft.destination, manifest, tuple(draft.measured), notes)


def _golden_image(plan: ExportPlan, material: _Material, manifest: Manifest, draft: Draft, say: Say) -> GoldenImage:
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
        miss(plan, say, "the golden image", "PSNR", psnr, image.min_psnr_db)
    return replace(image, psnr_db=round(psnr, 2), min_psnr_db=verify.floor_for(psnr, image.min_psnr_db))


def _repeat(image: GoldenImage, manifest: Manifest, draft: Draft) -> AnyArray:
    """The golden image by the runtime: uint8, [height, width, 3]."""
    pipe = _runtime(draft, manifest)
    pipe.safety_checker = None  # the source's golden image was not checked either
    given = golden_inputs(manifest.tasks, manifest.numbers.width, manifest.numbers.height)
    found = pipe.stream(
        image.prompt, seed=image.seed, num_inference_steps=image.steps, guidance_scale=image.guidance, **given
    ).result
    return np.asarray(found.images[0])


def _runtime(draft: Draft, manifest: Manifest) -> Pipeline:
    """The runtime on what was just written: the bundle is not opened but made, because its manifest comes last."""
    bundle = Bundle(draft.folder, manifest, manifest_digest(manifest))
    choices = choose_devices(bundle, f"{draft.engines[0]}:cpu")
    return Pipeline(bundle, open_components(bundle, choices, SessionOptions(), "release"))
