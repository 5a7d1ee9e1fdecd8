"""Checkpoints in one file: recognised by their tensors, converted bit for bit, refused in one line."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from safetensors.torch import save_file  # noqa: E402

from pocketdiffusion_export.errors import ExportError  # noqa: E402
from pocketdiffusion_export.families import FAMILIES  # noqa: E402
from pocketdiffusion_export.registry import lookup  # noqa: E402
from pocketdiffusion_export.source import load  # noqa: E402
from pocketdiffusion_export.sources.architectures import ARCHITECTURES  # noqa: E402
from pocketdiffusion_export.sources.single_file import KNOWN, Layout  # noqa: E402

from .architectures import original, small  # noqa: E402

pytestmark = pytest.mark.torch

PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    for name in (*KNOWN, "sd21-base"):
        monkeypatch.setitem(ARCHITECTURES, name, small(name))


def checkpoint(
    folder: Path, name: str, change: Callable[[dict[str, Any]], object] = lambda _: None
) -> tuple[Path, Any]:
    pipe = load(f"random:{name}").pipe
    tensors = original(pipe)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    return folder / "model.safetensors", pipe


def assert_same(found: Any, expected: Any) -> None:
    for part in PARTS:
        one, other = getattr(found, part).state_dict(), getattr(expected, part).state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key].to(one[key])) for key in one), part


def test_sd1_comes_back_bit_for_bit(tmp_path: Path) -> None:
    file, expected = checkpoint(tmp_path, "sd15")
    loaded = load(str(file))
    assert_same(loaded.pipe, expected)
    assert loaded.family == "sd" and list(loaded.sha256) == ["model.safetensors"]
    assert loaded.pipe.scheduler.config.prediction_type == "epsilon"
    assert (loaded.folder / "tokenizer/merges.txt").is_file() and (loaded.folder / "model_index.json").is_file()


def test_sdxl_with_its_two_text_encoders(tmp_path: Path) -> None:
    file, expected = checkpoint(tmp_path, "sdxl")
    found = load(str(file)).pipe
    assert_same(found, expected)
    one, other = found.text_encoder_2.state_dict(), expected.text_encoder_2.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert (found.tokenizer.pad_token, found.tokenizer_2.pad_token) == ("<|endoftext|>", "!")


@pytest.mark.parametrize(
    ("name", "channels", "task"),
    [("sd15-inpaint", 9, "inpaint"), ("sd15-pix2pix", 8, "instruct"), ("sdxl-inpaint", 9, "inpaint")],
)
def test_models_for_one_task_are_known_by_their_channels(name: str, channels: int, task: str, tmp_path: Path) -> None:
    file, expected = checkpoint(tmp_path, name)
    loaded = load(str(file))
    assert_same(loaded.pipe, expected)
    assert type(loaded.pipe) is type(expected) and loaded.pipe.unet.config.in_channels == channels
    assert lookup(FAMILIES, "family", loaded.family).tasks(loaded.pipe) == (task,)


@pytest.mark.parametrize("name", ["bk-sdm-base", "bk-sdm-small", "ssd-1b", "segmind-vega"])
def test_distilled_unets_are_known_by_their_blocks(name: str, tmp_path: Path) -> None:
    file, expected = checkpoint(tmp_path, name)
    assert_same(load(str(file)).pipe, expected)


def test_lcm_is_known_by_its_guidance_embedding(tmp_path: Path) -> None:
    file, expected = checkpoint(tmp_path, "lcm")
    found = load(str(file)).pipe
    assert_same(found, expected)
    assert type(found) is type(expected) and found.unet.config.time_cond_proj_dim == 256
    assert type(found.scheduler).__name__ == "LCMScheduler"


def test_a_guidance_embedding_may_have_diffusers_name(tmp_path: Path) -> None:
    def rename(tensors: dict[str, Any]) -> None:
        (old,) = [key for key in tensors if "cond_proj" in key]
        tensors["model.diffusion_model.time_embedding.cond_proj.weight"] = tensors.pop(old)

    file, expected = checkpoint(tmp_path, "lcm", rename)
    assert_same(load(str(file)).pipe, expected)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # Diffusers' own
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sdxl", {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}),
        ("sdxl", {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}),
        ("sd15", {"_class_name": "LCMScheduler"}),
        ("sd15", {"timestep_spacing": "trailing"}),
    ],
)
def test_a_scheduler_is_made_as_diffusers_makes_one_of_another(name: str, said: dict[str, Any], tmp_path: Path) -> None:
    file, expected = checkpoint(tmp_path, name)
    loaded = load(str(file), scheduler=said)
    settings = {key: value for key, value in said.items() if key != "_class_name"}
    kind = getattr(diffusers, said.get("_class_name", type(expected.scheduler).__name__))
    wanted = kind.from_config(expected.scheduler.config, **settings)
    found = loaded.pipe.scheduler
    assert loaded.scheduler is not None and loaded.scheduler["_class_name"] == kind.__name__
    assert type(found) is kind
    for steps in (1, 4):
        found.set_timesteps(steps)
        wanted.set_timesteps(steps)
        assert found.timesteps.tolist() == wanted.timesteps.tolist()
        if hasattr(wanted, "sigmas"):
            assert found.sigmas.tolist() == wanted.sigmas.tolist()


def test_a_preset_s_prediction_counts_for_sd2(tmp_path: Path) -> None:
    file, expected = checkpoint(tmp_path, "sd21-base")
    found = load(str(file), scheduler={"prediction_type": "epsilon", "_class_name": "EulerDiscreteScheduler"}).pipe
    assert_same(found, expected)
    assert found.scheduler.config.prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"spacing": "trailing"}, "'scheduler.spacing' is no setting of PNDMScheduler; allowed: "),
        ({"beta_schedule": "other"}, "the preset's scheduler can't be made as PNDMScheduler: "),
    ],
)
def test_a_setting_that_can_t_be_is_one_line(said: dict[str, Any], message: str, tmp_path: Path) -> None:
    file, _ = checkpoint(tmp_path, "sd15")
    with pytest.raises(ExportError) as found:
        load(str(file), scheduler=said)
    assert message in str(found.value) and "\n" not in str(found.value)


def test_half_precision_becomes_float32_exactly(tmp_path: Path) -> None:
    def halve(tensors: dict[str, Any]) -> None:
        tensors.update({key: tensor.half() for key, tensor in tensors.items()})

    file, expected = checkpoint(tmp_path, "sd15", halve)
    found = load(str(file)).pipe.unet.state_dict()
    wanted = expected.unet.state_dict()
    assert all(found[key].dtype == torch.float32 for key in found)
    assert all(torch.equal(found[key], wanted[key].half().float()) for key in found)


@pytest.mark.parametrize(
    ("said", "name", "prediction"), [("v", "sd21", "v_prediction"), ("eps", "sd21-base", "epsilon")]
)
def test_sd2_takes_its_prediction_from_the_file_beside_it(
    said: str, name: str, prediction: str, tmp_path: Path
) -> None:
    file, expected = checkpoint(tmp_path, name)
    (tmp_path / "model.yaml").write_text(f'model:\n  params:\n    parameterization: "{said}"\n', encoding="utf-8")
    found = load(str(file)).pipe
    assert_same(found, expected)
    assert found.scheduler.config.prediction_type == prediction
    assert found.tokenizer.pad_token == "!"


def test_marks_in_the_checkpoint_say_v_and_zero_terminal_snr(tmp_path: Path) -> None:
    def mark(tensors: dict[str, Any]) -> None:
        tensors.update(v_pred=torch.zeros(0), ztsnr=torch.zeros(0))

    file, _ = checkpoint(tmp_path, "sd21", mark)
    config = load(str(file)).pipe.scheduler.config
    assert (config.prediction_type, config.rescale_betas_zero_snr) == ("v_prediction", True)


def drop_one(tensors: dict[str, Any]) -> None:
    del tensors["model.diffusion_model.out.2.bias"]


def add_guidance(tensors: dict[str, Any]) -> None:
    tensors["model.diffusion_model.time_embed.cond_proj.weight"] = torch.zeros(16, 8)


def add_more(tensors: dict[str, Any]) -> None:
    tensors["model.diffusion_model.time_embed.more.weight"] = torch.zeros(16, 8)


def widen(tensors: dict[str, Any]) -> None:
    for key in [key for key in tensors if "attn2.to_k" in key]:
        tensors[key] = torch.zeros(len(tensors[key]), 640)


def drop_unet(tensors: dict[str, Any]) -> None:
    for key in [key for key in tensors if key.startswith("model.diffusion_model")]:
        del tensors[key]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sd15", drop_one, "1 tensors of the unet do not fit, first conv_out.bias: found none, needed"),
        ("sd15", add_guidance, "attention 1 deep and a guidance embedding 8 wide is not known; known: sd15"),
        (
            "sd15",
            add_more,
            "1 tensors of the UNet are of no known use, first model.diffusion_model.time_embed.more",
        ),
        ("sd15", widen, "a UNet with 4 input channels, 640-wide text states, "),
        ("sd15", drop_unet, "holds no checkpoint in the original layout"),
        ("sd21", lambda _: None, "put model.yaml with 'parameterization: v'"),
    ],
)
def test_what_is_not_known_is_one_line(
    name: str, change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    file, _ = checkpoint(tmp_path, name, change)
    with pytest.raises(ExportError) as found:
        load(str(file))
    assert message in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"state_dict": 1}), "holds a pickle"),
        (b"PK\x03\x04" + bytes(64), "holds a pickle"),
        (bytes(100), "is not safetensors"),
        (b"\x00\x01\x00\x00\x00\x00\x00\x00{}", "cut short or damaged"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{}", "holds no checkpoint"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{]", "cut short or damaged"),
    ],
)
def test_contents_decide_and_not_the_name(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ExportError, match=message):
        load(str(file))


def test_layouts_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    layouts = [Layout.of_config(ARCHITECTURES[name].unet) for name in KNOWN]
    assert len(set(layouts)) == len(KNOWN)
    assert Layout.of_config(ARCHITECTURES["ssd-1b"].unet) == Layout(4, 2048, 9, 1, 4, 0)
