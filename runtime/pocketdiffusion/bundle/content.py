"""What files of a bundle hold, checked before an engine parses them.

Refused: pickle under whatever name, ONNX graphs and OpenVINO IR that name files or ranges outside the bundle, XML with
a document type, safetensors whose header does not describe exactly its bytes, JSON that is no JSON.
Limits: Core ML packages are hashed but not looked into; a sound file with hostile numbers in it is the engine's to
handle; a file that another process cuts short during the check ends the process (it is mapped, not read).
"""

from __future__ import annotations

import math
import mmap
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pocketdiffusion.bundle.integrity import open_file
from pocketdiffusion.bundle.manifest import ComponentEntry, Manifest
from pocketdiffusion.bundle.onnx_wire import read_graph
from pocketdiffusion.bundle.openvino_xml import read_ir, weights_name
from pocketdiffusion.bundle.paths import path_problem
from pocketdiffusion.bundle.strict_json import load_json, short
from pocketdiffusion.errors import BundleCorrupt, BundleUnsafe

Data = bytes | mmap.mmap

MAX_HEADER = 16 << 20
"""Bytes of a safetensors header."""

_ITEM_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16}
_ITEM_BITS |= {"U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8}
_STRUCTURED = (".onnx", ".xml", ".safetensors", ".json")
_TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def check_content(root: Path, manifest: Manifest) -> None:
    """Look into every file. `root` must be real. Raises BundleCorrupt, BundleUnsafe."""
    sizes = {entry.path: entry.size for entry in manifest.files}
    entries = [(name, graph) for name, entry in manifest.components.items() for graph in entry.files]
    graphs = {entry.graph: entry for _, entry in entries}
    raw: set[str] = set()
    for path in sorted(sizes, key=lambda path: not (path.endswith(_STRUCTURED) or path in graphs)):
        with contents(root, path) as data:
            headed = path.endswith(".safetensors") and data[8:9] == b"{"  # its length may look like a pickle's mark
            _refuse_pickle(data, path, raw=headed or path in raw)
            if path.endswith(".onnx") or (path in graphs and graphs[path].format == "onnx"):
                raw |= _check_onnx(data, path, sizes, entries)
            elif path.endswith(".xml"):
                raw |= _check_openvino(data, path, sizes)
            elif path.endswith(".safetensors"):
                _check_safetensors(data, path)
            elif path.endswith(".json"):
                load_json(data[:], path, config=True)


@contextmanager
def contents(root: Path, path: str) -> Iterator[Data]:
    """A file's bytes, mapped. Raises BundleCorrupt, BundleUnsafe."""
    with open_file(root, path) as stream:
        if stream.seek(0, 2) == 0:
            yield b""
            return
        try:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise BundleCorrupt(path, f"can't be read: {error}") from None
        with mapped:
            yield mapped


def _refuse_pickle(data: Data, path: str, *, raw: bool) -> None:
    """By content. Raw weights may begin with any bytes, so there only longer marks count."""
    head = data[:16]
    framed = head[:3] in (b"\x80\x04\x95", b"\x80\x05\x95") and int.from_bytes(head[3:11], "little") <= len(data)
    short_mark = head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    if head.startswith((b"PK\x03\x04", _TORCH_MAGIC)) or framed or (short_mark and not raw):
        raise BundleUnsafe(path, "holds a pickle or an archive of them, which can run code; convert it to safetensors")


def _check_onnx(
    data: Data, path: str, sizes: Mapping[str, int], entries: Sequence[tuple[str, ComponentEntry]]
) -> set[str]:
    """Returns the files that hold its weights."""
    facts = read_graph(data, path)
    files = set()
    for external in facts.external:
        file = _beside(path, external.location, sizes)
        _check_range(path, file, external.offset, external.length or 0, sizes)
        files.add(file)
    for name, entry in entries:
        if entry.graph == path and (difference := facts.mismatch(entry.inputs, entry.outputs)):
            raise BundleCorrupt(path, f"{name}: {difference}")
    return files


def _beside(graph: str, location: str, sizes: Mapping[str, int]) -> str:
    """The listed file that `location`, relative to the graph's folder, names."""
    if problem := path_problem(location):
        raise BundleUnsafe(graph, f"its weights lie in {short(location)}, which is refused: {problem}")
    file = posixpath.join(posixpath.dirname(graph), location)
    if file not in sizes or file == graph:
        raise BundleUnsafe(graph, f"its weights lie in {short(location)}, which the manifest does not list")
    return file


def _check_range(graph: str, file: str, offset: int, length: int, sizes: Mapping[str, int]) -> None:
    if offset + length > sizes[file]:
        raise BundleCorrupt(graph, f"reads {file} up to byte {offset + length}, which has {sizes[file]}")


def _check_openvino(data: Data, path: str, sizes: Mapping[str, int]) -> set[str]:
    """Returns the files that hold its weights."""
    constants = read_ir(data, path).constants
    if not any(size for _, size in constants):
        return set()
    weights = _beside(path, weights_name(path), sizes)
    for offset, size in constants:
        _check_range(path, weights, offset, size, sizes)
    return {weights}


def _check_safetensors(data: Data, path: str) -> None:
    """The format's own rules: a bounded header, and tensors that cover the bytes behind it without gap or overlap."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER, len(data) - 8):
        raise BundleCorrupt(path, f"safetensors header of {length} bytes in a file of {len(data)}")
    header = load_json(data[8 : 8 + length], path, max_depth=8)
    if not isinstance(header, dict):
        raise BundleCorrupt(path, "safetensors header is no JSON object")
    header.pop("__metadata__", None)
    at = 0
    for start, stop in sorted(_tensor_range(name, tensor, path) for name, tensor in header.items()):
        if start != at:
            raise BundleCorrupt(path, f"safetensors with a gap or overlap at byte {at}")
        at = stop
    if at != len(data) - 8 - length:
        raise BundleCorrupt(path, f"safetensors of {len(data) - 8 - length} bytes, its header describes {at}")


def _tensor_range(name: str, tensor: Any, path: str) -> tuple[int, int]:
    try:
        dtype, shape, (start, stop) = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
        bits = _ITEM_BITS[dtype]
        sound = len(shape) <= 32 and all(type(number) is int and number >= 0 for number in (*shape, start, stop))
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound or len(tensor) != 3 or stop - start != math.prod(shape) * bits // 8:
        raise BundleCorrupt(path, f"safetensors entry {short(name)} is malformed")
    return start, stop
