"""`manifest.json` <-> `Manifest`, strictly.

There is one spelling of every manifest: UTF-8, keys sorted, two spaces of indent, a final newline, and a "digest"
(sha256 of the same text without that key). A file that is not byte for byte that spelling is refused, so any flipped
bit is found. This is damage detection and not a signature: whoever can rewrite the file can recompute the digest.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Set
from dataclasses import is_dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pocketdiffusion.bundle.manifest import (
    FORMAT_VERSION,
    BandGraph,
    ComponentEntry,
    FileEntry,
    GoldenImage,
    GraphPart,
    Manifest,
    Numbers,
    SizedGraph,
    Source,
    version_needed,
)
from pocketdiffusion.bundle.paths import check_paths, folded
from pocketdiffusion.bundle.strict_json import load_json, short
from pocketdiffusion.errors import BundleCorrupt, BundleUnsupported
from pocketdiffusion.tensors import TensorSpec

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 20
DTYPES = (
    *("bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64"),
)
FORMATS = ("onnx", "openvino", "coreml", "fake")

_DAMAGED = "damaged or edited by hand; fetch or export the bundle again"
_MAX_TEXT = 4096
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DECIBEL = (-1000.0, 1000.0)

_RANGES: Mapping[tuple[type, str], tuple[float, float]] = {
    (FileEntry, "size"): (0, 1 << 45),
    (ComponentEntry, "sqnr_db"): _DECIBEL,
    (ComponentEntry, "min_sqnr_db"): _DECIBEL,
    (BandGraph, "halo"): (0, 64),
    (BandGraph, "scale"): (1, 256),
    (GraphPart, "weight_bytes"): (0, 1 << 45),
    (SizedGraph, "width"): (1, 16384),
    (SizedGraph, "height"): (1, 16384),
    (Numbers, "width"): (1, 16384),
    (Numbers, "height"): (1, 16384),
    (Numbers, "latent_channels"): (1, 1024),
    (Numbers, "latent_scale"): (1e-6, 1e6),
    (Numbers, "latent_shift"): (-1e6, 1e6),
    (Numbers, "vae_factor"): (1, 256),
    (Numbers, "size_multiple"): (1, 4096),
    (Numbers, "text_length"): (0, 65536),
    (Numbers, "default_steps"): (1, 10000),
    (Numbers, "default_guidance"): (0, 1000),
    (Numbers, "latent_rgb"): (-1e6, 1e6),
    (GoldenImage, "seed"): (0, (1 << 64) - 1),
    (GoldenImage, "steps"): (1, 10000),
    (GoldenImage, "guidance"): (0, 1000),
    (GoldenImage, "psnr_db"): _DECIBEL,
    (GoldenImage, "min_psnr_db"): _DECIBEL,
    (TensorSpec, "shape"): (1, (1 << 31) - 1),
    (Manifest, "format_version"): (1, FORMAT_VERSION),
}
_ADDED: Mapping[tuple[type, str], Any] = {
    (ComponentEntry, "sizes"): (),
    (ComponentEntry, "parts"): (),
    (ComponentEntry, "bands"): (),
    (SizedGraph, "parts"): (),
    (Manifest, "changes"): (),
}
"""Keys that a later format added, which are left out where they hold this value: older readers refuse what is new."""
_PATTERNS: Mapping[tuple[type, str], tuple[re.Pattern[str], str]] = {
    (FileEntry, "sha256"): (_SHA256, "64 lower-case hexadecimal digits"),
    (Source, "sha256"): (_SHA256, "64 lower-case hexadecimal digits"),
    (Manifest, "name"): (_NAME, "letters, digits, '.', '_' and '-'"),
    (Manifest, "family"): (_NAME, "letters, digits, '.', '_' and '-'"),
    (Manifest, "tasks"): (_NAME, "letters, digits, '.', '_' and '-'"),
    (ComponentEntry, "format"): (re.compile("|".join(FORMATS)), " or ".join(FORMATS)),
    (TensorSpec, "dtype"): (re.compile("|".join(DTYPES)), " or ".join(DTYPES)),
}


def dump_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json. Raises BundleCorrupt or BundleUnsafe where `parse_manifest` would refuse them."""
    content = _encode(Manifest, manifest)
    _read(content, MANIFEST)
    return canonical({**content, "digest": digest(content)})


