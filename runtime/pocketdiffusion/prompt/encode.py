"""Prompts to text-encoder outputs: weights, prompts longer than the encoder, clip skip, batches.

A long prompt is encoded in chunks of `length - 2` tokens, each between its own start and end, and the hidden states are
joined along the token axis. A chunk that is full ends after its last comma where one is near. A weight multiplies the
hidden states of its tokens; the chunk's mean is then restored, as A1111's "original" emphasis does.

A family calls `split_prompts` once, before any graph is needed, and then `encode_prompts`; one with two encoders calls
`encode_chunks` with each tokenizer and encoder instead, and joins the hidden states along the last axis. Limits: no
prompt editing, no `AND`; the pooled output is the first chunk's, and weights do not change it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pocketdiffusion.errors import BundleUnsupported, InvalidRequest
from pocketdiffusion.prompt.syntax import Fragment, parse_weights
from pocketdiffusion.prompt.tokenizer import ClipTokenizer
from pocketdiffusion.request import LONG_PROMPT, one_of
from pocketdiffusion.tensors import AnyArray, Array

__all__ = [
    "Chunk",
    "ClipTokenizer",
    "EncodedPrompts",
    "RunTextEncoder",
    "SplitPrompts",
    "encode_chunks",
    "encode_prompts",
    "hidden_name",
    "split_prompts",
    "token_row",
]

RunTextEncoder = Callable[[NDArray[np.int64]], Mapping[str, AnyArray]]
"""Ids (n, length) -> all outputs of the graph by name, the first axis of each being n. Any n >= 1."""

_POOLED = ("text_embeds", "pooler_output")
_COMMA_BACKTRACK = 20
_SHOWN = 200
"""Characters of a cut text that a message shows."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Ids of one chunk, without start, end and padding, and a weight for each."""

    ids: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class SplitPrompts:
    """The chunks of each prompt, the same number for all: short prompts are filled up with empty chunks."""

    positive: tuple[tuple[Chunk, ...], ...]
    negative: tuple[tuple[Chunk, ...], ...] | None
    messages: tuple[str, ...]
    """What was cut off, one sentence for each text."""

    @property
    def rows(self) -> tuple[tuple[Chunk, ...], ...]:
        """The prompts, then the negative ones."""
        return self.positive + (self.negative or ())

    @property
    def chunks(self) -> int:
        """Of each prompt: how often it fills a text encoder."""
        return len(self.positive[0])


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    """Text-encoder outputs, one row per prompt."""

    positive: Array
    """float32 (n, chunks * length, dim)."""
    negative: Array | None
    """Like `positive`; None when no negative prompts were given."""
    pooled: Array | None
    """float32 (n, dim) of each first chunk; None when the graph has no pooled output."""
    negative_pooled: Array | None
    messages: tuple[str, ...]
    """What was cut off, one sentence for each text; people should see them."""


def encode_prompts(
    tokenizer: ClipTokenizer, run_text_encoder: RunTextEncoder, split: SplitPrompts, *, clip_skip: int = 0
) -> EncodedPrompts:
    """Encode prompts with one text encoder, which is run once, on the distinct rows.

    `clip_skip` is Diffusers': 0 is the last layer, 1 leaves out one layer (A1111 counts from 1). Raises InvalidRequest
    for a negative one, BundleUnsupported when the graph lacks the output.
    """
    hidden, pooled = encode_chunks(tokenizer, run_text_encoder, split.rows, hidden_name(clip_skip))
    count = len(split.positive)
    has_negative = split.negative is not None
    return EncodedPrompts(
        positive=hidden[:count],
        negative=hidden[count:] if has_negative else None,
        pooled=None if pooled is None else pooled[:count],
        negative_pooled=pooled[count:] if pooled is not None and has_negative else None,
        messages=split.messages,
    )


def hidden_name(clip_skip: int) -> str:
    """The graph output that holds the final-layer-normed hidden state with the last `clip_skip` layers left out."""
    if clip_skip < 0:
        raise InvalidRequest("clip_skip", f"clip_skip is {clip_skip}; 0 (the last layer) or more is allowed")
    return "last_hidden_state" if clip_skip == 0 else f"clip_skip_{clip_skip}"


def split_prompts(
    tokenizer: ClipTokenizer,
    prompts: Sequence[str],
    negative_prompts: Sequence[str] | None,
    *,
    weighting: bool,
    long_prompt: str = "chunk",
) -> SplitPrompts:
    """Tokenize prompts into chunks.

    `weighting` reads the notation of `prompt.syntax`; without it brackets are text. `long_prompt` is "chunk", which
    keeps everything, or "truncate", which keeps the first chunk, as Diffusers does, and says in `messages` what was
    left out. Raises InvalidRequest for parameters that do not fit together.
    """
    one_of("long_prompt", long_prompt, LONG_PROMPT)
    if not prompts:
        raise InvalidRequest("prompt", "no prompt was given; an empty text is allowed, an empty list is not")
    if negative_prompts is not None and len(negative_prompts) != len(prompts):
        raise InvalidRequest(
            "negative_prompt",
            f"{len(negative_prompts)} negative prompts were given for {len(prompts)} prompts; give one for each prompt",
        )
    roles = [("prompt", text) for text in prompts] + [("negative prompt", text) for text in negative_prompts or ()]
    messages: dict[str, None] = {}  # a set that keeps its order: each text is reported once
    rows: list[list[Chunk]] = []
    for role, text in roles:
        chunks = _chunks(tokenizer, parse_weights(text) if weighting else [Fragment(text)], long_prompt)
        if long_prompt == "truncate" and len(chunks) > 1:
            messages[_cut_message(tokenizer, role, chunks)] = None
            del chunks[1:]
        rows.append(chunks)
    longest = max(map(len, rows))
    filled = tuple(tuple(row) + (Chunk(),) * (longest - len(row)) for row in rows)
    count = len(prompts)
    return SplitPrompts(filled[:count], None if negative_prompts is None else filled[count:], tuple(messages))


