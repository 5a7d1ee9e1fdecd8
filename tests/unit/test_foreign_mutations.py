"""Damaged and hostile folders of other exporters: each is refused with file and reason, or makes a picture."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

from pocketdiffusion import Pipeline
from pocketdiffusion.errors import NonFinite, PocketDiffusionError

from . import foreign_maker as maker
from .bundle_maker import replace
from .bundle_mutations import ESCAPES

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="links and pipes"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NaN and overflow out of damaged weights
]

Change = tuple[str, str, Callable[[Path], object]]
"""Kind, the file that an error must name, and what to do to the folder."""

VALUES = (
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    1 << 60,
    0.0,
    -1.5,
    1e30,
    "",
    "x",
    "LCMScheduler",
    [],
    [0],
    [1] * 99,
    {},
    {"a": []},
)
TEXTS = (b"", b"null", b"[]", b"{", b"\xff\xfe{}", b"[" * 99_999, b'{"a": NaN}', b'{"a": 1, "a": 1}', b'{"a": 1e999}')
XML = (
    b'<?xml version="1.0"?><!DOCTYPE b [<!ENTITY a "aa"><!ENTITY c "&a;&a;">]><net>&c;</net>',
    b'<!DOCTYPE b [<!ENTITY x SYSTEM "file:///etc/passwd">]><net>&x;</net>',
    b"<a>" * 9999,
    b"<net/>",
    b"",
    b"\xff\xfe<\0n\0",
    b"<net><layers><layer/></layers></net>",
)
PICKLES = (b"\x80\x02}q\x00.", b"\x80\x04\x95\x02\0\0\0\0\0\0\0}.", b"PK\x03\x04" + b"archive/data.pkl" * 9)


def edited(path: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda root: replace(root / path, change((root / path).read_bytes()))


def flipped(data: bytes, bits: list[int]) -> bytes:
    changed = bytearray(data)
    for bit in bits:
        changed[bit // 8 % len(changed)] ^= 1 << bit % 8
    return bytes(changed)


def damaged(folder: Path, paths: list[str], rng: random.Random, flips: int) -> Iterator[Change]:
    """What happens to any file."""
    for path in paths:
        size = (folder / path).stat().st_size
        for _ in range(flips):
            bits = [rng.randrange(8 * size) for _ in range(rng.choice((1, 1, 1, 8)))]
            yield "bit flip", path, edited(path, lambda data, bits=bits: flipped(data, bits))
        for length in (0, 1, size // 2, size - 1):
            yield "truncation", path, edited(path, lambda data, length=length: data[:length])
        yield "extension", path, edited(path, lambda data: data + b"\xff" * 9)
        yield "deletion", path, lambda root, path=path: (root / path).unlink()
        yield "link out", path, lambda root, path=path: relink(root / path, "/etc/passwd")
        yield "device", path, lambda root, path=path: relink(root / path, "/dev/zero")
        yield "pipe", path, lambda root, path=path: ((root / path).unlink(), os.mkfifo(root / path))
        yield "folder", path, lambda root, path=path: ((root / path).unlink(), (root / path).mkdir())
        for data in PICKLES:
            yield "pickle", path, lambda root, path=path, data=data: replace(root / path, data)


def relink(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def hostile_configs(folder: Path, paths: list[str], rng: random.Random) -> Iterator[Change]:
    for path in (path for path in paths if path.endswith(".json")):
        for text in TEXTS:
            yield "hostile JSON", path, lambda root, path=path, text=text: replace(root / path, text)
        keys = list(json.loads((folder / path).read_bytes()))
        for key in rng.sample(keys, min(6, len(keys))):
            for value in VALUES:
                change = json.dumps({key: value}).encode()[1:-1]
                yield "value", path, edited(path, lambda data, key=key, new=change: put(data, key, new))


def put(data: bytes, key: str, pair: bytes) -> bytes:
    content = json.loads(data)
    content.pop(key)
    rest = json.dumps(content).encode()[1:-1]
    return b"{" + pair + (b", " + rest if rest else b"") + b"}"


def hostile_graphs(paths: list[str]) -> Iterator[Change]:
    for path in (path for path in paths if path.endswith(".onnx")):
        for location in ESCAPES:
            if location:
                yield "external path", path, lambda root, path=path, to=location: move_weights(root / path, to, 0)
        for offset in (-1, 1 << 40, 1 << 62):
            yield "external range", path, lambda root, path=path, at=offset: move_weights(root / path, None, at)
        for axis in (0, -1, 1 << 40):
            yield "declared axis", path, lambda root, path=path, size=axis: declare(root / path, size)
    for path in (path for path in paths if path.endswith(".xml")):
        for data in XML:
            yield "hostile XML", path, lambda root, path=path, data=data: replace(root / path, data)
        for old, new in (
            (b' offset="', b' offset="9'),
            (b' size="', b' size="9'),
            (b"Parameter", b"Result"),
            (b"names=", b"n="),
        ):
            yield "XML value", path, edited(path, lambda data, old=old, new=new: data.replace(old, new))


def move_weights(file: Path, location: str | None, offset: int) -> None:
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "offset":
                entry.value = str(offset)
            if entry.key == "location" and location is not None:
                entry.value = location
    replace(file, model.SerializeToString())


def declare(file: Path, size: int) -> None:
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = size
    replace(file, model.SerializeToString())


def verdict(folder: Path, device: str, file: str) -> tuple[str, str | None]:
    """What happened, and what is wrong with it."""
    start = time.monotonic()
    try:
        pipe = Pipeline.from_pretrained(folder, device=device, threads=1)
        pipe("abc", seed=1, num_inference_steps=1, height=16, width=16, output_type="np")
        outcome, problem = "picture", None
    except PocketDiffusionError as error:
        text = str(error)
        named = isinstance(error, NonFinite) or any(part in text for part in (file, *file.split("/"), folder.name))
        outcome = type(error).__name__
        problem = None if named and text.isprintable() else f"an error that does not name {file!r}: {text!r}"
    except Exception as error:
        outcome, problem = "crash", f"crashed: {error!r}"
    seconds = time.monotonic() - start
    return outcome, problem or (f"took {seconds:.0f} s" if seconds > 20 else None)


def run(source: Path, changes: list[Change], device: str, work: Path) -> Counter[str]:
    outcomes, failures = Counter[str](), []
    for number, (kind, file, apply) in enumerate(changes):
        folder = work / f"case-{number}"
        shutil.copytree(source, folder, copy_function=os.link)
        apply(folder)
        outcome, problem = verdict(folder, device, file)
        outcomes[outcome] += 1
        if problem:
            failures.append(f"{kind} #{number} of {file}: {problem}")
        shutil.rmtree(folder)
    print(dict(outcomes))
    assert failures == []
    return outcomes


def sources(tmp_path: Path, kind: str) -> tuple[Path, str]:
    onnx_source: Any = maker.onnx_folder(tmp_path / "onnx", external=kind == "onnx")
    if kind == "onnx":
        return onnx_source, "onnxruntime:cpu"
    return maker.openvino_folder(tmp_path / "openvino", onnx_source), "openvino:cpu"


def changes_of(folder: Path, seed: int, flips: int) -> list[Change]:
    rng = random.Random(seed)
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    paths = [path for path in paths if not path.endswith("openvino_tokenizer.xml")]
    found = [*damaged(folder, paths, rng, flips), *hostile_configs(folder, paths, rng), *hostile_graphs(paths)]
    rng.shuffle(found)
    return found


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_damaged_folders_are_refused_or_work(tmp_path: Path, kind: str) -> None:
    folder, device = sources(tmp_path, kind)
    run(folder, changes_of(folder, 1, 2)[: 40 if kind == "onnx" else 20], device, tmp_path)


@pytest.mark.campaign
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_all_damaged_folders_are_refused_or_work(tmp_path: Path, kind: str) -> None:
    folder, device = sources(tmp_path, kind)
    outcomes = run(folder, changes_of(folder, 2, 8), device, tmp_path)
    assert outcomes.total() >= 300
    assert outcomes["BundleUnsafe"] >= 50