def parse_manifest(data: bytes, file: str | Path = MANIFEST) -> Manifest:
    """The manifest in `data`. `file` is named in errors.

    Raises BundleCorrupt (damaged or malformed), BundleUnsafe (paths), BundleUnsupported (a newer format).
    """
    content = load_json(data, file, max_bytes=MAX_MANIFEST_BYTES, max_depth=16)
    if not isinstance(content, dict):
        raise BundleCorrupt(file, f"must be a JSON object, found {short(content)}")
    if canonical(content) != data:
        raise BundleCorrupt(file, f"not in canonical form: {_DAMAGED}")
    found = content.pop("digest", None)
    if found != digest(content):
        raise BundleCorrupt(file, f"its digest does not match: {_DAMAGED}")
    version = content.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise BundleUnsupported(
            f"{file}: bundle format {version} is newer than this version reads (up to {FORMAT_VERSION}): "
            "upgrade pocketdiffusion"
        )
    return _read(content, file)


def manifest_digest(manifest: Manifest) -> str:
    """sha256 of the canonical content, as in the "digest" key: 64 hexadecimal digits."""
    return digest(_encode(Manifest, manifest))


def canonical(content: Mapping[str, Any]) -> bytes:
    """The one spelling of a JSON object."""
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, indent=2, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def digest(content: Mapping[str, Any]) -> str:
    """sha256 of the canonical form."""
    return hashlib.sha256(canonical(content)).hexdigest()


@functools.cache
def _hints(kind: Any) -> dict[str, Any] | None:
    """Field name -> type of a dataclass, None for other types."""
    return typing.get_type_hints(kind) if is_dataclass(kind) else None


def _encode(kind: Any, value: Any) -> Any:
    """JSON value of a dataclass field. int in a float field becomes float: one spelling for each value."""
    if (hints := _hints(kind)) is not None:
        kept = {name: hint for name, hint in hints.items() if not _left_out(kind, name, getattr(value, name))}
        return {name: _encode(hint, getattr(value, name)) for name, hint in kept.items()}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else _encode(arguments[0], value) if len(arguments) == 2 else value
    if origin is tuple:
        return [_encode(arguments[0], item) for item in value]
    if origin is not None:
        return {key: _encode(arguments[1], item) for key, item in value.items()}
    return float(value) if kind is float else value


def _left_out(kind: Any, name: str, value: Any) -> bool:
    """Whether a field is not written. Read values are lists where fields are tuples."""
    return (kind, name) in _ADDED and (tuple(value) if isinstance(value, list) else value) == _ADDED[kind, name]


def _read(content: Any, file: str | Path) -> Manifest:
    manifest: Manifest = _Reader(file).value(Manifest, content, "", lambda item, where: None)
    _check_whole(manifest, file)
    return manifest


_Check = Callable[[Any, str], None]


