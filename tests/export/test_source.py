"""What is wrong with a source, a preset or a flag is said in one line, and nothing is written."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")

from pocketdiffusion_export.__main__ import main
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.plan import make_plan
from pocketdiffusion_export.sources.base import check_safetensors

pytestmark = pytest.mark.torch


def edit_index(source: Path, **changes: object) -> None:
    path = source / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def rename_pickle(source: Path) -> None:
    (source / "unet/diffusion_pytorch_model.safetensors").write_bytes(pickle.dumps({"weight": [1.0]}))


def zip_pickle(source: Path) -> None:
    (source / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"PK\x03\x04" + bytes(64))


def cut(source: Path) -> None:
    file = source / "unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def cut_in_data(source: Path) -> None:
    file = source / "unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def only_bin(source: Path) -> None:
    file = source / "text_encoder/model.safetensors"
    file.rename(file.with_name("pytorch_model.bin"))


def other_unet(source: Path) -> None:
    path = source / "unet/config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"block_out_channels": [32, 128]}
    path.write_text(json.dumps(config), encoding="utf-8")


CASES: list[tuple[Callable[[Path], object], str]] = [
    (rename_pickle, "holds a pickle"),
    (zip_pickle, "holds a pickle"),
    (cut, "cut short or damaged"),
    (cut_in_data, "can't be loaded as UNet2DConditionModel"),
    (only_bin, "found only pytorch_model.bin"),
    (other_unet, "can't be loaded as UNet2DConditionModel"),
    (lambda source: (source / "unet/config.json").unlink(), "config.json is missing"),
    (lambda source: (source / "model_index.json").unlink(), "holds no model_index.json"),
    (lambda source: (source / "model_index.json").write_text("{"), "can't be read as JSON"),
    (lambda source: (source / "model_index.json").write_text("[]"), "must hold a JSON object"),
    (lambda source: edit_index(source, _class_name="FluxPipeline"), "FluxPipeline can't be exported; known: "),
    (lambda source: edit_index(source, unet=["evil", "Evil"]), "which can't be exported; known classes"),
    (lambda source: shutil.rmtree(source), "is not a folder"),
]


@pytest.mark.parametrize("length", [0x80, 0x280])
def test_a_header_as_long_as_a_pickles_mark_is_no_pickle(length: int, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + b"{}".ljust(length))
    check_safetensors(file)


@pytest.mark.parametrize(("damage", "message"), CASES)
def test_a_bad_source_is_one_line(
    damage: Callable[[Path], object],
    message: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    damage(source)
    monkeypatch.setattr(sys, "argv", ["export", str(source), str(tmp_path / "bundle")])
    assert main() == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not (tmp_path / "bundle").exists() and not list(tmp_path.glob(".bundle*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "int3"}, "unknown recipe 'int3'; choose one of: "),
        ({"target": "tflite"}, "unknown target 'tflite'; choose one of: coreml, onnx"),
        ({"preset": "absent.toml"}, "preset absent.toml can't be read"),
    ],
)
def test_unknown_names_list_the_choices(options: dict[str, str], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        make_plan("source", "bundle", **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "can't be read"),
        ("nmae = 'x'", "unknown key 'nmae'; allowed: description, files, golden, name, numbers, prompts, scheduler, "),
        ("name = 3", "'name' has a value of the wrong type: 3"),
        ("[numbers]\nsteps = 3", "unknown key 'numbers.steps'"),
        ("[golden]\nseed = true", "'golden.seed' has a value of the wrong type"),
        ("source = 3", "'source' must be a table"),
        ("scheduler = 3", "'scheduler' must be a table"),
        ("[scheduler]\n_class_name = 'Euler'", "'scheduler._class_name' is 'Euler'; choose one of: DDIMScheduler, "),
        ("prompts = []", "'prompts' must be a list of texts"),
        ("files = ['absent.md']", "the file 'absent.md' in 'files' does not exist"),
    ],
)
def test_a_bad_preset_names_file_and_key(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "preset.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ExportError) as found:
        make_plan("source", "bundle", preset=file)
    assert message in str(found.value) and str(file) in str(found.value) and "\n" not in str(found.value)


def test_the_destination_may_not_lie_in_the_source() -> None:
    with pytest.raises(ExportError, match="lies in the source"):
        make_plan("model", "model/bundle")


def test_the_command_is_described_without_torch() -> None:
    code = "import sys, pocketdiffusion_export.cli as c; print(c.COMMAND.name, {'torch', 'onnx'} & set(sys.modules))"
    paths = ":".join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": paths})
    assert done.stdout.strip() == "export set()", done.stderr
