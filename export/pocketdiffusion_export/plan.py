"""What to export: one frozen value, from a preset file and command line flags.

A preset is a TOML file beside the model's card (see `models/README.md`). Flags win over the preset, the preset wins
over what the source's own configs say.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.quant import RECIPES, Recipe
from pocketdiffusion_export.sources import hub, random
from pocketdiffusion_export.sources.scheduler import CLASS, CLASSES
from pocketdiffusion_export.targets import CUTTERS, TARGETS, check_bands, check_targets

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DYNAMIC = "dynamic"
"""The size of graphs that take any."""

BATCHES = (1, 2)
"""Rows that a denoiser's graph can be fixed to."""

STRIDES = (2, 3, 4)
"""Of the keys that self-attention reads: along both sides, so that of 4, 9 or 16 one is left."""

TABLES = ("source", "numbers", "golden", "scheduler")
"""Of a preset."""

DEFAULT_PROMPTS = (
    "a red apple",
    "a photo of a cat on a sofa",
    "a blue car in the rain",
    "a portrait of an old man",
    "a house in the mountains at sunset",
    "a yellow flower",
)


@dataclass(frozen=True, slots=True)
class NumberOverrides:
    """Numbers that a preset may set; None takes the source's own (or Diffusers' usual 25 steps and 7.5)."""

    width: int | None = None
    height: int | None = None
    default_steps: int | None = None
    default_guidance: float | None = None


@dataclass(frozen=True, slots=True)
class GoldenPlan:
    """The whole generation that the bundle is compared with; None takes the model's defaults."""

    prompt: str = DEFAULT_PROMPTS[0]
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """One export, fully decided before anything heavy is imported."""

    source: str
    """A path, "random:NAME" or "hub:OWNER/NAME"; see `source.py`."""
    destination: Path
    targets: tuple[str, ...]
    """Keys of `TARGETS`; each becomes a bundle of its own."""
    recipe: Recipe
    name: str
    description: str = ""
    source_name: str = ""
    licence: str = "NOASSERTION"
    """SPDX expression of the weights."""
    numbers: NumberOverrides = field(default_factory=NumberOverrides)
    golden: GoldenPlan = field(default_factory=GoldenPlan)
    prompts: tuple[str, ...] = DEFAULT_PROMPTS
    """Captions for verification inputs, the preview's colours and (later) calibration."""
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    """Settings of Diffusers' scheduler that win over the source's."""
    files: tuple[Path, ...] = ()
    """Extra files, copied to the bundle's root: attributions, licence texts."""
    accept_error: bool = False
    """Write the bundle although a figure is under its threshold."""
    sizes: tuple[tuple[int, int], ...] = ()
    """Graphs take these sizes (width, height) and no others, the first of which is the one in `numbers`; () is any."""
    bands: bool = False
    """The VAE's decoder is also cut into pieces that run over bands of a picture."""
    tiny_vae: str | None = None
    """Where a tiny decoder comes from, besides the source's own; see `sources/tiny_vae.py`."""
    chunks: bool = False
    """Core ML's denoiser comes in two programs."""
    part_bytes: int | None = None
    """Components with more weights are also cut into parts of at most so many bytes; None cuts nothing."""
    key_stride: int | None = None
    """Of the keys that the UNet's largest self-attention reads, along both sides of the map; None reads all."""
    batch: int | None = None
    """With sizes: rows that the denoiser's graphs take, while all other graphs take one, and prompts one length; None
    leaves batch and text length free."""

    def batch_of(self, component: str) -> int | None:
        """Rows that a component's graphs take; None is any."""
        return self.batch if component == "unet" or self.batch is None else 1

    @property
    def bundles(self) -> dict[str, Path]:
        """Target -> the bundle's folder: the destination, or of several targets a folder in it for each."""
        if len(self.targets) == 1:
            return {self.targets[0]: self.destination}
        return {target: self.destination / target for target in self.targets}


