"""A thousand ways to damage a bundle, each of which must be refused."""
# ruff: noqa: E501 - tables of hostile inputs

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pocketdiffusion.bundle import MANIFEST
from pocketdiffusion.bundle.manifest_json import canonical

from .bundle_maker import (
    IR,
    PLACES,
    entry,
    external,
    message,
    onnx_model,
    rehash,
    replace,
    safetensors,
    tensor,
    value_info,
    varint,
)


class Mutation(NamedTuple):
    """`apply` damages a copy of the bundle, which may be hard links: files are replaced, never written in place."""

    kind: str
    file: str  # what the error must name
    apply: Callable[[Path], None]


ESCAPES = (
    "../secret", "../../secret", "a/../../secret", "./../secret", "a/../b", "..", ".", "", "/", "/etc/passwd",
    "//server/share/file", "\\\\server\\share\\file", "..\\secret", "a\\..\\..\\secret", "a\\b", "C:\\secret", "C:/secret",
    "c:secret", "file:///etc/passwd", "a//b", "a/", "/a", "a/./b", "./a", "a\0b", "a\nb", "\u202eb", "a\x7f", "a/.. ",
    "a/... ", "a.", "a /b", "a./b", " a", "CON", "con.txt", "a/NUL", "a/lpt1.bin", "COM1", "aux.onnx", "a:stream", "a*", "a?",
    "a" * 300, "a/" * 200 + "b", "%2e%2e/\\", "~/../x", "*/_ORT_MEM_ADDR_/*", "\u2028", "a|b", "<a>", 'a"b',
)  # fmt: skip


def mutations(bundle_dir: Path, seed: int) -> Iterator[Mutation]:
    """Damaged variants of any sound bundle, of which each must be refused. About 1,500 for a bundle of 8 files."""
    rng = random.Random(seed)
    content = json.loads((bundle_dir / MANIFEST).read_bytes())
    paths = [item["path"] for item in content["files"]]
    yield from _damage(bundle_dir, [*paths, MANIFEST], rng)
    yield from _hostile_manifests(content)
    yield from _hostile_paths(paths)
    for path in [part["graph"] for part in content["components"].values() if part["format"] == "onnx"][:1]:
        yield from _hostile_onnx(path, rng)
    for path in [path for path in paths if path.endswith(".xml")][:1]:
        yield from _hostile_xml(path)
    for path in [path for path in paths if path.endswith(".safetensors")][:1]:
        yield from _hostile_safetensors(path)
    yield from _wrong_kinds(paths)


