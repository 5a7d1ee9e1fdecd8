"""Every training stage for a few steps on synthetic pictures, one after the other, up to a folder that loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from pocketdiffusion_export.source import load  # noqa: E402
from sticker_train import checkpoint, cli, loop  # noqa: E402
from sticker_train.batches import Sampler, WeightedSampler, on_white  # noqa: E402
from sticker_train.denoiser import Material  # noqa: E402
from sticker_train.judge import Judge, varied  # noqa: E402
from sticker_train.loop import Settings, rate_at, train  # noqa: E402
from sticker_train.optimizer import Muon, orthogonal  # noqa: E402
from sticker_train.pack import Pictures, pack, read_pack  # noqa: E402
from sticker_train.shapes import SHAPES, Shape  # noqa: E402
from sticker_train.vae import inherit, new_vae  # noqa: E402

from .data import write_source  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

SMALL = Shape(64, (16, 16, 16), 4, 8, (16, 32), 16, 1, 12, 560)
SHORT = ["--steps", "3", "--batch", "4", "--threads", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    pack(write_source(folder / "source"), folder / "pictures.zip", ("fluent3d", "noto"))
    return folder / "pictures.zip"


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    """A run's folder after all stages of the smaller model."""
    run, place = data.with_name("run"), pytest.MonkeyPatch()
    place.setitem(SHAPES, 64, SMALL)
    try:
        common = ["--data", str(data), "--run", str(run), "--side", "64"]
        assert cli.main(["tokenizer", *common]) == 0
        for stage in ("judge", "vae", "tiny", "denoiser", "distil"):
            assert cli.main([stage, *common, *SHORT]) == 0
    finally:
        place.undo()
    return run


@pytest.fixture
def pictures(data: Path) -> Pictures:
    return read_pack(data, 64).part(held_out=False)


class Line:
    """y = w x for one number: a task whose course is plain."""

    def __init__(self) -> None:
        self.model: Any = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.model.weight)

    def loss(self, step: int, size: int) -> Any:
        x = torch.randn(size, 1)
        return ((self.model(x) - 2 * x) ** 2).mean()


SETTINGS = Settings(steps=60, batch=8, rate=0.1, warm_up=5, average=0.9)


def quiet(line: str) -> None:
    """Says nothing."""


def test_the_loop_learns_and_leaves_the_average(tmp_path: Path) -> None:
    task = Line()
    train(task, tmp_path, SETTINGS, quiet)
    assert float(task.model.weight) == pytest.approx(2, abs=0.3)
    curve = [json.loads(line) for line in (tmp_path / loop.CURVE).read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in curve] == [25, 50, 60] and curve[-1]["loss"] < curve[0]["loss"]


@pytest.mark.parametrize("matrices", [False, True])
def test_a_run_that_was_cut_ends_as_one_that_was_not(tmp_path: Path, matrices: bool) -> None:
    settings = Settings(**{**vars_of(SETTINGS), "matrices": matrices})
    whole, cut = Line(), Line()
    train(whole, tmp_path / "whole", settings, quiet)
    seconds = iter(range(0, 10_000, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.time, "monotonic", lambda: float(next(seconds)))
        train(cut, tmp_path / "cut", Settings(**{**vars_of(settings), "minutes": 1.0}), quiet)
    found = checkpoint.load(tmp_path / "cut" / loop.CHECKPOINT)
    assert found is not None and 0 < found[1]["step"] < 60
    again = Line()
    train(again, tmp_path / "cut", settings, quiet)
    assert float(again.model.weight) == float(whole.model.weight)


def test_orthogonal_steps_are_equally_long_in_every_direction() -> None:
    torch.manual_seed(0)
    for shape in ((16, 40), (40, 16)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape) @ torch.diag(torch.rand(shape[1]) + 0.1)))
        assert float(values.min()) > 0.5 and float(values.max()) < 1.5


def test_muon_takes_matrices_and_leaves_embeddings_and_vectors_to_adam() -> None:
    model: Any = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 8))
    optimizer = Muon(model, 0.1, 0.0)
    before = [weight.detach().clone() for weight in model.parameters()]
    model(torch.tensor([1, 2])).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert {len(optimizer.state[weight]) for weight in (model[0].weight, model[1].bias)} == {3}
    assert set(optimizer.state[model[1].weight]) == {"exp_avg"}


