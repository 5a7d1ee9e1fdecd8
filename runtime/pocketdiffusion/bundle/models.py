"""Where bundles are found: in the wheel, a source checkout, the user's models folder, the hub's cache, or at a path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pocketdiffusion.bundle.foreign import GOLDEN, is_foreign
from pocketdiffusion.bundle.foreign.hub import find_repository, is_repository, snapshot
from pocketdiffusion.bundle.manifest_json import MANIFEST
from pocketdiffusion.bundle.paths import models_dir, path_problem
from pocketdiffusion.bundle.strict_json import short
from pocketdiffusion.errors import BundleCorrupt, BundleNotFound, BundleUnsupported

_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class InstalledModel:
    """A bundle that can be asked for by name."""

    name: str
    path: Path
    kind: str
    """Where it was found: "embedded" (in the package), "checkout" (in the source tree), "user" (the models folder)."""


def find_bundle(name_or_path: str | Path) -> Path:
    """The folder of a bundle, by path or by name. Nothing in it is checked beyond that it looks like a model.

    What holds a separator is a path; "owner/name" that is no path is looked up in the Hugging Face cache. Anything else
    is a path if a model is there, else a name. Raises BundleNotFound, BundleUnsupported.
    """
    text = os.fspath(name_or_path)
    if not text or "\0" in text:
        raise BundleNotFound(f"{short(text)} is neither a name nor a path")
    separators = [mark for mark in ("/", os.sep, os.altsep) if mark]
    if isinstance(name_or_path, str) and is_repository(text) and not os.path.exists(text):
        return require_model(find_repository(text))
    if isinstance(name_or_path, Path) or any(mark in text for mark in separators) or _holds_model(Path(text)):
        return require_model(Path(text))
    for _, root, below in _places():
        folder = root / text / below
        if path_problem(text) is None and folder.is_dir():
            return require_model(folder)
    if os.path.exists(text):
        return require_model(Path(text))
    known = ", ".join(model.name for model in installed()) or "none"
    looked = ", ".join(str(root) for _, root, _ in _places())
    raise BundleNotFound(f"no model {short(text)}; installed: {known}; looked in {looked}; or give a folder's path")


def installed() -> list[InstalledModel]:
    """All bundles that have a name, sorted; of equal names the one that `find_bundle` takes."""
    found: dict[str, InstalledModel] = {}
    for kind, root, below in _places():
        for folder in _folders(root):
            if (folder / below / MANIFEST).is_file() or is_foreign(folder / below):
                found.setdefault(folder.name, InstalledModel(folder.name, folder / below, kind))
    return [found[name] for name in sorted(found)]


def require_model(folder: Path) -> Path:
    """`folder`, if it holds a manifest or another exporter's graphs; of a folder of a hub's cache the snapshot in it.

    Raises BundleNotFound, BundleUnsupported saying what it looks like, BundleCorrupt for ours without its manifest.
    """
    try:
        if not folder.exists():
            raise BundleNotFound(f"no folder {folder}; `pocketdiffusion models` lists what is installed")
        if not folder.is_dir():
            raise BundleUnsupported(f"{folder} is a file; a bundle is a folder with {MANIFEST}")
        folder = snapshot(folder)
        if os.path.lexists(folder / MANIFEST) or is_foreign(folder):
            return folder
        if os.path.lexists(folder / GOLDEN):
            raise BundleCorrupt(MANIFEST, f"missing in {folder}; fetch or export the bundle again")
        kind = _describe(folder)
    except OSError as error:
        raise BundleNotFound(f"{folder} can't be read: {error.strerror}") from None
    raise BundleUnsupported(f"{folder} has no {MANIFEST}: it looks like {kind}")


def _holds_model(folder: Path) -> bool:
    return os.path.lexists(folder / MANIFEST) or os.path.lexists(folder / GOLDEN) or is_foreign(folder)


def _places() -> Iterator[tuple[str, Path, str]]:
    """(kind, folder of models, path of the bundle below a model's folder), in the order of search."""
    yield "embedded", _PACKAGE / "_models", ""
    if _PACKAGE.parent.name == "runtime":
        yield "checkout", _PACKAGE.parent.parent / "models", "bundle"
    yield "user", models_dir(), ""


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []


def _describe(folder: Path) -> str:
    """What a folder without a manifest looks like, and what to do with it."""
    export = f"run `pocketdiffusion export {folder}`"
    graphs = "from another exporter; export the model from its source weights"
    diffusers = "a Diffusers folder" if (folder / "model_index.json").is_file() else "a folder"
    endings = {path.suffix for pattern in ("*", "*/*") for path in folder.glob(pattern)}
    for ending, kind in (
        (".onnx", f"{diffusers} of ONNX graphs {graphs}"),
        (".xml", f"{diffusers} of OpenVINO graphs {graphs}"),
        (".mlpackage", f"{diffusers} of Core ML graphs {graphs}"),
        (".safetensors", f"{diffusers} of safetensors weights; {export}"),
        (".bin", f"{diffusers} of pickled weights, which are never read; convert them to safetensors first"),
        (".ckpt", "a pickled checkpoint, which is never read; convert it to safetensors first"),
        (".gguf", "a GGUF model, which is for other runtimes; export the model from its source weights"),
    ):
        if ending in endings:
            return kind
    return "no model that is known here" if endings else "an empty folder"
