"""The tokenizer: byte-pair encoding (arXiv:1508.07909) in CLIP's files, trained on the prompts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from sticker_train.pack import Row
from sticker_train.words import COLOURS, STYLES, named, plural

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""CLIP's: contractions, words, single digits, runs of anything else."""
_CONNECTING = "next to above below and one two three four"


def texts(rows: Iterable[Row]) -> list[str]:
    """All that can be said about the pictures, once each."""
    found = {_CONNECTING, *COLOURS, *(word for words in STYLES.values() for word in words)}
    for row in rows:
        found |= {named(row), named(row, colour=True), plural(row.caption), *row.keywords}
    return sorted(found)


def train_tokenizer(rows: Iterable[Row], folder: Path, words: int, length: int) -> int:
    """Write the tokenizer of at most `words` tokens; returns how many it has.

    Every byte is in it alone and as a word's end, so that no text is unknown to it.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    basic = [START, END, *letters, *(letter + WORD_END for letter in letters)]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=words, end_of_word_suffix=WORD_END, initial_alphabet=letters, show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(texts(rows), trainer)
    pairs = [_pair(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]][: words - len(basic)]
    merged = dict.fromkeys(first.removesuffix(WORD_END) + second for first, second in pairs)
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*basic, *merged]))}
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    _write(folder / "merges.txt", "\n".join(["#version: 0.2", *(" ".join(pair) for pair in pairs)]))
    _write(folder / "tokenizer_config.json", json.dumps(_config(length), indent=2))
    return len(vocabulary)


def _pair(merge: str | list[str]) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _config(length: int) -> dict[str, str | int]:
    return {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }


def _write(file: Path, text: str) -> None:
    file.write_text(text + "\n", encoding="utf-8", newline="\n")
