"""The bundle's files that are not graphs: configs, tokenizer, README, tool versions.

Configs keep what the source says but for paths of the machine that made it.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocketdiffusion.bundle.foreign.configs import PREPROCESSOR
from pocketdiffusion.bundle.manifest import Manifest
from pocketdiffusion.safety import COMPONENT as SAFETY_CHECKER
from pocketdiffusion_export.component import ComponentSpec
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.plan import ExportPlan
from pocketdiffusion_export.sources.base import Loaded
from pocketdiffusion_export.sources.diffusers_folder import INDEX
from pocketdiffusion_export.sources.scheduler import FILE as SCHEDULER
from pocketdiffusion_export.verify import Measured

PATH_KEYS = frozenset({"_name_or_path", "name_or_path"})
GOLDEN = "golden.safetensors"
QUANTIZATION = "quantization.json"
"""Which weights were quantized with which error, and which stayed float and why."""
WEIGHTS = "weights.json"
"""SQNR of each weight in dB, where a graph was read back because no engine here opens it."""
TOKENIZER_FILES = ("merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json")
TOOLS = (
    "coremltools",
    *("diffusers", "numpy", "onnx", "onnxruntime", "openvino", "openvino_tokenizers", "pocketdiffusion", "torch"),
    "transformers",
)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """JSON with sorted keys and without keys that hold paths."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in content.items() if key not in PATH_KEYS}
    file.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")


def write_configs(loaded: Loaded, plan: ExportPlan, specs: Sequence[ComponentSpec], folder: Path) -> None:
    """Index, scheduler, tokenizers and preprocessing of a source, each component's config, the plan's own files."""
    source = loaded.folder
    index = json.loads((source / INDEX).read_text(encoding="utf-8"))
    scheduler = loaded.scheduler or json.loads((source / SCHEDULER).read_text(encoding="utf-8"))
    write_json(folder / INDEX, index | {"scheduler": ["diffusers", scheduler["_class_name"]]})
    write_json(folder / SCHEDULER, scheduler)
    if any(spec.name == SAFETY_CHECKER for spec in specs):
        write_json(folder / PREPROCESSOR, json.loads((source / PREPROCESSOR).read_text(encoding="utf-8")))
    for spec in specs:
        write_json(folder / spec.name / "config.json", spec.config)
    for tokenizer in sorted(source.glob("tokenizer*")):
        _write_tokenizer(tokenizer, folder / tokenizer.name)
    for file in plan.files:
        shutil.copyfile(file, folder / file.name)


def _write_tokenizer(source: Path, folder: Path) -> None:
    folder.mkdir()
    for name in TOKENIZER_FILES:
        file = source / name
        if file.suffix == ".json" and file.is_file() and name.endswith(("_config.json", "_map.json")):
            write_json(folder / name, json.loads(file.read_text(encoding="utf-8")))
        elif file.is_file():
            shutil.copyfile(file, folder / name)
    if not (folder / "tokenizer.json").is_file():
        from transformers import CLIPTokenizerFast

        CLIPTokenizerFast.from_pretrained(str(source), local_files_only=True).backend_tokenizer.save(
            str(folder / "tokenizer.json")
        )
    missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    if missing:
        raise ExportError(f"{source} lacks {', '.join(missing)}; a CLIP tokenizer needs them")


def tool_versions() -> dict[str, str]:
    """Versions of what makes a bundle, of those that are installed."""
    found = {}
    for name in TOOLS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def table(measured: Sequence[Measured]) -> list[str]:
    """How near components are to their source, as lines of Markdown."""
    head = ["| component | engine | output | SQNR | PSNR | worst channel |", "|---|---|---|---|---|---|"]
    return head + [
        f"| {item.component} | {item.engine} | {name} | {figures.sqnr_db:.1f} | {figures.psnr_db:.1f} "
        f"| {figures.worst_channel_db:.1f} |"
        for item in measured
        for name, figures in item.outputs.items()
    ]


def write_readme(
    manifest: Manifest, measured: Sequence[Measured], notes: Sequence[str], plan: ExportPlan, folder: Path
) -> None:
    """README.md of the bundle: what it is, its terms, and how near it is to its source."""
    image = manifest.golden_image
    lines = [
        f"# {manifest.name}",
        "",
        *([manifest.description, ""] if manifest.description else []),
        f"Recipe `{manifest.recipe}`. Weights: {manifest.source.name}, licence {manifest.source.licence}.",
        *(f"See [{file.name}]({file.name})." for file in plan.files),
        "",
        "Against the float32 source in torch, on the source's own inputs (dB):",
        "",
        *table(measured),
    ]
    lines += [line for note in (*notes, *(f"Changed: {change}." for change in manifest.changes)) for line in ("", note)]
    if image is not None and image.psnr_db is None:
        lines += ["", f'Whole image "{image.prompt}": not generated with this bundle; `{image.file}` is the source\'s.']
    elif image is not None:
        settings = f"seed {image.seed}, {image.steps} steps, guidance {image.guidance:g}"
        lines += ["", f'Whole image "{image.prompt}" ({settings}): {image.psnr_db:.1f} dB PSNR to `{image.file}`.']
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
