"""Chunks, weights and batches of prompts; the tokenizer has single letters, the encoder shows what it was fed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from pocketdiffusion.bundle import Bundle
from pocketdiffusion.bundle.manifest import FileEntry, Manifest, Source
from pocketdiffusion.errors import BundleCorrupt, BundleUnsupported, InvalidRequest
from pocketdiffusion.prompt.encode import (
    Chunk,
    ClipTokenizer,
    EncodedPrompts,
    RunTextEncoder,
    encode_chunks,
    encode_prompts,
    split_prompts,
)
from pocketdiffusion.tensors import AnyArray

SIZE = 8
"""Tokens of a chunk, without start and end."""


class Encoder:
    """Hidden state of a token: its id, its place, 1. Pooled: the row's ids. Keeps the rows of each call."""

    def __init__(self, *extra: str, pooled: str | None = "pooler_output") -> None:
        self.calls: list[AnyArray] = []
        self.extra, self.pooled = extra, pooled

    def __call__(self, ids: AnyArray) -> Mapping[str, AnyArray]:
        assert ids.dtype == np.int64
        self.calls.append(ids)
        place = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        hidden = np.stack([ids, place, np.ones_like(ids)], axis=-1).astype(np.float32)
        outputs = {"last_hidden_state": hidden} | {name: -hidden for name in self.extra}
        return outputs if self.pooled is None else outputs | {self.pooled: ids.astype(np.float32)}