def vars_of(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in Settings.__slots__}


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    task = Line()
    torch.nn.init.constant_(task.model.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0; lower the learning rate"):
        train(task, tmp_path, SETTINGS, quiet)
    assert checkpoint.load(tmp_path / loop.CHECKPOINT) is None


def test_the_rate_rises_and_falls() -> None:
    rates = [rate_at(step, SETTINGS) for step in range(60)]
    assert rates[0] == 0.2 and max(rates) == rates[4] == rates[5] == 1 and rates[-1] < 0.01


def test_checkpoints_are_in_pieces_and_survive_a_kill(tmp_path: Path) -> None:
    tensors = {f"t{index}": torch.full((1 << 20,), float(index)) for index in range(9)}  # 4 MiB each
    checkpoint.save(tmp_path / "c", tensors, {"step": 1})
    assert len(list((tmp_path / "c").glob("*.safetensors"))) == 3
    assert all(file.stat().st_size <= 16 << 20 for file in (tmp_path / "c").iterdir())
    (tmp_path / "c").rename(tmp_path / "c.old")  # killed between the two renames
    found = checkpoint.load(tmp_path / "c")
    assert found is not None and found[1] == {"step": 1}
    assert all(torch.equal(found[0][name], tensor) for name, tensor in tensors.items())


def test_batches_are_the_steps_own_and_of_distinct_things(pictures: Pictures) -> None:
    first, again = (Sampler(pictures, 1, composed=0.3).batch(7, 9) for _ in range(2))
    assert first.prompts == again.prompts and np.array_equal(first.pixels, again.pixels)
    assert Sampler(pictures, 2).batch(7, 9).prompts != Sampler(pictures, 1).batch(7, 9).prompts
    plain = Sampler(pictures, 1).batch(0, 99)
    assert len({picture[..., 3].tobytes() for picture in plain.pixels}) == len(plain.prompts) == 10


def test_the_denoiser_sees_each_set_as_often_as_is_said_and_hears_the_other_styles(pictures: Pictures) -> None:
    sampler = WeightedSampler(pictures, 1, composed=0.0)
    drawn = [sampler.batch(step, 50) for step in range(12)]
    again = WeightedSampler(pictures, 1, composed=0.0).batch(3, 50)
    assert drawn[3].prompts == again.prompts and np.array_equal(drawn[3].pixels, again.pixels)
    pairs = [(place, text) for batch in drawn for place, text in zip(batch.places, batch.prompts, strict=True)]
    known = [(pictures.rows[place].style, text) for place, text in pairs if place is not None]
    threes = [text for style, text in known if style == "fluent3d"]
    others = [text for style, text in known if style == "noto"]
    assert 3 < len(threes) / len(others) < 6.5  # 0.6 to 0.13, less what is shown in another colour
    assert sum("3d" in text for text in threes) < 0.2 * len(threes)
    assert sum("emoji" in text for text in others) > 0.8 * len(others)
    assert any(place is None for place, _ in pairs)


def test_latents_are_encoded_once_and_stay_the_pictures_own(pictures: Pictures) -> None:
    vae = new_vae(SMALL, 0)
    material = Material(pictures, vae, lambda prompts, **_: Ids(torch.zeros(len(prompts), 3)), 0, "cpu")
    first, _ = material.batch(5, 8, empty=0.0)
    again, _ = material.batch(5, 8, empty=0.0)
    fresh, _ = Material(pictures, vae, material.tokenizer, 0, "cpu").batch(5, 8, empty=0.0)
    assert first.shape == (8, 4, 16, 16) and torch.equal(first, fresh)
    assert torch.allclose(first, again, atol=1e-3)  # another batch size rounds otherwise


class Ids:
    """What a tokenizer answers."""

    def __init__(self, ids: Any) -> None:
        self.input_ids = ids


def test_a_grown_vae_begins_with_the_levels_next_to_the_latents() -> None:
    small, large = new_vae(SMALL, 0), new_vae(Shape(128, (16, *SMALL.vae), 4, 8, (16, 32), 16, 1, 12, 560), 1)
    small.register_to_config(scaling_factor=0.5)
    inherit(large, small)
    assert torch.equal(large.decoder.conv_in.weight, small.decoder.conv_in.weight)
    old, new = (vae.encoder.down_blocks[level].resnets[0].conv1.weight for vae, level in ((small, 2), (large, 3)))
    assert torch.equal(old, new) and large.config.scaling_factor == 0.5


def test_what_comes_in_at_the_edges_is_white() -> None:
    torch.manual_seed(0)
    found = varied(torch.ones(64, 3, 64, 64))
    assert float(found.mean()) > 0.85 and found.shape == (64, 3, 64, 64)
    assert on_white(np.zeros((1, 2, 2, 4), np.uint8), "cpu").unique().tolist() == [-1]


@pytest.mark.slow
def test_the_judge_learns_to_tell_pictures_apart(data: Path, pictures: Pictures, trained: Path) -> None:
    from sticker_train.judge import JudgeTask, load_tokenizer

    task = JudgeTask(pictures, load_tokenizer(trained / "parts/tokenizer"), 0, "cpu")
    settings = Settings(steps=60, batch=10, rate=2e-3, warm_up=5, average=0.5)
    train(task, trained.with_name("judge"), settings, quiet)
    curve = (trained.with_name("judge") / loop.CURVE).read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in curve]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.slow
