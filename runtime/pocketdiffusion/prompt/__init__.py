"""Prompts: tokens, weights, chunks, and the text encoder's states."""

from pocketdiffusion.prompt.encode import (
    EncodedPrompts,
    SplitPrompts,
    encode_chunks,
    encode_prompts,
    hidden_name,
    split_prompts,
    token_row,
)
from pocketdiffusion.prompt.syntax import Fragment, parse_weights
from pocketdiffusion.prompt.tokenizer import ClipTokenizer

__all__ = [
    "ClipTokenizer",
    "EncodedPrompts",
    "Fragment",
    "SplitPrompts",
    "encode_chunks",
    "encode_prompts",
    "hidden_name",
    "parse_weights",
    "split_prompts",
    "token_row",
]
