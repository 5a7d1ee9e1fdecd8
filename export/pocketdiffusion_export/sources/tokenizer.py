"""CLIP's tokenizer files for sources that bring none: the vocabulary follows from the merges.

The 49,408 entries are 256 byte characters, the same with `</w>`, one for each of 48,894 merges, and two special ones.
"""

from __future__ import annotations

import gzip
import json
from importlib import resources
from pathlib import Path

LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(folder: Path, pad: str) -> None:
    """vocab.json, merges.txt and tokenizer_config.json; `pad` is the token that fills a prompt up to 77."""
    data = resources.files("pocketdiffusion_export") / "data/clip/merges_48894.txt.gz"
    merges = gzip.decompress(data.read_bytes()).decode("utf-8").splitlines()[1:]
    letters = _byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    vocab = {word: index for index, word in enumerate([*words, START, END])}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LENGTH,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad,
    }
    folder.mkdir(parents=True)
    _write(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False))
    _write(folder / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=2))


def _byte_letters() -> list[str]:
    """The letter of each byte: itself where it is printable, then the letters from 256 on for the others."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8", newline="\n")