def make_plan(
    source: str | Path,
    destination: str | Path,
    *,
    target: str = "onnx",
    recipe: str = "fp32",
    size: str = DYNAMIC,
    batch: int | None = None,
    part_size: int | None = None,
    preset: str | Path | None = None,
    accept_error: bool = False,
    banded_vae: bool = False,
    tiny_vae: str | None = None,
    chunk_unet: bool = False,
    downsample_keys: int | None = None,
) -> ExportPlan:
    """A checked plan. `target` is one name or several with commas between them, `size` "dynamic" or one or several
    of "WIDTHxHEIGHT", `part_size` in megabytes.

    Raises ExportError for an unknown target or recipe, a size that is none, a batch that can't be fixed, keys that
    can't be left out, bands of a target or recipe that can't have them, targets that can't be cut into parts, and a
    preset that can't be used.
    """
    targets = tuple(dict.fromkeys(name.strip() for name in target.split(",")))
    for name in targets:
        if name not in TARGETS:
            raise ExportError(f"unknown target '{name}'; choose one of: {', '.join(sorted(TARGETS))}")
    if recipe not in RECIPES:
        raise ExportError(f"unknown recipe '{recipe}'; choose one of: {', '.join(sorted(RECIPES))}")
    destination = Path(destination)
    if Path(source).resolve() in (destination.resolve(), *destination.resolve().parents):
        raise ExportError(f"the destination {destination} lies in the source {source}; choose a folder outside of it")
    given = {} if preset is None else read_preset(Path(preset))
    origin = _origin(str(source))
    if origin is not None and given.get("source_name") != origin:  # it tells the origin and terms of other weights
        given = {key: value for key, value in given.items() if key not in ("source_name", "licence")}
    plan = ExportPlan(
        source=str(source),
        destination=destination,
        targets=targets,
        recipe=RECIPES[recipe],
        accept_error=accept_error,
        bands=banded_vae,
        tiny_vae=tiny_vae,
        chunks=chunk_unet,
        key_stride=downsample_keys,
        part_bytes=None if part_size is None else part_bytes(part_size, targets),
        **{"name": destination.name, "source_name": origin or Path(source).name, **given},
    )
    if banded_vae:
        check_bands(targets, plan.recipe)
    if chunk_unet and "coreml" not in targets:
        raise ExportError(f"{', '.join(targets)} graphs have no chunks, coreml's have; give --part-size to cut others")
    if downsample_keys not in (None, *STRIDES):
        allowed = ", ".join(map(str, STRIDES))
        raise ExportError(f"keys can't be downsampled by {downsample_keys}; choose one of: {allowed}")
    if batch not in (None, *BATCHES):
        raise ExportError(f"batch {batch} can't be fixed; choose 1 (guidance in turn) or 2 (both passes together)")
    if size == DYNAMIC:
        if batch is not None:
            raise ExportError(f"batch {batch} needs fixed sizes as well; give --size WIDTHxHEIGHT")
        check_targets(targets, plan.recipe, 0)
        return plan
    sizes = tuple(dict.fromkeys(_parse_size(part.strip()) for part in size.split(",")))
    width, height = sizes[0]
    check_targets(targets, plan.recipe, len(sizes))
    return replace(plan, sizes=sizes, batch=batch, numbers=replace(plan.numbers, width=width, height=height))


def _origin(source: str) -> str | None:
    """What a source says itself of where its weights come from; None for paths, of which a preset may tell it."""
    if source.startswith(random.PREFIX):
        return source
    return hub.parse(source).repository if source.startswith(hub.PREFIX) else None


def part_bytes(megabytes: int, targets: Iterable[str]) -> int:
    """Bytes of a part. Raises ExportError for a size that is none, and for graph formats that can't be cut."""
    if megabytes < 1:
        raise ExportError(f"part size {megabytes} is none; give megabytes of weights, for example 64")
    for target in targets:
        if target not in CUTTERS:
            raise ExportError(f"{target} graphs can't be cut into parts; that is possible for {', '.join(CUTTERS)}")
    return megabytes * 1_000_000


def _parse_size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if found is None:
        raise ExportError(f"size '{text}' is none; give WIDTHxHEIGHT in pixels, for example 512x512, or {DYNAMIC}")
    return int(found[1]), int(found[2])


def read_preset(path: Path) -> dict[str, Any]:
    """Fields of `ExportPlan` from a preset. Raises ExportError with the file and key that is wrong."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ExportError(f"preset {path} can't be read: {error}") from None
    _check_table(path, data, "", {"name": str, "description": str, "prompts": list, "files": list}, *TABLES)
    source, numbers, golden, scheduler = (data.get(key, {}) for key in TABLES)
    _check_table(path, source, "source.", {"name": str, "licence": str})
    _check_table(path, numbers, "numbers.", {f.name: (int, float) for f in fields(NumberOverrides)})
    _check_table(path, golden, "golden.", {"prompt": str, "seed": int, "steps": int, "guidance": (int, float)})
    _check_scheduler(path, scheduler)
    plan: dict[str, Any] = {key: data[key] for key in ("name", "description") if key in data}
    plan |= {new: source[old] for old, new in (("name", "source_name"), ("licence", "licence")) if old in source}
    plan |= {key: _strings(path, key, data[key]) for key in ("prompts", "files") if key in data}
    if "files" in plan:
        plan["files"] = tuple(_existing(path, name) for name in plan["files"])
    return plan | {"numbers": NumberOverrides(**numbers), "golden": GoldenPlan(**golden), "scheduler": scheduler}


def _check_table(path: Path, table: object, prefix: str, allowed: Mapping[str, Any], *tables: str) -> None:
    if not isinstance(table, dict):
        raise ExportError(f"preset {path}: '{prefix.rstrip('.')}' must be a table")
    for key, value in table.items():
        if key in tables:
            continue
        if key not in allowed:
            choices = ", ".join(sorted([*allowed, *tables]))
            raise ExportError(f"preset {path}: unknown key '{prefix}{key}'; allowed: {choices}")
        if not isinstance(value, allowed[key]) or isinstance(value, bool):
            raise ExportError(f"preset {path}: '{prefix}{key}' has a value of the wrong type: {value!r}")


def _check_scheduler(path: Path, table: object) -> None:
    """Its class, if it names one; other settings are the class's own."""
    if not isinstance(table, dict):
        raise ExportError(f"preset {path}: 'scheduler' must be a table")
    if (name := table.get(CLASS, CLASSES[0])) not in CLASSES:
        raise ExportError(f"preset {path}: 'scheduler.{CLASS}' is {name!r}; choose one of: {', '.join(CLASSES)}")


def _strings(path: Path, key: str, values: list[object]) -> tuple[str, ...]:
    if not values or not all(isinstance(value, str) and value for value in values):
        raise ExportError(f"preset {path}: '{key}' must be a list of texts, not empty")
    return tuple(str(value) for value in values)


def _existing(preset: Path, name: str) -> Path:
    file = preset.parent / name
    if not file.is_file():
        raise ExportError(f"preset {preset}: the file '{name}' in 'files' does not exist beside it")
    return file