def test_all_stages_make_a_source_that_loads(trained: Path, tmp_path: Path) -> None:
    for arguments in ([], ["--distilled"]):
        assert cli.main(["hand-over", "--run", str(trained), "--to", str(tmp_path / "source"), *arguments]) == 0
        loaded = load(str(tmp_path / "source"))
        assert isinstance(loaded.pipe.judge_image, type(Judge(loaded.pipe.tokenizer).image))
        assert ("LCM" in type(loaded.pipe.scheduler).__name__) == (arguments == ["--distilled"])
        assert type(loaded.pipe.tiny_vae).__name__ == "AutoencoderTiny"
        picture = loaded.pipe("a red apple", num_inference_steps=2, output_type="np").images
        assert picture.shape == (1, 64, 64, 3) and np.isfinite(picture).all()


@pytest.mark.slow
def test_a_later_stage_without_an_earlier_one_says_which(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--data", str(data), "--run", str(tmp_path), "--side", "64", *SHORT]
    assert cli.main(["judge", *common]) == 1
    assert "no tokenizer in" in (said := capsys.readouterr().err) and "run the stage `tokenizer` first" in said
    shutil.copytree(trained / "parts/tokenizer", tmp_path / "parts/tokenizer")
    assert cli.main(["denoiser", *common]) == 1
    assert "no vae in" in (said := capsys.readouterr().err) and "run the stage `vae` first" in said


@pytest.mark.slow
def test_a_vae_for_larger_pictures_keeps_the_smaller_ones_latents(data: Path, trained: Path, tmp_path: Path) -> None:
    large = Shape(128, (16, *SMALL.vae), 4, 8, (16, 32), 16, 1, 12, 560)
    first, run = tmp_path / "first", tmp_path / "run"
    assert cli.main(["hand-over", "--run", str(trained), "--to", str(first)]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, 128, large)
        common = ["--data", str(data), "--run", str(run), "--start", str(first), "--side", "128", *SHORT]
        assert cli.main(["vae", *common, "--precision", "bfloat16"]) == 0
    words = ["hand-over", "--run", str(run), "--start", str(first), "--to", str(tmp_path / "second")]
    assert cli.main(words) == 0
    picture = load(str(tmp_path / "second")).pipe("a red apple", num_inference_steps=2, output_type="np").images
    assert picture.shape == (1, 128, 128, 3) and np.isfinite(picture).all()


@pytest.mark.slow
def test_a_run_starts_from_another_models_parts(data: Path, trained: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli.main(["hand-over", "--run", str(trained), "--to", str(first)]) == 0
    common = ["--data", str(data), "--run", str(second), "--start", str(first), "--side", "64"]
    assert cli.main(["denoiser", *common, *SHORT, "--rate", "0"]) == 0
    before, after = (folder / "text_encoder/model.safetensors" for folder in (first, second / "parts"))
    assert before.read_bytes() == after.read_bytes()
