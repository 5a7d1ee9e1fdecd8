"""Where the models of cases come from: bundles as they are, and what is made once from a source and kept.

A source is "random:NAME" or a Diffusers folder of safetensors. Ours runs a bundle exported from it, peers the folder
itself or what their own tools convert it to. What is made is made anew when the source, the recipe, or the export
stage's code changes.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pocketdiffusion import __version__
from pocketdiffusion.bundle import MANIFEST, Bundle
from pocketdiffusion.bundle.models import find_bundle
from pocketdiffusion_bench.case import Case
from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.once import make_once

RANDOM = "random:"
EXPORT = "pocketdiffusion_export"
TINY_VAE = f"{RANDOM}taesd"
RECIPE = "fp32"
"""Of a source for which no other was asked."""
STEPS, GUIDANCE = 25, 7.5
"""What the export stage writes into a bundle where neither preset nor source says more."""
PRESETS = Path(__file__).resolve().parents[2] / "models"
"""In a source checkout; an installed package has none."""


def provide(case: Case, target: str = "onnx") -> Path:
    """The bundle's folder that a case of ours runs. A source is exported with the case's recipe, once; minutes.

    "random:NAME" gets a tiny decoder as well where the case asks for one.
    Raises BenchError when a bundle has another recipe than the case asks for, or when the export fails.
    """
    if is_source(case.model):
        made = _exported(case.model, case.recipe or RECIPE, target, case.downsample_keys)
        return _with_tiny_decoder(made) if case.model.startswith(RANDOM) and case.decoder == "tiny" else made
    if case.downsample_keys is not None:
        raise BenchError(f"{case.model} is a bundle, which reads the keys it was exported with: give a source")
    folder = find_bundle(case.model)
    if case.recipe is not None:
        found = Bundle.open(folder).manifest.recipe
        if found != case.recipe:
            raise BenchError(
                f"{case.model} is stored as {found}, asked for {case.recipe}; leave --recipe out, or give a source"
            )
    return folder


def source(case: Case) -> Path:
    """The Diffusers folder of a case's source, safetensors in float32. "random:NAME" is written once.

    Raises BenchError for a bundle, whose original weights are not known.
    """
    if not is_source(case.model):
        raise BenchError(f"{case.model} is no source: give random:NAME or a Diffusers folder with safetensors weights")
    if not case.model.startswith(RANDOM):
        return Path(case.model)

    def command(folder: Path) -> Sequence[str]:
        return [sys.executable, "-m", f"{EXPORT}.save_source", case.model, str(folder)]

    return make_once(f"source-{slug(case.model)}", [case.model, _code("sources")], command)


def is_source(model: str) -> bool:
    """Whether a model is "random:NAME" or a Diffusers folder of weights, rather than a bundle."""
    folder = Path(model)
    return model.startswith(RANDOM) or (
        (folder / "model_index.json").is_file()
        and not (folder / MANIFEST).exists()
        and any(folder.glob("unet/*.safetensors"))
    )


def settled(case: Case) -> Case:
    """The case with size, steps and guidance: where it leaves them open, what ours takes for the same model.

    Peers have other defaults, and would do other work.
    """
    numbers = _source_numbers(case) if is_source(case.model) else _bundle_numbers(case)
    return replace(
        case, **{name: value if getattr(case, name) is None else getattr(case, name) for name, value in numbers.items()}
    )


def identity(model: str) -> str:
    """What tells one source from another: a name, or of a folder its files with sizes and times."""
    if model.startswith(RANDOM):
        return model
    root = Path(model).resolve()
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return repr((root, [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]))


def _exported(model: str, recipe: str, target: str, key_stride: int | None) -> Path:
    preset = _preset(model)
    text = preset.read_text(encoding="utf-8") if preset else f'name = "{slug(model)}"\n[golden]\nsteps = 2\n'
    with tempfile.TemporaryDirectory() as folder:
        file = preset or Path(folder) / "preset.toml"
        if not preset:
            file.write_text(text, encoding="utf-8")
        # Random weights are there for time and memory: a figure under a recipe's threshold is kept and shown.
        accept = ["--accept-error"] if model.startswith(RANDOM) else []

        fewer = [] if key_stride is None else ["--downsample-keys", str(key_stride)]

        def command(part: Path) -> Sequence[str]:
            options = ["--recipe", recipe, "--target", target, "--preset", str(file), *fewer, *accept]
            return [sys.executable, "-m", EXPORT, model, str(part), *options]

        key = [identity(model), recipe, target, text, __version__, _code(), *fewer]
        name = f"{slug(model)}-{recipe}-{target}" + ("" if key_stride is None else f"-keys{key_stride}")
        return make_once(name, key, command)


def _with_tiny_decoder(bundle: Path) -> Path:
    """A copy of a bundle that has one, with random weights."""

    def command(part: Path) -> Sequence[str]:
        return [sys.executable, "-m", EXPORT, str(bundle), str(part), "--tiny-vae", TINY_VAE]

    return make_once(f"{bundle.name.rpartition('-')[0]}-tiny", [bundle.name, TINY_VAE], command)


def slug(model: str) -> str:
    """A name for files; folders of one name in two places get different ones."""
    name = model.replace(RANDOM, "random-", 1)
    if not model.startswith(RANDOM):
        path = Path(model).resolve()
        name = f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:6]}"
    return "".join(char if char.isalnum() or char in "-_" else "-" for char in name)


def _preset(model: str) -> Path | None:
    file = PRESETS / model.removeprefix(RANDOM) / "preset.toml"
    return file if model.startswith(RANDOM) and file.is_file() else None


@functools.cache
def _code(part: str = "") -> str:
    """Hash of the export stage's source files, or of those in one of its folders. Nothing of it is imported."""
    spec = importlib.util.find_spec(EXPORT)
    if spec is None or not spec.submodule_search_locations:
        raise BenchError(f"the export stage ({EXPORT}) is not installed; give a bundle instead of a source")
    digest = hashlib.sha256()
    root = Path(spec.submodule_search_locations[0]) / part
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _bundle_numbers(case: Case) -> Mapping[str, Any]:
    numbers = Bundle.open(find_bundle(case.model)).manifest.numbers
    return {
        "width": numbers.width,
        "height": numbers.height,
        "steps": numbers.default_steps,
        "guidance": numbers.default_guidance,
    }


def _source_numbers(case: Case) -> Mapping[str, Any]:
    folder = source(case)
    unet, vae = (json.loads((folder / part / "config.json").read_text(encoding="utf-8")) for part in ("unet", "vae"))
    side = unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    found = {"width": side, "height": side, "steps": STEPS, "guidance": GUIDANCE}
    preset = _preset(case.model)
    given = {} if preset is None else _toml(preset).get("numbers", {})
    names = {"width": "width", "height": "height", "default_steps": "steps", "default_guidance": "guidance"}
    return found | {names[key]: value for key, value in given.items()}


def _toml(file: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(file.read_text(encoding="utf-8"))