def _damage(bundle: Path, paths: list[str], rng: random.Random) -> Iterator[Mutation]:
    for path in paths:
        data = (bundle / path).read_bytes()
        if not data:
            continue
        bits = (
            {rng.randrange(8 * len(data)) for _ in range(60)}
            | set(range(0, min(64, 8 * len(data)), 5))
            | {8 * len(data) - 1}
        )
        for bit in sorted(bits):
            yield Mutation("bit flip", path, lambda root, path=path, bit=bit: _flip(root / path, bit))
        for size in sorted({0, len(data) // 2, len(data) - 1, *(rng.randrange(len(data)) for _ in range(6))}):
            yield Mutation("truncation", path, lambda root, path=path, size=size: _resize(root / path, size, b""))
        for tail in (b"\0", b"\n", b" ", b"}", bytes(4096), rng.randbytes(1), rng.randbytes(100)):
            yield Mutation("extension", path, lambda root, path=path, tail=tail: _resize(root / path, None, tail))
        yield Mutation("deletion", path, lambda root, path=path: (root / path).unlink())
        for suffix in (".bak", "_", ".tmp"):
            yield Mutation(
                "rename", path, lambda root, path=path, suffix=suffix: os.rename(root / path, root / (path + suffix))
            )
        for other in paths:
            if other < path and (bundle / other).read_bytes() != data:
                yield Mutation("swap", "", lambda root, path=path, other=other: _swap(root / path, root / other))


def _flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    replace(path, bytes(data))


def _resize(path: Path, size: int | None, tail: bytes) -> None:
    replace(path, path.read_bytes()[:size] + tail)


def _swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    replace(one, second)
    replace(other, first)


def _hostile_manifests(content: dict[str, Any]) -> Iterator[Mutation]:
    body = canonical(content)
    texts = [
        b"", b"null", b"[]", b"1", b'"x"', b"{}", b"{", b"\xff\xfe{}", b"\xef\xbb\xbf" + body, body.decode().encode("utf-16"),
        b"[" * 100_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000, b'{"a":[' * 17 + b"]}" * 17,
        b'{"a": ' + b"9" * 100_000 + b"}", b'{"a": 1e999}', b'{"a": -1e999}', b'{"a": NaN}', b'{"a": Infinity}',
        b'{"a": -Infinity}', b'{"a": "\\ud800"}', b'{"\\udfff": 1}', b'{"a": "\xed\xa0\x80"}', b'{"a": "\xff"}',
        b'{"a": "' + b"x" * (4 << 20) + b'"}', b'{"a": "' + b"x" * 900_000 + b'"}', b'{"a": 1, "a": 1}', b" " * (2 << 20),
        b'{"a": "\x00"}', b'{"a": "' + b"\\" * 99_999, b'"' + b'\\"' * 400_000, b'{"a": 1.' + b"0" * 100_000 + b"}", body[:-1], body + b"\n",
        body.replace(b"  ", b"\t"), body.replace(b"\n", b"\r\n"), body.replace(b'": ', b'":', 1), b"/*x*/" + body,
        body.replace(b'"format_version": 1', b'"format_version": 1, "format_version": 1'), body.rstrip(b"}\n") + b",}\n",
        json.dumps(content).encode(), body.replace(b"0.5", b"0.50"), body.replace(b"sd", b"\\u0073d", 1),
    ]  # fmt: skip
    for text in texts:
        if text != body:
            yield Mutation("hostile JSON", MANIFEST, lambda root, text=text: replace(root / MANIFEST, text))
    for keys in _nodes(content):
        for change in (_set_to_object, _remove, _add_key):
            yield Mutation(
                "schema", MANIFEST, lambda root, keys=keys, change=change: rehash(root, lambda all: change(all, keys))
            )
    for keys, values in _WRONG_VALUES.items():
        for value in values:
            yield Mutation(
                "wrong value",
                MANIFEST,
                lambda root, keys=keys, value=value: rehash(root, lambda all: _put(all, keys.split("."), value)),
            )


_WRONG_VALUES: dict[str, list[Any]] = {
    "format_version": [0, -1, 2, 10**18, True, "1", 1.0, None],
    "name": ["", "../x", "a b", "a/b", "\u202e", 1, "x" * 100],
    "description": ["a\nb", "\x1b[31m", "x" * 5000, 1, None],
    "family": ["", "../sd", "sd sd"],
    "tasks": ["text-to-image", [1], ["a/b"], [None]],
    "numbers.width": [0, -64, 10**9, 65, 64.0, True, "64", None, 10**19],
    "numbers.height": [0, 10**9, 65],
    "numbers.vae_factor": [0, -8, 10**9, 7, 8.0, True],
    "numbers.size_multiple": [0, 9, 10**9],
    "numbers.latent_channels": [0, 10**9, True],
    "numbers.latent_scale": [0.0, -1.0, 1e300, 1, None, "1"],
    "numbers.latent_shift": [1e300, 0],
    "numbers.default_steps": [0, -1, 10**9, True],
    "numbers.default_guidance": [-1.0, 1e10, 7],
    "numbers.text_length": [-1, 10**9, False],
    "numbers.latent_rgb": [[], [[1.0]], [[1.0, 1.0]] * 2, [[1, 1, 1]] * 2, [[1e300] * 3] * 2, [[True] * 3] * 2],
    "files.0.sha256": ["", "0" * 63, "0" * 65, "A" * 64, "g" * 64, "../" + "0" * 61, 0],
    "files.0.size": [-1, 1.0, True, 10**19, "1", 1 << 60],
    "golden": ["nothing", "../x", 1, ""],
}


def _nodes(value: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if key != "digest" and not (len(keys) >= 2 and keys[0] == "files" and keys[1] > 1):
            yield (*keys, key)
            yield from _nodes(item, (*keys, key))


def _parent(content: Any, keys: tuple[Any, ...]) -> Any:
    for key in keys[:-1]:
        content = content[key]
    return content


def _put(content: Any, keys: list[str], value: Any) -> None:
    parts = tuple(int(key) if key.isdigit() else key for key in keys)
    _parent(content, parts)[parts[-1]] = value


def _set_to_object(content: Any, keys: tuple[Any, ...]) -> None:
    _parent(content, keys)[keys[-1]] = {"unexpected": {"nested": None}}


def _remove(content: Any, keys: tuple[Any, ...]) -> None:
    """Remove a key of a record; where the key is free (a map, a list), break the value instead."""
    parent = _parent(content, keys)
    free = isinstance(parent, list) or keys[-2:-1] in (
        ("components",),
        ("inputs",),
        ("outputs",),
        ("tools",),
        ("sha256",),
    )
    if free:
        parent[keys[-1]] = [[]]
    else:
        del parent[keys[-1]]


def _add_key(content: Any, keys: tuple[Any, ...]) -> None:
    parent = _parent(content, keys)
    if isinstance(parent, dict):
        parent["un\u00e9xpected"] = [[]]
    else:
        parent.append([[]])


def _hostile_paths(paths: list[str]) -> Iterator[Mutation]:
    for path in ESCAPES:
        for place in ("files", "graph", "golden"):
            yield Mutation(
                "hostile path",
                MANIFEST,
                lambda root, path=path, place=place: rehash(root, lambda all: _put_path(all, path, place)),
            )
    clashes = (
        paths[0],
        paths[0].upper(),
        paths[0] + "/x",
        paths[0].split("/")[0],
        MANIFEST,
        "Manifest.JSON",
        "zz\u00e9",
        "zze\u0301",
    )
    for path in clashes:
        if path != "zz\u00e9":
            extra = ["zz\u00e9"] if path == "zze\u0301" else []
            yield Mutation(
                "clashing path",
                MANIFEST,
                lambda root, more=[*extra, path]: rehash(root, lambda all: [_put_path(all, p, "files") for p in more]),
            )
    yield Mutation("unsorted", MANIFEST, lambda root: rehash(root, lambda all: all["files"].reverse()))


def _put_path(content: dict[str, Any], path: str, place: str) -> None:
    if place == "files":
        content["files"].append({"path": path, "size": 0, "sha256": hashlib.sha256(b"").hexdigest()})
        content["files"].sort(key=lambda item: item["path"])
    elif place == "graph":
        next(iter(content["components"].values()))["graph"] = path
    else:
        content["golden"] = path


def _rewrite(path: str, data: bytes) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        replace(root / path, data)
        rehash(root)

    return apply


def _hostile_onnx(path: str, rng: random.Random) -> Iterator[Mutation]:
    for location in (
        *ESCAPES,
        "missing",
        "model.ONNX_data",
        "unet/model.onnx_data",
        "model.onnx",
        "manifest.json",
        b"\xff",
    ):
        where = rng.choice(list(PLACES))
        yield Mutation("external data path", path, _rewrite(path, onnx_model(external(location), where)))
    for where in PLACES:
        for location in ("../../secret", "/etc/passwd", "nowhere"):
            yield Mutation("external data place", path, _rewrite(path, onnx_model(external(location), where)))
    here = "model.onnx_data"
    far = 1 << 40
    tensors = [
        external(here, far), external(here, 0, far), external(here, 1, 1 << 62), external(here, "-1"), external(here, "+0"),
        external(here, "0x0"), external(here, "1_0"), external(here, " 0"), external(here, "", ""), external(here, "9" * 30),
        external(here, "\u0661"), external(here, 1.5), external(here, 0, "-16"),
        tensor(entry("offset", "0")), tensor(entry("location", here), entry("location", "../x")),
        tensor(entry("location", here), entry("__class__", "x")), tensor(entry("location", here), entry("basepath", "/")),
        tensor(message((1, "location"), (2, here), (2, "../x"))), tensor(entry("location", here), b"\xff" * 12),
    ]  # fmt: skip
    for weights in tensors:
        yield Mutation("external data entry", path, _rewrite(path, onnx_model(weights)))
    sound = onnx_model(external(here))
    deep = b""
    for _ in range(3000):
        deep = message((1, message((5, message((6, deep))))))
    graphs = [
        b"", b"\0", b"\xff" * 64, sound[:-1], sound + b"\x0b", sound + b"\x3a\x7f", message((1, 8)), message((7, deep)),
        message((7, 5)), sound + message((7, b"")), varint(1 << 33 | 7 << 3 | 2) + sound, b"\x80" * 11 + b"\x01",
        message((1, 8), (7, b"\x0a\x00" * 2_100_000)), message((7, message((11, value_info("z")), (12, value_info("y"))))),
        message((7, message((11, value_info("x", 7)), (12, value_info("y"))))), b"\x3b" + sound,
        message((7, message((11, value_info("x", 1, (4,))), (12, value_info("y"))))), sound + b"\x3a\xff\xff\xff\xff\x0f",
        message((7, message((11, value_info("x")), (12, message((1, b"\xff\xfe")))))), b"<?xml version='1.0'?><net/>", b"{}",
    ]  # fmt: skip
    for graph in graphs:
        yield Mutation("malformed ONNX", path, _rewrite(path, graph))
    for data in _PICKLES:
        yield Mutation("pickle as ONNX", path, _rewrite(path, data))


_PICKLES = (
    b"\x80\x02c__builtin__\neval\nq\x00X\x01\x00\x00\x001q\x01\x85q\x02Rq\x03.", b"\x80\x03}q\x00.", b"\x80\x04\x95\x02\0\0\0\0\0\0\0}.",
    b"\x80\x05\x95\x02\0\0\0\0\0\0\0}.", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(9), b"PK\x03\x04" + b"archive/data.pkl" * 9,
)  # fmt: skip


def _hostile_xml(path: str) -> Iterator[Mutation]:
    for offset, size in (
        (0, 1 << 40),
        (1 << 40, 4),
        (-1, 4),
        (0, -4),
        ("0x0", 4),
        ("", 4),
        ("\u0661", 4),
        (8, 9),
        (1 << 63, 1 << 63),
    ):
        yield Mutation("OpenVINO range", path, _rewrite(path, IR.format(offset=offset, size=size).encode()))
    sound = IR.format(offset=0, size=16)
    bomb = '<?xml version="1.0"?><!DOCTYPE b [<!ENTITY a "aaaa"><!ENTITY c "&a;&a;">]><net>&c;</net>'
    xxe = '<?xml version="1.0"?><!DOCTYPE b [<!ENTITY x SYSTEM "file:///etc/passwd">]><net>&x;</net>'
    for text in (
        bomb,
        xxe,
        "",
        "<net>",
        "<net>&undefined;</net>",
        sound[:-9],
        sound + "<x/>",
        "<a>" * 9999,
        "<net/><!DOCTYPE a>",
    ):
        yield Mutation("hostile XML", path, _rewrite(path, text.encode()))
    for data in (
        sound.encode("utf-16"),
        sound.replace('"1.0"?', '"1.0" encoding="utf-7"?').encode(),
        b"\xff\xfe<\0n\0",
    ):
        yield Mutation("hostile XML", path, _rewrite(path, data))


def _hostile_safetensors(path: str) -> Iterator[Mutation]:
    def one(**change: Any) -> dict[str, Any]:
        return {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **change}}

    second = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}
    files = [
        b"", b"\0" * 7, struct.pack("<Q", 1 << 63), struct.pack("<Q", 100) + b"{}", struct.pack("<Q", 0), safetensors({}, b"x"),
        safetensors([], b""), safetensors(b'{"a":', b""), safetensors(b"[" * 9999, b""), safetensors(b'{"a":1,"a":1}', b""),
        safetensors(one(), bytes(15)), safetensors(one(), bytes(17)), safetensors(one(dtype="F33"), bytes(16)),
        safetensors(one(shape=[5]), bytes(16)), safetensors(one(shape=[-4]), bytes(16)), safetensors(one(shape=[4.0]), bytes(16)),
        safetensors(one(shape="4"), bytes(16)), safetensors(one(shape=[True] * 2), bytes(16)), safetensors(one(x=1), bytes(16)),
        safetensors(one(data_offsets=[4, 20]), bytes(20)), safetensors(one(data_offsets=[16, 0]), bytes(16)),
        safetensors(one(data_offsets=[0]), bytes(16)), safetensors(one(shape=[1 << 62] * 30), bytes(16)),
        safetensors({**one(), "b": second}, bytes(16)), safetensors({"a": 1}, b""), safetensors({"a": None}, b""),
    ]  # fmt: skip
    for data in (*files, *_PICKLES):
        yield Mutation("hostile safetensors", path, _rewrite(path, data))


def _wrong_kinds(paths: list[str]) -> Iterator[Mutation]:
    for path in [*paths, MANIFEST]:
        yield Mutation("link out", path, lambda root, path=path: _link_out(root, path))
        yield Mutation("link nowhere", path, lambda root, path=path: _link_to(root / path, "nowhere/at/all"))
        yield Mutation("link to itself", path, lambda root, path=path: _link_to(root / path, (root / path).name))
        yield Mutation("link to a device", path, lambda root, path=path: _link_to(root / path, "/dev/zero"))
        yield Mutation("folder", path, lambda root, path=path: _make(root / path, os.mkdir))
        yield Mutation("fifo", path, lambda root, path=path: _make(root / path, os.mkfifo))
    for folder in sorted({path.rsplit("/", 1)[0] for path in paths if "/" in path}):
        yield Mutation("folder link out", folder, lambda root, folder=folder: _folder_out(root, folder))
    for path in (path for path in paths if path.endswith((".json", ".png"))):
        for data in _PICKLES:
            yield Mutation("renamed pickle", path, _rewrite(path, data))
    for path in (path for path in paths if path.endswith(".json")):
        for data in (b"", b"[" * 99_999, b'{"a": NaN}', b'{"a": 1, "a": 2}', b'"\\ud800"', b"9" * 9999, b"\xff"):
            yield Mutation("hostile config", path, _rewrite(path, data))


def _link_out(root: Path, path: str) -> None:
    outside = root.parent / f"{root.name}.outside"
    outside.write_bytes((root / path).read_bytes())
    _link_to(root / path, str(outside))


def _folder_out(root: Path, folder: str) -> None:
    outside = root.parent / f"{root.name}.outside"
    os.rename(root / folder, outside)
    os.symlink(outside, root / folder, target_is_directory=True)


def _link_to(path: Path, target: str) -> None:
    path.unlink()
    os.symlink(target, path)


def _make(path: Path, how: Callable[[Path], None]) -> None:
    path.unlink()
    how(path)
