"""CLIP's byte-pair tokenizer, read from a bundle's tokenizer folder.

Ids equal those of transformers' ``CLIPTokenizerFast`` on the same folder. Not done, as there: openai/CLIP's repair of
mis-decoded text (ftfy) and of HTML entities, so ``&amp;`` stays five characters.

The vocabulary comes from ``tokenizer.json``, or from ``vocab.json`` with ``merges.txt``; special tokens and the length
from ``tokenizer_config.json`` and ``special_tokens_map.json``. The `tokenizers` library is imported on use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketdiffusion.bundle.strict_json import load_json
from pocketdiffusion.errors import BundleCorrupt

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

    from pocketdiffusion.bundle import Bundle

_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
_DEFAULTS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
"""What CLIP's tokenizer uses where the folder's files name no token (transformers' defaults too)."""

_WORD_END = "</w>"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""Contractions, words, single digits, runs of anything else: how CLIP (arXiv:2103.00020) splits before merging."""

_MAX_LENGTH = 65536
"""Above it `model_max_length` is a placeholder: transformers writes 1e30 for "not known"."""


class ClipTokenizer:
    """Text to ids. `length` counts the start and the end token."""

    def __init__(self, tokenizer: Tokenizer, *, bos: int, eos: int, pad: int, length: int) -> None:
        self._tokenizer = tokenizer
        self.bos, self.eos, self.pad, self.length = bos, eos, pad, length

    @classmethod
    def from_bundle(cls, bundle: Bundle, folder: str = "tokenizer") -> ClipTokenizer:
        """The tokenizer of an opened bundle, for the length that its text encoder takes.

        Raises what `load` does, and BundleUnsupported for a tokenizer file that the manifest does not list.
        """
        for name in _FILES:
            if (bundle.path / folder / name).exists():
                bundle.file(f"{folder}/{name}")
        return cls.load(bundle.path / folder, bundle.manifest.numbers.text_length)

    @classmethod
    def load(cls, folder: Path, length: int | None = None) -> ClipTokenizer:
        """Read a tokenizer folder.

        `length` is the number of tokens that the text encoder takes; None takes ``model_max_length`` from
        ``tokenizer_config.json``. Raises BundleCorrupt when a file is missing or malformed, when a special token is not
        in the vocabulary, or when no usable length is known.
        """
        config = _config(folder)
        special = {name: _content(config.get(name) or default, folder) for name, default in _DEFAULTS.items()}
        tokenizer = _vocabulary(folder, special["unk_token"])
        _add_tokens(tokenizer, config, special, folder)
        ids = {name: tokenizer.token_to_id(content) for name, content in special.items()}
        return cls(
            tokenizer,
            bos=ids["bos_token"],
            eos=ids["eos_token"],
            pad=ids["pad_token"],
            length=_length(config.get("model_max_length") if length is None else length, folder),
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without start and end, of any number. Lone surrogates count as U+FFFD."""
        with _library("tokenizer", "fails on a text"):
            return list(self._tokenizer.encode(_without_surrogates(text), add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text that ids stand for, lower-cased and with one space after each word: for messages."""
        from tokenizers.decoders import ByteLevel

        tokens = [self._tokenizer.id_to_token(token) or "" for token in ids]
        return str(ByteLevel().decode(tokens)).replace(_WORD_END, " ").strip()


@contextmanager
def _library(file: Path | str, problem: str) -> Iterator[None]:
    """What the tokenizers library raises as BundleCorrupt: it has no class of its own, and its panics no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise BundleCorrupt(file, f"{problem}: {' '.join(str(error).split())}") from error


def _without_surrogates(text: str) -> str:
    """Surrogate pairs joined, lone ones replaced: UTF-8, which the tokenizer takes, has neither."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _vocabulary(folder: Path, unknown: str) -> Tokenizer:
    """The bare tokenizer, neither cutting nor padding."""
    from tokenizers import Tokenizer

    serialized = folder / "tokenizer.json"
    if not serialized.is_file():
        return _from_merges(folder, unknown)
    with _library(serialized, "not a tokenizer"):
        tokenizer = Tokenizer.from_file(str(serialized))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _from_merges(folder: Path, unknown: str) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    for file in (vocab, merges):
        if not file.is_file():
            raise BundleCorrupt(file, "missing; a tokenizer needs tokenizer.json, or vocab.json and merges.txt")
    with _library(vocab, "not a vocabulary that fits merges.txt"):
        model = models.BPE.from_file(str(vocab), str(merges), unk_token=unknown, end_of_word_suffix=_WORD_END)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, config: Mapping[str, Any], special: Mapping[str, str], folder: Path) -> None:
    """Make special tokens match as a whole where they stand in a text, as transformers does."""
    for name, content in special.items():
        if tokenizer.token_to_id(content) is None:
            raise BundleCorrupt(folder, f"{name} {content!r} is not in the vocabulary")
    listed = config.get("added_tokens_decoder", {})
    if not isinstance(listed, dict):
        raise BundleCorrupt(folder / "tokenizer_config.json", "added_tokens_decoder is not an object")
    tokens = [_added_token(entry, folder) for entry in listed.values()]
    tokens += [_added_token(config.get(name) or content, folder) for name, content in special.items()]
    size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(tokens)  # one that is there already keeps its flags
    if tokenizer.get_vocab_size() != size:
        raise BundleCorrupt(folder, "an added token is not in the vocabulary, so the text encoder has no row for it")


def _added_token(entry: str | Mapping[str, Any], folder: Path) -> AddedToken:
    from tokenizers import AddedToken

    flags = entry if isinstance(entry, dict) else {}
    return AddedToken(
        _content(entry, folder),
        single_word=bool(flags.get("single_word", False)),
        lstrip=bool(flags.get("lstrip", False)),
        rstrip=bool(flags.get("rstrip", False)),
        normalized=bool(flags.get("normalized", True)),
        special=True,
    )


def _content(entry: object, folder: Path) -> str:
    """The text of a special token, which configs hold as a string or as an object."""
    content = entry.get("content") if isinstance(entry, dict) else entry
    if not isinstance(content, str) or not content:
        raise BundleCorrupt(folder, f"special token {entry!r} is neither text nor an object with a text 'content'")
    return content


def _config(folder: Path) -> Mapping[str, Any]:
    """Both config files as one; as in transformers, a config without added tokens yields to the special tokens map."""
    config = _read_object(folder / "tokenizer_config.json")
    special = _read_object(folder / "special_tokens_map.json")
    return {**special, **config} if "added_tokens_decoder" in config else {**config, **special}


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object; {} when there is no such file."""
    if not file.is_file():
        return {}
    value = load_json(file.read_bytes(), file, config=True)
    if not isinstance(value, dict):
        raise BundleCorrupt(file, f"holds a JSON {type(value).__name__}, not an object")
    return value


def _length(length: object, folder: Path) -> int:
    if not isinstance(length, int) or not 3 <= length <= _MAX_LENGTH:
        raise BundleCorrupt(
            folder, f"the text length (model_max_length) is {length!r}; a number from 3 to {_MAX_LENGTH} is needed"
        )
    return length
