"""Figures of a judge: retrieval and distance on made-up vectors, and the command on the fake engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pocketdiffusion.pipeline import Pipeline
from pocketdiffusion_bench import judge
from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.judge import Case
from pocketdiffusion_bench.judging import diversity, found_within, frechet, nearest_db, ranks
from pocketdiffusion_bench.sheet import contact_sheet

from .test_judge import judged  # noqa: F401


def test_ranks_count_the_prompts_that_fit_better() -> None:
    read = np.eye(3, dtype=np.float32)
    seen = np.array([[1, 0, 0], [0.6, 0.8, 0], [0.6, 0.8, 0], [0.5, 0.5, 0.7]], np.float32)
    places = ranks(seen, read, [0, 1, 0, 0])
    assert places.tolist() == [0, 0, 1, 2]
    assert found_within(places, 1) == 0.5 and found_within(places, 2) == 0.75


def test_a_judge_that_tells_nothing_apart_finds_nothing() -> None:
    same = np.ones((5, 1), np.float32)
    assert found_within(ranks(same, same, range(5)), 1) == 0


def test_the_distance_of_normal_distributions_is_the_formulas() -> None:
    random = np.random.default_rng(0)
    first = random.normal(0, 1, (40_000, 3))
    second = random.normal(0, 1, (40_000, 3)) * [1, 2, 1] + [0, 0, 3]
    assert frechet(first, first) == pytest.approx(0, abs=1e-9)
    assert frechet(first, second) == pytest.approx(9 + (2 - 1) ** 2, rel=0.03)  # means 3 apart, deviations 1 and 2
    assert frechet(first[:2], second[:2]) > 0


def test_diversity_is_how_far_apart_the_seeds_are() -> None:
    same = np.broadcast_to(np.float32([1, 0]), (2, 3, 2))
    assert diversity(same) == pytest.approx(0)
    assert diversity(np.broadcast_to(np.eye(2, dtype=np.float32), (5, 2, 2))) == pytest.approx(1)


def test_the_nearest_known_picture_is_found() -> None:
    known = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    near = known[2:4].copy()
    near[1, 0, 0, 0] ^= 255  # one value of 48 is off
    same, other = nearest_db(near, known)
    off = (2.0 * near[1, 0, 0, 0] - 255) / 255
    assert same > 80 and other == pytest.approx(-10 * np.log10(off**2 / 48), abs=0.1)


@pytest.mark.parametrize(
    ("text", "case"),
    [
        ("a/b", Case("a/b")),
        ("a/b@20", Case("a/b", 20)),
        ("a/b@4@1", Case("a/b", 4, 1.0)),
        ("a@4@3.5", Case("a", 4, 3.5)),
        ("a+b+tiny@4", Case("a+b", 4, None, "tiny")),
    ],
)
def test_cases_are_bundles_with_steps_and_guidance(text: str, case: Case) -> None:
    assert Case.of(text) == case


def test_cases_are_named_after_the_bundles_folder() -> None:
    assert [Case.of(text).name for text in ("a/b", "a/b@4@1", "b+tiny@4")] == ["b", "b 4", "b tiny 4"]


@pytest.mark.parametrize("text", ["", "@4", "a@", "a@four", "a@4@", "a@4@1@2", "a@4@-1"])
def test_other_texts_are_no_case(text: str) -> None:
    with pytest.raises(BenchError, match="is no case; write BUNDLE"):
        Case.of(text)


def test_the_sheet_has_a_cell_for_each_prompt_and_column(tmp_path: Path) -> None:
    grey = [np.full((16, 16, 3), 30 * index, np.uint8) for index in range(5)]
    contact_sheet([f"prompt {index}" for index in range(5)], {"one": grey, "two": grey[::-1]}, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.getpixel((140, 18 + 68 + 30)) == (30, 30, 30)
        assert sheet.getpixel((140 + 68, 18 + 68 + 30)) == (90, 90, 90)
        assert sheet.getpixel((132 + 2 * 68 + 140, 18 + 30)) == (90, 90, 90)


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    (tmp_path / "captions.txt").write_text("r\nb\ngreen\n", encoding="utf-8")
    (tmp_path / "sheet.txt").write_text("r\nb\n", encoding="utf-8")
    (tmp_path / "real").mkdir()
    for line, colour in ((1, "red"), (2, "blue"), (2, "navy")):
        Image.new("RGB", (20, 20), colour).save(tmp_path / f"real/{line:02d}-{colour}.png")
    np.save(tmp_path / "training.npy", np.full((2, 4, 4, 3), 255, np.uint8))
    np.save(tmp_path / "wrong.npy", np.zeros((2, 4, 4), np.float32))
    return tmp_path


def test_the_command_makes_a_table_and_a_sheet(
    evaluation: Path,
    judged: Pipeline,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *args, **kwargs: judged)
    known = ["--training", "training.npy"]
    files = ["--captions", "captions.txt", "--sheet-prompts", "sheet.txt", "--real", "real", "--sheet", "sheet.jpg"]
    monkeypatch.chdir(evaluation)
    assert judge.main(["x/tiny@2", "x/tiny@3@1", "--count", "2", *known, *files]) == 0
    head, rule, real, *rows = capsys.readouterr().out.splitlines()
    assert {line.count("|") for line in (head, rule, real, *rows)} == {8}
    assert real.split(" | ")[0] == "| real" and " | 0.0000 |  | 1.8 |" in real and "100.0%" not in real.split(" | ")[2]
    assert [line.split(" | ")[0] for line in rows] == ["| tiny 2", "| tiny 3"]
    with Image.open("sheet.jpg") as sheet:
        assert sheet.format == "JPEG"


def test_bad_input_is_one_line(
    evaluation: Path,
    pipe: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *args, **kwargs: pipe)
    captions = ["--captions", str(evaluation / "captions.txt")]
    for arguments, said in (
        ([*captions], "tiny has no judge; name a bundle first that has one"),
        (["--captions", str(evaluation / "none.txt")], "can't be read: No such file"),
        ([*captions, "--training", str(evaluation / "none.npy")], "give the training.npy that the recipe writes"),
        ([*captions, "--training", str(evaluation / "wrong.npy")], "holds float32 (2, 4, 4); small pictures are uint8"),
        ([*captions, "--sheet", "x.jpg"], "--sheet and --sheet-prompts belong together"),
    ):
        assert judge.main(["tiny", *arguments]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


def test_true_pictures_name_their_caption(evaluation: Path) -> None:
    pictures, own = judge.real_pictures(evaluation / "real", ["r", "b"])
    assert own == [0, 1, 1] and pictures[0][0, 0].tolist() == [255, 0, 0]
    with pytest.raises(BenchError, match=r"02-blue\.png begins with no line of the captions' file, 1 to 1"):
        judge.real_pictures(evaluation / "real", ["r"])
    with pytest.raises(BenchError, match=r"holds no \.png files"):
        judge.real_pictures(evaluation, ["r"])