class _Reader:
    """Builds dataclasses from JSON values by their type hints; anything that doesn't fit exactly is refused."""

    def __init__(self, file: str | Path) -> None:
        self._file = file

    def value(self, kind: Any, value: Any, where: str, check: _Check) -> Any:
        if (hints := _hints(kind)) is not None:
            return self._record(kind, hints, value, where)
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin is types.UnionType:
            fits = next((member for member in arguments if _accepts(member, value)), None)
            if fits is None:
                self._refuse(where, value, "one of " + ", ".join(_label(member) for member in arguments))
            return None if value is None else self.value(fits, value, where, check)
        if not _accepts(kind, value):
            self._refuse(where, value, _label(kind))
        if origin is tuple:
            return self._items(arguments, value, where, check)
        if origin is not None:
            return {
                self._text(key, f"{where} key"): self.value(arguments[1], item, f"{where}.{short(key)}", check)
                for key, item in value.items()
            }
        if kind is str:
            self._text(value, where)
        check(value, where)
        return value

    def _record(self, kind: Any, hints: dict[str, Any], value: Any, where: str) -> Any:
        if type(value) is not dict:
            self._refuse(where, value, "an object")
        if unknown := value.keys() - hints.keys():
            self._refuse(where or "a key", min(unknown), ", ".join(sorted(hints)))
        if missing := {name for name in hints.keys() - value.keys() if (kind, name) not in _ADDED}:
            raise BundleCorrupt(self._file, f"{where or 'the manifest'} lacks the key {min(missing)}")
        if needless := [name for name in value if _left_out(kind, name, value[name])]:
            self._refuse(f"{where}.{needless[0]}", value[needless[0]], "no such key, or another value")
        return kind(
            **{
                name: self.value(hint, value[name], f"{where}.{name}".lstrip("."), self._check(kind, name))
                for name, hint in hints.items()
                if name in value
            }
        )

    def _items(self, arguments: tuple[Any, ...], value: list[Any], where: str, check: _Check) -> tuple[Any, ...]:
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            self._refuse(where, value, f"{len(arguments)} items")
        return tuple(self.value(arguments[0], item, f"{where}[{n}]", check) for n, item in enumerate(value))

    def _check(self, owner: type, name: str) -> _Check:
        def check(value: Any, where: str) -> None:
            if isinstance(value, str):
                pattern, allowed = _PATTERNS.get((owner, name), (None, ""))
                if pattern is not None and not pattern.fullmatch(value):
                    self._refuse(where, value, allowed)
            elif isinstance(value, int | float) and (owner, name) in _RANGES:
                low, high = _RANGES[owner, name]
                if not low <= value <= high:
                    self._refuse(where, value, f"a number from {low:g} to {high:g}")

        return check

    def _text(self, value: str, where: str) -> str:
        if len(value) > _MAX_TEXT or _CONTROL.search(value):
            self._refuse(where, value, f"at most {_MAX_TEXT} characters on one line")
        return value

    def _refuse(self, where: str, found: Any, allowed: str) -> typing.NoReturn:
        raise BundleCorrupt(self._file, f"{where} is {short(found)}, allowed: {allowed}")


def _accepts(kind: Any, value: Any) -> bool:
    """Whether a JSON value has the type that a hint asks for. bool is no int, and int is no float."""
    origin = typing.get_origin(kind)
    if is_dataclass(kind) or origin is Mapping:
        return type(value) is dict
    return type(value) is (list if origin is tuple else kind)


def _label(kind: Any) -> str:
    if is_dataclass(kind) or typing.get_origin(kind) is Mapping:
        return "an object"
    if typing.get_origin(kind) is tuple:
        return "a list"
    return {str: "a text", int: "an integer", float: "a number with a decimal point"}.get(kind, "null")


def _check_whole(manifest: Manifest, file: str | Path) -> None:
    """What no single field shows: paths, and references from one part to another."""
    paths = [entry.path for entry in manifest.files]
    check_paths(paths, str(file))
    if paths != sorted(paths):
        raise BundleCorrupt(file, "files are not sorted by path")
    if any(folded(path) == MANIFEST for path in paths):
        raise BundleCorrupt(file, "lists itself")
    known = set(paths)
    packages = known | {str(folder) for path in paths for folder in PurePosixPath(path).parents} - {"."}
    for name, component in manifest.components.items():
        if not _NAME.fullmatch(name):
            raise BundleCorrupt(file, f"component name {short(name)}, allowed: letters, digits, '.', '_' and '-'")
        if component.graph not in (packages if component.format == "coreml" else known):
            raise BundleCorrupt(file, f"graph {short(component.graph)} of {name} is not among its files")
        _check_sizes(name, component, manifest.numbers, known, file)
        _check_bands(name, component, known, file)
        for graph in component.graphs:
            _check_parts(graph, known, file)
    golden = [manifest.golden, manifest.golden_image and manifest.golden_image.file]
    for path in golden:
        if path is not None and path not in known:
            raise BundleCorrupt(file, f"golden file {short(path)} is not among its files")
    _check_numbers(manifest.numbers, file)
    if manifest.format_version != (needed := version_needed(manifest.components, manifest.changes)):
        raise BundleCorrupt(file, f"format_version is {manifest.format_version}, what it holds is format {needed}")