def write_tokenizer(folder: Path, config: object = None) -> Path:
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    default = {"model_max_length": SIZE + 2}
    (folder / "tokenizer_config.json").write_text(json.dumps(default if config is None else config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ClipTokenizer:
    return ClipTokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def encode(
    tokenizer: ClipTokenizer,
    encoder: RunTextEncoder,
    prompts: list[str],
    negative_prompts: list[str] | None,
    *,
    clip_skip: int = 0,
    **options: Any,
) -> EncodedPrompts:
    split = split_prompts(tokenizer, prompts, negative_prompts, **options)
    return encode_prompts(tokenizer, encoder, split, clip_skip=clip_skip)


def chunk_texts(tokenizer: ClipTokenizer, prompt: str, *, weighting: bool = False, **options: str) -> list[str]:
    split = split_prompts(tokenizer, [prompt], None, weighting=weighting, **options)
    return [tokenizer.decode(chunk.ids) for chunk in split.positive[0]]


def test_rows_have_start_end_and_padding(tokenizer: ClipTokenizer) -> None:
    encoder = Encoder()
    encoded = encode(tokenizer, encoder, ["ab", ""], None, weighting=False)
    ids = tokenizer.encode("ab")
    rest = [tokenizer.pad] * (SIZE - 2)
    assert encoder.calls[0].tolist() == [
        [tokenizer.bos, *ids, tokenizer.eos, *rest],
        [tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.pad, *rest],
    ]
    assert encoded.positive.shape == (2, SIZE + 2, 3)
    assert encoded.positive.dtype == np.float32
    assert encoded.negative is None
    assert encoded.negative_pooled is None
    assert encoded.messages == ()


def test_padding_token_of_the_folder_is_used(tmp_path: Path) -> None:
    config = {"model_max_length": 5, "pad_token": "!", "eos_token": {"content": "<|endoftext|>"}}
    tokenizer = ClipTokenizer.load(write_tokenizer(tmp_path, config))
    encoder = Encoder()
    encode(tokenizer, encoder, ["a"], None, weighting=False)
    assert tokenizer.pad != tokenizer.eos
    assert encoder.calls[0][0].tolist()[2:] == [tokenizer.eos, tokenizer.pad, tokenizer.pad]


def test_long_prompt_is_chunked_and_joined(tokenizer: ClipTokenizer) -> None:
    text = "abcdefghijklmnopqr"  # 18 tokens
    encoded = encode(tokenizer, Encoder(), [text], [""], weighting=False)
    assert chunk_texts(tokenizer, text) == ["abcdefgh", "ijklmnop", "qr"]
    assert encoded.negative is not None
    assert encoded.positive.shape == encoded.negative.shape == (1, 3 * (SIZE + 2), 3)
    assert encoded.positive[0, :, 1].tolist() == list(range(SIZE + 2)) * 3
    starts = encoded.negative[0, :: SIZE + 2, 0]
    assert starts.tolist() == [tokenizer.bos] * 3


@pytest.mark.parametrize("count", [SIZE - 1, SIZE, SIZE + 1])
def test_chunk_boundary(tokenizer: ClipTokenizer, count: int) -> None:
    assert len(chunk_texts(tokenizer, "a" * count)) == (2 if count > SIZE else 1)


def test_full_chunk_ends_after_a_near_comma(tokenizer: ClipTokenizer) -> None:
    assert chunk_texts(tokenizer, "abcdef,ghi") == ["abcdef ,", "ghi"]
    assert chunk_texts(tokenizer, "a,bcdefghi") == ["a , bcdefg", "hi"]  # too far back
    assert chunk_texts(tokenizer, "abcdef,g,h") == ["abcdef , g", ", h"]  # the next token is a comma
    assert chunk_texts(tokenizer, "abcdefg,") == ["abcdefg ,"]


def test_break_starts_a_chunk_only_with_weighting(tokenizer: ClipTokenizer) -> None:
    assert chunk_texts(tokenizer, "a BREAK b", weighting=True) == ["a", "b"]
    assert chunk_texts(tokenizer, "a BREAK b") == ["a break b"]
    assert chunk_texts(tokenizer, "BREAK b BREAK", weighting=True) == ["", "b"]


def test_truncation_is_said_and_names_the_text(tokenizer: ClipTokenizer) -> None:
    encoded = encode(tokenizer, Encoder(), ["abcdefgh ij"], ["klmnopqr st"], weighting=False, long_prompt="truncate")
    assert encoded.positive.shape == (1, SIZE + 2, 3)
    first, second = encoded.messages
    assert first.startswith("prompt cut to 8 tokens")
    assert "'ij'" in first
    assert second.startswith("negative prompt cut")
    assert "'st'" in second


def test_truncation_ignores_commas_and_reports_equal_texts_once(tokenizer: ClipTokenizer) -> None:
    split = split_prompts(tokenizer, ["abcdef,ghi"] * 2, None, weighting=False, long_prompt="truncate")
    assert [len(prompt[0].ids) for prompt in split.positive] == [SIZE, SIZE]
    assert len(split.messages) == 1
    fitting = split_prompts(tokenizer, ["abcdefgh"], None, weighting=False, long_prompt="truncate")
    assert fitting.messages == ()


def test_weights_scale_tokens_and_keep_the_mean(tokenizer: ClipTokenizer) -> None:
    plain = encode(tokenizer, Encoder(), ["a bc d"], None, weighting=True).positive[0]
    weighted = encode(tokenizer, Encoder(), ["a (bc:2) d"], None, weighting=True).positive[0]
    weights = np.ones((SIZE + 2, 1))
    weights[2:4] = 2
    expected = plain * weights
    expected *= plain.mean() / expected.mean()
    np.testing.assert_allclose(weighted, expected, rtol=1e-6)
    assert weighted.dtype == np.float32


def test_mean_is_kept_by_the_chunk(tokenizer: ClipTokenizer) -> None:
    one = encode(tokenizer, Encoder(), ["a BREAK b"], None, weighting=True).positive[0]
    two = encode(tokenizer, Encoder(), ["a BREAK (b:3)"], None, weighting=True).positive[0]
    np.testing.assert_array_equal(one[: SIZE + 2], two[: SIZE + 2])
    assert two[SIZE + 2 :].mean() == pytest.approx(one[SIZE + 2 :].mean(), rel=1e-6)


def test_zero_mean_leaves_weighted_states_finite(tokenizer: ClipTokenizer) -> None:
    def zeros(ids: AnyArray) -> Mapping[str, AnyArray]:
        return {"last_hidden_state": np.zeros((*ids.shape, 3), np.float32)}

    encoded = encode(tokenizer, zeros, ["(a:2)"], None, weighting=True)
    assert not encoded.positive.any()


def test_without_weighting_brackets_are_text(tokenizer: ClipTokenizer) -> None:
    assert chunk_texts(tokenizer, "(a:2)") == ["( a : 2 )"]


def test_equal_rows_run_once_in_one_call(tokenizer: ClipTokenizer) -> None:
    encoder = Encoder()
    encoded = encode(tokenizer, encoder, ["a", "(a:2)", "a"], ["b", "b", "b"], weighting=True)
    assert [call.shape for call in encoder.calls] == [(2, SIZE + 2)]
    assert encoded.negative is not None
    np.testing.assert_array_equal(encoded.positive[0], encoded.positive[2])
    assert not np.array_equal(encoded.positive[0], encoded.positive[1])
    assert encoded.negative.shape == (3, SIZE + 2, 3)


def test_batch_row_equals_the_prompt_alone(tokenizer: ClipTokenizer) -> None:
    batch = encode(tokenizer, Encoder(), ["ab", "cd"], ["x", "yz"], weighting=False)
    alone = encode(tokenizer, Encoder(), ["cd"], ["yz"], weighting=False)
    assert batch.negative is not None
    assert alone.negative is not None
    np.testing.assert_array_equal(batch.positive[1], alone.positive[0])
    np.testing.assert_array_equal(batch.negative[1], alone.negative[0])


def test_pooled_is_the_first_chunks(tokenizer: ClipTokenizer) -> None:
    encoded = encode(tokenizer, Encoder(), ["abcdefghij"], ["k"], weighting=False)
    assert encoded.pooled is not None
    assert encoded.negative_pooled is not None
    assert encoded.pooled[0].tolist() == [tokenizer.bos, *tokenizer.encode("abcdefghij")[:SIZE], tokenizer.eos]
    assert encoded.negative_pooled[0, 1] == tokenizer.encode("k")[0]


def test_projected_pooled_output_comes_first_and_none_is_allowed(tokenizer: ClipTokenizer) -> None:
    def both(ids: AnyArray) -> Mapping[str, AnyArray]:
        outputs = dict(Encoder()(ids))
        return outputs | {"text_embeds": -outputs["pooler_output"]}

    assert encode(tokenizer, Encoder(pooled=None), ["a"], None, weighting=False).pooled is None
    projected = encode(tokenizer, both, ["a"], None, weighting=False).pooled
    assert projected is not None
    assert projected[0, 0] == -tokenizer.bos


def test_clip_skip_takes_its_own_output(tokenizer: ClipTokenizer) -> None:
    encoder = Encoder("clip_skip_1", "clip_skip_2")
    last = encode(tokenizer, encoder, ["a"], None, weighting=False).positive
    skipped = encode(tokenizer, encoder, ["a"], None, weighting=False, clip_skip=2).positive
    np.testing.assert_array_equal(skipped, -last)


def test_missing_outputs_list_what_there_is(tokenizer: ClipTokenizer) -> None:
    with pytest.raises(BundleUnsupported, match=r"clip_skip=3 .* offers clip_skip 0, 1;"):
        encode(tokenizer, Encoder("clip_skip_1"), ["a"], None, weighting=False, clip_skip=3)
    with pytest.raises(BundleUnsupported, match="no output 'penultimate', only last_hidden_state, pooler_output"):
        encode_chunks(tokenizer, Encoder(), [[Chunk()]], "penultimate")


@pytest.mark.parametrize(
    ("parameter", "options"),
    [
        ("clip_skip", {"clip_skip": -1}),
        ("long_prompt", {"long_prompt": "cut"}),
        ("prompt", {"prompts": []}),
        ("negative_prompt", {"negative_prompts": ["a", "b"]}),
    ],
)
def test_parameters_that_cannot_be_served(tokenizer: ClipTokenizer, parameter: str, options: dict[str, object]) -> None:
    arguments = {"prompts": ["a"], "negative_prompts": None, "weighting": False} | options
    with pytest.raises(InvalidRequest) as caught:
        encode(tokenizer, Encoder(), **arguments)  # type: ignore[arg-type]
    assert caught.value.parameter == parameter


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\ud83d\ude00"])
def test_surrogates_do_not_crash(tokenizer: ClipTokenizer, text: str) -> None:
    replaced = {"\ud800": "\ufffd", "a\udfffb": "a\ufffdb", "\ud83d\ude00": "\U0001f600"}[text]
    assert tokenizer.encode(text) == tokenizer.encode(replaced)


def test_given_length_wins_over_the_folders(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, {})
    assert ClipTokenizer.load(tmp_path, 24).length == 24
    with pytest.raises(BundleCorrupt, match=r"length \(model_max_length\) is None"):
        ClipTokenizer.load(tmp_path)
    with pytest.raises(BundleCorrupt, match=r"length \(model_max_length\) is 2"):
        ClipTokenizer.load(tmp_path, 2)


def test_stored_padding_and_truncation_are_off(tmp_path: Path, tokenizer: ClipTokenizer) -> None:
    from tokenizers import Tokenizer

    stored = Tokenizer.from_str(tokenizer._tokenizer.to_str())
    stored.enable_truncation(4)
    stored.enable_padding(length=20)
    write_tokenizer(tmp_path)
    stored.save(str(tmp_path / "tokenizer.json"))
    loaded = ClipTokenizer.load(tmp_path)
    assert loaded.encode("abcdefgh") == tokenizer.encode("abcdefgh")


def bundle_of(folder: Path, *names: str) -> Bundle:
    numbers: Any = SimpleNamespace(text_length=24)  # all that a tokenizer needs of the model's numbers
    files = tuple(FileEntry(f"tokenizer/{name}", 0, "0" * 64) for name in names)
    manifest = Manifest("model", "", "sd", (), "", Source("", ""), numbers, {}, files)
    return Bundle(folder, manifest, "")


def test_bundle_gives_the_length_and_only_listed_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer")
    names = ("vocab.json", "merges.txt", "tokenizer_config.json")
    assert ClipTokenizer.from_bundle(bundle_of(tmp_path, *names)).length == 24
    with pytest.raises(BundleUnsupported, match=r"tokenizer_config\.json"):
        ClipTokenizer.from_bundle(bundle_of(tmp_path, *names[:2]))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("vocab.json", "{"),
        ("vocab.json", "[]"),
        ("vocab.json", None),
        ("merges.txt", None),
        ("merges.txt", "#version: 0.2\nzz yy\n"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": 1}'),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", '{"model_max_length": 1e30}'),
        ("tokenizer_config.json", '{"model_max_length": true}'),
        ("tokenizer_config.json", '{"model_max_length": 2}'),
        ("tokenizer_config.json", '{"model_max_length": 9, "bos_token": "<absent>"}'),
        ("tokenizer_config.json", '{"model_max_length": 9, "bos_token": 3}'),
        ("tokenizer_config.json", '{"model_max_length": 9, "eos_token": {"content": 3}}'),
        ("tokenizer_config.json", '{"model_max_length": 9, "added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", '{"model_max_length": 9, "added_tokens_decoder": {"999": {"content": "<new>"}}}'),
        ("special_tokens_map.json", '{"pad_token": "<absent>"}'),
    ],
)
def test_malformed_folders_are_refused(tmp_path: Path, file: str, content: str | None) -> None:
    write_tokenizer(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(BundleCorrupt) as caught:
        ClipTokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_importing_the_module_does_not_load_tokenizers() -> None:
    code = "import sys, pocketdiffusion.prompt; sys.exit('tokenizers' in sys.modules)"
    paths = f"import sys; sys.path[:0] = {sys.path!r}; "
    assert subprocess.run([sys.executable, "-c", paths + code], check=False, timeout=60).returncode == 0
