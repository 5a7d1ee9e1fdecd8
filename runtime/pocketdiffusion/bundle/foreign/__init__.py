"""Folders of other exporters, read unmodified: a `Manifest` is made in memory from their own configs and graphs.

Known: `optimum-cli export onnx` and `export openvino` (now and as they were), Diffusers' `OnnxStableDiffusionPipeline`,
transformers.js' suffixes (``model_fp16.onnx``). All have a ``model_index.json`` and a folder for each graph.

Limits: nothing in such a folder says what its bytes should be, so damage inside weights is not found.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketdiffusion.bundle.foreign.configs import INDEX, PREPROCESSOR, SCHEDULER, Configs, list_files
from pocketdiffusion.bundle.foreign.contract import component_entry
from pocketdiffusion.bundle.foreign.graphs import CHECKER, choose_graphs, graph_files
from pocketdiffusion.bundle.foreign.numbers import make_numbers
from pocketdiffusion.bundle.foreign.scheduler import check_scheduler
from pocketdiffusion.bundle.integrity import file_size
from pocketdiffusion.bundle.manifest import ComponentEntry, FileEntry, Manifest, Source
from pocketdiffusion.bundle.paths import check_paths
from pocketdiffusion.bundle.strict_json import short
from pocketdiffusion.errors import BundleCorrupt, BundleUnsupported

RECIPE = "as found"

FAMILIES = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionImg2ImgPipeline": "sd",
    "LatentConsistencyModelPipeline": "sd",
    "LatentConsistencyModelImg2ImgPipeline": "sd",
    "StableDiffusionInpaintPipeline": "sd",
    "StableDiffusionInstructPix2PixPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "StableDiffusionXLInpaintPipeline": "sdxl",
}
"""Diffusers' pipeline class -> key of `pocketdiffusion.families.FAMILIES`."""
_MAKERS = re.compile(r"^(?:Onnx|ORT|OV)(?=[A-Z])")
"""What exporters put before Diffusers' class names."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """What `Bundle` needs of a folder without manifest.json."""

    manifest: Manifest
    """`FileEntry.sha256` is "" for graphs and weights: there is nothing to compare them with."""
    digest: str
    """sha256 of the names and sizes of all files and of the bytes of the configs; see `_digest`."""
    notes: tuple[str, ...]
    """What was chosen or left out, for people."""


GOLDEN = "golden.safetensors"
"""In every bundle of our exporter and in nobody else's folder: without a manifest it is damaged, not foreign."""


def is_foreign(folder: Path) -> bool:
    """Whether a folder looks like one that `read_foreign` reads. One of our own that lost its manifest does not."""
    ours = os.path.lexists(folder / GOLDEN)
    return not ours and os.path.lexists(folder / INDEX) and any(graph_files(folder).values())


def read_foreign(root: Path, variant: str | None = None) -> Foreign:
    """Describe a folder. `root` must be real; `variant` is a suffix such as "fp16".

    Raises BundleUnsupported (another family, an unknown variant, graphs that take or give other things than those of
    the known exporters), BundleCorrupt, BundleUnsafe. What files hold beyond that is checked by `Bundle.open`.
    """
    configs = Configs(root)
    index = configs.read(INDEX)
    chosen, notes = choose_graphs(root, variant, checked=_is_checked(index, root))
    entries, weights = {}, set[str]()
    for name, graph in chosen.items():
        entries[name], found = component_entry(root, name, graph)
        weights |= found
    class_name = _class_name(index, root)
    if FAMILIES[class_name] == "sdxl" and "text_encoder_2" not in entries:
        raise BundleCorrupt(root, f"has no graph for text_encoder_2, which a {class_name} needs")
    check_scheduler(configs.read(SCHEDULER))
    numbers = make_numbers(root, configs, entries, few_steps=_few_steps(index, configs, class_name, root))
    files = _files(root, {entry.graph for entry in entries.values()} | weights)
    manifest = Manifest(
        name=_name(root),
        description=f"a {class_name} that another exporter wrote; the folder holds no hashes to check it against",
        family=FAMILIES[class_name],
        tasks=_tasks(entries, numbers.latent_channels),
        recipe=RECIPE,
        source=Source(_name(root), "unknown"),
        numbers=numbers,
        components=entries,
        files=files,
    )
    return Foreign(manifest, _digest(files), notes)


def _class_name(index: dict[str, Any], root: Path) -> str:
    """Diffusers' name of the pipeline's class, without what exporters put before it."""
    found = index.get("_class_name")
    name = _MAKERS.sub("", found) if isinstance(found, str) else ""
    if name not in FAMILIES:
        raise BundleUnsupported(
            f"{root} holds a pipeline of class {short(found)}; folders of other exporters are read for "
            f"{', '.join(FAMILIES)}; export the model with `pocketdiffusion export`"
        )
    return name


def _is_checked(index: dict[str, Any], root: Path) -> bool:
    """Whether the pipeline has a safety checker and what it needs; null in the index stands for none."""
    return index.get(CHECKER) not in (None, [None, None]) and os.path.lexists(root / PREPROCESSOR)


def _few_steps(index: dict[str, Any], configs: Configs, class_name: str, root: Path) -> bool:
    """Whether the model was distilled to few steps without guidance, by its scheduler, its class or its name."""
    scheduler = configs.read(SCHEDULER).get("_class_name")
    names = f"{index.get('_name_or_path', '')} {_name(root)}".lower()
    distilled = scheduler in ("LCMScheduler", "TCDScheduler") or class_name.startswith("LatentConsistency")
    return distilled or "turbo" in names or "lightning" in names


def _tasks(entries: Mapping[str, ComponentEntry], latent_channels: int) -> tuple[str, ...]:
    """A denoiser that takes a picture, or a mask and a masked picture, besides the latents can do nothing else."""
    channels = entries["unet"].inputs["sample"].shape[1]
    if isinstance(channels, int) and channels > latent_channels:
        return ("instruct",) if channels == 2 * latent_channels else ("inpaint",)
    return ("text-to-image", "image-to-image") if "vae_encoder" in entries else ("text-to-image",)


def _name(root: Path) -> str:
    """The folder's name as a bundle's; in a Hugging Face cache the repository's."""
    cached = next((part for part in reversed(root.parts) if part.startswith("models--")), root.name)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", cached.split("--")[-1]).strip("._-")[:64] or "model"


def _files(root: Path, graphs: set[str]) -> tuple[FileEntry, ...]:
    """The files that the pipeline uses. Configs have their sha256, graphs and weights none."""
    configs = list_files(root) - graphs
    paths = sorted(configs | graphs)
    check_paths(paths, INDEX)
    reader = Configs(root)
    return tuple(
        FileEntry(
            path, file_size(root, path), hashlib.sha256(reader.bytes(path)).hexdigest() if path in configs else ""
        )
        for path in paths
    )


def _digest(files: tuple[FileEntry, ...]) -> str:
    """sha256 of the JSON list of [path, size, sha256 or ""]: names the contents as far as they are known."""
    listed = [[entry.path, entry.size, entry.sha256] for entry in files]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