def _check_sizes(name: str, component: ComponentEntry, numbers: Numbers, known: Set[str], file: str | Path) -> None:
    """Further sizes: each once, none the native one, with the first graph's inputs and outputs, in a listed file."""
    taken = {(numbers.width, numbers.height)}
    for sized in component.sizes:
        size = (sized.width, sized.height)
        if size in taken or any(side % numbers.size_multiple for side in size):
            text = "{}x{}".format(*size)
            raise BundleCorrupt(
                file, f"{name} has size {text}; allowed: each size once, in multiples of {numbers.size_multiple}"
            )
        taken.add(size)
        if sized.graph not in known:
            raise BundleCorrupt(file, f"graph {short(sized.graph)} of {name} is not among its files")
        if (sized.inputs.keys(), sized.outputs.keys()) != (component.inputs.keys(), component.outputs.keys()):
            raise BundleCorrupt(file, f"{sized.graph} has other inputs or outputs than {component.graph}")


def _check_bands(name: str, component: ComponentEntry, known: Set[str], file: str | Path) -> None:
    """Pieces: each in a listed file, each reading what is there by then; together they give the component's outputs."""
    there = set(component.inputs)
    for band in component.bands:
        if band.graph not in known:
            raise BundleCorrupt(file, f"graph {short(band.graph)} of {name} is not among its files")
        figures = {f"{source}{end}" for source in there for end in ("_mean", "_variance")}
        if missing := band.inputs.keys() - there - figures:
            raise BundleCorrupt(file, f"{band.graph} reads {short(min(missing))}, which no piece before it makes")
        if not there.intersection(band.inputs):
            raise BundleCorrupt(file, f"{band.graph} reads no map")
        there |= band.outputs.keys()
    if component.bands and (missing := component.outputs.keys() - there):
        raise BundleCorrupt(file, f"the pieces of {name} do not make {short(min(missing))}")


def _check_parts(whole: ComponentEntry, known: Set[str], file: str | Path) -> None:
    """Parts: in listed files, each fed by the whole's inputs and earlier parts, together making the whole's outputs."""
    ready = dict(whole.inputs)
    for part in whole.parts:
        if part.graph not in known:
            raise BundleCorrupt(file, f"graph {short(part.graph)} is not among its files")
        if missing := part.inputs.keys() - ready.keys():
            raise BundleCorrupt(file, f"{part.graph} needs {short(min(missing))}, which no part before it makes")
        ready |= part.outputs
    if whole.parts and (missing := whole.outputs.keys() - ready.keys()):
        raise BundleCorrupt(file, f"no part of {whole.graph} makes {short(min(missing))}")


def _check_numbers(numbers: Numbers, file: str | Path) -> None:
    for value, unit in (
        (numbers.size_multiple, numbers.vae_factor),
        (numbers.width, numbers.size_multiple),
        (numbers.height, numbers.size_multiple),
    ):
        if value % unit:
            raise BundleCorrupt(
                file,
                f"{value} is no multiple of {unit}: vae_factor must divide size_multiple, and that width and height",
            )
    rows = numbers.latent_channels + 1
    if numbers.latent_rgb is not None and len(numbers.latent_rgb) != rows:
        raise BundleCorrupt(
            file, f"latent_rgb has {len(numbers.latent_rgb)} rows, allowed: latent_channels + 1 = {rows}"
        )
