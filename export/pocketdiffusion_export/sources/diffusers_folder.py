"""A Diffusers folder with safetensors weights.

Classes are taken from a literal table and never from what the folder names, weights are safetensors by content and
not by ending, and nothing is fetched from a network. Limits: pipelines of the classes in `base.LOADERS`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pocketdiffusion.judge import COMPONENTS as JUDGE
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.families import HINTS, PIPELINES
from pocketdiffusion_export.sources.base import (
    CHECKING,
    LOADERS,
    TRANSFORMERS,
    WEIGHTED,
    Loaded,
    assemble,
    check_safetensors,
    class_named,
    parts_of,
    sha256,
)

INDEX = "model_index.json"
"""What the folder of a pipeline is known by."""


def load(folder: Path) -> Loaded:
    """Load a Diffusers folder as float32. Raises ExportError in one line for everything that is wrong with it."""
    index = _index_of(folder)
    pipeline = index["_class_name"]
    names = parts_named(index)
    weights = [file for part in names if part in WEIGHTED for file in weight_files(folder / part, stem_of(part))]
    for file in weights:
        check_safetensors(file)
    pipe = assemble(pipeline, {part: _load_part(folder, part, index) for part in names} | _settings(index))
    hashes = {file.relative_to(folder).as_posix(): sha256(file) for file in weights}
    return Loaded(pipe, folder, PIPELINES[pipeline], hashes)


def parts_named(index: Mapping[str, Any]) -> tuple[str, ...]:
    """What a pipeline is made of. A safety checker counts where the index names one, null stands for none; a judge
    where the index names one of its parts."""
    checks = index.get("safety_checker") not in (None, [None, None])
    judges = any(name in index for name in JUDGE)
    return (*parts_of(index["_class_name"]), *(CHECKING if checks else ()), *(JUDGE if judges else ()))


def _settings(index: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the pipeline itself that change what it computes."""
    return {key: index[key] for key in ("force_zeros_for_empty_prompt",) if key in index}


def _index_of(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ExportError(
            f"the source {folder} is not a folder or file; give a Diffusers folder, which holds {INDEX}, a "
            ".safetensors checkpoint, random:NAME, or hub:OWNER/NAME to download from the Hugging Face hub"
        )
    if not (folder / INDEX).is_file():
        raise ExportError(f"the source {folder} holds no {INDEX}; give a Diffusers folder")
    index = read_index(folder / INDEX)
    if "safety_checker" in parts_named(index) and not (folder / "safety_checker").is_dir():
        raise ExportError(
            f"{folder / INDEX} names a safety_checker, which the folder lacks; get it, or write [null, null] for it in "
            "that file to export without"
        )
    return index


def read_index(path: Path) -> dict[str, Any]:
    """A model_index.json. Raises ExportError unless its pipeline and every part are of classes that are exported."""
    index = read_json(path)
    found = index.get("_class_name")
    if found not in PIPELINES:
        hint = HINTS.get(str(found), f"known: {', '.join(sorted(PIPELINES))}")
        raise ExportError(f"{path}: pipeline class {found} can't be exported; {hint}")
    for part in parts_named(index):
        named = index.get(part)
        if not (isinstance(named, list) and len(named) == 2 and named[1] in LOADERS):
            known = ", ".join(sorted(LOADERS))
            raise ExportError(f"{path}: '{part}' names {named}, which can't be exported; known classes: {known}")
    return index


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ExportError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} can't be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise ExportError(f"{path} must hold a JSON object")
    return data


def stem_of(part: str) -> str:
    """What the names of a part's weight files start with."""
    return "model" if part in TRANSFORMERS else "diffusion_pytorch_model"


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors of one model, whose names start with `stem`. Raises ExportError where there are none."""
    if not (folder / "config.json").is_file():
        raise ExportError(f"{folder}/config.json is missing; the source is not a complete Diffusers folder")
    return [folder / name for name in weight_names((file.name for file in folder.iterdir()), stem, str(folder))]


def weight_names(names: Iterable[str], stem: str, where: str) -> list[str]:
    """Those of a model's files that hold its weights in full. Raises ExportError naming `where` when there are none."""
    names = sorted(names)
    found = [name for name in names if name.startswith(stem) and name.endswith(".safetensors")]
    found = [name for name in found if ".fp16." not in name and ".non_ema." not in name]
    if not found:
        others = [name for name in names if name.endswith((".bin", ".pt", ".ckpt"))]
        instead = f"only {', '.join(others)} (pickle, never read)" if others else "none"
        raise ExportError(f"{where} needs {stem}.safetensors; found {instead}")
    return found


def _load_part(folder: Path, part: str, index: dict[str, Any]) -> Any:
    if part in WEIGHTED:
        return load_weighted(folder / part, index[part][1], "dtype" if part in TRANSFORMERS else "torch_dtype")
    return _from_pretrained(folder / part, index[part][1])


def load_weighted(folder: Path, kind: str, dtype: str) -> Any:
    """A model of a class in `LOADERS` as float32, in evaluation mode; `dtype` is the class's own word for that option.

    Raises ExportError.
    """
    import torch

    options = {"use_safetensors": True, "low_cpu_mem_usage": False, dtype: torch.float32}
    return _from_pretrained(folder, kind, **options).eval()


def _from_pretrained(folder: Path, kind: str, **options: Any) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return class_named(kind).from_pretrained(str(folder), local_files_only=True, **options)
    except Exception as error:  # the libraries raise many kinds for a bad folder; the user needs one line
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"{folder} can't be loaded as {kind}: {reason}") from error
