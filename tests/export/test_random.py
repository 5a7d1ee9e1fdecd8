"""Random weights: true architectures, the same numbers everywhere, activations that stay finite."""

from __future__ import annotations

import gc
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from pocketdiffusion_export.errors import ExportError  # noqa: E402
from pocketdiffusion_export.plan import make_plan  # noqa: E402
from pocketdiffusion_export.source import load  # noqa: E402
from pocketdiffusion_export.sources.architectures import ARCHITECTURES  # noqa: E402
from pocketdiffusion_export.sources.base import class_named  # noqa: E402
from pocketdiffusion_export.sources.build import empty_modules, require_family  # noqa: E402
from pocketdiffusion_export.sources.random import fill  # noqa: E402

from .architectures import small  # noqa: E402

pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[2]
VECTORS = ROOT / "tests/golden/clip/vectors.json"
PRESETS = sorted(file for file in ROOT.glob("models/*/preset.toml") if file.parent.name != "sticker")
PUBLISHED = {
    ("sd15", "unet"): 859_520_964,
    ("sd15", "vae"): 83_653_863,
    ("sd15", "text_encoder"): 123_060_480,
    ("sd15-taesd", "vae"): 2_445_063,
    ("sd21", "unet"): 865_910_724,
    ("sd21", "text_encoder"): 340_387_840,
    ("sdxl", "unet"): 2_567_463_684,
    ("sdxl", "text_encoder_2"): 694_659_840,
    ("ssd-1b", "unet"): 1_331_334_404,
    ("segmind-vega", "unet"): 745_225_604,
    ("bk-sdm-base", "unet"): 579_384_964,
    ("bk-sdm-small", "unet"): 482_346_884,
    ("bk-sdm-tiny", "unet"): 323_384_964,
}
"""Parameters; BK-SDM's in table 1 of arXiv 2305.15798 (0.58, 0.49, 0.33 thousand million), Segmind's in arXiv
2401.02677 (1.3 and 0.74 thousand million)."""


@pytest.mark.parametrize("name", sorted({name for name, _ in PUBLISHED}))
def test_architectures_have_the_published_sizes(name: str) -> None:
    modules = empty_modules(ARCHITECTURES[name])
    found = {part: sum(tensor.numel() for tensor in modules[part].parameters()) for part in modules}
    assert {key: found[key[1]] for key in PUBLISHED if key[0] == name} == {
        key: count for key, count in PUBLISHED.items() if key[0] == name
    }


def test_the_same_numbers_on_every_machine() -> None:
    layer = torch.nn.Linear(3, 2)
    fill(layer, "unet")
    again = torch.nn.Linear(3, 2)
    fill(again, "unet")
    assert torch.equal(layer.weight, again.weight) and torch.equal(layer.bias, again.bias)
    assert layer.weight[0].tolist() == [0.0736304521560669, 0.3718562126159668, -0.2046501636505127]
    fill(again, "vae")
    assert not torch.equal(layer.weight, again.weight)


def test_activations_stay_finite_and_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setitem(ARCHITECTURES, "sd15", small("sd15"))
    pipe = load("random:sd15").pipe
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        text = pipe.text_encoder(torch.arange(20)[None])[0]
        latents = torch.randn(1, 4, 16, 16, generator=generator)
        outputs = [text, pipe.unet(latents, 500.0, text).sample, pipe.vae.decode(latents).sample]
    assert all(0.1 < float(output.std()) < 3 for output in outputs)


def test_light_files_are_there_while_the_pipeline_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "sd21", small("sd21"))
    loaded = load("random:sd21")
    folder = loaded.folder
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "StableDiffusionPipeline"
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text(encoding="utf-8"))
    assert (scheduler["_class_name"], scheduler["prediction_type"]) == ("DDIMScheduler", "v_prediction")
    del loaded
    gc.collect()
    assert not folder.exists()


def test_the_tokenizer_is_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "sd15", small("sd15"))
    tokenizer = load("random:sd15").pipe.tokenizer
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    for vector in json.loads(VECTORS.read_text(encoding="utf-8"))["vectors"]:
        if vector["text"].isascii() and "&" not in vector["text"] and "<|" not in vector["text"]:
            assert tokenizer(vector["text"]).input_ids[1:-1] == vector["ids"]


def test_unknown_names_and_families_are_refused_in_one_line() -> None:
    with pytest.raises(ExportError, match="unknown architecture 'random:sd9'; choose one of: random:sd15, "):
        load("random:sd9")
    with pytest.raises(ExportError, match="random:x is a NoPipeline, which can't be exported yet; known: "):
        require_family(replace(ARCHITECTURES["sd15"], pipeline="NoPipeline"), "random:x")


def test_the_bound_keeps_the_variance() -> None:
    layer = torch.nn.Conv2d(64, 256, 3)
    fill(layer, "unet")
    assert float(layer.weight.detach().std()) == pytest.approx(math.sqrt(1 / (64 * 9)), rel=0.01)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda file: file.parent.name)
def test_every_preset_is_of_a_known_architecture_and_native_size(preset: Path) -> None:
    plan = make_plan("folder", "bundle", preset=preset)
    assert plan.name == preset.parent.name
    architecture = ARCHITECTURES[plan.name]
    assert plan.numbers.width == plan.numbers.height == architecture.unet["sample_size"] * 8
    assert plan.licence != "NOASSERTION"


def test_random_weights_do_not_carry_a_presets_origin_and_terms() -> None:
    plan = make_plan("random:sd15", "bundle", preset=ROOT / "models/sd15/preset.toml")
    assert (plan.source_name, plan.licence) == ("random:sd15", "NOASSERTION")
    assert plan.numbers.width == 512


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # Diffusers' own
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_scheduler_takes_its_settings(name: str) -> None:
    settings = dict(ARCHITECTURES[name].scheduler)
    made = class_named(settings.pop("_class_name"))(**settings)
    assert {key: made.config[key] for key in settings} == settings
