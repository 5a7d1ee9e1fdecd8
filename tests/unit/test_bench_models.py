"""Models of the benchmark: bundles as they are, and what a child process makes once. The export stage is a fake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pocketdiffusion.bundle import Bundle
from pocketdiffusion_bench import models
from pocketdiffusion_bench.case import Case
from pocketdiffusion_bench.errors import BenchError

EXPORT = """
import pathlib, sys
folder = pathlib.Path(sys.argv[2])
folder.mkdir()
(folder / "arguments").write_text("\\n".join(sys.argv[1:]))
if "--preset" in sys.argv:
    (folder / "preset").write_text(pathlib.Path(sys.argv[sys.argv.index("--preset") + 1]).read_text())
"""
SAVE = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[2])
for part, config in (("unet", {"sample_size": 64}), ("vae", {"block_out_channels": [1, 1, 1, 1]})):
    (folder / part).mkdir(parents=True)
    (folder / part / "config.json").write_text(json.dumps(config))
(folder / "model_index.json").write_text("{}")
"""


@pytest.fixture(autouse=True)
def fake_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in the place of the export stage."""
    package = tmp_path / "fake" / "fake_export"
    (package / "sources").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(EXPORT)
    (package / "save_source.py").write_text(SAVE)
    monkeypatch.setattr(models, "EXPORT", "fake_export")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.syspath_prepend(package.parent)
    models._code.cache_clear()
    return package


def made(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir())


def test_a_random_model_is_exported_once(capfd: pytest.CaptureFixture[str]) -> None:
    case = Case("random:sd15-inpaint", recipe="int8")
    folder = models.provide(case)
    arguments = (folder / "arguments").read_text().splitlines()
    assert arguments[0] == "random:sd15-inpaint"
    assert arguments[2:6] == ["--recipe", "int8", "--target", "onnx"] and arguments[-1] == "--accept-error"
    assert "steps = 2" in (folder / "preset").read_text()
    assert str(folder) in capfd.readouterr().err
    (folder / "mark").touch()
    assert (models.provide(case) / "mark").exists()
    assert models.provide(Case("random:sd15-inpaint")) != folder
    assert models.provide(case, "openvino") != folder


def test_a_random_model_gets_a_tiny_decoder_where_a_case_asks_for_one() -> None:
    full, tiny = models.provide(Case("random:sd15")), models.provide(Case("random:sd15", decoder="tiny"))
    assert (tiny / "arguments").read_text().splitlines()[::2] == [str(full), "--tiny-vae"]
    assert (tiny / "arguments").read_text().endswith("random:taesd")
    (full / "mark").touch()
    assert models.provide(Case("random:sd15")) == full and (full / "mark").exists()  # the copy is no newer form of it
    assert models.provide(Case("random:sd15", decoder="full")) == full


def test_fewer_keys_make_another_bundle() -> None:
    whole, fewer = (models.provide(Case("random:sd15", recipe="w8a8", downsample_keys=n)) for n in (None, 2))
    assert whole != fewer and "-keys2-" in fewer.name
    assert "--downsample-keys\n2" in (fewer / "arguments").read_text()
    assert "--downsample-keys" not in (whole / "arguments").read_text()


def test_a_preset_of_the_checkout_is_used() -> None:
    assert "Stable Diffusion 1.5" in (models.provide(Case("random:sd15")) / "preset").read_text(encoding="utf-8")


def test_another_export_stage_makes_the_model_anew(fake_export: Path) -> None:
    first = models.provide(Case("random:sd15"))
    (fake_export / "new.py").write_text("")
    models._code.cache_clear()
    second = models.provide(Case("random:sd15"))
    assert first != second and made(second) == [second.name]


def test_a_source_folder_is_exported_as_it_is_now(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    weights = folder / "unet" / "model.safetensors"
    weights.write_bytes(b"1")
    first = models.provide(Case(str(folder)))
    assert "--accept-error" not in (first / "arguments").read_text()
    assert models.source(Case(str(folder))) == folder
    weights.write_bytes(b"22")
    assert models.provide(Case(str(folder))) != first


def test_a_missing_export_stage_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "EXPORT", "no_such_package")
    with pytest.raises(BenchError, match="not installed; give a bundle"):
        models.provide(Case("random:sd15"))


def test_a_failed_export_leaves_nothing_and_says_why(fake_export: Path) -> None:
    (fake_export / "__main__.py").write_text(
        "import sys; print('working', file=sys.stderr); sys.exit('error: no disk')"
    )
    with pytest.raises(BenchError, match="random-sd15-fp32-onnx can't be made: error: no disk"):
        models.provide(Case("random:sd15"))
    (fake_export / "__main__.py").write_text(EXPORT)
    models._code.cache_clear()
    folder = models.provide(Case("random:sd15"))
    assert made(folder) == [folder.name]


def test_a_bundle_is_taken_as_it_is(tiny_bundle: Bundle) -> None:
    assert models.provide(Case(str(tiny_bundle.path))) == tiny_bundle.path
    assert models.provide(Case(str(tiny_bundle.path), recipe="fp32")) == tiny_bundle.path
    with pytest.raises(BenchError, match=r"is stored as fp32, asked for int8; leave --recipe out"):
        models.provide(Case(str(tiny_bundle.path), recipe="int8"))
    with pytest.raises(BenchError, match="is a bundle, which reads the keys it was exported with: give a source"):
        models.provide(Case(str(tiny_bundle.path), downsample_keys=2))


def test_a_bundle_is_no_source(tiny_bundle: Bundle) -> None:
    with pytest.raises(BenchError, match="is no source: give random:NAME"):
        models.source(Case(str(tiny_bundle.path)))


def test_what_a_case_leaves_open_is_settled_as_for_ours(tiny_bundle: Bundle) -> None:
    numbers = tiny_bundle.manifest.numbers
    found = models.settled(Case(str(tiny_bundle.path), steps=2))
    assert (found.width, found.height, found.steps) == (numbers.width, numbers.height, 2)
    assert found.guidance == numbers.default_guidance
    found = models.settled(Case("random:sd15-inpaint", width=256))
    assert (found.width, found.height, found.steps, found.guidance) == (256, 512, 25, 7.5)
    turbo = models.settled(Case("random:sd-turbo"))
    assert (turbo.steps, turbo.guidance) != (25, 7.5)  # by the checkout's preset


def test_the_source_of_a_random_model_is_written_once() -> None:
    folder = models.source(Case("random:sd15"))
    assert json.loads((folder / "unet/config.json").read_text()) == {"sample_size": 64}
    (folder / "mark").touch()
    assert (models.source(Case("random:sd15", recipe="int8")) / "mark").exists()
