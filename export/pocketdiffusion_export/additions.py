"""A tiny decoder for a bundle that is there: its files are copied, and nothing else is exported again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from pocketdiffusion.bundle import Bundle, file_entries, write_manifest
from pocketdiffusion.bundle.manifest import Manifest, version_needed
from pocketdiffusion.presets import DECODERS
from pocketdiffusion.tensors import AnyArray
from pocketdiffusion_export import layout, verify
from pocketdiffusion_export.component import Feeds
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.families.parts import check_tiny_vae, other_shape, tiny_decoder
from pocketdiffusion_export.parts import append_readme, copy_files, open_own
from pocketdiffusion_export.plan import ExportPlan
from pocketdiffusion_export.quant import RECIPES
from pocketdiffusion_export.registry import lookup
from pocketdiffusion_export.sources import tiny_vae
from pocketdiffusion_export.targets import TARGETS
from pocketdiffusion_export.work import Draft, Say, Work
from pocketdiffusion_export.write import assembled

FULL, TINY = DECODERS["full"], DECODERS["tiny"]


def add_tiny_vae(
    source: Path, destination: Path, tiny: str, say: Say, *, accept_error: bool = False
) -> tuple[str, ...]:
    """Write a copy of a bundle with a tiny decoder, see `sources.tiny_vae.load`, in the bundle's own recipe and sizes.

    What it is calibrated and verified with are the latents among the bundle's golden tensors. Returns what was found,
    for people. Raises BundleError, ExportError; then nothing was written or replaced.
    """
    say(f"checking {source}")
    bundle = open_own(source, destination)
    manifest = bundle.manifest
    latents = _latents(bundle)
    plan = _plan(manifest, tiny, destination, accept_error)
    model, hashes = tiny_vae.load(tiny)
    check_tiny_vae(model, manifest.numbers.latent_channels, manifest.numbers.vae_factor)
    spec = tiny_decoder(model)
    target = lookup(TARGETS, "target", plan.targets[0])
    with assembled(destination) as folder:
        say(f"copying {len(manifest.files)} files")
        copy_files(bundle, folder)
        draft = Draft(target, verify.engines(target.format), destination, folder, dict(manifest.components))
        layout.write_json(folder / TINY / "config.json", spec.config)
        work = Work(plan, [draft], say)
        work.component(spec, [latents, other_shape(latents, 2)])
        _write(manifest, draft, work, hashes)
    return (f"{TINY} of {plan.source_name} was added", *draft.notes)


def _latents(bundle: Bundle) -> Feeds:
    """One picture's latents in the denoiser's scale. Raises ExportError where there is nothing to take them from."""
    manifest = bundle.manifest
    name = manifest.name
    if TINY in manifest.components:
        raise ExportError(f"{name} has a {TINY} already; add another to the bundle that it was made from")
    if FULL not in manifest.components or manifest.golden is None:
        raise ExportError(f"{name} holds no {FULL} with golden tensors; export its source with --tiny-vae instead")
    found = load_file(bundle.file(manifest.golden)).get(f"{FULL}/in/latent_sample")
    if found is None:
        raise ExportError(f"{name} has no golden latents of its {FULL}; export its source with --tiny-vae instead")
    numbers = manifest.numbers
    return {"latent_sample": ((found[:1] - numbers.latent_shift) * numbers.latent_scale).astype(np.float32)}


def _plan(manifest: Manifest, tiny: str, destination: Path, accept_error: bool) -> ExportPlan:
    """The plan of the bundle's own export, as far as it is about decoders."""
    if manifest.recipe not in RECIPES:
        raise ExportError(f"{manifest.name} is of recipe {manifest.recipe}, which is not known; export it again")
    full, numbers = manifest.components[FULL], manifest.numbers
    rows, _, height, _ = full.inputs["latent_sample"].shape
    native = [(numbers.width, numbers.height)] if isinstance(height, int) else []
    return ExportPlan(
        source=tiny,
        destination=destination,
        targets=(full.format,),
        recipe=RECIPES[manifest.recipe],
        name=manifest.name,
        source_name=Path(tiny).name,
        accept_error=accept_error,
        sizes=(*native, *((sized.width, sized.height) for sized in full.sizes)),
        batch=rows if isinstance(rows, int) else None,
    )


def _write(manifest: Manifest, draft: Draft, work: Work, hashes: Mapping[str, str]) -> None:
    """What of the bundle is not the graph: golden tensors, reports, README and the manifest."""
    folder, golden = draft.folder, manifest.golden or layout.GOLDEN
    tensors: dict[str, AnyArray] = load_file(folder / golden)
    (folder / golden).write_bytes(save(tensors | work.golden))
    for name, found in ((layout.QUANTIZATION, work.quantization), (layout.WEIGHTS, draft.weights)):
        if found:
            before = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}
            layout.write_json(folder / name, before | found)
    lines = [f"`{TINY}` of {work.plan.source_name} was added:", "", *layout.table(draft.measured)]
    append_readme(folder, manifest.name, ["\n".join(lines), *draft.notes])
    source = replace(manifest.source, sha256={**manifest.source.sha256, **hashes})
    made = replace(manifest, source=source, components=draft.entries, files=file_entries(folder))
    write_manifest(folder, replace(made, format_version=version_needed(draft.entries, made.changes)))