def encode_chunks(
    tokenizer: ClipTokenizer, run_text_encoder: RunTextEncoder, prompts: Sequence[Sequence[Chunk]], output: str
) -> tuple[Array, Array | None]:
    """Hidden states (n, chunks * length, dim) of the graph output `output`, and pooled (n, dim) of each first chunk.

    All prompts have the same number of chunks. Rows of equal ids run once. Raises BundleUnsupported when the graph has
    no output of that name.
    """
    places: dict[tuple[int, ...], int] = {}
    for chunk in (chunk for prompt in prompts for chunk in prompt):
        places.setdefault(chunk.ids, len(places))
    outputs = run_text_encoder(np.array([token_row(tokenizer, ids) for ids in places], dtype=np.int64))
    if output not in outputs:
        raise BundleUnsupported(_missing_output(output, outputs))
    hidden = np.asarray(outputs[output], dtype=np.float32)
    joined = [np.concatenate([_weighted(hidden[places[chunk.ids]], chunk) for chunk in prompt]) for prompt in prompts]
    name = next((name for name in _POOLED if name in outputs), None)
    if name is None:
        return np.stack(joined), None
    firsts = [places[prompt[0].ids] for prompt in prompts]
    return np.stack(joined), np.asarray(outputs[name], dtype=np.float32)[firsts]


def _chunks(tokenizer: ClipTokenizer, fragments: Sequence[Fragment], long_prompt: str) -> list[Chunk]:
    """At least one chunk. One that a closing BREAK leaves empty is dropped, other empty ones stay, as in A1111."""
    sections: list[list[tuple[int, float]]] = [[]]
    for fragment in fragments:
        if fragment.starts_chunk:
            sections.append([])
        sections[-1].extend((token, fragment.weight) for token in tokenizer.encode(fragment.text))
    if len(sections) > 1 and not sections[-1]:
        del sections[-1]
    size = tokenizer.length - 2
    comma = tokenizer.encode(",") if long_prompt == "chunk" else []
    chunks: list[Chunk] = []
    for section in sections:
        start = 0
        while len(section) - start > size:
            end = _chunk_end([token for token, _ in section[start : start + size + 1]], comma)
            chunks.append(_chunk(section[start : start + end]))
            start += end
        chunks.append(_chunk(section[start:]))
    return chunks


def _chunk(pairs: Sequence[tuple[int, float]]) -> Chunk:
    return Chunk(tuple(token for token, _ in pairs), tuple(weight for _, weight in pairs))


def _chunk_end(ids: Sequence[int], comma: Sequence[int]) -> int:
    """Where to end a full chunk; `ids` are its tokens and the next one.

    After the last comma of the final 20 tokens (A1111's default), or a third of the chunk in encoders that are shorter
    than CLIP's 77; else, and where the next token is itself a comma, at the end.
    """
    size = len(ids) - 1
    if len(comma) != 1 or ids[size] == comma[0]:
        return size
    near = range(size - 1, size - 1 - min(_COMMA_BACKTRACK, size // 3), -1)
    return next((place + 1 for place in near if ids[place] == comma[0]), size)


def token_row(tokenizer: ClipTokenizer, ids: Sequence[int]) -> list[int]:
    """Start, ids, end, padding: `length` ids."""
    row = [tokenizer.bos, *ids, tokenizer.eos]
    return row + [tokenizer.pad] * (tokenizer.length - len(row))


def _weighted(hidden: Array, chunk: Chunk) -> Array:
    """Hidden states (length, dim) with each token's weight applied and the mean of all restored."""
    if all(weight == 1.0 for weight in chunk.weights):
        return hidden
    weights = np.ones((len(hidden), 1), dtype=np.float32)
    weights[1 : 1 + len(chunk.weights), 0] = chunk.weights
    scaled = hidden * weights
    before, after = hidden.mean(dtype=np.float64), scaled.mean(dtype=np.float64)
    if after == 0.0:
        return scaled  # no factor can restore the mean
    return scaled * np.float32(before / after)


def _cut_message(tokenizer: ClipTokenizer, role: str, chunks: Sequence[Chunk]) -> str:
    cut = tokenizer.decode(token for chunk in chunks[1:] for token in chunk.ids)
    shown = cut if len(cut) <= _SHOWN else cut[:_SHOWN] + "…"
    return (
        f"{role} cut to {len(chunks[0].ids)} tokens (long_prompt='truncate'), left out: {shown!r}; "
        "long_prompt='chunk' keeps all of it"
    )


def _missing_output(output: str, outputs: Mapping[str, AnyArray]) -> str:
    prefix = "clip_skip_"
    if not output.startswith(prefix):
        return f"the text encoder has no output '{output}', only {', '.join(sorted(outputs))}; export the model again"
    offered = sorted(int(name[len(prefix) :]) for name in outputs if name.startswith(prefix))
    allowed = ", ".join(map(str, [0, *offered]))
    return f"clip_skip={output[len(prefix) :]} was asked for; this bundle offers clip_skip {allowed}; use one of these"
