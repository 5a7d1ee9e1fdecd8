"""Encoded prompts against Diffusers' `StableDiffusionPipeline.encode_prompt`, with a small random text encoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from pocketdiffusion.prompt import ClipTokenizer, encode_prompts, split_prompts
from pocketdiffusion.tensors import AnyArray

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.torch

LENGTH, LAYERS = 24, 3
PROMPTS = ["a cat", "dogs, (hat:1.2)", ""]
NEGATIVES = ["", "blurry", "bad art!"]
LONG = "a very long prompt, that ends late"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of single bytes, which both sides read."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": LENGTH}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=514,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=512,
        eos_token_id=513,
    )
    return diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=transformers.CLIPTextModel(config).eval(),
        tokenizer=transformers.CLIPTokenizerFast.from_pretrained(folder),
        unet=None,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def run_text_encoder(model: Any, ids: AnyArray) -> Mapping[str, AnyArray]:
    """The outputs that an exported text encoder has."""
    with torch.no_grad():
        outputs = model(torch.from_numpy(ids), output_hidden_states=True)
        named = {"last_hidden_state": outputs.last_hidden_state, "pooler_output": outputs.pooler_output}
        for skip in range(1, LAYERS):
            named[f"clip_skip_{skip}"] = model.text_model.final_layer_norm(outputs.hidden_states[-(skip + 1)])
    return {name: value.numpy() for name, value in named.items()}


def encode(
    reference: Any, folder: Path, prompts: list[str], negatives: list[str], *, clip_skip: int = 0, **options: Any
) -> Any:
    def run(ids: AnyArray) -> Mapping[str, AnyArray]:
        return run_text_encoder(reference.text_encoder, ids)

    tokenizer = ClipTokenizer.load(folder)
    return encode_prompts(tokenizer, run, split_prompts(tokenizer, prompts, negatives, **options), clip_skip=clip_skip)


def diffusers_states(reference: Any, prompts: list[str], negatives: list[str], skip: int) -> list[AnyArray]:
    with torch.no_grad():
        both = reference.encode_prompt(
            prompts, "cpu", 1, True, negative_prompt=negatives, clip_skip=None if skip == 0 else skip
        )
    return [states.numpy() for states in both]


@pytest.mark.parametrize("skip", range(LAYERS))
def test_short_prompts_equal_diffusers(reference: Any, folder: Path, skip: int) -> None:
    encoded = encode(reference, folder, PROMPTS, NEGATIVES, weighting=False, clip_skip=skip)
    # Diffusers applies clip_skip to the prompt only, and leaves the negative prompt at the last layer.
    positive, negative = diffusers_states(reference, PROMPTS, NEGATIVES, skip)
    np.testing.assert_allclose(encoded.positive, positive, atol=1e-6)
    if skip == 0:
        np.testing.assert_allclose(encoded.negative, negative, atol=1e-6)


def test_truncated_prompt_equals_diffusers(reference: Any, folder: Path) -> None:
    encoded = encode(reference, folder, [LONG], [""], weighting=False, long_prompt="truncate")
    positive, _ = diffusers_states(reference, [LONG], [""], 0)
    np.testing.assert_allclose(encoded.positive, positive, atol=1e-6)
    assert len(encoded.messages) == 1


def test_chunks_equal_their_texts_encoded_alone(reference: Any, folder: Path) -> None:
    encoded = encode(reference, folder, [LONG], [""], weighting=False)
    first, second = "a very long prompt,", "that ends late"
    expected, empty = diffusers_states(reference, [first, second], ["", ""], 0)
    np.testing.assert_allclose(encoded.positive[0], np.concatenate(expected), atol=1e-6)
    np.testing.assert_allclose(encoded.negative[0], np.concatenate(empty), atol=1e-6)


def test_pooled_equals_transformers(reference: Any, folder: Path) -> None:
    encoded = encode(reference, folder, PROMPTS, NEGATIVES, weighting=False)
    ids = reference.tokenizer(PROMPTS, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = reference.text_encoder(ids).pooler_output.numpy()
    np.testing.assert_allclose(encoded.pooled, expected, atol=1e-6)
