"""Ids against openai/CLIP's own (golden files) and against transformers' CLIPTokenizerFast."""

from __future__ import annotations

import gzip
import html
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketdiffusion.prompt.tokenizer import ClipTokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "clip"
STICKER = Path(__file__).parents[2] / "models" / "sticker" / "bundle" / "tokenizer"
VECTORS = json.loads((GOLDEN / "vectors.json").read_text(encoding="utf-8"))["vectors"]
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def token(content: str, *, normalized: bool = True) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": normalized}


def special(pad: str, **flags: bool) -> dict[str, Any]:
    return {
        "bos_token": token(BOS, **flags),
        "eos_token": token(EOS, **flags),
        "unk_token": token(EOS, **flags),
        "pad_token": pad,
    }


def decoder(normalized: bool, *contents: tuple[int, str]) -> dict[str, Any]:
    added = {str(index): token(content, normalized=normalized) | {"special": True} for index, content in contents}
    return {"added_tokens_decoder": added}


ENDS = ((49406, BOS), (49407, EOS))
NAMES = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS}
CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "no names": ({}, None),
    "names": (NAMES | {"pad_token": EOS}, None),
    "Stable Diffusion 1.5": (special(EOS), special(EOS)),
    "Stable Diffusion 2, map pads with !": (special(EOS), special("!")),
    "Stable Diffusion XL, second": (NAMES | {"pad_token": "!"} | decoder(True, (0, "!"), *ENDS), None),
    "exact special tokens": (NAMES | {"pad_token": EOS} | decoder(False, *ENDS), None),
}
"""Contents of tokenizer_config.json and special_tokens_map.json, in the forms that published models have."""


def write_folder(folder: Path, config: dict[str, Any], special_map: dict[str, Any] | None) -> Path:
    """A folder with CLIP's vocabulary: 256 bytes as characters, the same ending a word, merges, start and end."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(byte) for byte in visible] + [chr(256 + index) for index in range(256 - len(visible))]
    merges = gzip.decompress((GOLDEN / "merges_48894.txt.gz").read_bytes()).decode("utf-8")
    merged = [line.replace(" ", "") for line in merges.splitlines()[1:]]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *merged, BOS, EOS]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77} | config), encoding="utf-8")
    if special_map is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(special_map), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipTokenizer:
    return ClipTokenizer.load(write_folder(tmp_path_factory.mktemp("clip") / "tokenizer", {}, None))


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: ascii(vector["text"])[:30])
def test_openai_clip_vectors(clip: ClipTokenizer, vector: dict[str, Any]) -> None:
    text = html.unescape(vector["text"])  # openai/CLIP does so itself; transformers and this package do not
    assert clip.encode(text) == vector["ids"]
    assert (clip.bos, clip.eos, clip.pad, clip.length) == (49406, 49407, 49407, 77)


def test_decoding_gives_the_words_back(clip: ClipTokenizer) -> None:
    assert clip.decode(clip.encode("A smiling CAT, café 😀")) == "a smiling cat , café 😀"


Pair = tuple[ClipTokenizer, Any]

FIXED = [
    "",
    "   ",
    "hello! !b !!!",
    f"x {BOS}y{EOS} z",
    "X<|ENDOFTEXT|>y <|StartOfText|>",
    "a\x00b \x1f\x85\u2028\u00ad",
    "\ufffd e\u0301 \u0130 ΑΣ ﬁ",
    "שלום עולם مرحبا \u202eabc",
    "日本の猫 한국어 😀 👩‍👩‍👧 🏳️‍🌈",
    "it's IT'S we'll don’t 1234 ½ ²",
    "(masterpiece:1.2), [low quality]",
    "word " * 3000,
]


def pair(folder: Path) -> Pair:
    transformers = pytest.importorskip("transformers")
    reference = transformers.CLIPTokenizerFast.from_pretrained(folder)
    reference.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return ClipTokenizer.load(folder), reference


def assert_equal_ids(pair: Pair, text: str) -> None:
    ours, reference = pair
    assert ours.encode(text) == reference(text, add_special_tokens=False, truncation=False).input_ids


@pytest.fixture(scope="module", params=[*CONFIGS, "tokenizer.json", "sticker"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Our tokenizer and transformers' of one folder."""
    if request.param == "sticker":
        if not STICKER.is_dir():
            pytest.skip("the embedded model is not there")
        return pair(STICKER)
    folder = tmp_path_factory.mktemp("both") / "tokenizer"
    if request.param == "tokenizer.json":
        _, reference = pair(write_folder(folder, *CONFIGS["Stable Diffusion 2, map pads with !"]))
        folder = folder.parent / "serialized"
        reference.save_pretrained(folder)
        return pair(folder)
    return pair(write_folder(folder, *CONFIGS[request.param]))


@pytest.mark.torch
def test_special_tokens_equal_transformers(both: Pair) -> None:
    ours, reference = both
    theirs = (reference.bos_token_id, reference.eos_token_id, reference.pad_token_id, reference.model_max_length)
    assert (ours.bos, ours.eos, ours.pad, ours.length) == theirs


@pytest.mark.torch
@pytest.mark.parametrize("text", FIXED, ids=lambda text: ascii(text)[:20])
def test_chosen_texts_equal_transformers(both: Pair, text: str) -> None:
    assert_equal_ids(both, text)


@pytest.mark.torch
@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=200)
    | st.text(alphabet="aA bß'slltred!?,.😀\n\t\u3000\u0301İ1½<|>", max_size=60)
    | st.lists(st.sampled_from([BOS, EOS, "!", "a", " ", "<|EndOfText|>"]), max_size=8).map("".join)
)
def test_any_text_equals_transformers(both: Pair, text: str) -> None:
    assert_equal_ids(both, text)
