"""Pictures and words of the training: the pack, prompts, compositions, held-out pictures. No torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sticker_train.combinations import combinations
from sticker_train.compose import pair, paste, several
from sticker_train.held_out import caption_list, write_evaluation
from sticker_train.pack import DataError, Pictures, Row, pack, read_pack
from sticker_train.recolour import HUES, can_recolour, recoloured
from sticker_train.words import named, plural, prompt_for

from .data import NAMES, write_source

SETS = ("fluent3d", "noto")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("train") / "source")


@pytest.fixture(scope="module")
def pictures(source: Path) -> Pictures:
    file = source.with_name("pictures.zip")
    assert pack(source, file, SETS) == 20
    return read_pack(file, 64)


def row(**changes: object) -> Row:
    facts: dict[str, object] = {
        **{"key": "a/b", "style": "noto", "concept": "b", "group": "objects", "caption": "cat", "article": "a"},
        **{"keywords": ("kitten",), "colour": "orange", "core": True, "held_out": False},
    }
    return Row(**{**facts, **changes})  # type: ignore[arg-type]


def test_a_pack_gives_back_what_was_put_in(pictures: Pictures) -> None:
    assert len(pictures.rows) == 20 and pictures.pixels.shape == (20, 64, 64, 4)
    assert [r.caption for r in pictures.rows[:10]] == list(NAMES)
    first = pictures.pixels[0]
    assert tuple(first[10, 8]) == (220, 30, 30, 255) and tuple(first[60, 60]) == (255, 255, 255, 0)
    assert len(pictures.part(held_out=True).rows) == 1 and len(pictures.part(held_out=False).rows) == 19


def test_equal_pictures_make_equal_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("a.zip", "b.zip"):
        pack(source, tmp_path / name, SETS, side=32)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert read_pack(tmp_path / "a.zip", 32).pixels.shape == (20, 32, 32, 4)


def test_bad_folders_and_files_are_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no set blob; it has fluent3d, noto"):
        pack(source, tmp_path / "x.zip", ("noto", "blob"))
    with pytest.raises(DataError, match=r"holds no captions\.jsonl"):
        pack(tmp_path, tmp_path / "x.zip")
    (tmp_path / "y.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match="is no pack of pictures"):
        read_pack(tmp_path / "y.zip", 32)


@pytest.mark.parametrize(
    ("changes", "colour", "expected"),
    [
        ({}, False, "a cat"),
        ({}, True, "an orange cat"),
        ({"colour": ""}, True, "a cat"),
        ({"caption": "red cat"}, True, "a red cat"),
        ({"article": "", "caption": "fog"}, True, "fog"),
    ],
)
def test_names_have_articles_and_colours(changes: dict[str, object], colour: bool, expected: str) -> None:
    assert named(row(**changes), colour=colour) == expected


@pytest.mark.parametrize(
    ("one", "many"), [("cat", "cats"), ("box", "boxes"), ("cherry", "cherries"), ("key", "keys"), ("fish", "fishes")]
)
def test_plurals(one: str, many: str) -> None:
    assert plural(one) == many


def test_prompts_say_the_same_in_many_ways() -> None:
    found = {prompt_for(row(), np.random.default_rng(seed)) for seed in range(200)}
    assert {"a cat", "an orange cat", "cat"} <= found and any("emoji" in text for text in found)
    assert prompt_for(row(), np.random.default_rng(3)) == prompt_for(row(), np.random.default_rng(3))


def test_a_picture_in_another_colour_says_so(pictures: Pictures) -> None:
    red = pictures.rows[0]
    assert can_recolour(red) and not can_recolour(row(colour="gray")) and not can_recolour(row(caption="red cat"))
    for seed in range(20):
        picture, text = recoloured(red, pictures.pixels[0], np.random.default_rng(seed))
        colour = text.split()[1]
        assert text.endswith(" apple") and colour != "red" and (picture[60, 60] == (255, 255, 255, 0)).all()
        r, g, b, _ = (int(value) for value in picture[10, 8])
        shown = {"green": g > max(r, b), "blue": b > max(r, g), "yellow": min(r, g) > b + 60}
        assert shown.get(colour, True)


def test_pasted_things_lie_where_the_words_say(pictures: Pictures) -> None:
    red, blue = pictures.pixels[0], pictures.pixels[11]
    rows = (pictures.rows[0], pictures.rows[11])
    for seed in range(40):
        picture, text = pair(rows, (red, blue), np.random.default_rng(seed))
        ink = picture[..., 3] > 128
        reds, blues = (np.argwhere(ink & (picture[..., band] > 128)).mean(0) for band in (0, 2))
        assert "apple" in text and "book" in text
        if " above " in text:
            assert reds[0] < blues[0]
        elif " below " in text:
            assert reds[0] > blues[0]
        else:
            assert abs(reds[1] - blues[1]) > 16


def test_as_many_are_pasted_as_are_said(pictures: Pictures) -> None:
    one = int((pictures.pixels[0][..., 3] > 128).sum())
    for seed in range(20):
        picture, text = several(pictures.rows[0], pictures.pixels[0], np.random.default_rng(seed))
        count = {"two": 2, "three": 3, "four": 4}[text.split()[0]]
        assert text.endswith("apples") and int((picture[..., 3] > 128).sum()) == pytest.approx(
            count * one / 4, rel=0.15
        )


def test_what_is_not_pasted_on_is_white(pictures: Pictures) -> None:
    canvas = paste([pictures.pixels[0]], [(0.5, 0.5)])
    assert (canvas[:32] == (255, 255, 255, 0)).all() and (canvas[..., 3] > 0).any()


def test_captions_of_held_out_pictures_come_first(pictures: Pictures, tmp_path: Path) -> None:
    captions = caption_list(pictures.rows, 10)
    assert captions[0] == "a star" and sorted(captions) == sorted(named(r) for r in pictures.rows[:10])
    assert write_evaluation(pictures, tmp_path, 10) == 1
    assert (tmp_path / "captions.txt").read_text(encoding="utf-8").splitlines() == captions
    (file,) = (tmp_path / "real").iterdir()
    with Image.open(file) as picture:
        assert file.name == "0001-noto-star.png" and picture.size == (64, 64)
    trained = np.load(tmp_path / "training.npy")
    assert trained.shape == (19, 32, 32, 3) and trained[0, 5, 4].tolist() == [220, 30, 30]
    said = (tmp_path / "combinations.txt").read_text(encoding="utf-8").splitlines()
    assert len(said) == len(list((tmp_path / "combinations").iterdir())) > 30


def test_combinations_are_of_several_things_and_one_has_another_colour(pictures: Pictures) -> None:
    made = combinations(pictures, 40)
    assert [text for _, text in made] == [text for _, text in combinations(pictures, 40)]
    assert len({text for _, text in made}) == 40
    for picture, text in made:
        assert picture.shape == (64, 64, 4) and set(text.split()) & set(HUES) - {"red"}
        assert any(f" {word} " in text for word in ("next to", "above", "below", "and")) or text.endswith("s")
