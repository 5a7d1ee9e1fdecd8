"""The Diffusers folder that other programs get of a source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from safetensors.torch import load_file  # noqa: E402

from pocketdiffusion_export import save_source  # noqa: E402
from pocketdiffusion_export.source import load  # noqa: E402
from pocketdiffusion_export.sources import random  # noqa: E402

from .architectures import small  # noqa: E402

pytestmark = pytest.mark.torch

WEIGHTS = {
    "text_encoder": "text_encoder/model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}


def test_a_random_model_is_written_with_its_very_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(random.ARCHITECTURES, "sd15", small("sd15"))
    folder = tmp_path / "source"
    assert save_source.main(["random:sd15", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    pipe = load("random:sd15").pipe
    for part, file in WEIGHTS.items():
        found, expected = load_file(folder / file), dict(getattr(pipe, part).named_parameters())
        assert found.keys() == expected.keys()
        assert all(found[key].dtype == torch.float32 and torch.equal(found[key], expected[key]) for key in found)
        assert part != "text_encoder" or all(key.startswith("text_model.") for key in found)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "StableDiffusionPipeline" and index["safety_checker"] == [None, None]
    assert json.loads((folder / "scheduler/scheduler_config.json").read_text())["_class_name"] == "PNDMScheduler"
    assert (folder / "tokenizer/merges.txt").is_file()


def test_an_error_is_one_line_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert save_source.main(["random:nothing", str(tmp_path / "source")]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: unknown architecture 'random:nothing'") and said.err.count("\n") == 1
    assert said.out == "" and list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").touch()
    assert save_source.main(["random:sd15", str(tmp_path)]) == 1
    assert "holds other files and no bundle" in capsys.readouterr().err and (tmp_path / "mine").exists()
