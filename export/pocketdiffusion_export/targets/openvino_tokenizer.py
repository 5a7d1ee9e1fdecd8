"""A bundle's CLIP tokenizers as OpenVINO IR too, which openvino_genai wants. Our runtime never reads it.

It needs the optional package openvino_tokenizers. Prompts are cut to the encoder's length, keeping the end token:
openvino_genai copies the ids into the encoder's input without looking at its length.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import openvino

FILE = "openvino_tokenizer.xml"
PACKAGE = "openvino_tokenizers"


def write_tokenizers(folder: Path) -> tuple[str, ...]:
    """Convert each tokenizer of the bundle in `folder`, beside itself. Returns what was left out, for people."""
    if importlib.util.find_spec(PACKAGE) is None:
        return (f"no {FILE}, without which openvino_genai can't load it; pip install {PACKAGE} and export again",)
    for tokenizer in sorted(path for path in folder.glob("tokenizer*") if path.is_dir()):
        _write(tokenizer)
    return ()


def _write(folder: Path) -> None:
    from transformers import CLIPTokenizerFast

    tokenizer = CLIPTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    model = importlib.import_module(PACKAGE).convert_tokenizer(tokenizer, truncation=True)
    _number(model)
    openvino.save_model(model, folder / FILE)


def _number(model: Any) -> None:
    """Name nodes by their place: the converter counts those of the whole process."""
    model.inputs[0].get_tensor().set_names({"text"})
    for index, node in enumerate(model.get_ordered_ops()):
        node.friendly_name = f"{node.get_type_name()}_{index}"
